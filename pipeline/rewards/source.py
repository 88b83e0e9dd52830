"""What a reward source is given and what it returns."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.codec import Codec
from pipeline.errors import TrainingError
from pipeline.not_finite import NotFinite
from pipeline.records import Prompt

ABSTAINED = math.nan  # stands for the score of a row that a source says nothing about


@dataclass(frozen=True)
class Completions:
    """Prompts and the responses sampled for them, as ids and as text, row by row.

    A stop token or stop string is no part of the text.
    """

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    ended: Sequence[bool]  # by a stop token or string, not cut by the length limit
    codec: Codec | None = None  # whose ids these are; None: of whoever reads them
    # The responses as training would have them (`Codec.closed_ids`), where there are stop strings.
    closed_ids: Sequence[Sequence[int]] | None = None

    @classmethod
    def decode(
        cls,
        codec: Codec,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        ended: Sequence[bool],
    ) -> "Completions":
        """Completions of sampled ids, with their texts."""
        rows = [
            (list(ids), not isinstance(prompt.prompt, str))
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        texts = [codec.text(*row) for row in rows]
        closed = [codec.closed_ids(*row) for row in rows] if codec.stop_strings else None
        return cls(prompts, prompt_ids, completion_ids, texts, ended, codec, closed)

    @property
    def read_ids(self) -> Sequence[Sequence[int]]:
        """What models of ours read: the sampled ids, but for responses that a stop string ended."""
        return self.completion_ids if self.closed_ids is None else self.closed_ids

    def take(self, rows: Sequence[int]) -> "Completions":
        """Some rows, in the order asked for."""
        return Completions(
            prompts=[self.prompts[row] for row in rows],
            prompt_ids=[self.prompt_ids[row] for row in rows],
            completion_ids=[self.completion_ids[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            ended=[self.ended[row] for row in rows],
            codec=self.codec,
            closed_ids=self.closed_ids and [self.closed_ids[row] for row in rows],
        )

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Scores:
    """Scores of N completions; where several sources make them up, each one's own as well."""

    total: list[float]
    by_source: Mapping[str, list[float]]  # as the sources gave them; ABSTAINED where they did

    def rows(self) -> list[tuple[float, dict[str, float]]]:
        """Each completion's score, and its scores by source."""
        return [
            (total, {name: scores[row] for name, scores in self.by_source.items()})
            for row, total in enumerate(self.total)
        ]

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[float, Mapping[str, float]]]) -> "Scores":
        """The inverse of `rows`."""
        names = rows[0][1] if rows else ()
        return cls([total for total, _ in rows], {n: [own[n] for _, own in rows] for n in names})


class RewardSource(Protocol):
    """Scores completions: one finite number each, higher is better.

    Only as one source of several may it abstain from a row (ABSTAINED).
    """

    name: str

    def score(self, completions: Completions) -> list[float]:
        """Scores in the order of the rows.

        Raises:
            TrainingError: the source failed, or returned a wrong count or numbers that are not
                finite; names the source and the rows.
        """
        ...


def checked(
    name: str, scores: Iterable[Any], completions: Completions, *, may_abstain: bool = False
) -> list[float]:
    """Scores as floats, or a `TrainingError` that names the source and the rows at fault.

    With `may_abstain`, None says that the source has no score for a row.
    """
    try:
        given = list(scores)
        values = [ABSTAINED if may_abstain and s is None else float(s) for s in given]
    except (TypeError, ValueError, OverflowError) as error:
        raise TrainingError(
            f"reward {name} must return a list of numbers: {error} ({rows_text(completions)})"
        ) from error
    if len(values) != len(completions):
        raise TrainingError(
            f"reward {name} returned {len(values)} scores for {len(completions)} completions "
            f"({rows_text(completions)})"
        )
    bad = [
        row
        for row, value in enumerate(values)
        if not (math.isfinite(value) or (may_abstain and given[row] is None))
    ]
    if bad:
        raise NotFinite(
            "score",
            f"reward {name} returned {values[bad[0]]} for {len(bad)} of {len(values)} completions; "
            f"the first is row {bad[0]}: {completions.texts[bad[0]]!r}",
            [{"row": n, "response": completions.texts[n], "score": values[n]} for n in bad],
        )
    return values


def rows_text(completions: Completions, rows: Sequence[int] | None = None) -> str:
    """Some rows of `completions` (default: all) in a few words, by where their prompts stand."""
    shown = list(range(len(completions)) if rows is None else rows)
    origins = dict.fromkeys(completions.prompts[row].origin for row in shown)
    named = [origin for origin in origins if origin]
    first, last = (shown[0], shown[-1]) if shown else (0, 0)
    text = f"row {first}" if first == last else f"rows {first} to {last}"
    if named:
        text += f", prompts at {', '.join(named[:3])}{' ...' if len(named) > 3 else ''}"
    return text


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as a list of messages; a plain text is a user's."""
    if isinstance(prompt.prompt, str):
        return [{"role": "user", "content": prompt.prompt}]
    return [{"role": turn.role, "content": turn.content} for turn in prompt.prompt]


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The prompts' further columns, a value a prompt; None where a row has not that column."""
    names = sorted({name for prompt in prompts for name in prompt.columns})
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
