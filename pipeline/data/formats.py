"""Row formats: each a small pure function from one row to one record.

`FORMATS` is the whole list; `docs/data-formats.md` shows an example row of each. To add one, write
its function, add an entry, and describe it there. A function gives the richest record that the row
holds; `pipeline.data.detect` finds a file's format and converts records to the kind asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.data.conversations import (
    as_conversation,
    as_messages,
    check_turns,
    is_transcript,
    last_reply,
    read_prompt,
    transcript_turns,
)
from pipeline.data.validate import (
    Reason,
    RowFault,
    as_list,
    as_number,
    as_text,
    dense_ranks,
    excerpt,
    normalise,
    wrong_type,
)
from pipeline.records import (
    Conversation,
    Demonstration,
    Document,
    Prompt,
    PromptText,
    Ranking,
)

Kind = Literal["demonstrations", "rankings", "prompts", "pretraining"]
Row = dict[str, Any]
Record = Demonstration | Ranking | Prompt | Document

COMPLETION_TEXTS = ("response", "text")
COMPLETION_SCORES = ("overall_score", "score", "fine-grained_score")


@dataclass(frozen=True, slots=True)
class Format:
    """One row format. `needs` lists columns, alternatives together; `matches` is asked by `auto`.

    `prompt_columns` are the columns that hold nothing but the prompt.
    """

    kind: Kind
    needs: tuple[tuple[str, ...], ...]
    matches: Callable[[Row], bool]
    read: Callable[[Row, str], Record]
    prompt_columns: tuple[str, ...] = ()


# --- prompts and demonstrations -------------------------------------------------------------------


def first_column(row: Row, names: tuple[str, ...]) -> str:
    """The first of the alternative columns that is there, by preference not null."""
    there = [name for name in names if name in row]
    if not there:
        have = ", ".join(map(str, row)) or "none"
        raise RowFault(
            Reason.MISSING_COLUMN, f"`{'` or `'.join(names)}` is not among its columns: {have}"
        )
    return next((name for name in there if row[name] is not None), there[0])


def _read_prompt_and_response(row: Row, origin: str) -> Demonstration:
    name = first_column(row, ("response", "completion"))
    prompt, answer = read_prompt(row["prompt"]), row[name]
    if not isinstance(answer, list):
        return Demonstration(prompt, as_text(answer, name), origin)
    opening = as_messages(prompt)
    return Demonstration(*last_reply(as_conversation(opening + answer, f"prompt + {name}")), origin)


def _read_messages(row: Row, origin: str) -> Demonstration | Prompt:
    turns = as_conversation(row["messages"], "messages")
    if turns[-1].role == "user":
        return Prompt(turns, {}, origin)
    return Demonstration(*last_reply(turns), origin)


# --- rankings ------------------------------------------------------------------------------------


def _annotator(row: Row) -> str | None:
    value = row.get("annotator")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type("annotator", value, "text or a whole number")
    return str(value)


def _read_ranking(row: Row, origin: str) -> Ranking:
    """The canonical format: responses with ids, and the ids from best to worst."""
    texts: list[str] = []
    scores: list[float] = []
    ids: dict[str, int] = {}
    for i, item in enumerate(as_list(row["responses"], "responses")):
        where = f"responses[{i}]"
        fields = item if isinstance(item, dict) else {"text": item}
        name = _response_id(fields.get("id", i), f"{where}.id")
        if name in ids:
            raise RowFault(Reason.RESPONSE_ID, f"`{where}.id` is {name!r} again")
        ids[name] = i
        texts.append(as_text(fields.get("text"), f"{where}.text" if fields is item else where))
        if fields.get("score") is not None:
            scores.append(as_number(fields["score"], f"{where}.score"))
    if 0 < len(scores) < len(texts):
        raise RowFault(Reason.BLANK, f"{len(texts) - len(scores)} of {len(texts)} scores are null")
    return Ranking(
        read_prompt(row["prompt"]),
        tuple(texts),
        _ranks(as_list(row["ranking"], "ranking"), ids),
        tuple(scores) or None,
        _annotator(row),
        origin,
    )


def _response_id(value: Any, field: str) -> str:
    """Ids may be text or whole numbers; 1 and "1" are the same id."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise wrong_type(field, value, "text or a whole number")
    return str(value)


