"""The configurations of configs/accelerate/ are ones that accelerate takes, and are complete."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from pipeline.config import ModelSection
from pipeline.distributed import strategy, zero_settings
from pipeline.distributed.launch import SHIPPED, Machines
from pipeline.errors import ConfigError

PATHS = sorted(SHIPPED.glob("*.yaml"))
configurations = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def test_there_is_one_of_each_strategy() -> None:
    one_machine = {"cpu2", "ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"}
    many = {f"{name}-multi-node" for name in one_machine - {"cpu2"}}
    assert {path.stem for path in PATHS} >= one_machine | many


@configurations
def test_accelerate_takes_it(path: Path) -> None:
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "-m", "stages", "ppo"])
    args, defaults, _ = _validate_launch_command(parsed)
    assert defaults.to_dict().items() >= {"num_processes": read(path)["num_processes"]}.items()
    kind = read(path)["distributed_type"]
    assert args.multi_gpu == (kind == "MULTI_GPU")
    assert args.use_fsdp == (kind == "FSDP")
    assert args.use_deepspeed == (kind == "DEEPSPEED")
    assert args.training_script_args == ["ppo"]


@configurations
def test_it_leaves_precision_and_device_to_the_run(path: Path) -> None:
    content = read(path)
    assert content["compute_environment"] == "LOCAL_MACHINE"
    assert (content["mixed_precision"], content["use_cpu"]) == ("no", False)
    assert content["num_processes"] >= 2
    assert content["num_processes"] % content["num_machines"] == 0


@configurations
def test_a_strategy_says_what_it_is(path: Path) -> None:
    content = read(path)
    if path.stem.startswith("fsdp2"):
        assert content["fsdp_config"]["fsdp_version"] == 2
    if path.stem.startswith("deepspeed"):
        settings = content["deepspeed_config"]
        assert settings["zero_stage"] == int(path.stem.removesuffix("-multi-node")[-1])
        assert settings["offload_optimizer_device"] == settings["offload_param_device"] == "none"
        assert settings.get("zero3_init_flag", False) is False


@pytest.mark.parametrize(
    "path", [path for path in PATHS if path.stem.endswith("multi-node")], ids=lambda path: path.stem
)
def test_several_machines_have_a_rank_an_address_and_a_rendezvous(path: Path) -> None:
    content = read(path)
    assert content["num_machines"] == 2
    names = ("machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "same_network")
    assert all(name in content for name in names)
    assert content["rdzv_backend"] == "static"
    if "deepspeed_config" in content:  # not pdsh, which starts the other machines by itself
        assert content["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    words = ["--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--config_file", str(path)]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "x.py"]))
    assert (args.machine_rank, args.main_process_ip) == (1, "10.0.0.1")


# --- what the launch asks for ---


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a process that accelerate started, with DeepSpeed installed."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "RLHF_STRATEGY")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(zero_settings, "find_spec", lambda _: True)
    return monkeypatch


def test_fsdp2_is_claimed_from_accelerate(asked: pytest.MonkeyPatch) -> None:
    asked.setenv("RLHF_STRATEGY", "")  # put back after the test
    asked.delenv("RLHF_STRATEGY")
    asked.setenv("WORLD_SIZE", "2")
    asked.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="set fsdp_version to 2"):
        strategy.claim()
    asked.setenv("FSDP_VERSION", "2")
    asked.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ConfigError, match="fsdp_offload_params, which no stage does"):
        strategy.claim()
    asked.setenv("FSDP_OFFLOAD_PARAMS", "false")
    assert strategy.claim() is strategy.FSDP2
    assert "ACCELERATE_USE_FSDP" not in os.environ  # accelerate would do it once more
    assert strategy.claim() is strategy.FSDP2


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_claimed_from_accelerate(asked: pytest.MonkeyPatch, stage: int) -> None:
    asked.setenv("RLHF_STRATEGY", "")  # put back after the test
    asked.delenv("RLHF_STRATEGY")
    asked.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    asked.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    found = strategy.claim()
    assert found.name == f"DeepSpeed ZeRO-{stage}"
    assert (found.in_step, found.shards) == (True, stage == 3)
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ  # transformers would shard at loading
    assert strategy.claim() == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ZERO_STAGE": "1"}, "stage 1 of DeepSpeed's ZeRO: set zero_stage to 2 or 3"),
        (
            {"OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "set offload_optimizer_device to none",
        ),
        ({"OFFLOAD_PARAM_DEVICE": "cpu", "ZERO_STAGE": "3"}, "set offload_param_device to none"),
    ],
)
def test_settings_that_are_not_for_here_are_refused(
    asked: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    asked.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in settings.items():
        asked.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(ConfigError, match=message):
        strategy.claim()


def test_a_missing_deepspeed_is_said_before_anything_starts(asked: pytest.MonkeyPatch) -> None:
    asked.setattr(zero_settings, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-pipeline\[deepspeed\]'"):
        Machines().settings(SHIPPED / "deepspeed-zero3.yaml")


@pytest.mark.parametrize(
    ("model", "found", "message"),
    [
        ({"dtype": "float64"}, strategy.ZERO_2, "model.dtype is float64, but DeepSpeed ZeRO-2"),
        ({"dtype": "float16"}, strategy.ZERO_3, "set model.dtype to float32"),
        ({"quantization": "8bit"}, strategy.ZERO_3, "set model.quantization to none"),
        ({"quantization": "4bit"}, strategy.FSDP2, "4bit, whose weights FSDP2 cannot take apart"),
    ],
)
def test_models_that_a_strategy_cannot_train_are_refused(
    model: dict[str, str], found: strategy.Strategy, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        found.refuse(ModelSection(path="x", **model))  # type: ignore[arg-type]
    strategy.DDP.refuse(ModelSection(path="x", **model))  # type: ignore[arg-type]


def test_a_processor_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pipeline.config import RunSection

    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="ninja and g\\+\\+ is not on the PATH"):
        zero_settings.engine(RunSection(name="r"), torch.device("cpu"))
