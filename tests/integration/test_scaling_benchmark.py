"""The scaling benchmark: its expectations, its slopes, and a small run."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from benchmarks.ppo_peer.flops import Cost
from benchmarks.ppo_peer.meter import PHASES
from benchmarks.ppo_scaling.communication import OBJECTS, Collectives
from benchmarks.ppo_scaling.points import (
    FLOAT,
    Point,
    decoding_bytes,
    expected_flops,
    working_bytes,
)
from benchmarks.scaling import SLOPES, fit

ROOT = Path(__file__).parents[2]
SMALL = Point("full", prompt_tokens=2, response_tokens=3, prompts=2, responses_per_prompt=2)


def test_flops_by_hand() -> None:
    """2 prompts of 2 tokens, 2 responses of 3 tokens each; 10 FLOPs a token, 100 for its logits."""
    model = Cost(trunk=10, head=100, pair=1)
    # Prefill: 10 x 2 + pairs 3, for 2 prompts. Decoding: 110 x 3 + pairs 3 + 4 + 5, for 4 rows.
    rollout = 2 * 23 + 4 * 342
    # Three passes of 10 x 5 + pairs 15, and logits of 3 tokens.
    scoring = 4 * (3 * 65 + 300)
    # Policy and value, three passes' worth each, and the policy's logits.
    update = 4 * (2 * 3 * 65 + 3 * 300)
    found = expected_flops(SMALL, model, adapter=0)
    assert found == {"rollout": rollout, "scoring": scoring, "update": update}
    # 2 adapter weights: 4 FLOPs a token forward, 12 trained; the base's backward pass costs one.
    lora = expected_flops(replace(SMALL, tuning="lora"), model, adapter=2)
    assert lora["rollout"] == rollout + 2 * 4 * 2 + 4 * 4 * 3
    assert lora["scoring"] == scoring + 4 * 3 * 4 * 5
    assert lora["update"] == 4 * (2 * ((20 + 12) * 5 + 45) + 2 * 300)


def test_bytes_of_decoding_by_hand() -> None:
    """4 rows, 2 at a time, 3 steps: weights 5 + 50 + 1; 3, 4 and 5 columns of 4 layers x 256."""
    model = Cost(trunk=10, head=100, pair=1)
    point = replace(SMALL, generation_rows=2)
    assert decoding_bytes(point, model, adapter=1) == 4 * (2 * 3 * 56 + 4 * 12 * 2 * 4 * 256)


def test_kept_activations_are_those_of_autograd() -> None:
    """What the formula says that the layers keep, against the storages that autograd saves."""
    from transformers import AutoConfig, AutoModelForCausalLM

    point = Point("full", 32, 32, prompts=4, width=64, layers=3, vocabulary=64)
    shape = point.shape
    config = AutoConfig.for_model("llama", vocab_size=shape.vocabulary, **shape.fields)
    model = AutoModelForCausalLM.from_config(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = torch.randint(2, 64, (point.rows, point.tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, use_cache=False)
    found = sum(storage.nbytes() for storage in kept.values())
    kept = working_bytes(point, point.rows * point.tokens, trained=0, chunk=0)["update"]
    assert kept == pytest.approx(found, rel=0.15)


def test_chunks_bound_the_logits() -> None:
    """64 response tokens x 32,768 words are 2^21 numbers: one chunk, or a fourth of it."""
    point = Point("full", 64, 64, prompts=1, vocabulary=32_768)
    whole = working_bytes(point, 128, trained=0, chunk=1 << 24)
    bounded = working_bytes(point, 128, trained=0, chunk=1 << 19)
    assert whole["scoring"] - bounded["scoring"] == FLOAT * (2**21 - 2**19)
    assert whole["update"] - bounded["update"] == FLOAT * (2**21 - 2**19)


def test_slopes_are_exponents_of_the_upper_points() -> None:
    """y = 3 x^1.5 above 8, a constant below; seconds grow faster than FLOPs, memory does not."""
    found: list[dict[str, Any]] = []
    for value in (1, 2, 4, 8, 16):
        numbers = dict.fromkeys(PHASES, 3.0 * max(value, 4) ** 1.5)
        linear = dict.fromkeys(PHASES, 5.0 * value)
        point = {"prompts": value, "tuning": "full"}
        row: dict[str, Any] = {"point": point, **dict.fromkeys(SLOPES, linear)}
        found.append(row | {"cpu_seconds": numbers, "decoding_bytes": 7.0 * value**1.4})
    for row in fit("prompts", found):
        assert row["slopes"]["cpu_seconds"] == pytest.approx(1.5)
        assert row["slopes"]["held_mb"] == pytest.approx(1.0)
        # Rollouts may grow as what decoding reads: by 1.4.
        assert row["above"] == ([] if row["phase"] == "rollout" else ["cpu_seconds"])


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the only one of its group."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def of_four() -> Iterator[None]:
    """This process as the first of four, of which the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


def _layers() -> torch.nn.Sequential:
    """Float32: 10 x 20 weights and 20 biases, frozen; 20 x 4 weights."""
    torch.manual_seed(1)
    first, second = torch.nn.Linear(10, 20), torch.nn.Linear(20, 4, bias=False)
    return torch.nn.Sequential(first.requires_grad_(False), second)


