"""Settings of the evaluation: what the trained policies are measured on, and by whom."""

from pydantic import Field

from pipeline.config import (
    NOT_IN_KEY,
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    Resource,
    Section,
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
        True,
        description="Whether best-of-n of the SFT policy stands beside PPO, with the n whose "
        "log n - (n - 1) / n is nearest PPO's sequence KL in nats.",
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
    micro_batch_tokens: PositiveInt = Field(
        16384,
        description="Tokens, padding included, of one scoring forward pass.",
        json_schema_extra=NOT_IN_KEY,
    )
