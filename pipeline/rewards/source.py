"""What a reward source is given and what it returns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.codec import Codec
from pipeline.errors import TrainingError
from pipeline.not_finite import NotFinite
from pipeline.records import Prompt


@dataclass(frozen=True)
class Completions:
    """Prompts and the responses sampled for them, as ids and as text, row by row."""

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    ended: Sequence[bool]  # by a stop token, not cut by the length limit

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
        texts = [
            codec.text(list(ids), conversation=not isinstance(prompt.prompt, str))
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        return cls(prompts, prompt_ids, completion_ids, texts, ended)

    def take(self, rows: Sequence[int]) -> "Completions":
        """Some rows, in the order asked for."""
        return Completions(
            prompts=[self.prompts[row] for row in rows],
            prompt_ids=[self.prompt_ids[row] for row in rows],
            completion_ids=[self.completion_ids[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            ended=[self.ended[row] for row in rows],
        )

    def __len__(self) -> int:
        return len(self.texts)


class RewardSource(Protocol):
    """Scores completions: one finite number each, higher is better."""

    name: str

    def score(self, completions: Completions) -> list[float]:
        """Scores in the order of the rows.

        Raises:
            TrainingError: the source failed, or returned a wrong count or numbers that are not
                finite; names the source and the rows.
        """
        ...


def checked(name: str, scores: Sequence[Any], completions: Completions) -> list[float]:
    """Scores as floats, or a `TrainingError` that names the source and the rows at fault."""
    try:
        values = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise TrainingError(f"reward {name} must return a list of numbers: {error}") from error
    if len(values) != len(completions):
        raise TrainingError(
            f"reward {name} returned {len(values)} scores for {len(completions)} completions"
        )
    bad = [row for row, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise NotFinite(
            "score",
            f"reward {name} returned {values[bad[0]]} for {len(bad)} of {len(values)} completions; "
            f"the first is row {bad[0]}: {completions.texts[bad[0]]!r}",
            [{"row": n, "response": completions.texts[n], "score": values[n]} for n in bad],
        )
    return values


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as a list of messages; a plain text is a user's."""
    if isinstance(prompt.prompt, str):
        return [{"role": "user", "content": prompt.prompt}]
    return [{"role": turn.role, "content": turn.content} for turn in prompt.prompt]
