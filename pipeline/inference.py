"""A handle's outputs for many rows, without gradient and within a token budget."""

from collections.abc import Collection

import torch
from torch import Tensor

from pipeline.batches import TokenBatch, micro_batches
from pipeline.models.trunk import Handle
from pipeline.out_of_memory import halving


@torch.no_grad()
def infer(
    handle: Handle,
    batch: TokenBatch,
    want: Collection[str],
    token_budget: int | None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """The outputs that `want` names (see `TrunkOutput`), (B, R) or (B,), by name.

    The rows pass in micro-batches of at most `token_budget` tokens (None: as suits the device),
    padding included, in an order of their own; the outputs are in the order of the batch, on its
    device. Where memory runs out, the micro-batches get smaller.

    Raises:
        TrainingError: the longest row alone does not fit into memory.
    """
    lengths = batch.lengths

    def attempt(tokens: int) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for rows in micro_batches(lengths, tokens, packed=handle.trunk.packs):
            part = handle(batch.take(rows), want, temperature)
            for name in want:
                found: Tensor = getattr(part, name).to(batch.response_ids.device)
                if name not in out:
                    shape = batch.response_ids.shape[: found.dim()]
                    out[name] = torch.zeros(shape, dtype=found.dtype, device=found.device)
                if found.dim() == 1:
                    out[name][rows] = found
                else:
                    out[name][rows, : found.shape[1]] = found
        return out

    budget = handle.trunk.token_budget(token_budget)
    remedy = f"{max(lengths)} tokens, the longest row, do not fit the {handle.role.name} model"
    found, _ = halving(attempt, budget, min(budget, max(lengths)), remedy, undo=_nothing)
    return found


def _nothing() -> None:
    """An attempt without gradient leaves nothing behind."""
