"""The last layer of a decoder, only at the positions whose final state is read.

Of a prompt's tokens, the last layer is needed for its keys and values alone: its queries, attention
and feed-forward part serve no one. A transformers layer hands its keys and values to a cache before
it attends, so that two calls of the layer itself are enough: one over all positions that ends
there, and one over the wanted positions that attends to what the first one left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models import sequence_attention
from pipeline.models.joiner import PACKED_FAMILIES, Joined
from pipeline.models.sequence_attention import Span
from pipeline.tensors import send

# Families whose layers can be called like this, each held to the whole pass by a test. (GPT-2
# shapes its final states like its input; BLOOM, Falcon and MPT carry ALiBi biases beside the mask.)
FAMILIES = PACKED_FAMILIES | {"gpt_neox", "opt"}
# Attention that takes a mask of any shape.
MASKED_ATTENTION = frozenset({"sdpa", "eager", sequence_attention.NAME})
# Keys and values are computed twice at the wanted positions, queries at the others in vain:
# of almost all positions, the whole layer is the cheaper one.
WORTH_IT = 0.75


@dataclass(frozen=True)
class Reads:
    """The M positions whose final states are read, on the host."""

    columns: Tensor  # (B, S), with others among them where rows differ in length
    order: Tensor  # (M,): where in (B x S), response tokens row by row first, the ends last

    @classmethod
    def of(cls, joined: Joined, response_mask: Tensor, of_tokens: bool, of_last: bool) -> "Reads":
        """Those that predict the response tokens, those of their ends, or both."""
        last = joined.last.unsqueeze(1)  # (B, 1)
        columns = torch.cat([joined.predictors] * of_tokens + [last] * of_last, 1)
        places = torch.arange(columns.numel()).view_as(columns)
        order = []
        if of_tokens:
            order.append((places[:, :-1] if of_last else places)[response_mask])
        if of_last:
            order.append(places[:, -1])
        return cls(columns, torch.cat(order))


@dataclass(frozen=True)
class Places:
    """The positions at which the last layer is wanted: (b, s) indices of rows and columns.

    Either b is the batch and the columns are padded to s, or b is 1 and nothing is padded: every
    query attends to all rows behind a mask, or to its own sequence of a packed row.
    """

    rows: Tensor
    columns: Tensor
    is_flat: bool
    sequences: tuple[Span, ...] | None = None  # of a packed row

    def to(self, device: torch.device) -> "Places":
        """The same places on another device."""
        return replace(self, rows=send(self.rows, device), columns=send(self.columns, device))


def selective_layer(model: Any) -> nn.Module | None:
    """The model's last layer, if it can be computed at some positions only."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    config = model.config
    if config.model_type not in FAMILIES or config._attn_implementation not in MASKED_ATTENTION:
        return None
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)][-1]


