"""The ranking losses against loops over pairs, closed forms and numbers computed by hand."""

import math
import random

import pytest
import torch

from stages.reward.loss import (
    comparable_pairs,
    count_correct,
    pairwise_loss,
    plackett_luce_loss,
    rating_margins,
)

F64 = torch.float64


def softplus(x: float) -> float:
    """log(1 + e^x) = -log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def ragged(lists: list[list[float]], fill: float, dtype: torch.dtype) -> torch.Tensor:
    width = max(len(row) for row in lists)
    return torch.tensor([row + [fill] * (width - len(row)) for row in lists], dtype=dtype)


def tensors(scores: list[list[float]], ranks: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """Padded (scores, ranks, mask); the padding holds NaN scores and the best rank, as a trap."""
    mask = ragged([[1.0] * len(row) for row in scores], 0.0, torch.bool)
    return ragged(scores, math.nan, F64), ragged(ranks, 0, torch.int64), mask


def random_rankings(seed: int, prompts: int) -> tuple[list[list[float]], list[list[int]]]:
    rng = random.Random(seed)
    sizes = [rng.randint(2, 9) for _ in range(prompts)]
    scores = [[rng.gauss(0, 2) for _ in range(size)] for size in sizes]
    ranks = [[rng.randint(0, 3) for _ in range(size)] for size in sizes]  # many ties
    return scores, ranks


def loop_pairwise(scores: list[float], ranks: list[int], margins=None) -> float:
    losses = [
        softplus(-(scores[i] - scores[j] - (margins[i][j] if margins else 0.0)))
        for i in range(len(scores))
        for j in range(len(scores))
        if ranks[i] < ranks[j]
    ]
    return sum(losses) / len(losses) if losses else 0.0


def loop_plackett_luce(scores: list[float], ranks: list[int]) -> float:
    choices = []
    for i in range(len(scores)):
        below = [j for j in range(len(scores)) if ranks[j] > ranks[i]]
        if below:
            total = math.exp(scores[i]) + sum(math.exp(scores[j]) for j in below)
            choices.append(-math.log(math.exp(scores[i]) / total))
    return sum(choices) / len(choices) if choices else 0.0


def test_three_responses_by_hand() -> None:
    # s = (1, 0, 2) in the order 0 > 1 > 2; differences of the pairs: 1, -1, -2.
    # log(1+e^-1) = 0.3132617, log(1+e) = 1.3132617, log(1+e^2) = 2.1269280; their mean 1.2511505.
    loss = pairwise_loss(*tensors([[1.0, 0.0, 2.0]], [[0, 1, 2]]))
    assert loss.tolist() == pytest.approx([1.2511504620264728], abs=1e-12)


def test_pairwise_equals_the_loop_over_pairs_with_ties_and_ragged_k() -> None:
    scores, ranks = random_rankings(seed=1, prompts=40)
    loss = pairwise_loss(*tensors(scores, ranks))
    expected = [loop_pairwise(s, r) for s, r in zip(scores, ranks, strict=True)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_two_responses_are_bradley_terry_in_value_and_gradient() -> None:
    # d/ds_chosen of -log sigmoid(d) is -sigmoid(-d); d = 0.5 gives -0.3775406687981454.
    scores = torch.tensor([[0.2, 0.7]], dtype=F64, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = pairwise_loss(scores, torch.tensor([[1, 0]]), mask)
    loss.sum().backward()
    assert loss.item() == pytest.approx(softplus(-0.5), abs=1e-12)
    assert scores.grad.tolist()[0] == pytest.approx([0.3775406687981454, -0.3775406687981454])


def test_a_tie_is_no_pair() -> None:
    # Order: 0 above the tied 1 and 2. Pairs 0-1 (difference 2) and 0-2 (difference -1) only:
    # (log(1+e^-2) + log(1+e)) / 2 = (0.1269280 + 1.3132617) / 2 = 0.7200948.
    loss = pairwise_loss(*tensors([[1.0, -1.0, 2.0]], [[0, 1, 1]]))
    assert loss.tolist() == pytest.approx([0.7200948492805977], abs=1e-12)


@pytest.mark.parametrize("loss", [pairwise_loss, plackett_luce_loss])
def test_all_tied_gives_zero_loss_and_gradient(loss) -> None:
    scores = torch.tensor([[3.0, -1.0, 2.0]], dtype=F64, requires_grad=True)
    value = loss(scores, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
    value.sum().backward()
    assert value.tolist() == [0.0]
    assert scores.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("loss", [pairwise_loss, plackett_luce_loss])
def test_padding_reaches_neither_value_nor_gradient(loss) -> None:
    scores, ranks, mask = tensors([[1.0, 0.0, 2.0], [0.5, 0.0]], [[0, 1, 2], [0, 1]])
    scores.requires_grad_(True)
    loss(scores, ranks, mask).sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[1, 2] == 0.0


@pytest.mark.parametrize("loss", [pairwise_loss, plackett_luce_loss])
def test_every_prompt_weighs_the_same(loss) -> None:
    # All scores 0: every pair costs log 2, so K = 9 (36 pairs) costs what K = 2 (1 pair) costs.
    # The choices of Plackett-Luce cost log 9, log 8, ..., log 2: their mean is log(9!) / 8.
    scores, ranks, mask = tensors([[0.0] * 9, [0.0] * 2], [list(range(9)), [0, 1]])
    nine = math.log(2) if loss is pairwise_loss else math.log(math.factorial(9)) / 8
    assert loss(scores, ranks, mask).tolist() == pytest.approx([nine, math.log(2)], abs=1e-12)


def test_prompts_do_not_influence_one_another() -> None:
    scores, ranks = random_rankings(seed=2, prompts=12)
    for loss in (pairwise_loss, plackett_luce_loss):
        together = loss(*tensors(scores, ranks))
        alone = [loss(*tensors([s], [r])).item() for s, r in zip(scores, ranks, strict=True)]
        assert together.tolist() == pytest.approx(alone, abs=1e-12)


def test_margins_by_hand_and_against_the_loop() -> None:
    # Ratings 7, 4, 5 and coef 0.5 give margins 1.5 (0-1), 1.0 (0-2), 0.5 (1-2), symmetric.
    margins = rating_margins(torch.tensor([[7.0, 4.0, 5.0]], dtype=F64), coef=0.5)
    assert margins.tolist() == [[[0.0, 1.5, 1.0], [1.5, 0.0, 0.5], [1.0, 0.5, 0.0]]]
    scores, ranks = [1.0, 0.0, 2.0], [0, 2, 1]
    # Pairs 0-2: -1 - 1 = -2; 0-1: 1 - 1.5 = -0.5; 2-1: 2 - 0.5 = 1.5.
    expected = (softplus(2) + softplus(0.5) + softplus(-1.5)) / 3
    loss = pairwise_loss(*tensors([scores], [ranks]), margins=margins)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert loss.item() == pytest.approx(
        loop_pairwise(scores, ranks, margins[0].tolist()), abs=1e-12
    )


def test_missing_ratings_give_no_margin() -> None:
    ratings = torch.tensor([[math.nan, math.nan], [3.0, 1.0]], dtype=F64)
    assert rating_margins(ratings, 1.0).tolist() == [[[0, 0], [0, 0]], [[0, 2], [2, 0]]]


def test_plackett_luce_by_hand() -> None:
    # s = (1, 0, 2) in the order 0 > 1 > 2: first choice e / (e + 1 + e^2), second 1 / (1 + e^2).
    # (log 11.1073379 - 1 + log 8.3890561) / 2 = (1.4076060 + 2.1269280) / 2 = 1.7672670.
    loss = plackett_luce_loss(*tensors([[1.0, 0.0, 2.0]], [[0, 1, 2]]))
    assert loss.tolist() == pytest.approx([1.7672669878], abs=1e-9)


def test_plackett_luce_probabilities_of_all_orders_sum_to_one() -> None:
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    loss = plackett_luce_loss(*tensors([[0.3, -1.2, 0.8]] * 6, orders))
    # The loss is the mean of the two choices' negative log-likelihoods.
    assert (-2 * loss).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_plackett_luce_equals_the_loop_over_choices_with_ties() -> None:
    scores, ranks = random_rankings(seed=3, prompts=40)
    loss = plackett_luce_loss(*tensors(scores, ranks))
    expected = [loop_plackett_luce(s, r) for s, r in zip(scores, ranks, strict=True)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    rng = random.Random(4)
    scores = [[rng.gauss(0, 3), rng.gauss(0, 3)] for _ in range(20)]
    batch = tensors(scores, [[1, 0]] * 20)
    assert plackett_luce_loss(*batch).tolist() == pytest.approx(
        [softplus(first - second) for first, second in scores], abs=1e-12
    )


def test_losses_ignore_a_common_shift_of_a_prompts_scores() -> None:
    scores, ranks, mask = tensors(*random_rankings(seed=5, prompts=10))
    for loss in (pairwise_loss, plackett_luce_loss):
        shifted = loss(scores + 11.0, ranks, mask)
        assert shifted.tolist() == pytest.approx(loss(scores, ranks, mask).tolist(), abs=1e-12)


def test_extreme_scores_stay_finite_in_bfloat16() -> None:
    scores = torch.tensor([[-3e4, 3e4]], dtype=torch.bfloat16)
    ranks, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    for loss in (pairwise_loss, plackett_luce_loss):
        value = loss(scores, ranks, mask)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(float(scores[0, 1] - scores[0, 0]), rel=1e-6)


def test_comparable_pairs_leave_out_ties_and_padding() -> None:
    _, ranks, mask = tensors([[0.0] * 3, [0.0] * 2], [[1, 0, 1], [1, 0]])
    pairs = comparable_pairs(ranks, mask).nonzero().tolist()
    assert pairs == [[0, 1, 0], [0, 1, 2], [1, 1, 0]]


def test_count_correct_counts_ties_of_the_model_half() -> None:
    # Order 0 > 1 > 2 with scores 2, 2, 1: 0-1 undecided, 0-2 and 1-2 right: 2.5 of 3.
    correct, pairs = count_correct(*tensors([[2.0, 2.0, 1.0], [0.0, 1.0]], [[0, 1, 2], [0, 1]]))
    assert correct.tolist() == [2.5, 0.0]
    assert pairs.tolist() == [3, 1]
