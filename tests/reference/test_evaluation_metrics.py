"""Evaluation metrics against hand-computed values, closed forms and simulation."""

import math
import random

import pytest

from stages.evaluation.metrics import (
    best_indices,
    best_of_n_kl,
    distinct_n,
    nearest_n,
    order_accuracy,
    sequence_kl,
    wilson_interval,
    win_rate,
)


def test_wilson_interval_solves_its_defining_equation() -> None:
    # Wilson's bounds are the two p0 with |p - p0| = z sqrt(p0 (1 - p0) / n).
    z = 1.959963984540054
    for successes, n in ((7, 10), (81.5, 100), (1, 500), (400, 500)):
        for bound in wilson_interval(successes, n):
            distance = abs(successes / n - bound)
            assert distance == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


def test_wilson_interval_published_value() -> None:
    # Newcombe 1998, table I: 81 of 263, 95% score interval without continuity: 0.2553 to 0.3662.
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_wilson_interval_at_the_edges() -> None:
    # No success in 10: 0 to z^2 / (n + z^2) = 3.8415 / 13.8415 = 0.27753.
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.277533, abs=1e-6)
    low, high = wilson_interval(10, 10)
    assert low == pytest.approx(1 - 0.277533, abs=1e-6)
    assert high == pytest.approx(1.0, abs=1e-12)


def test_win_rate_counts_ties_half() -> None:
    # Wins: prompts 0 and 3; tie: prompt 1; loss: prompt 2. (2 + 0.5) / 4 = 0.625.
    result = win_rate([3.0, 1.0, 0.0, 2.0], [2.0, 1.0, 5.0, 1.0])
    assert result.rate == 0.625
    assert result.n == 4
    # z^2 = 3.841459; denominator 1 + 0.960365 = 1.960365; centre (0.625 + 0.480182) / 1.960365
    # = 0.563764; half width 1.959964 sqrt(0.625 * 0.375 / 4 + 3.841459 / 64) / 1.960365
    # = 0.999796 * sqrt(0.058594 + 0.060023) = 0.344338.
    assert result.low == pytest.approx(0.563764 - 0.344338, abs=2e-6)
    assert result.high == pytest.approx(0.563764 + 0.344338, abs=2e-6)


def test_win_rate_of_a_policy_and_itself_is_one_half() -> None:
    scores = [0.1, -2.0, 7.5]
    assert win_rate(scores, scores).rate == 0.5


def test_win_rates_of_both_sides_add_to_one() -> None:
    ours, theirs = [1.0, 2.0, 2.0, 0.0, 9.0], [0.0, 2.0, 3.0, 0.0, 1.0]
    one, other = win_rate(ours, theirs), win_rate(theirs, ours)
    assert one.rate + other.rate == 1.0
    assert one.low == pytest.approx(1 - other.high, abs=1e-12)


def test_distinct_n() -> None:
    # Bigrams: (1 2) (2 1) (1 2) | (1 2) (2 3): 5, of which {12, 21, 23} differ; [9] has none.
    assert distinct_n([[1, 2, 1, 2], [1, 2, 3], [9]], 2) == 3 / 5
    # Unigrams: 4 + 3 + 1 = 8, {1, 2, 3, 9} differ.
    assert distinct_n([[1, 2, 1, 2], [1, 2, 3], [9]], 1) == 4 / 8
    assert distinct_n([[], [4]], 2) == 0.0


def test_distinct_n_does_not_join_responses() -> None:
    assert distinct_n([[1, 2], [3, 4]], 2) == 1.0
    assert distinct_n([[1, 2], [1, 2]], 2) == 0.5


def test_sequence_kl_sums_tokens_and_averages_responses() -> None:
    # Response 0: (-1 + 1.5) + (-2 + 2.25) = 0.75; response 1: -0.5 + 0.25 = -0.25. Mean 0.25.
    assert sequence_kl([[-1.0, -2.0], [-0.5]], [[-1.5, -2.25], [-0.25]]) == 0.25


def test_sequence_kl_estimates_the_exact_kl() -> None:
    # Two independent tokens of a 3-symbol policy; exact KL = 2 sum p log(p / q).
    p, q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    exact = 2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    rng = random.Random(0)
    draws = [rng.choices(range(3), weights=p, k=2) for _ in range(40_000)]
    estimate = sequence_kl(
        [[math.log(p[i]) for i in row] for row in draws],
        [[math.log(q[i]) for i in row] for row in draws],
    )
    # Variance a response: 2 Var(log p/q) = 2 * (0.7 * 0.9163^2 - 0.2749^2) = 1.024;
    # five standard errors of 40,000: 5 * sqrt(1.024 / 40000) = 0.0253.
    assert abs(estimate - exact) < 0.0253


def test_best_of_n_kl() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(0.193147, abs=1e-6)  # 0.693147 - 1/2
    assert best_of_n_kl(16) == pytest.approx(2.772589 - 0.9375, abs=1e-6)


def test_best_of_n_kl_is_the_kl_of_the_winner_among_many_equally_likely_responses() -> None:
    # M equally likely responses with distinct scores: the best of n has rank r with probability
    # (r^n - (r - 1)^n) / M^n; for M -> inf its KL to 1/M is log n - (n - 1) / n.
    size, n = 100_000, 5
    total = 0.0
    for rank in range(1, size + 1):
        probability = (rank / size) ** n - ((rank - 1) / size) ** n
        if probability > 0:
            total += probability * math.log(probability * size)
    assert total == pytest.approx(best_of_n_kl(n), abs=1e-4)


def test_nearest_n() -> None:
    # KL of 1, 2, 3, 4: 0, 0.1931, 0.4319, 0.6363. Midpoints: 0.0966, 0.3125, 0.5341.
    assert [nearest_n(kl, 16) for kl in (-0.2, 0.09, 0.10, 0.31, 0.32, 0.53, 0.54)] == [
        1, 1, 2, 2, 3, 3, 4,
    ]  # fmt: skip
    assert nearest_n(50.0, 16) == 16


def test_best_indices_take_the_first_of_equals() -> None:
    assert best_indices([[0.0, 2.0, 1.0], [1.0, 1.0], [-3.0]]) == [1, 0, 0]


def test_order_accuracy() -> None:
    # Ranking 0: 0 > 1 right, 0 > 2 equal (half), 1 > 2 wrong; ranking 1: 1 > 0 right. 2.5 / 4.
    scores = [[3.0, 1.0, 3.0], [0.0, 1.0]]
    pairs = [[(0, 1), (0, 2), (1, 2)], [(1, 0)]]
    assert order_accuracy(scores, pairs) == (0.625, 4)
