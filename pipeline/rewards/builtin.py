"""Built-in reward sources: penalties for length and repetition, a pattern, ROUGE."""

import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import TrainingError
from pipeline.reward_config import (
    LengthPenaltyEntry,
    RegexEntry,
    RepetitionPenaltyEntry,
    RewardEntry,
    RougeEntry,
)
from pipeline.rewards.source import Completions, checked, rows_text
from pipeline.rouge import f_measures, require_rouge, words

VARIANTS = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}  # rouge-score's names


class BuiltinReward:
    """The built-in source of an entry."""

    def __init__(self, entry: RewardEntry) -> None:
        """Raises ConfigError where a package that it needs is missing."""
        if isinstance(entry, RougeEntry):
            require_rouge("ppo.rewards")
        self.entry = entry
        self.name = str(getattr(entry, "builtin", ""))

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        return checked(self.name, self._scores(completions), completions)

    def _scores(self, completions: Completions) -> list[float]:
        entry, texts, ids = self.entry, completions.texts, completions.completion_ids
        if isinstance(entry, LengthPenaltyEntry):
            return [
                length_penalty(len(r), entry.target, entry.span, entry.max_penalty) for r in ids
            ]
        if isinstance(entry, RepetitionPenaltyEntry):
            units: Sequence[Sequence[Any]] = ids
            if entry.unit == "words":
                units = [words(text) for text in texts]
            return [repetition_penalty(row, entry.ngram) for row in units]
        if isinstance(entry, RegexEntry):
            pattern = re.compile(entry.pattern)
            return [entry.match if pattern.search(text) else entry.miss for text in texts]
        assert isinstance(entry, RougeEntry), entry
        references = self._references(completions, entry.column)
        return f_measures(texts, references, VARIANTS[entry.variant])

    def _references(self, completions: Completions, column: str) -> list[str]:
        found = [prompt.columns.get(column) for prompt in completions.prompts]
        missing = [row for row, text in enumerate(found) if not isinstance(text, str)]
        if missing:
            columns = ", ".join(completions.prompts[missing[0]].columns) or "none"
            raise TrainingError(
                f"reward {self.name} wants a text in the column {column!r}, which {len(missing)} "
                f"of {len(found)} prompts do not have (the first is "
                f"{rows_text(completions, missing[:1])}; its columns: {columns})"
            )
        return [str(text) for text in found]


def length_penalty(length: int, target: int, span: int, max_penalty: float | None) -> float:
    """Minus the tokens beyond `target`, in units of `span`; at least minus `max_penalty`.

    DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13) has `target` = L_max - L_cache,
    `span` = L_cache and `max_penalty` = 1.
    """
    penalty = max(0, length - target) / span
    return 0.0 - (penalty if max_penalty is None else min(penalty, max_penalty))


def repetition_penalty(units: Sequence[Any], ngram: int) -> float:
    """Minus the share of n-grams that stood before: different / all - 1; 0 without any n-gram.

    The measure of Yeo et al. 2025 (arXiv:2502.03373, app. C.2), at a largest penalty of 1.
    """
    grams = [tuple(units[i : i + ngram]) for i in range(len(units) - ngram + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0
