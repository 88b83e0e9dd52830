"""How well scores agree with held-out preferences: numpy in, numbers out.

Everything is computed from comparable pairs, N of them. A pair's `difference` is the score of the
preferred response minus that of the rejected one, in logits (the score before `head.scale`, since
training makes sigmoid(difference) the probability of the preference).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class ScoredPairs:
    """Comparable pairs of held-out rankings with the model's opinion; all arrays are (N,)."""

    difference: Array  # score of the preferred response minus that of the rejected one, logits
    rank_distance: Array  # rank of the rejected response minus that of the preferred one, >= 1
    length_difference: Array  # length of the preferred response minus the rejected one's, tokens
    annotator: Array  # who ranked, "" where the data does not say

    def __len__(self) -> int:
        return len(self.difference)


def scored_pairs(
    scores: Sequence[Sequence[float]],
    ranks: Sequence[Sequence[int]],
    lengths: Sequence[Sequence[int]],
    annotators: Sequence[str | None],
) -> ScoredPairs:
    """All comparable pairs of rankings; one inner sequence of K numbers a ranking."""
    rows: list[tuple[float, int, int, str]] = []
    for score, rank, length, annotator in zip(scores, ranks, lengths, annotators, strict=True):
        for i in range(len(rank)):
            for j in range(len(rank)):
                if rank[i] < rank[j]:
                    distance = rank[j] - rank[i]
                    rows.append(
                        (score[i] - score[j], distance, length[i] - length[j], annotator or "")
                    )
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    return ScoredPairs(
        difference=np.array(columns[0], dtype=np.float64),
        rank_distance=np.array(columns[1], dtype=np.int64),
        length_difference=np.array(columns[2], dtype=np.int64),
        annotator=np.array(columns[3], dtype=object),
    )


def correctness(difference: Array) -> Array:
    """1 where the model agrees with the preference, 0 where not, 1/2 where it is undecided."""
    return (difference > 0) + 0.5 * (difference == 0)


def accuracy(difference: Array) -> float:
    """Share of pairs ordered as the data orders them; NaN without pairs."""
    return float(correctness(difference).mean()) if len(difference) else float("nan")


def accuracy_by(difference: Array, group: Array) -> dict[str, dict[str, float]]:
    """Accuracy and number of pairs for each value of `group` (N,), in the values' order."""
    return {
        str(value): {
            "accuracy": accuracy(difference[group == value]),
            "pairs": int((group == value).sum()),
        }
        for value in sorted(set(group.tolist()))
    }


def confidence(difference: Array) -> Array:
    """Probability, 1/2 to 1, that the model gives to the response it prefers itself."""
    return 1.0 / (1.0 + np.exp(-np.abs(difference)))


def reliability_bins(difference: Array, bins: int = 10) -> list[dict[str, float]]:
    """Mean confidence and accuracy in `bins` equal slices of confidence from 1/2 to 1.

    A slice holds its lower edge and not its upper one, except that 1 lies in the last. Empty
    slices are left out.
    """
    sure, correct = confidence(difference), correctness(difference)
    index = np.minimum(((sure - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    return [
        {
            "low": 0.5 + b / (2 * bins),
            "high": 0.5 + (b + 1) / (2 * bins),
            "confidence": float(sure[index == b].mean()),
            "accuracy": float(correct[index == b].mean()),
            "pairs": int((index == b).sum()),
        }
        for b in range(bins)
        if (index == b).any()
    ]


def expected_calibration_error(difference: Array, bins: int = 10) -> float:
    """Mean distance of accuracy and confidence over reliability bins, weighted by pairs.

    Guo et al. 2017 (arXiv:1706.04599, eq. 3); 0 is calibrated; NaN without pairs.
    """
    if not len(difference):
        return float("nan")
    return sum(
        row["pairs"] / len(difference) * abs(row["accuracy"] - row["confidence"])
        for row in reliability_bins(difference, bins)
    )


def longer_preferred(pairs: ScoredPairs) -> dict[str, float | None]:
    """Share of pairs of unequal length where the longer response is preferred, by whom.

    `data` is the annotators' share, `model` the score's (equal scores count one half), `pairs`
    the number of pairs of unequal length; without any the shares are None. A model share above
    the data's is a length bias.
    """
    unequal = pairs.length_difference != 0
    if not unequal.any():
        return {"data": None, "model": None, "pairs": 0}
    longer_won = pairs.length_difference[unequal] > 0
    right = correctness(pairs.difference[unequal])
    return {
        "data": float(longer_won.mean()),
        "model": float(np.where(longer_won, right, 1.0 - right).mean()),
        "pairs": int(unequal.sum()),
    }


def calibration_report(pairs: ScoredPairs, bins: int = 10) -> dict[str, Any]:
    """Everything above as one JSON object; annotators only where the data names them."""
    named = pairs.annotator != ""
    return {
        "pairs": len(pairs),
        "accuracy": accuracy(pairs.difference),
        "accuracy_by_rank_distance": accuracy_by(pairs.difference, pairs.rank_distance),
        "accuracy_by_annotator": accuracy_by(pairs.difference[named], pairs.annotator[named]),
        "ece": expected_calibration_error(pairs.difference, bins),
        "reliability": reliability_bins(pairs.difference, bins),
        "longer_preferred": longer_preferred(pairs),
    }
