"""How PPO learns from rollouts: KL control, advantages, objective and optimiser."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import (
    NOT_IN_KEY,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
)
from pipeline.fit_config import OptimSection

DEFAULT_LEARNING_RATE = {"full": 3e-6, "lora": 3e-5}


class KlSection(Section):
    """How the coefficient of the KL penalty moves, and which KL is logged."""

    controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="`adaptive` steers the KL to `target`, starting from `ppo.kl_coef`."
    )
    target: Positive = Field(
        6.0, description="KL that the adaptive controller aims at, in nats a response."
    )
    horizon: Positive = Field(
        10_000, description="Responses over which the adaptive controller corrects an error."
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="Estimator of the logged KL; the penalty itself always uses k1."
    )
    column: str | None = Field(
        None,
        description="Prompt column that names a prompt's dataset: score, KL and coefficient are "
        "logged for each of its values, and `adaptive` steers each of them apart.",
    )
    coefs: dict[str, NonNegative] = Field(
        default_factory=dict,
        description="By value of `column`: the weight of the KL penalty, instead of `ppo.kl_coef`.",
    )
    targets: dict[str, Positive] = Field(
        default_factory=dict,
        description="By value of `column`: what `adaptive` aims at, instead of `target`.",
    )

    @model_validator(mode="after")
    def _values_are_those_of_a_column(self) -> "KlSection":
        for name in ("coefs", "targets"):
            given = getattr(self, name)
            if given and self.column is None:
                raise ValueError(
                    f"ppo.kl.{name} = {given} is by the values of a prompt column, but "
                    f"ppo.kl.column is not set: name the column or remove ppo.kl.{name}"
                )
        if self.targets and self.controller == "fixed":
            raise ValueError(
                f"ppo.kl.targets = {self.targets} has no effect with ppo.kl.controller = fixed: "
                "set it to adaptive or remove ppo.kl.targets"
            )
        return self


class AdvantageSection(Section):
    """From scores to advantages."""

    gamma: Fraction = Field(1.0, description="Discount a token.")
    gae_lambda: Fraction = Field(0.95, description="Lambda of generalised advantage estimation.")
    value_lambda: Fraction | None = Field(
        None,
        description="Lambda of the value model's returns (decoupled GAE; 1 is the Monte Carlo "
        "return); null is `gae_lambda`.",
    )
    length_adaptive_alpha: Positive | None = Field(
        None,
        description="Lambda of the policy's advantages is 1 - 1 / (alpha x tokens of the response) "
        "instead of `gae_lambda` (VAPO has 0.05); null keeps it the same for all.",
    )
    whiten: bool = Field(
        True, description="Whiten advantages over all response tokens of the iteration."
    )
    whiten_rewards: bool = Field(
        False, description="Divide token rewards by their standard deviation (mean kept)."
    )
    reward_clip: Positive | None = Field(
        None, description="Scores are clipped to plus and minus this before the KL penalty."
    )
    reference_length: Positive | None = Field(
        None,
        description="Length-normalised scores: each times this / the tokens of its response, "
        "before missing-EOS rule and clipping; null leaves scores as they are.",
    )


class PpoOptimSection(OptimSection):
    """The clipped objective and its optimiser."""

    learning_rate: Positive = Field(
        DEFAULT_LEARNING_RATE["lora"],
        description="Peak learning rate; unset, 3e-5 with `tuning: lora` and 3e-6 with `full`.",
    )
    value_learning_rate: Positive | None = Field(
        None, description="Peak learning rate of a separate value model; unset, learning_rate."
    )
    adam_eps: Positive = Field(1e-5, description="Epsilon of AdamW.")
    ppo_epochs: PositiveInt = Field(4, description="Passes over the rollouts of an iteration.")
    minibatches: PositiveInt = Field(
        1, description="Optimiser steps a pass: the rollouts are divided into this many parts."
    )
    micro_batch_tokens: PositiveInt | None = Field(
        None,
        description="Tokens, padding included, of one forward and backward pass; null suits the "
        "device. Halved where memory runs out.",
        json_schema_extra=NOT_IN_KEY,
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, slower.",
        json_schema_extra=NOT_IN_KEY,
    )
    clip_range: Positive = Field(0.2, description="Clip range of the probability ratio.")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Bound of the ratio where advantages are negative (3 in common use)."
    )
    value_clip_range: Positive | None = Field(
        0.2, description="Clip range of new values round the old ones; null switches it off."
    )
    value_coef: NonNegative = Field(0.1, description="Weight of the value loss.")
    entropy_coef: NonNegative = Field(0.0, description="Weight of the entropy bonus.")
    ptx_coef: NonNegative = Field(
        0.0,
        description="Weight of the language-model loss on demonstrations (InstructGPT's PPO-ptx), "
        "in mean nats a token.",
    )
    ptx_rows: PositiveInt | None = Field(
        None,
        description="Demonstrations an optimiser step draws; null: as many as it has rollouts.",
    )
    pretraining_coef: NonNegative = Field(
        0.0,
        description="Weight of the language-model loss on `data.pretraining`, in mean nats a "
        "token.",
    )
    pretraining_rows: PositiveInt | None = Field(
        None,
        description="Chunks of pretraining text an optimiser step draws (InstructGPT: 8 times its "
        "rollouts); null: as many as it has rollouts.",
    )
    target_kl: Positive | None = Field(
        None, description="Approximate KL, in nats a token, above which an iteration stops early."
    )
    value_warmup_iterations: NonNegativeInt = Field(
        0,
        description="First iterations that train the value model only. A new value head starts at "
        "zero and needs none.",
    )

    @model_validator(mode="after")
    def _rows_have_a_weight(self) -> "PpoOptimSection":
        for name in ("ptx", "pretraining"):
            rows = getattr(self, f"{name}_rows")
            if rows is not None and not getattr(self, f"{name}_coef"):
                raise ValueError(
                    f"ppo.optim.{name}_rows = {rows} has no effect with ppo.optim.{name}_coef = 0: "
                    "set a weight or remove it"
                )
        return self
