"""The chain by two processes (gloo) under DeepSpeed's ZeRO-2 and ZeRO-3, against one process.

DeepSpeed steps weights of float32 whatever a model's type is, so that the 1e-9 of float64, to which
DDP and FSDP2 are held, cannot be asked. Sums of float32 in another order differ by 1e-7 of their
size, which Adam's division makes steps of full length where a gradient is nothing but rounding:
`adam_eps` is above that here, and what is left is held to 1e-5.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.distributed.conftest import NEEDS_DEEPSPEED
from tests.distributed.test_pipeline_ranks import CONFIG, ENVIRONMENT, FORMS, RLHF, responses
from tests.tiny_chain import ROOT, assert_close, assert_close_stage

pytestmark = [pytest.mark.slow, NEEDS_DEEPSPEED]
FLOAT32 = CONFIG.replace("dtype: float64", "dtype: float32").replace(
    "learning_rate: 5.0e-3", "learning_rate: 5.0e-3, adam_eps: 1.0e-4"
)
STAGES = ("sft", "reward", "ppo")
TOLERANCE = 1e-5
# Small models' weights all lie below the size that DeepSpeed keeps gathered: here none is kept.
ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

Rlhf = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def rlhf(deepspeed_builds) -> Rlhf:
    """Run a verb in a folder."""
    environment = ENVIRONMENT | deepspeed_builds

    def run(
        folder: Path, *arguments: str, command: list[str] = RLHF, **more: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            cwd=folder, env=environment | more, capture_output=True, text=True, timeout=280,
        )  # fmt: skip

    return run


def make(folder: Path) -> dict[str, list[str]]:
    """Leave the configurations in a folder; the arguments of each launch."""
    (folder / "c.yaml").write_text(FLOAT32)
    (folder / "zero3.json").write_text(json.dumps(ZERO_3))
    launch = yaml.safe_load((ROOT / "configs/accelerate/deepspeed-zero3.yaml").read_text())
    launch["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero3.json")}
    del launch["mixed_precision"]  # accelerate wants it in one of the two
    (folder / "zero3.yaml").write_text(yaml.safe_dump(launch))
    two = ["--processes", "2", "run.device=cpu"]
    return {
        "ZeRO-2": ["--launch", "deepspeed-zero2", *two],
        "ZeRO-3": ["--launch", "zero3.yaml", *two],
        "ZeRO-3 as shipped": ["--launch", "deepspeed-zero3", *two],
    }


@pytest.fixture(
    scope="module",
    params=[
        ("lora-shared", "ZeRO-2"),
        ("lora-shared", "ZeRO-3"),
        ("full", "ZeRO-2"),
        ("full", "ZeRO-3"),
        ("lora", "ZeRO-3 as shipped"),
    ],
    ids="-".join,
)
def runs(request, tmp_path_factory, rlhf):
    """A folder with `one` and `two`, by one process and by two; what two printed; the strategy."""
    form, strategy = request.param
    folder = tmp_path_factory.mktemp("runs")
    launches = make(folder)
    one = rlhf(folder, "run", "c.yaml", *FORMS[form], "run.name=one")
    assert one.returncode == 0, one.stdout + one.stderr
    two = rlhf(folder, "run", "c.yaml", *FORMS[form], "run.name=two", *launches[strategy])
    assert two.returncode == 0, two.stdout + two.stderr
    return folder / "runs", two.stdout + two.stderr, f"DeepSpeed {strategy[:6]}"


def test_two_processes_compute_what_one_does(runs):
    folder, *_ = runs
    for stage in STAGES:
        # Perplexity and explained variance multiply the error of what they are made of.
        one, two = folder / "one" / stage, folder / "two" / stage
        assert_close_stage(one, two, TOLERANCE, metrics=1e-4)


def test_the_first_rollouts_agree_token_for_token(runs):
    folder, *_ = runs
    one, two = (
        {index: row for index, row in responses(folder / name).items() if row[0] == 1}
        for name in ("one", "two")
    )
    assert one == two and len(two) == 9


def test_exports_are_those_of_one_process(runs):
    folder, *_ = runs
    assert_close(folder / "one/export", folder / "two/export", TOLERANCE)


def test_the_strategy_is_the_one_that_was_asked_for(runs):
    _, output, strategy = runs
    assert output.count(f"2 processes on cpu, {strategy}") == 5  # all stages, export the last
    assert "FutureWarning" not in output


@pytest.mark.parametrize(
    ("form", "strategy", "stage"), [("lora", "ZeRO-2", 2), ("full", "ZeRO-3", 3)]
)
def test_killed_processes_go_on_as_if_they_had_not_been(tmp_path, rlhf, form, strategy, stage):
    two = make(tmp_path)[strategy]
    form = [*FORMS[form], "ppo.checkpoint_every=1", "ppo.ema_decay=0.7"]
    for verb in ("sft", "reward"):
        made = rlhf(tmp_path, verb, "c.yaml", *form, "run.name=parents", *two)
        assert made.returncode == 0, made.stdout + made.stderr
    ppo = ["ppo", "c.yaml", *form, "--from", "runs/parents"]
    assert rlhf(tmp_path, *ppo, "run.name=whole", *two).returncode == 0
    killing = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    killing += ["-m", "tests.killing", "stages.ppo.run:Training.update", "3"]
    asked = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
    }
    if stage == 3:
        asked["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(tmp_path / "zero3.json")
    for name in ("two", "alone", "other"):
        arguments = [*ppo, f"run.name={name}", "run.device=cpu"]
        rlhf(tmp_path, *arguments, command=killing, **asked)
    done = rlhf(tmp_path, *ppo, "run.name=two", *two)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after step 2" in done.stdout
    for path in sorted((tmp_path / "runs/whole/ppo").rglob("*")):
        if path.suffix in (".safetensors", ".parquet"):
            other = tmp_path / "runs/two/ppo" / path.relative_to(tmp_path / "runs/whole/ppo")
            assert other.read_bytes() == path.read_bytes(), path.name
    # What two processes of DeepSpeed's left, one takes up, and two of DDP's.
    for name, launch in (("alone", ["run.device=cpu"]), ("other", ["--launch", "cpu2"])):
        done = rlhf(tmp_path, *ppo, f"run.name={name}", *launch)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "going on after step 2" in done.stdout
        whole, run = (tmp_path / f"runs/{run}/ppo/artifact" for run in ("whole", name))
        assert_close(whole, run, TOLERANCE)


@pytest.mark.parametrize("strategy", ["ZeRO-2", "ZeRO-3"])
def test_interrupted_sft_goes_on_bit_for_bit_and_takes_states_of_others(tmp_path, rlhf, strategy):
    two = make(tmp_path)[strategy]
    form = ["sft.tuning=full", "sft.checkpoint_every=2"]
    assert rlhf(tmp_path, "sft", "c.yaml", *form, "run.name=whole", *two).returncode == 0
    killing = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    killing += ["-m", "tests.killing", "pipeline.hf_trainer:PlannedTrainer.training_step", "8"]
    stage = strategy[-1]
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    if stage == "3":
        asked["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(tmp_path / "zero3.json")
    for name, strategies in (("two", asked), ("other", {})):  # DeepSpeed's state, and DDP's
        arguments = ["sft", "c.yaml", *form, f"run.name={name}", "run.device=cpu"]
        rlhf(tmp_path, *arguments, command=killing, **strategies)
        done = rlhf(tmp_path, "sft", "c.yaml", *form, f"run.name={name}", *two)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "going on after step 6" in done.stdout
    folders = [tmp_path / f"runs/{name}/sft/artifact" for name in ("whole", "two", "other")]
    assert_close(folders[0], folders[1], tolerance=0)
    assert_close(folders[0], folders[2], TOLERANCE)


def test_logits_in_chunks_of_which_processes_have_unequal_numbers(tmp_path, rlhf):
    """ZeRO-3 gathers the output layer for each: a process with fewer makes some of nothing."""
    make(tmp_path)
    (tmp_path / "chunked.py").write_text(
        "import sys\n"
        "from pipeline.models import trunk\n"
        "from stages.cli import main\n"
        "trunk.LOGITS_AT_A_TIME = 4000  # 10 rows of 400\n"
        "main()\n"
    )
    # Slopes of log-probs (frozen output layer) in PPO, logits made again in SFT.
    form = [*FORMS["lora"], "ppo.optim.entropy_coef=0", "ppo.optim.gradient_checkpointing=true"]
    asked = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json"),
    }
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, command, more in (("one", [sys.executable], {}), ("two", two, asked)):
        verb = ["chunked.py", "run", "c.yaml", *form, f"run.name={name}"]
        done = rlhf(tmp_path, *verb, command=command, **more)
        assert done.returncode == 0, done.stdout + done.stderr
    for stage in STAGES:
        one, two = (tmp_path / "runs" / name / stage / "artifact" for name in ("one", "two"))
        assert_close(one, two, TOLERANCE)


def test_bfloat16_weights_beside_a_head_of_float32_are_refused_by_zero_3_alone(tmp_path, rlhf):
    """ZeRO-3 flattens all that it steps as one type."""
    launches = make(tmp_path)
    full = ["model.dtype=bfloat16", "sft.tuning=full", "reward.tuning=full", "reward.max_steps=2"]
    made = rlhf(tmp_path, "sft", "c.yaml", *full, *launches["ZeRO-3"])  # it has no head
    assert made.returncode == 0, made.stdout + made.stderr
    done = rlhf(tmp_path, "reward", "c.yaml", *full, *launches["ZeRO-3"])
    assert done.returncode == 2
    assert "they are bfloat16 and float32 (heads are of float32): set model.dtype" in done.stderr
    assert "Traceback" not in done.stderr
    done = rlhf(tmp_path, "reward", "c.yaml", *full, *launches["ZeRO-2"])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_type_that_deepspeed_does_not_step_is_refused(tmp_path, rlhf):
    launches = make(tmp_path)
    done = rlhf(tmp_path, "sft", "c.yaml", "model.dtype=float64", *launches["ZeRO-2"])
    assert done.returncode == 2
    assert "model.dtype is float64, but DeepSpeed ZeRO-2 steps weights of float32" in done.stderr
    assert "Traceback" not in done.stderr
