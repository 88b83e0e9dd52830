"""What optimisers, and SFT and reward training, have in common in a run's configuration."""

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field

from pipeline.config import NOT_IN_KEY, Fraction, NonNegative, Positive, PositiveInt, Section


class OptimSection(Section):
    """AdamW and its schedule."""

    learning_rate: Positive = Field(1e-5, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Decay of the learning rate to 0 after the warm-up."
    )
    warmup_fraction: Fraction = Field(0.0, description="Share of the steps that warm up linearly.")
    weight_decay: NonNegative = Field(0.0, description="Decoupled weight decay of AdamW.")
    adam_beta1: Fraction = Field(0.9, description="Decay of AdamW's first moment.")
    adam_beta2: Fraction = Field(0.95, description="Decay of AdamW's second moment.")
    adam_eps: Positive = Field(1e-8, description="Epsilon of AdamW.")
    max_grad_norm: Positive = Field(1.0, description="Norm to which gradients are clipped.")


def _steps_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(
            f"{value} is neither a whole number of steps (1, 2, ...) nor a share of all steps "
            "(above 0 and below 1)"
        )
    return value


class FitSection(Section):
    """What SFT and reward training have in common (`pipeline.hf_trainer`)."""

    epochs: Positive = Field(1.0, description="Passes over the training rows.")
    max_steps: PositiveInt | None = Field(
        None, description="Optimiser steps after which training ends, whatever `epochs` says."
    )
    batch_size: PositiveInt = Field(
        32, description="Rows (demonstrations, rankings) an optimiser step, over all processes."
    )
    micro_batch_tokens: PositiveInt | None = Field(
        None,
        description="Most tokens, padding included, in one forward pass; null suits the device. "
        "The responses of one ranking stay together even if they exceed it.",
        json_schema_extra=NOT_IN_KEY,
    )
    optim: OptimSection = Field(OptimSection(), description="AdamW and its schedule.")
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, slower.",
        json_schema_extra=NOT_IN_KEY,
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
    checkpoint_every: Annotated[Positive, AfterValidator(_steps_or_share)] = Field(
        0.1,
        description="Optimiser steps between two states that an interrupted training goes on from; "
        "below 1 it is a share of all steps.",
        json_schema_extra=NOT_IN_KEY,
    )
    log_every: PositiveInt = Field(
        10,
        description="Optimiser steps between rows of metrics.",
        json_schema_extra=NOT_IN_KEY,
    )

    def steps_between(self, what: Literal["eval_every", "checkpoint_every"], total: int) -> int:
        """Optimiser steps between two evaluations or states, of `total`."""
        every: float = getattr(self, what)
        return int(every) if every >= 1 else max(1, math.ceil(every * total))

    def sized(self, micro_batch_tokens: int) -> Self:
        """The same settings with micro-batches of this many tokens."""
        return self.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
