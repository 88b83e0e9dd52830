"""Masked reductions and token statistics: torch only, no rank, file, logger or config.

Suffixes: B sequences, R response positions, N gathered positions, V vocabulary. A mask is boolean
and true on real tokens. Reductions are made in float32 or wider, whatever the input's type.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on a device that need not be waited for."""
    return x.to(device, non_blocking=True)


def scatter(x_n: Tensor, mask: Tensor) -> Tensor:
    """`x_n` where `mask` is true, row by row, and zeros elsewhere; differentiable.

    The mask rests on the host: N is known there, and the device need not be waited for.
    """
    places_n = send(mask.flatten().nonzero().squeeze(-1), x_n.device)
    return x_n.new_zeros(mask.numel()).index_copy(0, places_n, x_n).view(mask.shape)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask` is true; NaN behind a false mask does not spread."""
    return widen(x).masked_fill(~mask, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is true; 0 if it is true nowhere."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Variance (divided by the count) of `x` where `mask` is true."""
    return masked_sum((widen(x) - masked_mean(x, mask)) ** 2, mask) / mask.sum().clamp(min=1)


def token_logprobs(logits_nv: Tensor, ids_n: Tensor, *, consume: bool = False) -> Tensor:
    """log softmax(logits)[id] of each row (N,).

    The backward pass makes one more (N, V) tensor; with `consume` it writes the gradient over the
    logits, which nobody else may need then.
    """
    result: Tensor = _TokenLogprobs.apply(widen(logits_nv), ids_n, consume)
    return result


class _TokenLogprobs(torch.autograd.Function):
    """z_id - logsumexp(z); d / d z = g (onehot(id) - softmax(z)), made in place."""

    @staticmethod
    def forward(ctx: Any, logits_nv: Tensor, ids_n: Tensor, consume: bool) -> Tensor:
        log_total_n = logits_nv.logsumexp(-1)
        ctx.consume = consume
        ctx.save_for_backward(logits_nv, log_total_n, ids_n)
        return logits_nv.gather(-1, ids_n.unsqueeze(-1)).squeeze(-1) - log_total_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_nv, log_total_n, ids_n = ctx.saved_tensors
        g_n1 = grads[0].unsqueeze(-1)
        gradient_nv = logits_nv if ctx.consume else logits_nv.clone()
        gradient_nv.sub_(log_total_n.unsqueeze(-1)).exp_().mul_(-g_n1)
        return gradient_nv.scatter_add_(-1, ids_n.unsqueeze(-1), g_n1), None, None


def entropy(logits_nv: Tensor, log_total_n: Tensor | None = None) -> Tensor:
    """Entropy of softmax(logits) of each row (N,), in nats: -sum_v p_v log p_v.

    `log_total_n` is logsumexp(z), where it is known already.
    """
    logits_nv = widen(logits_nv)
    if log_total_n is None:
        log_total_n = logits_nv.logsumexp(-1)
    logprobs_nv = logits_nv - log_total_n.unsqueeze(-1)
    # p log p is 0 where p is 0 (a forbidden token): 0 * -inf would be NaN.
    finite_nv = logprobs_nv.clamp(min=torch.finfo(torch.float32).min)
    return -(logprobs_nv.exp() * finite_nv).sum(-1)


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(name.encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()
