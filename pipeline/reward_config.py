"""The kinds of reward sources that `ppo.rewards` may hold; `reward_list.py` puts them together."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config import (
    NOT_IN_KEY,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Resource,
    Section,
    function_reference,
)

OWN = "own"  # the run's own reward model
_URL = re.compile(r"https?://\S+")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# Strict mode takes lists for tuples in JSON alone, and what a validator has looked at is none.
FROM_LIST = BeforeValidator(_tuple)


def section_of_text(text: str) -> dict[str, str]:
    """The section that a text stands for; what looks like nothing else names a model."""
    if _URL.match(text):
        return {"http": text}
    return {"function": text} if function_reference(text) else {"model": text}


class RewardEntry(Section):
    """What every reward source has."""

    weight: float = Field(
        1.0,
        description="Multiplies the score, less its `shift`, in the sum of all sources (and in an "
        "ensemble); below 0 a high score is a fault, and 0 only logs it.",
    )
    shift: float = Field(
        0.0,
        description="Taken off the score before it is weighted, for instance a model's mean score.",
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Name in metrics, samples and messages; null makes one from the source.",
        json_schema_extra=NOT_IN_KEY,
    )


class ModelEntry(RewardEntry):
    """A reward model: this run's, another run's, or any sequence-classification model."""

    model: Literal["own"] | Resource = Field(
        description="`own` is this run's reward model; else a run, or a folder or Hub id of a "
        "sequence-classification model with one label, which reads text by its own tokenizer.",
        union_mode="left_to_right",
    )
    reads: Literal["auto", "text", "pair"] = Field(
        "auto",
        description="How a sequence-classification model without a chat template reads prompt and "
        "response: as one text, or as a pair with its separator between (`auto`: as a pair if its "
        "tokenizer has cls and sep tokens, as encoders' have).",
    )
    batch_rows: PositiveInt = Field(
        16,
        description="Responses of one forward pass of a sequence-classification model.",
        json_schema_extra=NOT_IN_KEY,
    )

    @field_validator("model")
    @classmethod
    def _is_no_other_kind(cls, model: str) -> str:
        kind = next(iter(section_of_text(model)))
        if kind != "model":
            raise ValueError(f"that is no model: write {{{kind}: {model}}}")
        return model


class FunctionEntry(RewardEntry):
    """A Python function in TRL's convention, sync or async."""

    function: Resource = Field(
        description="`file.py:function` or `module:function`: "
        "`f(prompts, completions, completion_ids, **columns) -> list of numbers` (docs/rewards.md)."
    )
    timeout_seconds: Positive | None = Field(
        None,
        description="Longest time of one call, in seconds; null waits for ever.",
        json_schema_extra=NOT_IN_KEY,
    )

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str) -> str:
        if function_reference(function) is None:
            raise ValueError("it names no function: write file.py:NAME or module:NAME")
        return function


class HttpEntry(RewardEntry):
    """A scorer behind an address: JSON in, JSON out (docs/rewards.md)."""

    http: str = Field(description="Address that responses are posted to (http:// or https://).")
    columns: Annotated[tuple[str, ...], FROM_LIST] | None = Field(
        None,
        description="Columns of the prompts that are sent along; null sends all.",
    )
    batch_rows: PositiveInt = Field(
        64, description="Responses of one request.", json_schema_extra=NOT_IN_KEY
    )
    concurrency: PositiveInt = Field(
        4, description="Requests under way at a time.", json_schema_extra=NOT_IN_KEY
    )
    timeout_seconds: Positive = Field(
        60.0, description="Longest silence of the server, in seconds.", json_schema_extra=NOT_IN_KEY
    )
    retries: NonNegativeInt = Field(
        3,
        description="Attempts after a lost connection, a timeout or an error 429 or 5xx, with "
        "growing pauses.",
        json_schema_extra=NOT_IN_KEY,
    )
    auth_env: str | None = Field(
        None,
        description="Environment variable that holds the secret of the auth header.",
        json_schema_extra=NOT_IN_KEY,
    )
    auth_header: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9-]+$",
        description="Header that holds the secret as it is; null sends `Authorization: Bearer`.",
        json_schema_extra=NOT_IN_KEY,
    )
    ca_file: Resource | None = Field(
        None,
        description="Certificates (PEM) that an https server is trusted by, beside the system's.",
        json_schema_extra=NOT_IN_KEY,
    )

    @field_validator("http")
    @classmethod
    def _is_an_address_without_secrets(cls, url: str) -> str:
        if not _URL.fullmatch(url) or not urlsplit(url).hostname:
            raise ValueError("write an address such as https://scorer.example/score")
        if "@" in urlsplit(url).netloc:
            raise ValueError(
                "an address must hold no password, since it is written into the run's folder: put "
                "the secret into an environment variable and name it in auth_env"
            )
        return url

    @model_validator(mode="after")
    def _a_header_has_a_secret(self) -> "HttpEntry":
        if self.auth_header is not None and self.auth_env is None:
            raise ValueError(
                f"auth_header is {self.auth_header} but auth_env names no variable with the secret"
            )
        return self


class LengthPenaltyEntry(RewardEntry):
    """Built in: minus the tokens beyond a target, in units of `span`.

    With `max_penalty: 1` it is DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13).
    """

    builtin: Literal["length_penalty"] = Field(description="`length_penalty`.")
    target: NonNegativeInt = Field(
        description="Tokens of a response, its end included, that cost nothing."
    )
    span: PositiveInt = Field(1, description="Tokens beyond the target that cost 1.")
    max_penalty: Positive | None = Field(None, description="Largest cost; null sets no limit.")


class RepetitionPenaltyEntry(RewardEntry):
    """Built in: minus the share of a response's n-grams that stood in it before, 0 to -1."""

    builtin: Literal["repetition_penalty"] = Field(description="`repetition_penalty`.")
    ngram: PositiveInt = Field(3, description="Length of an n-gram.")
    unit: Literal["words", "tokens"] = Field(
        "words", description="Of words in any script (case and punctuation aside), or of token ids."
    )


class RegexEntry(RewardEntry):
    """Built in: whether a response matches a regular expression."""

    builtin: Literal["regex"] = Field(description="`regex`.")
    pattern: str = Field(
        description="Python regular expression, looked for anywhere: anchor it with \\A and \\Z to "
        "match a whole response."
    )
    match: float = Field(1.0, description="Score of a response that matches.")
    miss: float = Field(0.0, description="Score of one that does not.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        return pattern


class RougeEntry(RewardEntry):
    """Built in: ROUGE F-measure against a reference response, 0 to 1 (needs `rouge-score`)."""

    builtin: Literal["rouge"] = Field(description="`rouge`.")
    column: str = Field(description="Column of the prompts with the reference response.")
    variant: Literal["rouge_1", "rouge_2", "rouge_l"] = Field(
        "rouge_l", description="Words, pairs of words, or the longest common subsequence."
    )