def _ranks(ranking: list[Any], ids: dict[str, int]) -> tuple[int, ...]:
    """Ranks in the order of the responses; `ranking` holds ids or lists of tied ids."""
    ranks: dict[str, int] = {}
    for place, group in enumerate(ranking):
        for value in group if isinstance(group, list) else [group]:
            name = _response_id(value, f"ranking[{place}]")
            if name not in ids:
                known = ", ".join(ids)
                raise RowFault(
                    Reason.UNKNOWN_ID, f"`ranking[{place}]` names {name!r}; the ids are {known}"
                )
            if name in ranks:
                raise RowFault(Reason.NOT_A_PERMUTATION, f"`ranking` names {name!r} twice")
            ranks[name] = place
    missing = [name for name in ids if name not in ranks]
    if missing:
        raise RowFault(Reason.NOT_A_PERMUTATION, f"`ranking` leaves out {', '.join(missing)}")
    return dense_ranks(ranks[name] for name in ids)


def _read_scored(row: Row, origin: str) -> Ranking:
    """UltraFeedback (arXiv:2310.01377): completions with a score each; higher is better."""
    completions = as_list(row["completions"], "completions")
    for i, item in enumerate(completions):
        if not isinstance(item, dict):
            raise wrong_type(f"completions[{i}]", item, "an object with a response and a score")
    score = _shared_name(completions, COMPLETION_SCORES)
    text = _shared_name(completions, COMPLETION_TEXTS)
    scores = tuple(
        as_number(item[score], f"completions[{i}].{score}") for i, item in enumerate(completions)
    )
    return Ranking(
        read_prompt(row[first_column(row, ("prompt", "instruction"))]),
        tuple(
            as_text(item[text], f"completions[{i}].{text}") for i, item in enumerate(completions)
        ),
        dense_ranks(-value for value in scores),
        scores,
        _annotator(row),
        origin,
    )


