"""What a reward source is given and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.codec import Codec
from pipeline.records import Prompt


@dataclass(frozen=True)
class Completions:
    """Prompts and the responses sampled for them, as ids and as text, row by row."""

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    ended: Sequence[bool]  # by a stop token, not cut by the length limit
    codec: Codec | None = None  # whose ids these are; None: of whoever reads them

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
        return cls(prompts, prompt_ids, completion_ids, texts, ended, codec)

    def take(self, rows: Sequence[int]) -> "Completions":
        """Some rows, in the order asked for."""
        return Completions(
            prompts=[self.prompts[row] for row in rows],
            prompt_ids=[self.prompt_ids[row] for row in rows],
            completion_ids=[self.completion_ids[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            ended=[self.ended[row] for row in rows],
            codec=self.codec,
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
