"""The common section of what every stage samples: what ends a response, what is never sampled."""

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config import NonNegativeInt, Section

StopString = Annotated[str, Field(min_length=1)]
ForbiddenToken = NonNegativeInt | Annotated[str, Field(min_length=1)]


class GenerationSection(Section):
    """How responses are sampled, wherever this run samples them (docs/generation.md)."""

    stop_strings: tuple[StopString, ...] = Field(
        (),
        description="Strings that end a response, besides the model's stop tokens; rewards read "
        "the text before the string.",
    )
    forbidden_tokens: tuple[ForbiddenToken, ...] = Field(
        (),
        description="Tokens that are never sampled, as ids or as texts of one token; log-probs of "
        "policy, reference and training are those of the remaining ones.",
    )

    @model_validator(mode="after")
    def _each_once(self) -> "GenerationSection":
        for name in ("stop_strings", "forbidden_tokens"):
            values = getattr(self, name)
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"generation.{name} names {twice!r} twice: remove one of the two")
        return self
