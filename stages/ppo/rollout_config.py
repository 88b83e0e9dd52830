"""What PPO samples: rollouts, held-out responses, and which of them are kept."""

from typing import Literal

from pydantic import Field

from pipeline.config import (
    NOT_IN_KEY,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
)
from pipeline.vllm_config import VllmSection


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
