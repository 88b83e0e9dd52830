"""Losses of ranked responses: tensors in, one number a prompt out.

Suffixes: P prompts, K responses a prompt (ragged, true in `mask`). A rank of 0 is best, equal ranks
are ties, and ties are never compared. Each function returns a value per prompt, so that a caller
sums them and divides by the number of prompts of the whole optimiser step: the result then does not
depend on micro-batches or processes. Reductions are made in float32 or wider.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.tensors import widen


def comparable_pairs(ranks: Tensor, mask: Tensor) -> Tensor:
    """Which responses are preferred to which: (P, K, K) bool, true at [p, i, j] if i beats j."""
    both = mask.unsqueeze(2) & mask.unsqueeze(1)
    return both & (ranks.unsqueeze(2) < ranks.unsqueeze(1))


def rating_margins(ratings: Tensor, coef: float) -> Tensor:
    """Margins (P, K, K) from ratings (P, K): `coef` times the distance of two ratings.

    The margin of Llama 2 (arXiv:2307.09288, eq. 2) with a linear m(r); a prompt without ratings
    has NaN in them and gets the margin 0.
    """
    distance = (ratings.unsqueeze(2) - ratings.unsqueeze(1)).abs()
    return coef * distance.nan_to_num(0.0)


def pairwise_loss(
    scores: Tensor, ranks: Tensor, mask: Tensor, margins: Tensor | None = None
) -> Tensor:
    """Mean of -log sigmoid(s_i - s_j - m_ij) over the pairs of a prompt where i beats j: (P,).

    InstructGPT (arXiv:2203.02155, eq. 1): every prompt weighs the same, however many responses it
    has. With K = 2 this is the Bradley-Terry loss. A prompt without a comparable pair gives 0.
    `scores`, `ranks` and `mask` are (P, K); `margins` is (P, K, K) in units of the score.
    """
    preferred = comparable_pairs(ranks, mask)
    # Masked before the difference: a NaN or infinity in the padding would reach the gradient.
    scores = widen(scores).masked_fill(~mask, 0.0)
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)  # (P, K, K)
    if margins is not None:
        difference = difference - margins
    losses = -logsigmoid(difference).masked_fill(~preferred, 0.0)
    return losses.sum((1, 2)) / preferred.sum((1, 2)).clamp(min=1)


def plackett_luce_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of the choices that make up each prompt's order: (P,).

    Plackett-Luce draws an order as successive choices: response i is chosen before everything
    ranked below it with probability exp(s_i) / (exp(s_i) + sum over j below i of exp(s_j)). Tied
    responses do not compete: each faces itself and what is ranked below it, so that, as with
    pairs, a tie says nothing about the scores of its members. The sum over choices is divided by
    their number (responses with something below them), which gives every prompt the same weight
    and makes K = 2 the Bradley-Terry loss. A prompt whose responses are all tied gives 0.
    `scores`, `ranks` and `mask` are (P, K).
    """
    beats = comparable_pairs(ranks, mask)  # (P, K, K)
    scores = widen(scores).masked_fill(~mask, 0.0)
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    competitors = scores.unsqueeze(1).masked_fill(~(beats | itself), -torch.inf)  # (P, K, K)
    losses = competitors.logsumexp(2) - scores  # exactly 0 where nothing is ranked below
    choices = beats.any(2).sum(1)
    return losses.sum(1) / choices.clamp(min=1)


def count_correct(scores: Tensor, ranks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs that the scores order as the ranks do, and all comparable pairs: (P,) and (P,).

    Equal scores count one half, so that a constant score has accuracy 0.5.
    """
    preferred = comparable_pairs(ranks, mask)
    scores = widen(scores).masked_fill(~mask, 0.0)
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    correct = (difference > 0).to(scores.dtype) + 0.5 * (difference == 0).to(scores.dtype)
    return correct.masked_fill(~preferred, 0.0).sum((1, 2)), preferred.sum((1, 2))
