"""Settings of the evaluation: what the trained policies are measured on, and by whom."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import (
    NOT_IN_KEY,
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    Resource,
    Section,
)


class DecodingSection(Section):
    """What decodes the answers, beyond `evaluation.temperature` (0 is greedy)."""

    top_k: NonNegativeInt = Field(
        0, description="Sampling draws among the k most likely tokens; 0 takes all."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Sampling draws among the likeliest tokens that together have this "
        "probability; 1 takes all.",
    )
    num_beams: PositiveInt = Field(
        1,
        description="Beams of a beam search, which takes the place of sampling and turns "
        "best-of-n off; 1 is no search.",
    )


class EvaluationSection(Section):
    """The held-out comparison of the SFT policy, the PPO policy and best-of-n sampling."""

    prompts: PositiveInt = Field(
        500, description="Held-out prompts answered by each policy; fewer if there are fewer."
    )
    max_new_tokens: PositiveInt = Field(
        128, description="Longest response, in tokens; a response cut there has not ended."
    )
    temperature: NonNegative = Field(
        1.0,
        description="Sampling temperature of every policy; 0 is greedy, which leaves best-of-n "
        "nothing to choose from and turns it off.",
    )
    decoding: DecodingSection = Field(
        DecodingSection(), description="Truncated sampling or beam search."
    )
    seed_stream: NonNegativeInt = Field(
        0,
        description="Number of the noise stream under `run.seed`, the same for every policy; "
        "another number draws other responses.",
    )
    gold: Resource | None = Field(
        None,
        description="Gold judge as `file.py:function`, TRL's reward convention, higher is better; "
        "no other stage sees it, and without it the win rates are judged by the run's rewards.",
    )
    best_of_n: bool = Field(
        True, description="Whether best-of-n of the SFT policy stands beside PPO."
    )
    n: PositiveInt | None = Field(
        None,
        description="n of best-of-n; unset, the n up to `max_n` whose log n - (n - 1) / n is "
        "nearest PPO's sequence KL in nats.",
    )
    max_n: PositiveInt = Field(
        16, description="Largest n of best-of-n: it costs n responses a prompt."
    )
    reference_column: str | None = Field(
        None,
        description="Column of the prompts with a reference response, for the ROUGE-L F-measure.",
    )
    generation_rows: PositiveInt = Field(
        128, description="Responses generated at a time.", json_schema_extra=NOT_IN_KEY
    )
    micro_batch_tokens: PositiveInt | None = Field(
        None,
        description="Tokens, padding included, of one scoring forward pass; null suits the device.",
        json_schema_extra=NOT_IN_KEY,
    )

    @property
    def method(self) -> Literal["sample", "greedy", "beam"]:
        """How the answers come about."""
        if self.decoding.num_beams > 1:
            return "beam"
        return "greedy" if self.temperature == 0 else "sample"

    @model_validator(mode="after")
    def _decoding_is_of_one_kind(self) -> "EvaluationSection":
        decoding = self.decoding
        beams = decoding.num_beams
        if beams > 1 and self.temperature != 1:
            raise ValueError(
                f"evaluation.decoding.num_beams is {beams} but evaluation.temperature is "
                f"{self.temperature:g}, and a beam search draws nothing: set num_beams to 1 to "
                "sample, or temperature to 1 to search"
            )
        for name, value, off in (("top_k", decoding.top_k, 0), ("top_p", decoding.top_p, 1)):
            if value == off or self.method == "sample":
                continue
            setting = (
                f"evaluation.decoding.num_beams is {beams}, a beam search"
                if beams > 1
                else "evaluation.temperature is 0, which is greedy"
            )
            raise ValueError(
                f"evaluation.decoding.{name} is {value:g} but {setting}, and only sampling is "
                f"truncated: leave {name} at {off}, or set num_beams to 1 and temperature above 0"
            )
        return self
