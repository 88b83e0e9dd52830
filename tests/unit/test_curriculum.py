"""The order of prompts under a curriculum."""

import random

import pytest

from pipeline.errors import DataError
from pipeline.records import Prompt
from stages.ppo.config import CurriculumSection, PpoSection
from stages.ppo.curriculum import CurriculumOrder, difficulties, open_order
from stages.ppo.rollout import PromptOrder
from stages.ppo.rollout_config import RolloutSection

LEVELS = list(range(40))
random.Random(3).shuffle(LEVELS)
PROMPTS = [Prompt(f"p{level}", {"level": level}, f"f:{i}") for i, level in enumerate(LEVELS)]


def order(seed: int = 1, **section) -> CurriculumOrder:
    section = {"column": "level", "start_share": 0.25, "iterations": 4} | section
    return CurriculumOrder(PROMPTS, seed, CurriculumSection(**section), 10)


def levels(order: PromptOrder, iteration: int, count: int) -> list[int]:
    return [LEVELS[place] for place in order.places(iteration, count)]


@pytest.mark.parametrize("direction", ["ascending", "descending"])
def test_an_iteration_asks_among_the_open_prompts_only(direction) -> None:
    # 0.25, 0.5, 0.75, 1 of 40 prompts
    for iteration, opened in enumerate([10, 20, 30, 40, 40]):
        asked = levels(order(order=direction), iteration, 5)
        if direction == "descending":
            asked = [39 - level for level in asked]
        assert max(asked) < opened
    metrics = [order(order=direction).metrics(i) for i in (0, 1, 5)]
    assert metrics == [{"curriculum_share": s} for s in (0.25, 0.5, 1.0)]


def test_no_prompt_is_asked_again_before_all_that_are_open_were() -> None:
    plan, count = order(), 5
    asked_in_pass: set[int] = set()
    for iteration in range(30):
        opened = plan.open(iteration)
        for level in levels(plan, iteration, count):
            if level in asked_in_pass:
                assert asked_in_pass == set(range(opened)), iteration
                asked_in_pass = set()
            asked_in_pass.add(level)
    # The next 8 iterations of 5, from the begin of a pass on, are all 40.
    everything = [level for i in range(100) for level in levels(plan, i, count)]
    assert set(everything) == set(range(40))
    assert max(map(everything.count, range(40))) - min(map(everything.count, range(30, 40))) <= 2


def test_more_prompts_than_are_open_are_asked_evenly() -> None:
    asked = levels(order(), 0, 25)  # 10 are open
    assert {asked.count(level) for level in range(10)} == {2, 3}
    assert sum(asked.count(level) for level in range(10)) == 25


def test_the_order_follows_from_seed_and_iteration_alone() -> None:
    whole = [order().places(i, 5) for i in range(12)]
    assert order().places(11, 5) == whole[11]  # as a run that goes on asks
    backwards = order()
    assert [backwards.places(i, 5) for i in reversed(range(12))] == whole[::-1]
    assert [order(seed=2).places(i, 5) for i in range(12)] != whole
    # Ranks share an iteration's prompts, with the indices of one process.
    section = RolloutSection(prompts_per_iteration=5, responses_per_prompt=2)
    prompts, indices = order().draw(3, section)
    assert [p.columns["level"] for p in prompts[::2]] == [LEVELS[i] for i in whole[3]]
    shards = [order().draw(3, section, rank, 2) for rank in (0, 1)]
    together = {i: p for prompts, ids in shards for p, i in zip(prompts, ids, strict=True)}
    assert together == dict(zip(indices, prompts, strict=True))
    asked = order().asked(12, section)
    assert len(asked) == len({p.origin for p in asked})
    assert {p.origin for p in asked} == {PROMPTS[i].origin for places in whole for i in places}


@pytest.mark.parametrize("value", [None, "hard", True, float("nan"), "inf", [1]])
def test_what_is_no_number_is_named_with_row_and_column(value) -> None:
    rows = [Prompt("a", {"level": "2.5"}, "f:1"), Prompt("b", {"level": value}, "f:2")]
    with pytest.raises(DataError, match=r"^f:2: `level` \(ppo.curriculum.column\) is "):
        difficulties(rows, "level")
    with pytest.raises(DataError, match=r"^f:1: `grade` .* is missing"):
        difficulties(rows, "grade")
    assert difficulties(rows[:1], "level") == [2.5]  # a CSV's numbers are text


def test_without_a_column_nothing_changes() -> None:
    plain = open_order(PROMPTS, 1, PpoSection())
    assert type(plain) is PromptOrder and plain.metrics(0) == {}
    assert type(open_order(PROMPTS, 1, PpoSection(curriculum={"column": "level"}))) is not (
        PromptOrder
    )
