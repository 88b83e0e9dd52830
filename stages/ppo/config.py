"""The `ppo:` section: where the policy and its rewards come from, and every knob of PPO.

The defaults are those in common use (Ziegler et al. 2019, arXiv:1909.08593; InstructGPT,
arXiv:2203.02155; "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031).
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config import (
    NOT_IN_KEY,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Resource,
    Section,
    Tuning,
    VllmSection,
)
from pipeline.fit_config import OptimSection

DEFAULT_LEARNING_RATE = {"full": 3e-6, "lora": 3e-5}


class RolloutSection(Section):
    """What one iteration samples from the policy."""

    prompts_per_iteration: PositiveInt = Field(128, description="Prompts of one iteration.")
    responses_per_prompt: PositiveInt = Field(
        1, description="Responses sampled for each of these prompts."
    )
    max_new_tokens: PositiveInt = Field(128, description="Longest response, in tokens.")
    temperature: Positive = Field(
        1.0, description="Divides the logits of policy and reference, sampled and trained alike."
    )
    missing_eos: Literal["subtract", "replace", "keep"] = Field(
        "subtract",
        description="Score of a response that was cut before it ended: `subtract` takes the "
        "penalty off, `replace` sets it to minus the penalty, `keep` leaves it.",
    )
    missing_eos_penalty: NonNegative = Field(
        1.0, description="Penalty of a response without an end, in units of the score."
    )
    importance_cap: Positive | None = Field(
        2.0,
        description="Cap of the importance weights that correct for an engine whose log-probs are "
        "not the training forward's (vLLM, bf16); null leaves the mismatch uncorrected.",
    )
    generation_rows: PositiveInt = Field(
        128, description="Responses generated at a time.", json_schema_extra=NOT_IN_KEY
    )
    micro_batch_tokens: PositiveInt | None = Field(
        None,
        description="Tokens, padding included, of a forward pass that needs no gradient; null "
        "suits the device.",
        json_schema_extra=NOT_IN_KEY,
    )
    engine: Literal["native", "vllm"] = Field(
        "native", description="What samples: this program, or a vLLM server (`tuning: lora` only)."
    )
    vllm: VllmSection = Field(
        VllmSection(),
        description="The server, with `engine: vllm`.",
        json_schema_extra=NOT_IN_KEY,
    )

    @property
    def num_rollouts(self) -> int:
        """Responses of one iteration."""
        return self.prompts_per_iteration * self.responses_per_prompt


class ReferenceSection(Section):
    """Where the frozen start policy of full fine-tuning lies; an adapter's is the shared base."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="`auto` is the policy's device; `cpu` or another `cuda:N` make room there.",
        json_schema_extra=NOT_IN_KEY,
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Type of its weights; null is `model.dtype`."
    )

    @property
    def is_set(self) -> bool:
        """Whether the reference is to lie elsewhere, or in another type, than the start."""
        return self.device != "auto" or self.dtype is not None


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


class AdvantageSection(Section):
    """From scores to advantages."""

    gamma: Fraction = Field(1.0, description="Discount a token.")
    gae_lambda: Fraction = Field(0.95, description="Lambda of generalised advantage estimation.")
    whiten: bool = Field(
        True, description="Whiten advantages over all response tokens of the iteration."
    )
    whiten_rewards: bool = Field(
        False, description="Divide token rewards by their standard deviation (mean kept)."
    )
    reward_clip: Positive | None = Field(
        None, description="Scores are clipped to plus and minus this before the KL penalty."
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
        description="Weight of the language-model loss on demonstrations (InstructGPT's PPO-ptx).",
    )
    target_kl: Positive | None = Field(
        None, description="Approximate KL, in nats a token, above which an iteration stops early."
    )
    value_warmup_iterations: NonNegativeInt = Field(
        0,
        description="First iterations that train the value model only. A new value head starts at "
        "zero and needs none.",
    )


class StopSection(Section):
    """When the run has diverged, and what follows; the best policy is kept in any case."""

    action: Literal["stop", "roll_back"] = Field(
        "stop",
        description="`stop` ends the run where a rule is broken; `roll_back` goes back to the "
        "newest state with smaller learning rates, also where numbers are not finite, and stops "
        "only after `max_rollbacks` of them.",
    )
    max_rollbacks: PositiveInt = Field(
        2, description="With `action: roll_back`: how often; after that it is `stop`."
    )
    rollback_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="With `action: roll_back`: multiplies the learning rates each time."
    )
    max_kl: Positive | None = Field(
        100.0, description="Largest KL to the reference, in nats a response."
    )
    max_score_drop: Positive | None = Field(
        3.0,
        description="Largest fall of the mean score below the first iteration's, in standard "
        "deviations of the first iteration's scores.",
    )
    min_eos_share: Fraction | None = Field(
        0.2, description="Smallest EOS rate, as a share of the first iteration's."
    )
    patience: PositiveInt = Field(
        3, description="Iterations in a row that must break a rule before the run stops."
    )

    @property
    def rules(self) -> dict[str, Any]:
        """What `StopRules` is made of."""
        return self.model_dump(exclude={"action", "max_rollbacks", "rollback_factor"})


