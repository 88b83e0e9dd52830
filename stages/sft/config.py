"""The `sft` section: supervised fine-tuning on demonstrations."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.config import OptimSection, Positive, PositiveInt, Section, Tuning


def _steps_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(
            f"{value} is neither a whole number of steps (1, 2, ...) nor a share of all steps "
            "(above 0 and below 1)"
        )
    return value


class SftOptimSection(OptimSection):
    """AdamW and its schedule, with the defaults of supervised fine-tuning."""

    learning_rate: Positive = Field(
        2e-5, description="Peak learning rate (LoRA wants about ten times more)."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Decay of the learning rate to 0 after the warm-up."
    )
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.03, description="Share of the steps that warm up linearly."
    )


class SftSection(Section):
    """Supervised fine-tuning: cross-entropy on the response tokens of demonstrations."""

    tuning: Tuning = Field(
        "full", description="`full` trains all weights; `lora` an adapter on the frozen base."
    )
    epochs: Positive = Field(3.0, description="Passes over the training demonstrations.")
    max_steps: PositiveInt | None = Field(
        None, description="Optimiser steps after which training ends, whatever `epochs` says."
    )
    batch_size: PositiveInt = Field(
        32, description="Demonstrations an optimiser step, over all processes."
    )
    micro_batch_tokens: PositiveInt = Field(
        8192,
        description="Most tokens, padding included, in one forward pass; sets memory, not results.",
    )
    optim: SftOptimSection = Field(SftOptimSection(), description="AdamW and its schedule.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    eval_every: Annotated[Positive, AfterValidator(_steps_or_share)] = Field(
        0.25,
        description="Optimiser steps between evaluations; below 1 it is a share of all steps.",
    )
    eval_rows: PositiveInt | None = Field(
        None, description="Evaluate on the first held-out rows only, this many; null takes all."
    )
    patience: PositiveInt | None = Field(
        None,
        description="Stop after this many evaluations without a lower loss; null never stops.",
    )
    keep: Literal["best", "last"] = Field(
        "best", description="Weights kept: those of the lowest held-out loss, or the last."
    )
    log_every: PositiveInt = Field(10, description="Optimiser steps between rows of metrics.")
