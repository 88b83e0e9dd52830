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
    forbidden: Collection[int] = frozenset(),
) -> dict[str, Tensor]:
    """The outputs that `want` names (see `TrunkOutput`), (B, R) or (B,), by name.

    The rows pass in micro-batches of at most `token_budget` tokens (None: as suits the device),
    padding included, in an order of their own; the outputs are in the order of the batch, on the
    host. Where memory runs out, the micro-batches get smaller.

    Raises:
        TrainingError: the longest row alone does not fit into memory.
    """
    lengths, shards = batch.lengths, handle.trunk.shards

    def attempt(tokens: int) -> dict[str, Tensor]:
        groups = micro_batches(lengths, tokens, packed=handle.trunk.packs)
        passes = groups
        if shards is not None:  # a pass gathers weights from all: some pass for nothing
            passes = groups + groups[-1:] * (shards.most(len(groups)) - len(groups))
        parts = [handle(batch.take(rows), want, temperature, forbidden) for rows in passes]
        parts = parts[: len(groups)]
        if shards is not None:
            shards.rest()
        # Only here the device is waited for.
        return {
            name: _in_order([getattr(part, name).cpu() for part in parts], groups, batch)
            for name in want
        }

    budget = handle.trunk.token_budget(token_budget)
    remedy = f"{max(lengths)} tokens, the longest row, do not fit the {handle.role.name} model"
    # One process of several cannot make more passes than the others.
    smallest = min(budget, max(lengths)) if shards is None else budget
    found, _ = halving(attempt, budget, smallest, remedy, undo=_nothing)
    return found


def _in_order(parts: list[Tensor], groups: list[list[int]], batch: TokenBatch) -> Tensor:
    """The outputs of groups of rows, (b, r) or (b,) each, in the order of the batch."""
    out = torch.zeros(batch.response_ids.shape[: parts[0].dim()], dtype=parts[0].dtype)
    for rows, found in zip(groups, parts, strict=True):
        if found.dim() == 1:
            out[rows] = found
        else:
            out[rows, : found.shape[1]] = found
    return out


def _nothing() -> None:
    """An attempt without gradient leaves nothing behind."""
