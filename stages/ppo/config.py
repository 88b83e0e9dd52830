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
    Positive,
    PositiveInt,
    Resource,
    Section,
    Tuning,
)
from pipeline.reward_list import Entries, repeated_name
from stages.ppo.learning_config import (
    DEFAULT_LEARNING_RATE,
    AdvantageSection,
    KlSection,
    PpoOptimSection,
)
from stages.ppo.rejection_config import RejectionSection, check_rejection
from stages.ppo.rollout_config import HeldOutSection, RecordSection, RolloutSection


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


class CurriculumSection(Section):
    """Easy prompts first (Bengio et al. 2009, doi:10.1145/1553374.1553380)."""

    column: str | None = Field(
        None, description="Prompt column with a number, by which prompts open up; null: no order."
    )
    order: Literal["ascending", "descending"] = Field(
        "ascending", description="Whether small or large numbers come first."
    )
    start_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="Share of the prompts, the first by that order, of the first iteration."
    )
    pacing: Literal["linear", "root"] = Field(
        "linear",
        description="How the share grows to 1: `linear`, or `root` of the iteration, early fast "
        "(Platanios et al. 2019, arXiv:1903.09848).",
    )
    iterations: PositiveInt | None = Field(
        None, description="Iteration from which on all prompts are open; null: half of them."
    )

    @model_validator(mode="after")
    def _needs_a_column(self) -> "CurriculumSection":
        without = self.model_dump(exclude={"column"}, exclude_defaults=True)
        if self.column is None and without:
            name, value = next(iter(without.items()))
            raise ValueError(
                f"ppo.curriculum.{name} = {value} has no effect without ppo.curriculum.column: "
                "name the prompt column or remove it"
            )
        return self


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


class PpoSection(Section):
    """Policy optimisation against the reward model: PPO, or a cheaper baseline beside it."""

    algorithm: Literal["ppo", "rejection_sampling"] = Field(
        "ppo",
        description="`ppo`, or `rejection_sampling`: cross-entropy on the best of several responses"
        " to each prompt, without a value model (docs/baselines.md).",
    )
    policy: Resource | None = Field(
        None,
        description="Hub id, folder or run (its SFT) to start from; default: this run's SFT.",
    )
    rewards: Literal["own"] | Resource | Entries | None = Field(
        None,
        description="A run, a folder or Hub id of a sequence-classification model, a function "
        "(file.py:name or module:name), an address, or a list of sources whose weighted scores add "
        "up (docs/rewards.md); default: the run's own reward model (`own`).",
        union_mode="left_to_right",
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
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Decay, an iteration, of an average of the policy's weights: held-out "
        "evaluations and `keep` are then of the average, and the trained policy samples.",
    )
    rollout: RolloutSection = Field(RolloutSection(), description="Sampling.")
    rejection: RejectionSection = Field(
        RejectionSection(), description="What `algorithm: rejection_sampling` keeps."
    )
    curriculum: CurriculumSection = Field(
        CurriculumSection(), description="Order of the prompts, from easy to hard."
    )
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
    def _settings_fit_the_algorithm(self) -> "PpoSection":
        check_rejection(self)
        return self

    @model_validator(mode="after")
    def _minibatches_divide_rollouts(self) -> "PpoSection":
        prompts, minibatches = self.rollout.prompts_per_iteration, self.optim.minibatches
        field, each = "ppo.rollout.responses_per_prompt", self.rollout.responses_per_prompt
        if self.algorithm == "rejection_sampling":
            field, each = "ppo.rejection.keep", self.rejection.keep
        total = prompts * each
        size, rest = divmod(total, minibatches)
        if rest:
            raise ValueError(
                f"ppo.rollout.prompts_per_iteration x {field} = {prompts} x {each} = {total} "
                f"rollouts, not divisible by ppo.optim.minibatches = {minibatches} "
                f"({total} = {minibatches} x {size} + {rest}): change one of the three"
            )
        return self

    @model_validator(mode="after")
    def _sources_have_names_of_their_own(self) -> "PpoSection":
        if name := repeated_name(self.rewards):
            raise ValueError(
                f"ppo.rewards names two sources {name!r}, which metrics and samples could not tell "
                "apart: rename one"
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
    def _curriculum_opens_in_time(self) -> "PpoSection":
        asked = self.curriculum.iterations
        if asked is not None and asked > self.iterations:
            raise ValueError(
                f"ppo.curriculum.iterations = {asked} is after the last of ppo.iterations = "
                f"{self.iterations}, so that some prompts would never be asked: lower the first"
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
