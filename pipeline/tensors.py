"""Masked reductions and token statistics: torch only, no rank, file, logger or config.

Suffixes: B sequences, R response positions, N gathered positions, V vocabulary. A mask is boolean
and true on real tokens. Reductions are made in float32 or wider, whatever the input's type.
"""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask` is true; NaN behind a false mask does not spread."""
    return widen(x).masked_fill(~mask, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is true; 0 if it is true nowhere."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Variance (divided by the count) of `x` where `mask` is true."""
    return masked_sum((widen(x) - masked_mean(x, mask)) ** 2, mask) / mask.sum().clamp(min=1)


def token_logprobs(logits_nv: Tensor, ids_n: Tensor) -> Tensor:
    """log softmax(logits)[id] of each row (N,), without a second (N, V) tensor of log-probs."""
    logits_nv = widen(logits_nv)
    chosen_n = logits_nv.gather(-1, ids_n.unsqueeze(-1)).squeeze(-1)
    return chosen_n - logits_nv.logsumexp(-1)


def entropy(logits_nv: Tensor) -> Tensor:
    """Entropy of softmax(logits) of each row (N,), in nats: logsumexp(z) - sum_v p_v z_v."""
    logits_nv = widen(logits_nv)
    # p * z is 0 where z is -inf (a forbidden token): 0 * -inf would be NaN.
    expected_n = (logits_nv.softmax(-1) * logits_nv.clamp(min=torch.finfo(torch.float32).min)).sum(
        -1
    )
    return logits_nv.logsumexp(-1) - expected_n
