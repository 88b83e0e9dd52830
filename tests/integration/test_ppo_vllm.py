"""The PPO stage with a (stand-in) vLLM server: the reward rises, weights stay near 1, files go."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError, TrainingError
from pipeline.resume import States
from pipeline.stage import Context
from stages.ppo.run import PpoStage
from tests.integration.test_ppo_reward_rises import make_context
from tests.vllm_stand_in import StandIn


def context_for(root: Path, url: str, iterations: int, **ppo: Any) -> Context:
    """A tiny run on the server at `url`; its base lies in the artifact of SFT."""
    rollout = {
        "prompts_per_iteration": 32,
        "max_new_tokens": 8,
        "missing_eos": "keep",
        "engine": "vllm",
        "vllm": {"url": url, "retries": 0},
        **ppo.pop("rollout", {}),
    }
    optim = {"learning_rate": 2e-2, "minibatches": 2, "value_coef": 0.5}
    held_out = {"every": iterations, "num_prompts": 8, "num_texts": 1}
    mine = {"iterations": iterations, "rollout": rollout, "optim": optim, "held_out": held_out}
    return make_context(root, {**mine, **ppo})


@contextmanager
def served(
    root: Path, iterations: int, server: dict[str, Any], **ppo: Any
) -> Iterator[tuple[Context, StandIn]]:
    """A run, and the server of its base."""
    with socket.socket() as probe:  # a run's config names its server, and the server its base
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = context_for(root, f"http://127.0.0.1:{port}", iterations, **ppo)
    with StandIn(context.parents["sft"] / "model", port=port, **server) as stand_in:
        yield context, stand_in


def rows_of(context: Context) -> list[dict[str, float]]:
    context.tracker.close()
    return [json.loads(line) for line in context.folder.metrics_jsonl.read_text().splitlines()]


@pytest.mark.parametrize("value", ["separate", pytest.param("shared", marks=pytest.mark.slow)])
def test_reward_rises_and_weights_stay_near_1(value: str, tmp_path: Path) -> None:
    # Noise on the server's logits stands for its kernels: pi and mu differ by about 0.03 a token.
    server = {"noise": 0.05, "logprobs_mode": "processed_logprobs"}
    rollout = {"temperature": 0.9}
    with served(tmp_path, 14, server, value=value, rollout=rollout) as (context, stand_in):
        summary = PpoStage().run(context)
    rows = rows_of(context)
    first, last = rows[1]["score"], rows[14]["score"]
    # About 4% of a random model's letters are e.
    assert first < 0.1 and last > first + 0.08, (first, last)
    assert summary["held_out_reward_best"] > summary["held_out_reward_start"]
    for row in rows[1:]:
        # 32 x 8 tokens, weights with a deviation of about 0.035: their mean has one of 0.002.
        assert row["importance_mean"] == pytest.approx(1.0, abs=0.02)
        assert row["importance_mean"] != 1.0 and row["importance_capped"] == 0.0
    # One version an iteration that moved the policy, and nothing left on server or disk.
    names = [body["lora_name"] for body in stand_in.asked("/v1/load_lora_adapter")]
    assert len(set(names)) == len(names) in (14, 15)
    assert stand_in.loaded == {} and list((context.folder.root / "adapters").iterdir()) == []
    assert all(not torch.tensor(list(row.values())).isnan().any() for row in rows)


def test_without_a_cap_nothing_is_weighted(tmp_path: Path) -> None:
    with served(tmp_path, 2, {}, rollout={"importance_cap": None}) as (context, _):
        PpoStage().run(context)
    assert all("importance_mean" not in row for row in rows_of(context))


def test_a_server_that_dies_stops_the_stage_and_names_the_best_policy(tmp_path: Path) -> None:
    # 8 completions of the first evaluation, 32 of the first iteration, and some of the second.
    with (
        served(tmp_path, 4, {"dies_after": 60}) as (context, _),
        pytest.raises(TrainingError, match=r"vLLM did not answer .*best policy so far") as caught,
    ):
        PpoStage().run(context)
    assert str(context.folder.checkpoints / "step-0") in str(caught.value)
    assert list((context.folder.root / "adapters").iterdir()) == []


def nan_once() -> Callable[[dict[str, Any]], None]:
    """Spoils one answer of iteration 2, after 8 of the first evaluation and 32 of iteration 1."""
    answers = [0]

    def spoil(choice: dict[str, Any]) -> None:
        answers[0] += 1
        if answers[0] == 8 + 32 + 3:
            choice["logprobs"]["token_logprobs"][-1] = -9999.0  # vLLM's minus infinity

    return spoil


def test_log_probs_that_are_not_finite_leave_their_rows(tmp_path: Path) -> None:
    with (
        served(tmp_path, 4, {"spoil": nan_once()}) as (context, stand_in),
        pytest.raises(
            TrainingError, match=r"ppo, rollouts of iteration 2: the log-probs from http\S+ are not"
        ) as caught,
    ):
        PpoStage().run(context)
    path = context.folder.root / "not_finite.json"
    assert str(path) in str(caught.value) and "best policy so far" in str(caught.value)
    found = json.loads(path.read_text())
    assert (found["what"], found["place"]) == ("logprobs", "rollouts of iteration 2")
    (row,) = found["rows"]
    assert 32 <= row["sample_index"] < 64 and row["prompt"] and row["origin"]
    assert row["logprobs"][-1] == "-inf" and len(row["response"]) > 0
    assert stand_in.loaded == {}


def test_log_probs_that_are_not_finite_lead_back(tmp_path: Path) -> None:
    stop = {"action": "roll_back"}
    with served(tmp_path, 3, {"spoil": nan_once()}, stop=stop) as (context, stand_in):
        states = States(context.folder, "key", {}, context.runtime)
        summary = PpoStage().run(replace(context, states=states))
    assert summary["rollbacks"] == 1
    # Back to the start: what the server samples from there on is again the policy, as each
    # version's comparison of its log-probs says.
    assert [row["step"] for row in rows_of(context)] == [0, 1, 2, 3]
    names = [body["lora_name"] for body in stand_in.asked("/v1/load_lora_adapter")]
    assert len(set(names)) == len(names)


def test_no_server_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    context = context_for(tmp_path, "http://127.0.0.1:9", 2)
    with pytest.raises(ConfigError, match="vllm serve") as caught:
        PpoStage().run(context)
    # A base that this run made is served by its folder.
    assert f"vllm serve {tmp_path}/tiny/sft/artifact/model --enable-lora" in str(caught.value)
    assert "--max-lora-rank 8 --max-model-len 48" in str(caught.value)