def test_reduced_gradients_are_counted(alone: None) -> None:
    """DDP: what is trained, once a step, from its reducer in C++; and what Python asks for."""
    module = torch.nn.parallel.DistributedDataParallel(_layers())
    inputs = torch.ones(3, 10)
    module(inputs).sum().backward()  # makes buckets
    counted = Collectives()
    with counted, counted.telling_objects():
        module(inputs).sum().backward()  # not counted: no phase yet
        counted.phase = "update"
        for _ in range(3):
            with module.no_sync():
                module(inputs).sum().backward()
            module(inputs).sum().backward()
        counted.phase = "rest"
        torch.distributed.all_reduce(torch.ones(5, dtype=torch.float64))
        torch.distributed.broadcast_object_list(["word"])
    counts = counted.counts()
    assert counts["update"] == {"all_reduce": {"calls": 3, "bytes": 3 * 4 * 80}}
    assert counts["rest"]["all_reduce"] == {"calls": 1, "bytes": 40}
    assert counts["rest"].keys() == {"all_reduce", OBJECTS}
    assert counts["rest"][OBJECTS]["calls"] == 2  # lengths, then what was pickled


def test_gathered_weights_are_counted(of_four: None) -> None:
    """FSDP2: each layer's weights for its pass and again for the backward pass, then gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = _layers()
    mesh = init_device_mesh("cpu", (4,))
    for layer in module:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh)
    counted = Collectives()
    counted.phase = "update"
    with counted:
        module(torch.ones(3, 10, requires_grad=True)).sum().backward()
    counts = counted.counts()["update"]
    assert counts["all_gather"] == {"calls": 4, "bytes": 2 * 4 * (220 + 80)}
    assert counts["reduce_scatter"] == {"calls": 1, "bytes": 4 * 80}


# The quick size: width 64, inner width 176, 2 layers, 400 words. Attention, MLP and norms of a
# layer; the last norm and the embeddings; and a head.
LAYER = 4 * 64 * 64 + 3 * 64 * 176 + 2 * 64
MODEL, HEAD = 2 * LAYER + 64 + 400 * 64, 64 + 1
STEPS = 2 * 2  # epochs and minibatches


def _cases(out: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """What `--processes` measures in the quick size, with a value model of its own; and prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--quick", *arguments]
    command += ["--values", "own", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["cases"]
    return cases, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight runs
def test_two_processes_reduce_what_they_train(tmp_path: Path) -> None:
    """The PPO stage in two processes, tiny: bytes of its gradients are those of its weights."""
    cases, text = _cases(tmp_path / "processes.json", "--processes", "1", "2")
    adapter = 2 * 8 * (4 * (64 + 64) + 3 * (64 + 176))  # rank 8 on every linear layer
    trained = {"full": 2 * MODEL + HEAD, "lora": 2 * adapter + HEAD}
    assert [case["case"]["processes"] for case in cases] == [1, 2, 1, 2]
    for case in cases:
        weights, ranks = trained[case["case"]["tuning"]], case["ranks"]
        assert [rank["rank"] for rank in ranks] == list(range(case["case"]["processes"]))
        for rank in ranks:
            assert (rank["trained"], rank["optimiser_steps"]) == (weights, STEPS)
            assert rank["gradients_mb"] * 2**20 == pytest.approx(4 * weights)
            assert rank["collectives"] == ranks[0]["collectives"]
        if len(ranks) == 1:
            assert ranks[0]["collectives"] == {}
            continue
        counts = ranks[0]["collectives"]
        assert counts["update"]["all_reduce"]["bytes"] == STEPS * 4 * weights
        sizes = [entry["bytes"] for phase in counts.values() for entry in phase.values()]
        others = sum(sizes) - STEPS * 4 * weights
        assert others < 4000
    assert "| ddp | lora | own | 2 | update | all_reduce |" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_gather_what_they_divide(tmp_path: Path) -> None:
    """The same with FSDP2: a rollout gathers the policy once; rows of gradients come back."""
    arguments = ["--processes", "2", "--strategies", "fsdp2", "--tunings", "full"]
    ((case,), _) = _cases(tmp_path / "processes.json", *arguments)
    counts = case["ranks"][0]["collectives"]
    assert counts["rollout"]["all_gather"]["bytes"] == 4 * MODEL
    # Rows of odd lengths are filled up: a head of 65 numbers.
    trained = 2 * MODEL + HEAD
    assert 0 <= counts["update"]["reduce_scatter"]["bytes"] - STEPS * 4 * trained < 100
    # Reference, value and reward score; both models pass forward and backward.
    scored, passed = 3 * 4 * MODEL, STEPS * 4 * 2 * MODEL
    assert scored <= counts["scoring"]["all_gather"]["bytes"] < 1.01 * scored
    assert passed < counts["update"]["all_gather"]["bytes"] <= 2.01 * passed
    for rank in case["ranks"]:
        assert rank["gradients_mb"] * 2**20 == pytest.approx(4 * trained / 2, rel=0.01)


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    """Responses per prompt, tiny: rows for each phase, and as much work as the rows say."""
    out = tmp_path / "scaling.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--quick"]
    command += ["--axes", "responses_per_prompt", "--tunings", "lora", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(out.read_text(encoding="utf-8"))
    assert [row["phase"] for row in numbers["slopes"]] == list(PHASES)
    for row in numbers["slopes"][1:]:
        assert row["slopes"]["flops"] == pytest.approx(1.0)
    for point in numbers["points"]:
        assert all(point["cpu_seconds"][phase] > 0 for phase in PHASES)
        # An update is shorter here than the time between two looks at memory; some pages move.
        held, resting = point["held_mb"], point["resting_mb"]
        assert all(held[phase] > 0.9 * resting > 0 for phase in PHASES)
        assert point["working_mb"] == {phase: held[phase] - resting for phase in PHASES}
    assert "| responses_per_prompt 1 to 4 | lora | rollout |" in done.stdout
