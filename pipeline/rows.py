"""Rows to train on, whatever a row is, and a process's share of each optimiser step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.row_order import Plan, share_of


class Rows(Protocol):
    """What the fence asks of a dataset; what a row *is* (a demonstration, a ranking) it never asks.

    `lengths[i]` is what row i costs in a micro-batch, in tokens with its own padding (K responses:
    K times the longest); `units[i]` is what it adds to the count that a step's loss is divided by.
    """

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens that each row costs."""

    @property
    def units(self) -> Sequence[int]:
        """Units of loss that each row holds."""

    def collate(self, rows: Sequence[int]) -> Any:
        """These rows as one micro-batch."""

    def describe(self, row: int) -> Mapping[str, Any]:
        """A row as people know it: its number, where it is from, its texts; for JSON."""


@dataclass(frozen=True)
class Step:
    """One process's share of one optimiser step."""

    batches: list[Any]
    groups: list[list[int]]  # the rows of each batch
    weights: list[float]  # of each batch: 0 if the process passes it for nothing
    units: int  # of the whole step, over all processes
    rows: int  # of the whole step, over all processes


class StepDataset(Dataset[dict[str, Step]]):
    """The plan as a dataset: item i is optimiser step i."""

    def __init__(
        self,
        rows: Rows,
        plan: Plan,
        token_budget: int,
        rank: int,
        world_size: int,
        *,
        in_step: bool = False,
    ) -> None:
        self.rows, self.plan, self.token_budget = rows, plan, token_budget
        self.rank, self.world_size, self.in_step = rank, world_size, in_step

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Step]:
        chosen = self.plan.steps[index]
        share, weights = share_and_filler(
            chosen, self.rows, self.token_budget, self.rank, self.world_size, in_step=self.in_step
        )
        return {
            "step": Step(
                batches=[self.rows.collate(group) for group in share],
                groups=share,
                weights=weights,
                units=sum(self.rows.units[row] for row in chosen),
                rows=len(chosen),
            )
        }


def share_and_filler(
    chosen: Sequence[int],
    rows: Rows,
    token_budget: int,
    rank: int,
    world_size: int,
    *,
    in_step: bool = False,
) -> tuple[list[list[int]], list[float]]:
    """One process's micro-batches and their weights: 1, or 0 of those that it passes for nothing.

    A backward pass is a collective: a process without rows runs somebody's row. `in_step`: every
    pass is one (weights are sharded), and all processes make as many as the one that has most.
    """

    def share_of_rank(rank: int) -> list[list[int]]:
        return share_of(chosen, rows.lengths, token_budget, rank, world_size)

    share = share_of_rank(rank)
    passes = max(len(share_of_rank(other)) for other in range(world_size)) if in_step else 1
    missing = max(passes - len(share), 0)
    filler = share[-1] if share else [chosen[0]]
    return share + [filler] * missing, [1.0] * len(share) + [0.0] * missing


def rows_at_fault(groups: Sequence[Sequence[int]], sums: Sequence[Tensor]) -> list[int]:
    """The rows of the micro-batches whose sum is not finite."""
    finite = torch.stack(list(sums)).isfinite().tolist()
    return [row for group, good in zip(groups, finite, strict=True) if not good for row in group]
