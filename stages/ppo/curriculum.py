"""Curriculum: prompts in the order of a number that says how hard they are, easy ones first.

The pacing function of Bengio et al. 2009 (doi:10.1145/1553374.1553380): iteration t draws from the
first share of the sorted prompts, and the share grows to all of them.
"""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.errors import DataError
from pipeline.records import Prompt
from stages.ppo.config import CurriculumSection, PpoSection
from stages.ppo.rollout import PromptOrder


def open_share(section: CurriculumSection, iteration: int, iterations: int) -> float:
    """Share of the prompts that are open in an iteration, counted from 0, of so many.

    With s the share at the start and p = t / T the way to the iteration that opens all: s + (1 - s)
    p, or sqrt(s^2 + (1 - s^2) p) (Platanios et al. 2019, arXiv:1903.09848).
    """
    last = section.iterations or max(iterations // 2, 1)
    done = min(iteration / (last - 1), 1.0) if last > 1 else 1.0
    start = section.start_share
    if section.pacing == "linear":
        return start + (1.0 - start) * done
    return math.sqrt(start**2 + (1.0 - start**2) * done)


def difficulties(prompts: Sequence[Prompt], column: str) -> list[float]:
    """The number of each prompt; text of a CSV that is one counts.

    Raises:
        DataError: a prompt has none that is finite; names row and column.
    """
    found = []
    for prompt in prompts:
        value = prompt.columns.get(column)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            what = f"is {value!r}" if column in prompt.columns else "is missing"
            raise DataError(
                f"{prompt.origin}: `{column}` (ppo.curriculum.column) {what}: every prompt needs a "
                "finite number there. Add it, or remove ppo.curriculum"
            )
        found.append(number)
    return found


class CurriculumOrder(PromptOrder):
    """Prompts at random among those that are open, each once before any of them again.

    What is asked in a pass through the open prompts depends on the iterations before, all of which
    follow from the seed: they are gone through again where a run goes on.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, section: CurriculumSection, iterations: int
    ) -> None:
        super().__init__(prompts, seed)
        assert section.column is not None
        numbers = np.array(difficulties(prompts, section.column))
        sign = -1.0 if section.order == "descending" else 1.0
        self.sorted = np.argsort(sign * numbers, kind="stable")
        self.section, self.iterations = section, iterations
        self._drawn: dict[int, list[list[int]]] = {}  # of a count: the places of each iteration
        self._asked: dict[int, np.ndarray] = {}  # of a count: which the pass in hand has asked

    def open(self, iteration: int) -> int:
        """How many prompts are open in an iteration, counted from 0; at least one."""
        share = open_share(self.section, iteration, self.iterations)
        # 0.2 + 0.8 * 0.5 of 10 prompts are 6, whatever the last bit says.
        return max(1, min(math.ceil(share * len(self.prompts) - 1e-9), len(self.prompts)))

    def metrics(self, iteration: int) -> dict[str, float]:
        """`curriculum_share`: share of the prompts that are open."""
        return {"curriculum_share": self.open(iteration) / len(self.prompts)}

    def places(self, iteration: int, count: int) -> list[int]:
        """See `PromptOrder`."""
        drawn = self._drawn.setdefault(count, [])
        asked = self._asked.setdefault(count, np.zeros(len(self.prompts), dtype=bool))
        while len(drawn) <= iteration:
            drawn.append(self._next(len(drawn), count, asked))
        return drawn[iteration]

    def _next(self, iteration: int, count: int, asked: np.ndarray) -> list[int]:
        random = np.random.default_rng([self.seed, iteration])
        candidates = self.sorted[: self.open(iteration)]
        chosen: list[int] = []
        while len(chosen) < count:
            left = random.permutation(candidates[~asked[candidates]])
            if not left.size:  # the pass is over; the next one begins with others than just now
                asked[candidates] = False
                left = random.permutation(candidates)
                left = left[np.argsort(np.isin(left, chosen), kind="stable")]
            taken = left[: count - len(chosen)]
            asked[taken] = True
            chosen += taken.tolist()
        return chosen


def open_order(prompts: Sequence[Prompt], seed: int, section: PpoSection) -> PromptOrder:
    """The order in which a run asks its prompts."""
    if section.curriculum.column is None:
        return PromptOrder(prompts, seed)
    return CurriculumOrder(prompts, seed, section.curriculum, section.iterations)
