"""The plan of rows: complete, length-grouped, repeatable, and dealt out without loss."""

import random

import pytest

from pipeline.row_order import plan_steps, share_of


def some_lengths(count: int) -> list[int]:
    rng = random.Random(0)
    return [rng.randint(5, 200) for _ in range(count)]


def test_each_pass_visits_every_row_once() -> None:
    plan = plan_steps(some_lengths(103), batch_size=10, epochs=3, seed=1)
    assert plan.steps_per_epoch == 11 and len(plan) == 33  # ceil(103 / 10) = 11
    # The heaviest step swapped places with the first, so passes are compared as multisets.
    visits = sorted(row for step in plan.steps for row in step)
    assert visits == sorted(list(range(103)) * 3)
    assert all(len(set(step)) == len(step) for step in plan.steps)


def test_rows_of_a_step_are_alike_in_length() -> None:
    lengths = some_lengths(640)
    plan = plan_steps(lengths, batch_size=16, epochs=1, seed=1)
    padded = sum(len(step) * max(lengths[row] for row in step) for step in plan.steps)
    shuffled = list(range(640))
    random.Random(1).shuffle(shuffled)
    plain = sum(16 * max(lengths[row] for row in shuffled[i : i + 16]) for i in range(0, 640, 16))
    waste, plain_waste = padded - sum(lengths), plain - sum(lengths)
    assert waste < 0.2 * plain_waste


def test_order_depends_on_the_seed_only() -> None:
    lengths = some_lengths(200)
    first = plan_steps(lengths, 8, 2, seed=1)
    assert plan_steps(lengths, 8, 2, seed=1) == first
    assert plan_steps(lengths, 8, 2, seed=2) != first
    one_pass = first.steps_per_epoch
    assert set(first.steps[:one_pass]) != set(first.steps[one_pass:])  # passes differ too


def test_heaviest_step_comes_first() -> None:
    lengths = some_lengths(100)
    plan = plan_steps(lengths, 7, 2, seed=3)
    weights = [sum(lengths[row] for row in step) for step in plan.steps]
    assert weights[0] == max(weights)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(0.5, None, 5), (2, 7, 7), (0.01, None, 1), (1, 99, 10)]
)
def test_number_of_steps(epochs: float, max_steps: int | None, expected: int) -> None:
    plan = plan_steps(some_lengths(100), 10, epochs, seed=1, max_steps=max_steps)
    assert len(plan) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_processes_share_a_step_without_loss_or_overlap(world_size: int) -> None:
    lengths = some_lengths(50)
    step = tuple(range(3, 16))
    shares = [share_of(step, lengths, 300, rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for group in share for row in group) == list(step)
    for share in shares:
        for group in share:
            padded = len(group) * max(lengths[row] for row in group)
            assert padded <= 300 or len(group) == 1
