"""The configuration of a run: the common sections, and one section a stage, owned by its stage.

Checks here are those that no single section can make. They look at values only, so they end before
any model or dataset is opened.
"""

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import Field, model_validator

from pipeline.config import (
    DataSection,
    LoraSection,
    ModelSection,
    RunSection,
    Section,
)
from pipeline.errors import ConfigError, ModelError
from pipeline.generation_config import GenerationSection
from pipeline.reward_list import uses_own
from pipeline.vllm_config import vllm_refusals
from stages.evaluation.config import EvaluationSection
from stages.export.config import CLASSIFIED, ExportSection
from stages.ppo.config import PpoSection
from stages.reward.config import RewardSection
from stages.sft.config import SftSection


class RunConfig(Section):
    """One run: a YAML file with these sections, of which only `model` has to be there."""

    run: RunSection = Field(RunSection(), description="Where the run lives; seed and device.")
    model: ModelSection = Field(description="The base model.")
    lora: LoraSection = Field(LoraSection(), description="Shape of every LoRA adapter.")
    data: DataSection = Field(DataSection(), description="Datasets, checks and split.")
    generation: GenerationSection = Field(
        GenerationSection(), description="How every stage samples responses."
    )
    sft: SftSection = Field(SftSection(), description="Supervised fine-tuning.")
    reward: RewardSection = Field(RewardSection(), description="Reward model.")
    ppo: PpoSection = Field(PpoSection(), description="Policy optimisation.")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="Evaluation.")
    export: ExportSection = Field(ExportSection(), description="Export.")

    @model_validator(mode="after")
    def _random_weights_are_trained_in_full(self) -> "RunConfig":
        if self.model.init == "config" and self.sft.tuning == "lora":
            raise ValueError(
                "sft.tuning is lora but model.init is config, whose random weights an adapter "
                "cannot make a model of: set sft.tuning to full"
            )
        return self

    @model_validator(mode="after")
    def _reward_starts_from_trained_weights(self) -> "RunConfig":
        if self.model.init == "config" and self.reward.start == "base":
            raise ValueError(
                "reward.start is base but model.init is config, whose base has random weights: "
                "set reward.start to sft"
            )
        return self

    @model_validator(mode="after")
    def _half_precision_fits(self) -> "RunConfig":
        if self.run.mixed_precision == "bf16" and self.model.dtype in ("float16", "float64"):
            raise ValueError(
                f"run.mixed_precision is bf16 but model.dtype is {self.model.dtype}: "
                "set model.dtype to float32 or bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _vllm_can_load_the_adapters(self) -> "RunConfig":
        if self.ppo.rollout.engine != "vllm":
            return self
        faults = vllm_refusals(self.lora.rank, dora=self.lora.use_dora)
        if faults:
            raise ValueError(
                f"ppo.rollout.engine is vllm, which cannot load the run's adapters: "
                f"{'; '.join(faults)} (section lora), or set ppo.rollout.engine to native"
            )
        return self

    @model_validator(mode="after")
    def _vllm_can_load_the_exported_adapter(self) -> "RunConfig":
        if not self.export.vllm:
            return self
        if self.ppo.tuning == "full":
            raise ValueError(
                "export.vllm is true but ppo.tuning is full, so the policy has no adapter: vLLM "
                "serves `merged/`, which is written anyway; set export.vllm to false"
            )
        family = self.model.architecture.model_type if self.model.init == "config" else None
        faults = vllm_refusals(self.lora.rank, dora=self.lora.use_dora, model_type=family)
        if faults:
            raise ValueError(
                f"export.vllm is true, but vLLM cannot load the run's adapters: "
                f"{'; '.join(faults)}, or set export.vllm to false and export.merged to true, "
                "which vLLM serves as it is"
            )
        return self

    @model_validator(mode="after")
    def _exported_roles_are_the_runs(self) -> "RunConfig":
        export = self.export
        for role in ("sft", "reward"):
            if role in export.adapters and getattr(self, role).tuning == "full":
                instead = " and set export.reward to true" if role == "reward" else ""
                raise ValueError(
                    f"export.adapters has {role} but {role}.tuning is full, so it has no adapter: "
                    f"take {role} out of export.adapters{instead}"
                )
        if "sft" in export.adapters and self.ppo.policy is not None:
            raise ValueError(
                f"export.adapters has sft but ppo.policy is {self.ppo.policy!r}, so PPO starts "
                "from no SFT model of this run: take sft out of export.adapters"
            )
        if export.asks_for_reward and not uses_own(self.ppo.rewards):
            raise ValueError(
                "export.reward or export.adapters asks for the reward model, but ppo.rewards names "
                "others, so the run trains none: remove one of the two, or name `own` among "
                "ppo.rewards"
            )
        family = self.model.architecture.model_type
        on_own = self.model.init == "config" and self.reward.base is None
        if export.asks_for_reward and on_own and family not in CLASSIFIED:
            raise ValueError(
                f"export.reward or export.adapters asks for the reward model, but no classifier of "
                f"transformers is known to give its scores on {family}: take another "
                f"model.architecture.model_type ({', '.join(sorted(CLASSIFIED))}), or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _quantised_bases_are_frozen(self) -> "RunConfig":
        name = self.model.quantization
        if name == "none":
            return self
        if self.model.init == "config":
            raise ValueError(
                f"model.quantization is {name} but model.init is config, whose random weights are "
                "trained in full: set model.quantization to none or load a base (model.path)"
            )
        if self.model.dtype == "float64":
            raise ValueError(
                f"model.quantization is {name} but model.dtype is float64, which bitsandbytes does "
                "not compute in: set model.dtype to float32 or bfloat16"
            )
        for stage in ("sft", "reward", "ppo"):
            if getattr(self, stage).tuning == "full":
                raise ValueError(
                    f"model.quantization is {name} but {stage}.tuning is full, which trains the "
                    f"base's own weights: set {stage}.tuning to lora or model.quantization to none"
                )
        return self

    @model_validator(mode="after")
    def _sequences_fit_the_positions(self) -> "RunConfig":
        if self.model.init != "config":
            return self  # a loaded model's limit is in its own config: see `check_positions`
        limit = self.model.architecture.max_position_embeddings
        total, sum_ = self._longest_sequence()
        if total > limit:
            raise ValueError(
                f"model.architecture.max_position_embeddings is {limit} but {sum_} tokens: "
                f"raise the first to {total} or lower the others"
            )
        return self

    def check_positions(self, name: str, architecture: Any) -> None:
        """Whether the run's sequences fit a loaded model, by its transformers config.

        Raises:
            ModelError: the model called `name` has fewer positions than the longest of them.
        """
        limit = getattr(architecture.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return
        if architecture.is_encoder_decoder:
            # Each side has all positions; the decoder's first is its start token's.
            sides = {"data.max_prompt_tokens": self.data.max_prompt_tokens} | self.response_limits()
            field, longest = max(sides.items(), key=lambda item: item[1])
            if longest + 1 > limit:
                raise ModelError(
                    f"{name} has {limit} positions on each side but {field} is {longest}: lower it "
                    f"to {limit - 1}"
                )
            return
        total, sum_ = self._longest_sequence()
        if total > limit:
            raise ModelError(f"{name} has {limit} positions but {sum_} tokens: lower one of them")

    def _longest_sequence(self) -> tuple[int, str]:
        """Tokens of the longest sequence, and the sum that it is."""
        field, longest = max(self.response_limits().items(), key=lambda item: item[1])
        prompt = self.data.max_prompt_tokens
        total = prompt + longest
        return total, f"data.max_prompt_tokens + {field} = {prompt} + {longest} = {total}"

    def response_limits(self) -> dict[str, int]:
        """Longest responses that the run reads or samples, in tokens, by the field that says so."""
        sampled = self.reward.normalisation.max_new_tokens
        return {
            "data.max_response_tokens": self.data.max_response_tokens,
            "reward.normalisation.max_new_tokens": sampled or 0,  # null: the field above
            "ppo.rollout.max_new_tokens": self.ppo.rollout.max_new_tokens,
            "evaluation.max_new_tokens": self.evaluation.max_new_tokens,
        }


def check_needs(config: RunConfig, stages: Collection[str]) -> None:
    """Raise ConfigError if datasets that `stages` read are not named; it lists them all."""
    faults = list(_missing_data(config, stages))
    if faults:
        raise ConfigError("\n".join(faults))


def _missing_data(config: RunConfig, stages: Collection[str]) -> Iterator[str]:
    data = config.data
    if "sft" in stages and data.demonstrations is None:
        yield (
            "data.demonstrations is missing: the sft stage trains on it. Name a file or Hub "
            "dataset of prompts with responses, or start PPO from a finished model (ppo.policy)"
        )
    if "reward" in stages and data.rankings is None:
        yield (
            "data.rankings is missing: the reward stage trains on it. Name a file or Hub dataset "
            "of ranked responses, or let something else score (ppo.rewards)"
        )
    asking = [stage for stage in ("ppo", "evaluation") if stage in stages]
    if asking and data.prompts is data.demonstrations is data.rankings is None:
        yield (
            f"data.prompts is missing: {' and '.join(asking)} would have no prompts. Name a file "
            "or Hub dataset, or data.demonstrations or data.rankings, whose prompts are then used"
        )
    optim = config.ppo.optim
    if "ppo" in stages and optim.ptx_coef and data.demonstrations is None:
        yield (
            f"data.demonstrations is missing: ppo.optim.ptx_coef is {optim.ptx_coef:g}, which "
            "mixes demonstrations into PPO. Name them, or set ppo.optim.ptx_coef to 0"
        )
    if "ppo" in stages and optim.pretraining_coef and data.pretraining is None:
        yield (
            f"data.pretraining is missing: ppo.optim.pretraining_coef is "
            f"{optim.pretraining_coef:g}, which mixes plain text into PPO. Name a file or Hub "
            "dataset with a column `text`, or set ppo.optim.pretraining_coef to 0"
        )
