"""The `reward` section: the reward model trained from rankings."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import NonNegative, Positive, PositiveInt, Resource, Section, Tuning
from pipeline.fit_config import FitSection, OptimSection


class RewardOptimSection(OptimSection):
    """AdamW and its schedule, with the defaults of reward modelling."""

    learning_rate: Positive = Field(
        9e-6, description="Peak learning rate (9e-6 is InstructGPT's; LoRA wants ten times more)."
    )


class NormalisationSection(Section):
    """The zero (and unit) of the score, from the SFT policy's own responses."""

    mode: Literal["shift", "shift_and_scale", "none"] = Field(
        "shift",
        description="`shift` makes the mean score of the SFT policy's responses 0; "
        "`shift_and_scale` their standard deviation 1 too; `none` leaves the head as trained.",
    )
    num_samples: Annotated[int, Field(ge=2)] = Field(
        256, description="SFT responses scored for it, one to each of as many training prompts."
    )
    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest sampled response, in tokens; null: data.max_response_tokens."
    )
    temperature: NonNegative = Field(
        1.0, description="Sampling temperature of those responses; 0 is greedy."
    )


class RewardSection(FitSection):
    """Reward model: a scalar head on the SFT model, or on any base, trained from rankings."""

    tuning: Tuning = Field(
        "full",
        description="`full` trains a copy of all weights; `lora` an adapter on the shared base.",
    )
    start: Literal["sft", "base"] = Field(
        "sft", description="Weights to start from: the run's SFT model, or its base before SFT."
    )
    base: Resource | None = Field(
        None,
        description="Hub id or folder of another base to start from, with its own tokenizer: a "
        "decoder, or an encoder (BERT, RoBERTa, DeBERTa, ModernBERT, ...); docs/reward-models.md.",
    )
    base_revision: str | None = Field(
        None, description="Branch, tag or commit of `reward.base` on the Hub."
    )
    pooling: Literal["auto", "first", "mean"] = Field(
        "auto",
        description="What a score reads of an encoder: its `first` token's state, the `mean` of "
        "all; `auto` is how the base itself was pooled. Decoders are read at their last token.",
    )
    max_prompt_tokens: PositiveInt | None = Field(
        None,
        description="Longest prompt in tokens of `reward.base`; null: data.max_prompt_tokens. "
        "Prompts are cut further, from the front, to the base's positions.",
    )
    max_response_tokens: PositiveInt | None = Field(
        None,
        description="Longest response in tokens of `reward.base`; null: data.max_response_tokens; "
        "at most half of the base's positions.",
    )
    loss: Literal["pairwise", "plackett_luce"] = Field(
        "pairwise",
        description="`pairwise`: mean -log sigmoid(score difference) over all pairs of a ranking "
        "(Bradley-Terry, K-wise); `plackett_luce`: likelihood of the whole order.",
    )
    margin_coef: NonNegative = Field(
        0.0,
        description="Margin a pair must exceed, in score units for each unit of difference "
        "between its ratings; 0 is off; rankings without ratings have no margin.",
    )
    batch_size: PositiveInt = Field(
        64, description="Rankings (prompts) an optimiser step, over all processes."
    )
    optim: RewardOptimSection = Field(RewardOptimSection(), description="AdamW and its schedule.")
    normalisation: NormalisationSection = Field(
        NormalisationSection(), description="Zero and unit of the score, set after training."
    )

    @model_validator(mode="after")
    def _settings_of_another_base(self) -> "RewardSection":
        if self.base is not None:
            if self.start == "base":
                raise ValueError(
                    f"reward.start is base but reward.base is {self.base!r}, which is where the "
                    "reward model starts: remove one of them"
                )
            return self
        given = {
            "base_revision": self.base_revision,
            "pooling": None if self.pooling == "auto" else self.pooling,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_response_tokens": self.max_response_tokens,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"reward.{name} is {value} but belongs to another base, and reward.base names "
                    f"none: set reward.base or remove reward.{name}"
                )
        return self

    @model_validator(mode="after")
    def _margins_are_pairwise(self) -> "RewardSection":
        if self.loss == "plackett_luce" and self.margin_coef:
            raise ValueError(
                f"reward.margin_coef is {self.margin_coef} but reward.loss is plackett_luce, "
                "which has no pairs: set reward.margin_coef to 0 or reward.loss to pairwise"
            )
        return self