def choose_places(reads: Reads, joined: Joined, hidden_size: int) -> Places | None:
    """The cheapest way to the states that are read. None: the whole layer is no dearer.

    Counted in products a query: 6 x hidden size in the layer's weights (of 12, forward) and one a
    key.
    """
    if joined.lengths is not None:
        return _places_in_sequences(reads, torch.tensor(joined.lengths), hidden_size)
    width = joined.width
    (rows_n, per_row), number = reads.columns.shape, len(reads.order)
    padded = rows_n * per_row * (6 * hidden_size + width)
    flat = number * (6 * hidden_size + rows_n * width)
    if min(padded, flat) > WORTH_IT * rows_n * width * (6 * hidden_size + width):
        return None
    if padded <= flat:
        rows = torch.arange(rows_n).unsqueeze(1).expand_as(reads.columns)
        return Places(rows, reads.columns, is_flat=False)
    columns = reads.columns.flatten()[reads.order]
    return Places((reads.order // per_row).unsqueeze(0), columns.unsqueeze(0), is_flat=True)


def _places_in_sequences(reads: Reads, lengths: Tensor, hidden_size: int) -> Places | None:
    columns = reads.columns.flatten()[reads.order]
    if (columns.diff() <= 0).any():
        return None  # tokens and ends: a sequence's queries do not lie together
    ends = lengths.cumsum(0)
    queries = torch.bincount(torch.searchsorted(ends, columns, right=True))
    keys = columns[queries.cumsum(0) - 1] + 1 - (ends - lengths)
    products = (queries * (6 * hidden_size + keys)).sum()
    if products > WORTH_IT * (lengths * (6 * hidden_size + lengths)).sum():
        return None
    spans = zip(queries.tolist(), keys.tolist(), (lengths - keys).tolist(), strict=True)
    sequences = tuple(Span(*span) for span in spans)
    rows = torch.zeros_like(columns)
    return Places(rows.unsqueeze(0), columns.unsqueeze(0), is_flat=True, sequences=sequences)


@contextmanager
def last_layer_at(
    layer: nn.Module, places: Places, around: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Within it, the body's `last_hidden_state` is (b, s, d): the states at `places` (b, s).

    `around(function, hidden)` makes the calls, where something is to be wrapped round them.
    """
    own = layer.__dict__.get("forward")
    forward = layer.forward

    def chosen(hidden: Tensor, **given: Any) -> Any:
        function = partial(_at_places, forward, places, given)
        return function(hidden) if around is None else around(function, hidden)

    layer.forward = chosen
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _at_places(forward: Any, places: Places, given: dict[str, Any], hidden: Tensor) -> Any:
    # GPT-NeoX alone has another name for the cache.
    name = "layer_past" if "layer_past" in given else "past_key_values"
    memory = _KeysAndValues(places.is_flat)
    with suppress(_Remembered):
        forward(hidden, **given | {name: memory})

    def take(x: Tensor) -> Tensor:  # (B or 1, T, ...) -> (b, s, ...)
        return x[places.rows if x.shape[0] > 1 else 0, places.columns]

    placed: dict[str, Any] = {name: memory}
    if places.sequences is not None:
        placed["sequences"] = places.sequences
    else:
        placed["attention_mask"] = _mask(places, hidden, given["attention_mask"])
    if given.get("position_ids") is not None:
        placed["position_ids"] = take(given["position_ids"])
    if "position_embeddings" in given:
        placed["position_embeddings"] = tuple(take(x) for x in given["position_embeddings"])
    return forward(take(hidden), **given | placed)


def _mask(places: Places, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of a mask (B or 1, 1, T, T) at the places, (b, 1, s, T or B x T). None is causal."""
    batch, width = hidden.shape[:2]
    if mask is None:
        columns = torch.arange(width, device=hidden.device)
        chosen = columns <= places.columns.unsqueeze(-1)  # (b, s, T)
    else:
        chosen = mask.expand(batch, 1, width, width)[places.rows, 0, places.columns]
    if places.is_flat:
        own = torch.arange(batch, device=hidden.device) == places.rows.unsqueeze(-1)  # (1, s, B)
        if chosen.dtype == torch.bool:
            chosen = own.unsqueeze(-1) & chosen.unsqueeze(2)  # (1, s, B, T)
        else:  # added to the scores
            least = torch.finfo(chosen.dtype).min
            chosen = torch.where(own.unsqueeze(-1), chosen.unsqueeze(2), least)
        chosen = chosen.flatten(2)
    return chosen.unsqueeze(1)


class _Remembered(Exception):
    """Ends a layer's call once its keys and values are known."""


class _KeysAndValues:
    """A cache that ends the first call of a layer, and gives its keys and values to the second."""

    def __init__(self, is_flat: bool) -> None:
        self.is_flat = is_flat
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(
        self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what comes first, (B, heads, T, size), all rows as one if flat; return it then."""
        if self.kept is None:
            if self.is_flat:
                keys, values = (x.transpose(0, 1).flatten(1, 2)[None] for x in (keys, values))
            self.kept = keys, values
            raise _Remembered
        return self.kept
