"""A handle's outputs for many rows, without gradient and within a token budget."""

from collections.abc import Collection

import torch
from torch import Tensor

from pipeline.batches import TokenBatch, micro_batches
from pipeline.models.trunk import Handle


@torch.no_grad()
def infer(
    handle: Handle,
    batch: TokenBatch,
    want: Collection[str],
    token_budget: int,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """The outputs that `want` names (see `TrunkOutput`), (B, R) or (B,), by name.

    The rows pass in micro-batches of at most `token_budget` tokens, padding included, in an order
    of their own; the outputs are in the order of the batch.
    """
    out: dict[str, Tensor] = {}
    for rows in micro_batches(batch.lengths, token_budget):
        part = handle(batch.take(rows), want, temperature)
        for name in want:
            found: Tensor = getattr(part, name)
            if name not in out:
                shape = batch.response_ids.shape[: found.dim()]
                out[name] = torch.zeros(shape, dtype=found.dtype, device=found.device)
            if found.dim() == 1:
                out[name][rows] = found
            else:
                out[name][rows, : found.shape[1]] = found
    return out
