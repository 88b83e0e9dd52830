"""The PPO benchmark: its arithmetic, its refusals, and a small run of our side."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.ppo_peer import flops, quickstart, report, weights, workloads
from benchmarks.ppo_peer.workloads import PHI_TINY, W1, W2, Shape, Workload, quick

ROOT = Path(__file__).parents[2]


def _run(seconds: float, peak: float, lengths: list[int], **probe: list[float]) -> dict[str, Any]:
    phases = {"rollout": seconds / 2, "scoring": seconds / 4, "update": seconds / 4}
    peaks = dict.fromkeys((*phases, "overall"), peak)
    return {
        "iterations": [phases],
        "peak_mb": peaks,
        "lengths": [lengths],
        "probe": {"scores": [1.0], "logprobs": [-3.0]} | probe,
    }


def test_workloads_survive_json() -> None:
    for workload in (*workloads.CPU.values(), *workloads.CUDA.values()):
        given = json.loads(json.dumps(workload.to_dict()))
        assert Workload.from_dict(given) == workload


def test_ragged_prompts_are_those_of_the_issue() -> None:
    """8 to 128 tokens, 76 on average; responses end at 4.5% a token, so after 21 on average."""
    lengths = W2.prompt_lengths()
    assert (min(lengths), max(lengths), len(lengths)) == (8, 128, 32)
    assert sum(lengths) / 32 == pytest.approx(76, abs=0.5)
    assert W2.end_probability is not None
    alive, mean = 1.0, 0.0
    for _ in range(W2.response_tokens):
        mean, alive = mean + alive, alive * (1 - W2.end_probability)
    assert mean == pytest.approx(21, abs=0.1)


@pytest.mark.parametrize("probability", [0.2, None])
def test_weights_end_responses_as_often_as_asked(tmp_path: Path, probability: float | None) -> None:
    workload = replace(quick(W2), end_probability=probability)
    weights.make(workload, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.randint(2, PHI_TINY.vocabulary, (16, 12), generator=torch.manual_seed(3))
    with torch.no_grad():
        found = model(input_ids=ids).logits.softmax(-1)
    assert found[..., weights.PAD_ID].max() == 0.0
    if probability is None:
        assert workload.end_id == found.shape[-1]  # an id that no logit stands for
    else:
        torch.testing.assert_close(
            found[..., workload.end_id], torch.full((16, 12), probability), rtol=0.03, atol=0.0
        )


def test_flops_by_hand() -> None:
    """One layer, width 8, heads of 4, inner width 16, vocabulary 32; 3 + 2 tokens.

    Weights: 4 x 8 x 8 of attention + 2 x 8 x 16 = 512, so 1024 FLOPs a token; logits 2 x 8 x 32 =
    512 a response token; attention 4 x 8 = 32 a pair, and 5 tokens have 15 pairs.
    Forward 5 x 1024 + 2 x 512 + 15 x 32 = 6624. Training in full is 3 forwards; of the value model,
    without logits, 3 x (5120 + 480).
    """
    shape = Shape(
        "phi",
        32,
        {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    )
    one = replace(W1, shape=shape, prompts=1, prompt_tokens=(3, 3), ppo_epochs=1)
    found = flops.iteration_flops(one, "separate", 2.0)
    assert found == {"rollout": 6624.0, "update": 3 * 6624.0 + 3 * 5600.0}
    lora = flops.iteration_flops(replace(one, tuning="lora"), "shared", 2.0)
    assert lora["update"] == 2 * (5120 + 1024) + 3 * 480


def test_time_to_a_reward_lies_between_points() -> None:
    """Rewards 0, 1, 3 at 0, 10 and 30 seconds: 2 is reached halfway between, at 20 seconds."""
    curve = [
        {"seconds": 10.0, "reward": 0.0},
        {"seconds": 20.0, "reward": 1.0},
        {"seconds": 5.0, "reward": 3.0},
    ]
    assert quickstart.time_to(curve, 2.0) == 20.0
    assert quickstart.time_to(curve, 0.0) == 0.0
    assert quickstart.time_to(curve, 3.5) is None


def test_ratios_and_targets() -> None:
    """TRL 8 s and 200 MB against 4 s and 100 MB: 2 times the speed, half the memory."""
    runs = {"trl": [_run(8.0, 200.0, [64])], "separate": [_run(4.0, 100.0, [64])]}
    row = report.compare(replace(W1, prompts=32), runs)
    found = row["ratios"]["separate"]
    assert (found["speed"]["median"], found["memory"]["median"]) == (2.0, 0.5)
    assert found["reached"] and report.reached([row])
    assert row["sides"]["trl"]["episodes_per_second"]["median"] == 4.0
    slow = {"trl": runs["trl"], "separate": [_run(7.9, 100.0, [64])]}
    assert not report.reached([report.compare(W1, slow)])


def test_half_the_episodes_an_iteration_halve_the_speed() -> None:
    """TRL does 16 episodes in 8 s where we do 32 in 8 s: 2 times, in the median and the range."""
    small = _run(8.0, 200.0, [64]) | {"episodes": 16}
    row = report.compare(W1, {"trl": [small], "separate": [_run(8.0, 100.0, [64])]})
    assert row["ratios"]["separate"]["speed"] == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_other_models_and_other_lengths_are_refused() -> None:
    first = _run(8.0, 200.0, [20] * 100)
    with pytest.raises(SystemExit, match=r"scores differ by 0\.5"):
        other = _run(4.0, 100.0, [20] * 100, scores=[1.5])
        report.compare(W1, {"trl": [first], "separate": [other]})
    with pytest.raises(SystemExit, match=r"lengths differ: 20\.0 and 25\.0"):
        report.compare(W1, {"trl": [first], "separate": [_run(4.0, 100.0, [25] * 100)]})


@pytest.mark.slow
def test_our_side_runs(tmp_path: Path) -> None:
    """`--quick` of W1: both settings of the value, every phase, responses of full length."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "ppo_vs_trl.py"), "--quick"]
    command += ["--without-trl", "--workloads", "W1", "--rounds", "1", "--iterations", "2"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["comparisons"]
    assert set(row["sides"]) == {"separate", "shared"}
    for side in row["sides"].values():
        (run,) = side["runs"]
        assert run["lengths"] == [[8] * 8] * 3  # a warm-up iteration and two timed ones
        assert len(run["iterations"]) == 2
        assert all(seconds > 0 for phases in run["iterations"] for seconds in phases.values())
        peaks = run["peak_mb"]
        assert 0 < max(peaks[name] for name in ("rollout", "scoring", "update")) <= peaks["overall"]
    probes = [side["runs"][0]["probe"] for side in row["sides"].values()]
    assert probes[0] == probes[1]
