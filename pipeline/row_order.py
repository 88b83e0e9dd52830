"""The order in which training meets its rows, fixed once from the global batch.

Every process computes the same plan and takes its share of each step, so that the result depends on
neither micro-batches nor the number of processes. Plain Python: it says the same everywhere.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.batches import micro_batches

_MOST_BATCHES_SORTED_TOGETHER = 50


@dataclass(frozen=True)
class Plan:
    """Row indices of every optimiser step, over all passes and all processes."""

    steps: tuple[tuple[int, ...], ...]
    steps_per_epoch: int

    def __len__(self) -> int:
        return len(self.steps)

    def after(self, step: int) -> "Plan":
        """What is left when the first `step` steps are done."""
        return Plan(self.steps[step:], self.steps_per_epoch)


def plan_steps(
    lengths: Sequence[int],
    batch_size: int,
    epochs: float,
    seed: int,
    max_steps: int | None = None,
) -> Plan:
    """Length-grouped random order: rows of a step are of similar length, so padding is small.

    Each pass shuffles the rows, sorts them by length within stretches of up to 50 steps (at least
    four stretches a pass, so that steps differ from pass to pass), cuts them into steps and
    shuffles those. The step with the most tokens comes first: if memory is short, it shows at once.

    Args:
        lengths: tokens of each row.
        batch_size: rows a step; the last cut of a pass may hold fewer.
        epochs: passes over the rows; a fraction ends within a pass.
        max_steps: cap on the number of steps.
    """
    assert lengths, "no rows to train on"
    steps_per_epoch = math.ceil(len(lengths) / batch_size)
    total = max(1, math.ceil(epochs * steps_per_epoch))
    if max_steps is not None:
        total = min(total, max_steps)
    steps: list[tuple[int, ...]] = []
    epoch = 0
    while len(steps) < total:
        steps += _one_pass(lengths, batch_size, random.Random(f"rows/{seed}/{epoch}"))
        epoch += 1
    del steps[total:]
    heaviest = max(range(total), key=lambda step: sum(lengths[row] for row in steps[step]))
    steps[0], steps[heaviest] = steps[heaviest], steps[0]
    return Plan(tuple(steps), steps_per_epoch)


def _one_pass(lengths: Sequence[int], batch_size: int, rng: random.Random) -> list[tuple[int, ...]]:
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    together = max(1, min(len(rows) // (4 * batch_size), _MOST_BATCHES_SORTED_TOGETHER))
    stretch = together * batch_size
    grouped = [
        row
        for start in range(0, len(rows), stretch)
        for row in sorted(rows[start : start + stretch], key=lambda row: -lengths[row])
    ]
    steps = [
        tuple(grouped[start : start + batch_size]) for start in range(0, len(grouped), batch_size)
    ]
    rng.shuffle(steps)
    return steps


def share_of(
    rows: Sequence[int], lengths: Sequence[int], token_budget: int, rank: int, world_size: int
) -> list[list[int]]:
    """One process's micro-batches of a step: row indices, each within `token_budget` tokens.

    Rows are dealt out in order of length, so that all processes get about the same work. With fewer
    rows than processes some get none (an empty list).
    """
    dealt = sorted(rows, key=lambda row: (-lengths[row], row))[rank::world_size]
    groups = micro_batches([lengths[row] for row in dealt], token_budget)
    return [[dealt[index] for index in group] for group in groups]
