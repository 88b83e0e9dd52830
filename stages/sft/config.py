"""The `sft` section: supervised fine-tuning on demonstrations."""

from typing import Literal

from pydantic import Field

from pipeline.config import Fraction, Positive, Tuning
from pipeline.fit_config import FitSection, OptimSection


class SftOptimSection(OptimSection):
    """AdamW and its schedule, with the defaults of supervised fine-tuning."""

    learning_rate: Positive = Field(
        2e-5, description="Peak learning rate (LoRA wants about ten times more)."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Decay of the learning rate to 0 after the warm-up."
    )
    warmup_fraction: Fraction = Field(0.03, description="Share of the steps that warm up linearly.")


class SftSection(FitSection):
    """Supervised fine-tuning: cross-entropy on the response tokens of demonstrations."""

    tuning: Tuning = Field(
        "full", description="`full` trains all weights; `lora` an adapter on the frozen base."
    )
    all_turns: bool = Field(
        False,
        description="Train on every assistant turn of a conversation, each with the turns before "
        "it as its prompt; otherwise on the last one.",
    )
    epochs: Positive = Field(3.0, description="Passes over the training demonstrations.")
    optim: SftOptimSection = Field(SftOptimSection(), description="AdamW and its schedule.")
