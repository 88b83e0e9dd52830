"""SFT and the reward model on GPUs, under each sharded strategy, against one GPU without a launch.

Kernels of a GPU sum in an order of their own for each shape, and shapes follow the number of
processes: losses and weights in float32 are held to 1e-3 with an `adam_eps` above rounding.
"""

import json
import math
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_pipeline_ranks import CONFIG, ENVIRONMENT, RLHF
from tests.tiny_chain import assert_close, rows

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="there is no GPU"),
]
NAMES = {
    "fsdp2": "FSDP2",
    "deepspeed-zero2": "DeepSpeed ZeRO-2",
    "deepspeed-zero3": "DeepSpeed ZeRO-3",
}
ON_GPUS = (
    CONFIG.replace("dtype: float64", "dtype: float32")
    .replace("device: cpu", "device: auto")
    .replace("learning_rate: 5.0e-3", "learning_rate: 5.0e-3, adam_eps: 1.0e-4")
)
FORM = ["sft.tuning=full", "reward.tuning=lora"]
STAGES = ("sft", "reward")
strategies = pytest.mark.parametrize("strategy", NAMES)
numbers = pytest.mark.parametrize("processes", range(1, max(GPUS, 1) + 1))


def rlhf(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*RLHF, *arguments],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def need(strategy: str) -> None:
    if strategy.startswith("deepspeed") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'rlhf-pipeline[deepspeed]'")


def train(folder: Path, *arguments: str) -> str:
    return "".join(rlhf(folder, verb, "c.yaml", *FORM, *arguments) for verb in STAGES)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The folder of runs, with `one` of one process."""
    folder = tmp_path_factory.mktemp("gpus")
    (folder / "c.yaml").write_text(ON_GPUS)
    train(folder, "run.name=one")
    return folder


@strategies
@numbers
def test_sft_and_reward_are_those_of_one_process(one, strategy, processes):
    need(strategy)
    name = f"{strategy}-{processes}"
    launch = ["--launch", strategy, "--processes", str(processes)]
    output = train(one, f"run.name={name}", *launch)
    if processes > 1:
        assert output.count(f"{processes} processes on cuda, {NAMES[strategy]}") == 2
    for stage in STAGES:
        pairs = [rows(one / "runs" / run / stage) for run in ("one", name)]
        for row, other in zip(*pairs, strict=True):
            for key, number in row.items():
                if "loss" in key:
                    assert math.isclose(number, other[key], rel_tol=1e-3), (stage, key)
                else:
                    assert math.isfinite(other[key])
        alone, many = (one / "runs" / run / stage / "artifact" for run in ("one", name))
        assert_close(alone, many, 1e-3)


@strategies
def test_bfloat16_autocast_trains(one, strategy):
    need(strategy)
    name = f"{strategy}-bf16"
    launch = ["--launch", strategy, "--processes", str(GPUS), "run.mixed_precision=bf16"]
    train(one, f"run.name={name}", *launch)
    for stage in STAGES:
        losses = [row["loss"] for row in rows(one / "runs" / name / stage)
                  if "loss" in row]  # fmt: skip
        assert all(map(math.isfinite, losses))
        kept = json.loads((one / "runs" / name / stage / "artifact/manifest.json").read_text())
        assert kept["summary"]["steps"] > 0


@strategies
def test_an_interrupted_sft_goes_on(one, strategy):
    """SIGTERM, which saves the step in hand: the state is read by as many processes."""
    need(strategy)
    launch = ["--launch", strategy, "--processes", str(GPUS)]
    settings = ["c.yaml", *FORM, "sft.checkpoint_every=2", *launch]
    rlhf(one, "sft", *settings, f"run.name={strategy}-whole")
    name = f"{strategy}-stopped"
    with subprocess.Popen(
        [*RLHF, "sft", *settings, f"run.name={name}"],
        cwd=one, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        for line in running.stdout:
            if "SFT 3/" in line:
                running.terminate()
                break
        running.stdout.read()
    if not (one / "runs" / name / "sft/artifact/manifest.json").exists():
        rlhf(one, "sft", *settings, f"run.name={name}")
    whole = one / "runs" / f"{strategy}-whole" / "sft/artifact"
    for path in sorted(whole.rglob("*.safetensors")):
        found = load_file(one / "runs" / name / "sft/artifact" / path.relative_to(whole))
        for key, tensor in load_file(path).items():
            # Sums by atomic additions differ from run to run on some kernels.
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)
