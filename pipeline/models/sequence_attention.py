"""Attention within each sequence of a packed row, for processors: torch's own, once a sequence.

Kernels of variable length need a GPU. On a processor a call a sequence costs little beside its
arithmetic, and every other layer sees one row without padding. transformers' attention functions
take whatever keyword arguments a model is called with; this one takes `sequences`, and is `sdpa`
where there are none (decoding, batches with padding).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

NAME = "sdpa_by_sequence"
# Hidden size below which a call a sequence costs more than its padding. Passes of 32 ragged rows,
# forward and backward on two cores, took 1.10 times as long as padded at 128, 0.95 at 192, 0.94 at
# 256 and 0.91 at 384; rows of nearly one length 1.19, 1.12, 1.01 and 1.05 times.
WORTH_IT_FROM = 256


@dataclass(frozen=True)
class Span:
    """One sequence of a packed row: its last queries, and all keys up to the last of them."""

    queries: int
    keys: int
    skipped: int = 0  # keys of the sequence behind the last query


def arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a model is called with besides a packed row of sequences of these lengths.

    A mask of four dimensions counts as made, so that transformers makes none.
    """
    spans = [Span(length, length) for length in lengths]
    return {"sequences": spans, "attention_mask": torch.empty(1, 1, 0, 0, device=device)}


def install(model: Any, *, wanted: bool) -> None:
    """Give a model that attends with `sdpa` this attention, or take it back."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before, after = ("sdpa", NAME) if wanted else (NAME, "sdpa")
    if model.config._attn_implementation == before:
        model.set_attn_implementation(after)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequences: Sequence[Span] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Output (1, M, heads, size) of queries (1, heads, M, size) and N keys and values likewise.

    Without `sequences` it is transformers' function for `sdpa`, of any batch.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for span, q, k, v in _split(sequences, query, key, value):
        mask = _mask(span, sliding_window, query.device)
        out, _ = sdpa_attention_forward(module, q, k, v, mask, **kwargs)  # (b, m, heads, size)
        outputs.append(out.flatten(0, 1))
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).unsqueeze(0), None


def _split(
    sequences: Sequence[Span], query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[Span, Tensor, Tensor, Tensor]]:
    """Neighbours of the same lengths as one batch: queries (b, heads, m, size), keys, values."""
    groups = [(span, len(list(equal))) for span, equal in groupby(sequences)]
    queries = [count * span.queries for span, count in groups]
    keys = [count * (span.keys + span.skipped) for span, count in groups]
    parts = _cut(query, queries), _cut(key, keys), _cut(value, keys)
    for (span, count), q, k, v in zip(groups, *parts, strict=True):
        k, v = (_rows(x, count)[:, :, : span.keys] for x in (k, v))
        yield span, _rows(q, count), k, v


def _cut(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    # Even a cut into one piece costs a copy in the backward pass.
    return x.split(sizes, 2) if len(sizes) > 1 else [x]


def _rows(x: Tensor, count: int) -> Tensor:
    """(1, heads, count x n, size) as (count, heads, n, size)."""
    return x.unflatten(2, (count, -1)).squeeze(0).transpose(0, 1)


def _mask(span: Span, window: int | None, device: torch.device) -> Tensor | None:
    """What each query may see, (1, 1, m, n); None where `sdpa` knows it without: all or causal."""
    last = span.keys - span.queries  # the last key that the first query sees
    if window is None or window >= span.keys:
        if span.queries == 1 or last == 0:
            return None
        window = span.keys
    seen = torch.ones(1, 1, span.queries, span.keys, dtype=torch.bool, device=device)
    return seen.tril(last).triu(last - window + 1)
