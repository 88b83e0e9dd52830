"""Checks of single rows: every fault has a named reason and a remedy.

A `RowFault` is not yet an error for the user: `Tally` (pipeline.data.tally) counts it, or turns it
into a `DataError`, as `data.on_bad_row` says.
"""

import difflib
import json
import math
import unicodedata
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from pipeline.records import Ranking

MAX_ROW_BYTES = 1_000_000
EXCERPT_CHARACTERS = 160


class Reason(StrEnum):
    """Why a row is bad; the report counts rows by these words."""

    NOT_AN_OBJECT = "row is not an object of columns"
    FIELD_COUNT = "row has more fields than the header"
    TOO_LARGE = "row is larger than 1 MB"
    NUL = "text holds NUL characters"
    SURROGATE = "text holds lone surrogates"
    MISSING_COLUMN = "column is missing"
    WRONG_TYPE = "value has the wrong type"
    BLANK = "text is null or blank"
    ROW_ID = "row id is used twice"
    UNKNOWN_ROLE = "unknown chat role"
    SAME_ROLE = "two turns of the same role in a row"
    FIRST_TURN = "conversation does not start with a user turn"
    PROMPT_END = "prompt does not end with a user turn"
    NO_ASSISTANT = "no assistant turn"
    LAST_TURN = "conversation does not end with an assistant turn"
    EMPTY_REPLY = "last reply is empty"
    TRANSCRIPT = "text is not a Human/Assistant transcript"
    PROMPTS_DIFFER = "the prompts of chosen and rejected differ"
    CHOSEN_IS_REJECTED = "chosen equals rejected"
    FEW_RESPONSES = "fewer than 2 responses"
    RESPONSE_ID = "two responses have the same id"
    UNKNOWN_ID = "ranking names an unknown response"
    NOT_A_PERMUTATION = "ranking does not name every response once"
    ALL_TIED = "all responses are tied"
    IDENTICAL = "identical responses are ranked apart"
    SCORE_ORDER = "scores contradict the ranking"


REMEDIES: dict[Reason, str] = {
    Reason.NOT_AN_OBJECT: 'Write each row as {"column": value, ...}.',
    Reason.FIELD_COUNT: "Quote fields that hold commas, quotes or line breaks.",
    Reason.TOO_LARGE: "Shorten or split the row; it is far beyond what a model reads.",
    Reason.NUL: "Remove the NUL characters; the text was probably binary or UTF-16.",
    Reason.SURROGATE: "Write the character as UTF-8 or as a full \\uD83D\\uDE00-like pair.",
    Reason.MISSING_COLUMN: "Add the column, or name it with the source's `columns`.",
    Reason.WRONG_TYPE: "Write the value in the type that docs/data-formats.md shows.",
    Reason.BLANK: "Fill in the text or remove the row.",
    Reason.ROW_ID: "Make the ids unique; an id that groups rows must not be called `id` "
    "(the source's `columns` renames it).",
    Reason.UNKNOWN_ROLE: "Use the roles system, user and assistant.",
    Reason.SAME_ROLE: "Merge the two turns, or put the missing turn between them.",
    Reason.FIRST_TURN: "After an optional system turn, start with a user turn.",
    Reason.PROMPT_END: "End the prompt with the user turn that is to be answered.",
    Reason.NO_ASSISTANT: "Add the assistant turn that is the response.",
    Reason.LAST_TURN: "Remove what follows the last assistant turn.",
    Reason.EMPTY_REPLY: "Fill in the reply or remove the row.",
    Reason.TRANSCRIPT: "Write turns as '\\n\\nHuman: ...\\n\\nAssistant: ...'.",
    Reason.PROMPTS_DIFFER: "Make both conversations agree up to the last assistant turn.",
    Reason.CHOSEN_IS_REJECTED: "Remove the row: it holds no preference.",
    Reason.FEW_RESPONSES: "Give at least two responses to compare.",
    Reason.RESPONSE_ID: "Give each response of a row its own id.",
    Reason.UNKNOWN_ID: "Use the ids of `responses` (the indices 0, 1, ... where they have none).",
    Reason.NOT_A_PERMUTATION: "Name each response exactly once in `ranking`.",
    Reason.ALL_TIED: "Remove the row: it holds no preference.",
    Reason.IDENTICAL: "Tie responses with the same text, or remove one.",
    Reason.SCORE_ORDER: "Correct the scores or the ranking, or remove the scores.",
}


