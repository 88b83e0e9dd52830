"""How weights, gradients and optimiser lie over the processes: what the launch asks for.

accelerate launches and configures every strategy. DDP it also carries out; FSDP2 and DeepSpeed are
called here (`sharding`, `zero`), on GPUs and on processors alike: accelerate has neither on a
processor, takes one model an optimiser, where PPO has up to four models and trains two of them, and
hands DeepSpeed's mixed precision and transformers' loading over to DeepSpeed.
"""

import os
from dataclasses import dataclass

from pipeline.config import ModelSection
from pipeline.environment import num_processes
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Strategy:
    """What of a training a process holds a part of only; the rest it holds whole."""

    name: str
    shards: bool  # weights: every pass is a collective
    zero_stage: int = 0  # DeepSpeed's, if it is DeepSpeed that does it

    @property
    def in_step(self) -> bool:
        """Whether every pass with gradient is a collective: processes make as many as any."""
        return self.shards or self.zero_stage > 0

    @property
    def divides(self) -> tuple[str, ...]:
        """What of a model's cost lies over the processes (see `footprint.Cost`)."""
        if self.shards:
            return ("weights", "gradients", "optimiser")
        return ("gradients", "optimiser") if self.zero_stage else ()

    def refuse(self, model: ModelSection) -> None:
        """Refuse models that it would train otherwise than is asked, or not at all.

        Raises:
            ConfigError: names the setting and the remedy.
        """
        if self.zero_stage and model.dtype in ("float64", "float16"):
            raise ConfigError(
                f"model.dtype is {model.dtype}, but {self.name} steps weights of float32: set "
                "model.dtype to float32 (and run.mixed_precision to bf16 for speed), or start with "
                "--launch ddp or fsdp2"
            )
        if self.in_step and model.quantization != "none":
            raise ConfigError(
                f"model.quantization is {model.quantization}, whose weights {self.name} cannot "
                "take apart: set model.quantization to none, or start with --launch ddp"
            )


DDP = Strategy("DDP", shards=False)
FSDP2 = Strategy("FSDP2", shards=True)
ZERO_2 = Strategy("DeepSpeed ZeRO-2", shards=False, zero_stage=2)
ZERO_3 = Strategy("DeepSpeed ZeRO-3", shards=True, zero_stage=3)
_BY_NAME = {strategy.name: strategy for strategy in (DDP, FSDP2, ZERO_2, ZERO_3)}
# accelerate's words for it, which its launcher sets; ours, once it is ours to do.
_FSDP, _DEEPSPEED, _OURS = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "RLHF_STRATEGY"


def claim() -> Strategy:
    """What the launch asks for; of FSDP2 and DeepSpeed accelerate hears no more from here on.

    Raises:
        ConfigError: it asks for the first FSDP, or for another ZeRO stage than 2 and 3.
    """
    asked = DDP
    if _is_set(_FSDP):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "the launch asks for FSDP of version 1: set fsdp_version to 2 in its configuration "
                "(configs/accelerate/fsdp2.yaml is one)"
            )
        if _is_set("FSDP_OFFLOAD_PARAMS"):
            raise ConfigError(
                "the launch asks for fsdp_offload_params, which no stage does: set it to false in "
                "its configuration"
            )
        asked = FSDP2
    elif _is_set(_DEEPSPEED):
        asked = _zero()
    if asked is not DDP:
        # accelerate and transformers would shard, load on the meta device and wrap once more.
        os.environ.pop(_FSDP, None)
        os.environ.pop(_DEEPSPEED, None)
        os.environ[_OURS] = asked.name
    found = _BY_NAME[os.environ.get(_OURS, DDP.name)]
    return DDP if found is FSDP2 and num_processes() == 1 else found


def _zero() -> Strategy:
    from pipeline.distributed.zero_settings import settings

    stage = settings()["zero_optimization"]["stage"]
    if stage not in (2, 3):
        raise ConfigError(
            f"the launch asks for stage {stage} of DeepSpeed's ZeRO: set zero_stage to 2 or 3 in "
            "its configuration (configs/accelerate/deepspeed-zero2.yaml and -zero3.yaml are such)"
        )
    return ZERO_2 if stage == 2 else ZERO_3


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