def _shared_name(items: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """The first of the names that is given, and not null, in every item."""
    for name in names:
        if all(item.get(name) is not None for item in items):
            return name
    raise RowFault(
        Reason.BLANK, f"no one of {', '.join(names)} is filled in in all {len(items)} completions"
    )


def _read_nectar(row: Row, origin: str) -> Ranking:
    """Nectar: answers with a rank each; 1 is best, equal ranks are ties."""
    texts, places = [], []
    for i, item in enumerate(as_list(row["answers"], "answers")):
        if not isinstance(item, dict):
            raise wrong_type(f"answers[{i}]", item, "an object with answer and rank")
        texts.append(as_text(item.get("answer"), f"answers[{i}].answer"))
        places.append(as_number(item.get("rank"), f"answers[{i}].rank"))
    prompt = read_prompt(row["prompt"])
    return Ranking(prompt, tuple(texts), dense_ranks(places), None, _annotator(row), origin)


def _preference(row: Row, prompt: PromptText, chosen: str, rejected: str, origin: str) -> Ranking:
    if normalise(chosen) == normalise(rejected):
        raise RowFault(Reason.CHOSEN_IS_REJECTED, f"both are {excerpt(chosen)}")
    scores = None
    if row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        scores = (
            as_number(row["score_chosen"], "score_chosen"),
            as_number(row["score_rejected"], "score_rejected"),
        )
    return Ranking(prompt, (chosen, rejected), (0, 1), scores, _annotator(row), origin)


def _read_pairs(row: Row, origin: str) -> Ranking:
    chosen, rejected = as_text(row["chosen"], "chosen"), as_text(row["rejected"], "rejected")
    return _preference(row, read_prompt(row["prompt"]), chosen, rejected, origin)


def _check_agreement(chosen: Conversation, rejected: Conversation) -> None:
    """Two conversations must agree up to the last turn, the reply."""
    if chosen == rejected:
        return
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shorter = min(len(chosen), len(rejected))
    turn = next((i for i, (one, other) in pairs if one != other), shorter)
    raise RowFault(
        Reason.PROMPTS_DIFFER,
        f"from turn {turn + 1} on (chosen replies at turn {len(chosen) + 1}, rejected at turn "
        f"{len(rejected) + 1})",
    )


def _read_hh(row: Row, origin: str) -> Ranking:
    """Anthropic HH (arXiv:2204.05862): whole transcripts on both sides."""
    chosen, rejected = (
        transcript_turns(as_text(row[side], side), side) for side in ("chosen", "rejected")
    )
    # Before the order of turns: where the sides disagree, that is what is wrong with the row.
    _check_agreement(tuple(chosen[:-1]), tuple(rejected[:-1]))
    opening, reply = last_reply(check_turns(chosen, "chosen"), "chosen")
    other = last_reply(check_turns(rejected, "rejected"), "rejected")[1]
    return _preference(row, opening, reply, other, origin)


def _read_conversational(row: Row, origin: str) -> Ranking:
    """TRL's conversational preference rows.

    `chosen` and `rejected` hold either the reply alone, after an explicit `prompt`, or the whole
    conversation; an explicit `prompt` then has to be its opening (a list) or a user turn (text).
    """
    prompt = None if row.get("prompt") is None else read_prompt(row["prompt"])
    opening, chosen = _side(row, "chosen", prompt)
    other, rejected = _side(row, "rejected", prompt)
    _check_agreement(opening, other)
    return _preference(row, opening, chosen, rejected, origin)


def _side(row: Row, side: str, prompt: PromptText | None) -> tuple[Conversation, str]:
    items = as_list(row[side], side)
    reply_only = bool(items) and isinstance(items[0], dict) and items[0].get("role") == "assistant"
    if reply_only and prompt is not None:
        return last_reply(as_conversation(as_messages(prompt) + items, f"prompt + {side}"), side)
    opening, reply = last_reply(as_conversation(items, side), side)
    if isinstance(prompt, str):
        users = [normalise(turn.content) for turn in opening if turn.role == "user"]
        agrees = normalise(prompt) in (users[0], users[-1])
    else:
        agrees = prompt is None or prompt == opening
    if not agrees:
        raise RowFault(Reason.PROMPTS_DIFFER, f"`prompt` is not the opening of `{side}`")
    return opening, reply


# --- the list ------------------------------------------------------------------------------------


def _holds(row: Row, *columns: str, of: type | tuple[type, ...] = (str, list)) -> bool:
    return all(isinstance(row.get(name), of) for name in columns)


FORMATS: dict[str, Format] = {
    "prompts": Format(
        kind="prompts",
        needs=(("prompt",),),
        matches=lambda row: _holds(row, "prompt"),
        read=lambda row, origin: Prompt(read_prompt(row["prompt"]), {}, origin),
        prompt_columns=("prompt",),
    ),
    "demonstrations": Format(
        kind="demonstrations",
        needs=(("prompt",), ("response", "completion")),
        matches=lambda row: (
            _holds(row, "prompt") and (_holds(row, "response") or _holds(row, "completion"))
        ),
        read=_read_prompt_and_response,
        prompt_columns=("prompt",),
    ),
    "messages": Format(
        kind="demonstrations",
        needs=(("messages",),),
        matches=lambda row: _holds(row, "messages", of=list),
        read=_read_messages,
    ),
    "rankings": Format(
        kind="rankings",
        needs=(("prompt",), ("responses",), ("ranking",)),
        matches=lambda row: _holds(row, "prompt") and _holds(row, "responses", "ranking", of=list),
        read=_read_ranking,
        prompt_columns=("prompt",),
    ),
    "scored": Format(
        kind="rankings",
        needs=(("prompt", "instruction"), ("completions",)),
        matches=lambda row: (
            _holds(row, "completions", of=list)
            and (_holds(row, "prompt") or _holds(row, "instruction"))
        ),
        read=_read_scored,
        prompt_columns=("prompt", "instruction"),
    ),
    "nectar": Format(
        kind="rankings",
        needs=(("prompt",), ("answers",)),
        matches=lambda row: _holds(row, "prompt") and _holds(row, "answers", of=list),
        read=_read_nectar,
        prompt_columns=("prompt",),
    ),
    "conversational": Format(
        kind="rankings",
        needs=(("chosen",), ("rejected",)),
        matches=lambda row: _holds(row, "chosen", "rejected", of=list),
        read=_read_conversational,
        prompt_columns=("prompt",),
    ),
    "hh": Format(
        kind="rankings",
        needs=(("chosen",), ("rejected",)),
        matches=lambda row: is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")),
        read=_read_hh,
    ),
    "pairs": Format(
        kind="rankings",
        needs=(("prompt",), ("chosen",), ("rejected",)),
        matches=lambda row: _holds(row, "prompt") and _holds(row, "chosen", "rejected", of=str),
        read=_read_pairs,
        prompt_columns=("prompt",),
    ),
    "text": Format(
        kind="pretraining",
        needs=(("text",),),
        matches=lambda row: _holds(row, "text", of=str),
        read=lambda row, origin: Document(as_text(row["text"], "text"), origin),
    ),
}