class RowFault(Exception):
    """One row cannot be used. `detail` names the field and the value."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def normalise(text: str) -> str:
    """The form in which texts are compared: NFC, without outer whitespace."""
    return unicodedata.normalize("NFC", text).strip()


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar name, if one is similar enough to be a misspelling."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def excerpt(value: Any) -> str:
    """A short one-line picture of a value that can always be written as UTF-8."""
    # Cut before encoding: a bad row may be megabytes long.
    text = value[: EXCERPT_CHARACTERS + 1] if isinstance(value, str) else value
    picture = json.dumps(text, ensure_ascii=False, default=lambda item: type(item).__name__)
    if len(picture) > EXCERPT_CHARACTERS:
        picture = picture[:EXCERPT_CHARACTERS] + "..."
    return picture.encode("utf-8", "backslashreplace").decode("utf-8")


def check_row(row: Any) -> dict[str, Any]:
    """Faults that any row can have, whatever its format; returns the row.

    Raises:
        RowFault: not an object, too large, or a text with NUL characters or lone surrogates.
    """
    if not isinstance(row, dict):
        raise RowFault(Reason.NOT_AN_OBJECT, f"the row is {_type_name(row)}: {excerpt(row)}")
    if None in row:  # how the CSV reader keeps the fields beyond the header
        raise RowFault(Reason.FIELD_COUNT, f"fields beyond the header: {excerpt(row[None])}")
    size = sum(
        _text_bytes(name, "column name") + _text_bytes(value, name) for name, value in row.items()
    )
    if size > MAX_ROW_BYTES:
        raise RowFault(Reason.TOO_LARGE, f"its texts take {size:,} bytes")
    return row


def _text_bytes(value: Any, field: str) -> int:
    """UTF-8 bytes of all text inside a value; text that no tokenizer should see is a fault."""
    if isinstance(value, str):
        if "\0" in value:
            raise RowFault(Reason.NUL, f"`{field}` at character {value.index(chr(0)) + 1}")
        try:
            return len(value.encode())
        except UnicodeEncodeError as error:
            raise RowFault(
                Reason.SURROGATE,
                f"`{field}` at character {error.start + 1} (\\u{ord(value[error.start]):04x})",
            ) from None
    if isinstance(value, dict):
        return sum(
            _text_bytes(name, field) + _text_bytes(item, f"{field}.{name}")
            for name, item in value.items()
        )
    if isinstance(value, list):
        return sum(_text_bytes(item, f"{field}[{i}]") for i, item in enumerate(value))
    return 0


def _type_name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def wrong_type(field: str, value: Any, expected: str) -> RowFault:
    return RowFault(
        Reason.WRONG_TYPE,
        f"`{field}` is {_type_name(value)} ({excerpt(value)}), {expected} is needed",
    )


def as_text(value: Any, field: str) -> str:
    """Text that is neither null nor blank, as it stands."""
    if value is None:
        raise RowFault(Reason.BLANK, f"`{field}` is null")
    if not isinstance(value, str):
        raise wrong_type(field, value, "text")
    if not value.strip():
        raise RowFault(Reason.BLANK, f"`{field}` is blank: {excerpt(value)}")
    return value


def as_list(value: Any, field: str) -> list[Any]:
    """A list; null is named as such."""
    if value is None:
        raise RowFault(Reason.BLANK, f"`{field}` is null")
    if not isinstance(value, list):
        raise wrong_type(field, value, "a list")
    return value


def as_number(value: Any, field: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong_type(field, value, "a finite number")
    return float(value)


def check_ranking(ranking: Ranking) -> Ranking:
    """What holds for every ranking, whatever format it came in; returns it.

    Raises:
        RowFault: fewer than two responses, all tied, identical responses ranked apart, or a
            preferred response with a lower score.
    """
    texts = ranking.responses
    if len(texts) < 2:
        raise RowFault(Reason.FEW_RESPONSES, f"the row has {len(texts)}")
    if len(set(ranking.ranks)) == 1:
        raise RowFault(Reason.ALL_TIED, f"{len(texts)} responses share one rank")
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        j = first.setdefault(normalise(text), i)
        if ranking.ranks[i] != ranking.ranks[j]:
            raise RowFault(
                Reason.IDENTICAL, f"responses {j + 1} and {i + 1} are both {excerpt(text)}"
            )
    if ranking.scores is not None:
        for i, j in ranking.pairs():
            if ranking.scores[i] < ranking.scores[j]:
                raise RowFault(
                    Reason.SCORE_ORDER,
                    f"response {i + 1} (score {ranking.scores[i]:g}) is ranked above response "
                    f"{j + 1} (score {ranking.scores[j]:g})",
                )
    return ranking


def dense_ranks(values: Iterable[float]) -> tuple[int, ...]:
    """Ranks 0, 1, ... by ascending value; equal values are ties. (3, 1, 3) -> (1, 0, 1)."""
    values = tuple(values)
    place = {value: rank for rank, value in enumerate(sorted(set(values)))}
    return tuple(place[value] for value in values)
