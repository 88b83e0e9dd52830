"""Memory accounting: bytes by hand, each storage once, and the moment of measuring."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from pipeline.config import ArchitectureSection, LoraSection, ModelSection
from pipeline.models.footprint import Cost, at_first_step, divided, measured, peaks, record
from pipeline.runfolder import RunFolder
from stages.config import RunConfig
from stages.export.config import ExportSection
from stages.memory import Files, predicted_files, predicted_footprint
from stages.memory_screen import disk_table, memory_table
from stages.ppo.config import PpoSection
from stages.reward.config import RewardSection
from stages.sft.config import SftSection

# One Llama layer of width 8, two heads, feed-forward 16, 300 tokens, tied embeddings, float32:
# embedding 300 x 8 = 2400, attention 4 x 8 x 8 = 256, feed-forward 3 x 8 x 16 = 384, norms
# 3 x 8 = 24: 3064 weights of 4 bytes, in 1 + 4 + 3 + 3 = 11 tensors; and the rotary frequencies of
# a head of width 4, 2 numbers of 4 bytes, kept twice by transformers.
TRAINED = 3064 * 4
MODEL = TRAINED + 2 * 2 * 4
# Rank 2: 4 x 2 x (8 + 8) + 3 x 2 x (8 + 16) = 272 weights in 7 x 2 = 14 tensors.
ADAPTER = 272 * 4
# A head has 8 weights and a bias, which are trained, and shift and scale, which are not.
HEAD, HEAD_TRAINED = (8 + 1 + 2) * 4, (8 + 1) * 4


def adam(trained: int, tensors: int) -> int:
    """Two moments as large as the weights, and a float32 step count a tensor."""
    return 2 * trained + 4 * tensors


NOTHING = Cost()
HEAD_COST = Cost(HEAD, HEAD_TRAINED, adam(HEAD_TRAINED, 2))
ADAPTER_COST = Cost(ADAPTER, ADAPTER, adam(ADAPTER, 14))
MODEL_COST = Cost(MODEL, TRAINED, adam(TRAINED, 11))


def config(sft: str = "full", reward: str = "lora", **ppo: Any) -> RunConfig:
    return RunConfig(
        model=ModelSection(
            init="config",
            vocabulary_size=300,
            architecture=ArchitectureSection(
                hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            ),
        ),
        lora=LoraSection(rank=2),
        sft=SftSection(tuning=sft),
        reward=RewardSection(tuning=reward),
        ppo=PpoSection(**ppo),
    )


@pytest.mark.parametrize(
    ("ppo", "expected"),
    [
        (
            {"tuning": "lora", "value": "separate"},
            {
                "base": Cost(MODEL),
                "policy": ADAPTER_COST,
                "value": ADAPTER_COST + HEAD_COST,
                "reference": NOTHING,
                "reward": Cost(ADAPTER + HEAD),
            },
        ),
        (
            {"tuning": "lora", "value": "shared"},
            {
                "base": Cost(MODEL),
                "policy": ADAPTER_COST,
                "value": HEAD_COST,
                "reference": NOTHING,
                "reward": Cost(ADAPTER + HEAD),
            },
        ),
        (
            {"tuning": "full", "value": "separate"},
            {
                "base": Cost(MODEL),  # under the reward's adapter, and the reference
                "policy": MODEL_COST,
                "value": MODEL_COST + HEAD_COST,
                "reference": NOTHING,
                "reward": Cost(ADAPTER + HEAD),
            },
        ),
        (
            {"tuning": "full", "value": "shared"},
            {
                "base": Cost(MODEL),
                "policy": MODEL_COST,
                "value": HEAD_COST,
                "reference": NOTHING,
                "reward": Cost(ADAPTER + HEAD),
            },
        ),
        (
            # A copy of the reference's own, beside the reward model's base: half of the weights'
            # bytes, and the frequencies as they were.
            {"tuning": "full", "value": "shared", "reference": {"dtype": "bfloat16"}},
            {
                "policy": MODEL_COST,
                "value": HEAD_COST,
                "reference": Cost(TRAINED // 2 + MODEL - TRAINED),
                "reward": Cost(MODEL + ADAPTER + HEAD),
            },
        ),
        (
            {"tuning": "lora", "value": "separate", "rewards": "rewards.py:score"},
            {
                "base": Cost(MODEL),
                "policy": ADAPTER_COST,
                "value": ADAPTER_COST + HEAD_COST,
                "reference": NOTHING,
            },
        ),
    ],
    ids=["lora-separate", "lora-shared", "full-separate", "full-shared", "bf16", "function"],
)
def test_ppo_by_hand(ppo: dict[str, Any], expected: dict[str, Cost]) -> None:
    assert predicted_footprint(config(**ppo), "ppo") == expected


def test_sft_and_reward_by_hand() -> None:
    assert predicted_footprint(config(), "sft") == {"sft": MODEL_COST}
    assert predicted_footprint(config(reward="full"), "reward") == {
        "sft": Cost(MODEL),
        "reward": MODEL_COST + HEAD_COST,
    }
    assert predicted_footprint(config(), "reward") == {
        "base": Cost(MODEL),
        "sft": NOTHING,
        "reward": ADAPTER_COST + HEAD_COST,
    }
    assert predicted_footprint(config(), "evaluation") is None


def test_disk_by_hand() -> None:
    stages = ["sft", "reward", "ppo", "evaluation", "export"]
    assert predicted_files(config(), stages) == [
        Files("sft", "artifact", TRAINED),
        # Two that are kept and one that is written: each the weights, two moments, and the best.
        Files("sft", "checkpoints: states to go on from", 3 * 4 * TRAINED),
        Files("reward", "artifact", ADAPTER + HEAD),
        Files("reward", "checkpoints: states to go on from", 3 * 4 * (ADAPTER + HEAD_TRAINED)),
        Files("ppo", "artifact", ADAPTER),
        Files("ppo", "checkpoints: the best policy and the last", 2 * ADAPTER),
        Files("ppo", "checkpoints: states to go on from", 3 * 3 * (2 * ADAPTER + HEAD_TRAINED)),
        Files("export", "adapter/", ADAPTER),
        Files("export", "base/", TRAINED),  # the SFT model, which only this run has
    ]
    # No state is left where none is due.
    assert predicted_files(config(tuning="full", checkpoint_every=101), ["ppo", "export"]) == [
        Files("ppo", "artifact", TRAINED),
        Files("ppo", "checkpoints: the best policy and the last", 2 * TRAINED),
        Files("export", "merged/", TRAINED),
    ]


def test_disk_of_an_export_by_hand() -> None:
    """In bfloat16 a weight has half of float32's bytes; a classifier has no other output layer."""
    export = ExportSection(
        adapters=("policy", "reward"),
        vllm=True,
        merged=True,
        reward=True,
        gguf="convert_hf_to_gguf.py",
        dtype="bfloat16",
    )
    assert predicted_files(config().model_copy(update={"export": export}), ["export"]) == [
        Files("export", "adapter/", ADAPTER),
        Files("export", "vllm/", ADAPTER),
        Files("export", "base/", TRAINED),
        Files("export", "reward_adapter/", ADAPTER + HEAD),
        Files("export", "reward/", TRAINED // 2),
        Files("export", "merged/", TRAINED // 2),
        Files("export", "gguf/", TRAINED // 2),
    ]


def test_tensors_that_share_a_storage_count_once() -> None:
    layer = nn.Linear(3, 5)
    twin = nn.Linear(3, 5)
    twin.weight = layer.weight
    both = nn.ModuleDict({"layer": layer, "twin": twin})
    both.register_buffer("view", layer.bias.detach()[:2])
    optimiser = torch.optim.AdamW(layer.parameters())
    # One weight of 15 numbers, two biases of 5; the view has no storage of its own.
    assert measured({"reward": both}, optimiser) == {"reward": Cost((15 + 5 + 5) * 4)}
    layer(torch.ones(3)).sum().backward()
    assert measured({"reward": both}, optimiser)["reward"] == Cost(100, (15 + 5) * 4)
    optimiser.step()
    # The step counts are float32 numbers on the CPU.
    assert measured({"reward": both}, optimiser)["reward"] == Cost(100, 80, 160 + 2 * 4)


def test_measuring_waits_until_every_group_is_trained_and_happens_once() -> None:
    policy, value = nn.Linear(2, 2), nn.Linear(2, 1)
    optimiser = torch.optim.AdamW(
        [{"params": part.parameters()} for part in (policy, value)] + [{"params": []}]
    )
    seen = []
    at_first_step(optimiser, lambda inner: seen.append(measured({"policy": policy}, inner)))
    for trained in ([value], [policy, value], [policy, value]):  # a warm-up step comes first
        for part in trained:
            part(torch.ones(2)).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert seen == [{"policy": Cost(24, 24, 48 + 8)}]


def test_what_lies_over_processes_is_divided() -> None:
    whole = {"policy": Cost(10, 10, 21), "base": Cost(7, 0, 0)}
    assert divided(whole, 2, ("gradients", "optimiser")) == {
        "policy": Cost(10, 5, 11),
        "base": Cost(7, 0, 0),
    }
    assert divided(whole, 2, ("weights",))["base"] == Cost(4, 0, 0)
    assert divided(whole, 1, ("weights",)) == whole


def test_what_is_recorded_is_added_to(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).stage("ppo").memory_json
    path.parent.mkdir()
    record(path, predicted={"policy": Cost(1, 2, 3)})
    record(path, peak={"resident": 5})
    assert json.loads(path.read_text()) == {
        "format": 1,
        "unit": "bytes",
        "predicted": {"policy": {"weights": 1, "gradients": 2, "optimiser": 3}},
        "peak": {"resident": 5},
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_that_of_this_process_in_bytes() -> None:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kibibytes = int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1])
    assert peaks()["resident"] == pytest.approx(kibibytes * 1024, rel=0.05)


def printed(what: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(what)
    return " ".join(stream.getvalue().split())


def test_predicted_and_measured_stand_side_by_side() -> None:
    def cost(weights: int, gradients: int = 0, optimiser: int = 0) -> dict[str, int]:
        return {"weights": weights, "gradients": gradients, "optimiser": optimiser}

    text = printed(
        memory_table(
            {
                "sft": {"predicted": {"sft": cost(10**9, 10**9, 2 * 10**9)}},
                "ppo": {
                    "predicted": {"base": cost(3 * 10**9), "policy": cost(10**8, 10**8, 10**8)},
                    "measured": {"base": cost(3 * 10**9), "policy": cost(10**8, 0, 0)},
                    "peak": {"resident": 5 * 10**9, "cuda": 4 * 10**9},
                },
                "evaluation": {},
            }
        )
    )
    assert "memory, GB role weights gradients optimiser total" in text
    assert "sft sft 1.00 / - 1.00 / - 2.00 / - 4.00 / -" in text
    assert "ppo base 3.00 / 3.00 0 / 0 0 / 0 3.00 / 3.00" in text
    assert "policy 0.10 / 0.10 0.10 / 0 0.10 / 0 0.30 / 0.10" in text
    assert "all 3.10 / 3.10 0.10 / 0 0.10 / 0 3.30 / 3.10" in text
    assert "Each number is predicted / measured" in text
    assert "by the end of: ppo 5.0 GB resident, 4.0 GB cuda." in text
    assert memory_table({"evaluation": {"peak": {"resident": 1}}}) is None


def test_a_disk_without_room_is_a_warning() -> None:
    files = [("sft", "artifact", 2 * 10**9), ("ppo", "artifact", 10**9)]
    fits = printed(disk_table(files, free=3 * 10**9, folder="runs"))
    assert "all 3.00" in fits and "3.0 GB are free in runs" in fits and "warning" not in fits
    full = printed(disk_table(files, free=3 * 10**9 - 1, folder="runs"))
    assert "warning: 3.0 GB of weight files do not fit in runs, which has 3.0 GB free" in full