class HeldOutSection(Section):
    """Scoring of held-out prompts during training, which chooses the best policy."""

    every: PositiveInt = Field(
        10, description="Iterations between two evaluations; the last is always evaluated."
    )
    num_prompts: PositiveInt = Field(64, description="Held-out prompts of an evaluation.")
    num_texts: NonNegativeInt = Field(
        4,
        description="Fixed held-out prompts whose responses are written to texts.jsonl.",
        json_schema_extra=NOT_IN_KEY,
    )


class RecordSection(Section):
    """Which rollouts are kept on disk."""

    enabled: bool = Field(True, description="Whether rollouts are written to samples/*.parquet.")
    rows_per_file: PositiveInt = Field(2000, description="Rollouts of one Parquet file.")


class PpoSection(Section):
    """Policy optimisation with PPO against the reward model."""

    policy: Resource | None = Field(
        None,
        description="Hub id, folder or run (its SFT) to start from; default: this run's SFT.",
    )
    rewards: Resource | None = Field(
        None,
        description="A run, a folder or Hub id of a sequence-classification model, or "
        "function (file.py:name or module:name); default: the run's own reward model.",
    )
    tuning: Tuning = Field("lora", description="Train an adapter (`lora`) or all weights (`full`).")
    value: Literal["separate", "shared"] = Field(
        "separate", description="A value model of its own, or a head on the policy's trunk."
    )
    kl_coef: NonNegative = Field(
        0.05, description="Weight of the KL penalty to the reference, per nat."
    )
    iterations: PositiveInt = Field(100, description="Rounds of sampling and updating.")
    keep: Literal["best", "last"] = Field(
        "best",
        description="Policy of the artifact: the one of best held-out reward (the score after the "
        "missing-EOS rule), or the last.",
    )
    rollout: RolloutSection = Field(RolloutSection(), description="Sampling.")
    reference: ReferenceSection = Field(
        ReferenceSection(), description="Device and type of the reference, with `tuning: full`."
    )
    kl: KlSection = Field(KlSection(), description="KL control.")
    advantage: AdvantageSection = Field(AdvantageSection(), description="Advantages.")
    optim: PpoOptimSection = Field(PpoOptimSection(), description="Objective and optimiser.")
    stop: StopSection = Field(StopSection(), description="Rules that stop a diverged run.")
    held_out: HeldOutSection = Field(HeldOutSection(), description="Held-out scoring.")
    checkpoint_every: PositiveInt = Field(
        10,
        description="Iterations between two states that an interrupted run goes on from.",
        json_schema_extra=NOT_IN_KEY,
    )
    samples: RecordSection = Field(
        RecordSection(), description="Rollouts kept on disk.", json_schema_extra=NOT_IN_KEY
    )

    @model_validator(mode="before")
    @classmethod
    def _learning_rate_follows_tuning(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        optim = data.get("optim", {})
        rate = DEFAULT_LEARNING_RATE.get(str(data.get("tuning", "lora")))
        if rate is None or not isinstance(optim, dict) or "learning_rate" in optim:
            return data
        return {**data, "optim": {**optim, "learning_rate": rate}}

    @model_validator(mode="after")
    def _minibatches_divide_rollouts(self) -> "PpoSection":
        rollout, minibatches = self.rollout, self.optim.minibatches
        size, rest = divmod(rollout.num_rollouts, minibatches)
        if rest:
            raise ValueError(
                f"ppo.rollout.prompts_per_iteration x ppo.rollout.responses_per_prompt = "
                f"{rollout.prompts_per_iteration} x {rollout.responses_per_prompt} = "
                f"{rollout.num_rollouts} rollouts, not divisible by ppo.optim.minibatches = "
                f"{minibatches} ({rollout.num_rollouts} = {minibatches} x {size} + {rest}): "
                "change one of the three"
            )
        return self

    @model_validator(mode="after")
    def _vllm_takes_adapters_only(self) -> "PpoSection":
        if self.rollout.engine == "vllm" and self.tuning != "lora":
            raise ValueError(
                f"ppo.rollout.engine = vllm needs ppo.tuning = lora, not {self.tuning}: an adapter "
                "can be handed to the server, all weights of a model cannot. Set ppo.tuning to "
                "lora or ppo.rollout.engine to native"
            )
        return self

    @model_validator(mode="after")
    def _warmup_leaves_iterations(self) -> "PpoSection":
        warmup = self.optim.value_warmup_iterations
        if warmup >= self.iterations:
            raise ValueError(
                f"ppo.optim.value_warmup_iterations = {warmup} leaves none of ppo.iterations = "
                f"{self.iterations} to train the policy: lower it or raise ppo.iterations"
            )
        return self

    @model_validator(mode="after")
    def _a_shared_reference_stays_where_it_is(self) -> "PpoSection":
        if self.tuning == "lora" and self.reference.is_set:
            asked = "device" if self.reference.device != "auto" else "dtype"
            raise ValueError(
                f"ppo.reference.{asked} is {getattr(self.reference, asked)} but ppo.tuning is "
                "lora, whose reference is the policy's own base and costs no memory; a reference "
                "elsewhere would be a second base: remove ppo.reference or set ppo.tuning to full"
            )
        return self

    @model_validator(mode="after")
    def _shared_value_has_no_own_rate(self) -> "PpoSection":
        rate = self.optim.value_learning_rate
        if self.value == "shared" and rate is not None:
            raise ValueError(
                f"ppo.optim.value_learning_rate = {rate} has no effect with ppo.value = shared, "
                "which trains one trunk with one rate: remove it or set ppo.value to separate"
            )
        return self
