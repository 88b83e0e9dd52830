"""DeepSpeed's configuration: accelerate's settings, and what a training needs them to be."""

import copy
import os
import shutil
import warnings
from importlib.util import find_spec
from typing import Any

import torch

from pipeline.config import RunSection
from pipeline.errors import ConfigError

# What a configuration file may not say, for the run's own configuration says it.
_OURS = ("optimizer", "scheduler", "fp16", "bf16", "torch_autocast")


def refuse_without_deepspeed() -> None:
    """Raise the ConfigError that says how to install it."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "the launch asks for DeepSpeed, which is not installed: "
            "pip install 'rlhf-pipeline[deepspeed]'"
        )


def settings() -> dict[str, Any]:
    """DeepSpeed's configuration as accelerate's launcher was given it.

    Raises:
        ConfigError: DeepSpeed is not installed, or something in it is not for here.
    """
    refuse_without_deepspeed()
    from accelerate import DeepSpeedPlugin

    try:
        said = DeepSpeedPlugin().deepspeed_config
    except ValueError as error:  # the configuration names a file of DeepSpeed's and more than that
        raise ConfigError(f"the launch's configuration of DeepSpeed: {error}") from error
    found: dict[str, Any] = _without_auto(copy.deepcopy(said))
    zero = found["zero_optimization"]
    for what in ("offload_optimizer", "offload_param"):
        device = (zero.get(what) or {}).get("device", "none")
        if device != "none":
            raise ConfigError(
                f"the launch asks DeepSpeed to offload to {device} ({what}_device), which no stage "
                f"does: set {what}_device to none in its configuration"
            )
        zero.pop(what, None)
    doubled = [name for name in _OURS if name in found]
    if doubled:
        raise ConfigError(
            f"DeepSpeed's configuration file says {', '.join(doubled)}, which the run's own "
            "configuration does (optim, run.mixed_precision): take it out"
        )
    return found


def engine(run: RunSection, device: torch.device) -> dict[str, Any]:
    """The configuration of an engine that trains as the other strategies do.

    Raises:
        ConfigError: DeepSpeed cannot build what it needs on a processor.
    """
    _start(device)
    found = settings()
    found.pop("train_batch_size", None)
    return found | {
        # A step's passes and their weights are ours to count, and so is clipping.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Autocast over float32 weights, as elsewhere; sums over processes in float32. (`bf16` would
        # make the weights themselves bfloat16.)
        "torch_autocast": {
            "enabled": run.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


def _start(device: torch.device) -> None:
    if device.type == "cpu":
        missing = [tool for tool in ("ninja", "g++") if shutil.which(tool) is None]
        if missing:
            raise ConfigError(
                f"DeepSpeed on a processor compiles a part of itself, and {' and '.join(missing)} "
                "is not on the PATH: install it (and activate the environment), or use --launch "
                "cpu2 or fsdp2"
            )
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed calls collectives by names that torch is about to change.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    if not torch.distributed.is_initialized():  # accelerate needs no group for one process
        deepspeed.init_distributed("gloo" if device.type == "cpu" else None)


def _without_auto(settings: Any) -> Any:
    """Without what `auto` leaves to transformers' arguments: DeepSpeed's own defaults hold."""
    if not isinstance(settings, dict):
        return settings
    return {name: _without_auto(value) for name, value in settings.items() if value != "auto"}
