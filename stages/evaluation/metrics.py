"""The numbers of an evaluation, as pure functions of scores, log-probabilities and token ids.

Sources: Wilson 1927 (interval of a proportion), Li et al. 2016 arXiv:1510.03055 (distinct-n),
Stiennon et al. 2020 arXiv:2009.01325 and Hilton & Gao 2022 (KL of best-of-n), Gao et al. 2022
arXiv:2210.10760 (policies compared at equal KL).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # 97.5th percentile of the standard normal


@dataclass(frozen=True, slots=True)
class WinRate:
    """Share of prompts on which one policy beats another (ties half), with its 95% interval."""

    rate: float
    low: float
    high: float
    n: int


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; `successes` may be fractional (ties count half).

    With ties the interval is conservative: outcomes in {0, 1/2, 1} of mean p have a variance of at
    most p (1 - p), which is the binomial variance that the interval assumes.
    """
    assert n > 0 and 0 <= successes <= n, (successes, n)
    p = successes / n
    denominator = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / denominator
    half_width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / denominator
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> WinRate:
    """How often `ours[i] > theirs[i]`, a tie counting half; both hold one score a prompt."""
    assert len(ours) == len(theirs) > 0, (len(ours), len(theirs))
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True))
    low, high = wilson_interval(wins, len(ours))
    return WinRate(wins / len(ours), low, high, len(ours))


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of a policy's responses (token ids); 0 without any.

    The ratio falls as the text grows, so only sets of about the same size compare.
    """
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def sequence_kl(
    logprobs: Sequence[Sequence[float]], reference_logprobs: Sequence[Sequence[float]]
) -> float:
    """KL(policy || reference) of whole responses in nats, from the policy's own samples.

    The unbiased estimate (k1): the mean over responses of the sum over tokens of
    log p(token) - log p_ref(token). Each argument holds one ragged row a response.
    """
    assert len(logprobs) == len(reference_logprobs) > 0
    totals = [
        math.fsum(a - b for a, b in zip(ours, reference, strict=True))
        for ours, reference in zip(logprobs, reference_logprobs, strict=True)
    ]
    return math.fsum(totals) / len(totals)


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the policy it samples, log n - (n - 1) / n nats.

    Exact where no two responses share a score, an upper bound otherwise.
    """
    assert n >= 1, n
    return math.log(n) - (n - 1) / n


def nearest_n(kl: float, max_n: int) -> int:
    """The n in 1..max_n whose `best_of_n_kl` is nearest `kl` (nats); of two, the smaller."""
    return min(range(1, max_n + 1), key=lambda n: abs(best_of_n_kl(n) - kl))


def best_indices(scores: Sequence[Sequence[float]]) -> list[int]:
    """For each prompt the index of its best-scored candidate, the first among equals."""
    return [max(range(len(row)), key=lambda i: row[i]) for row in scores]


def order_accuracy(
    scores: Sequence[Sequence[float]], pairs: Sequence[Sequence[tuple[int, int]]]
) -> tuple[float, int]:
    """Share of pairs that the scores order as people did (equal scores half), and their number.

    `scores[r][k]` scores response k of ranking r; `pairs[r]` holds its (preferred, rejected) pairs.
    """
    outcomes = [
        1.0 if row[better] > row[worse] else 0.5 if row[better] == row[worse] else 0.0
        for row, ranking in zip(scores, pairs, strict=True)
        for better, worse in ranking
    ]
    assert outcomes, "no comparable pair"
    return math.fsum(outcomes) / len(outcomes), len(outcomes)
