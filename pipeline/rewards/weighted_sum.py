"""Several reward sources as one: a weighted sum, with ensembles among its terms."""

import asyncio
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from pipeline.errors import TrainingError
from pipeline.models.trunk import Handle
from pipeline.not_finite import NotFinite, caught, raised
from pipeline.rewards.classifier import SequenceClassificationReward
from pipeline.rewards.function import FunctionReward, run_async
from pipeline.rewards.http import HttpReward
from pipeline.rewards.model import ModelReward
from pipeline.rewards.source import ABSTAINED, Completions, RewardSource, Scores, checked, rows_text

Combine = Literal["mean", "minimum", "mean_minus_std"]


@dataclass(frozen=True)
class Term:
    """A source, with its weight x (score - shift) in a sum or an ensemble."""

    name: str
    weight: float
    shift: float
    source: "RewardSource | Ensemble"

    def weighted(self, scores: Sequence[float]) -> list[float]:
        """What it counts for; ABSTAINED stays so."""
        return [self.weight * (score - self.shift) for score in scores]


@dataclass(frozen=True)
class Ensemble:
    """Sources that are combined row by row."""

    members: tuple[Term, ...]
    combine: Combine
    std_coef: float

    def combined(self, scores: Mapping[str, Sequence[float]]) -> list[float]:
        """The scores of the members, by their names, as one a row."""
        weighted = (member.weighted(scores[member.name]) for member in self.members)
        return [combined(row, self.combine, self.std_coef) for row in zip(*weighted, strict=True)]


class WeightedSum:
    """Sum over terms of weight x (score - shift); every source's own score is kept apart.

    Where a source abstains from a row, it adds nothing there; somebody has to score each row.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        weights = ("" if term.weight == 1 else f"{term.weight:g} x " for term in terms)
        self.name = " + ".join(w + term.name for w, term in zip(weights, terms, strict=True))

    @property
    def sources(self) -> dict[str, RewardSource]:
        """Every source by its name, ensembles' members in their place."""
        return {term.name: source for term, source in self._singles()}

    @property
    def names(self) -> list[str]:
        """The names of `Scores.by_source`: of all sources and ensembles."""
        return [
            name
            for term in self.terms
            for name in (term.name, *(m.name for m in _members(term.source)))
        ]

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        return self.measure(completions).total

    def measure(self, completions: Completions) -> Scores:
        """Scores, and those of each source.

        Raises:
            TrainingError: a source failed. All sources are asked first: models whose weights lie
                over processes are passed by all processes or by none.
        """
        scores = self._ask_all(completions)
        total = [0.0] * len(completions)
        unscored = dict.fromkeys(range(len(completions)))
        for term in self.terms:
            if isinstance(term.source, Ensemble):
                scores[term.name] = term.source.combined(scores)
            for row, value in enumerate(term.weighted(scores[term.name])):
                if not math.isnan(value):
                    total[row] += value
                    unscored.pop(row, None)
        if unscored:
            first = next(iter(unscored))
            raise TrainingError(
                f"none of the rewards {self.name} has a score for {len(unscored)} of "
                f"{len(completions)} completions; the first is {completions.texts[first]!r} "
                f"({rows_text(completions, [first])})"
            )
        by_source = {name: scores[name] for name in self.names}
        return Scores(checked(self.name, total, completions), by_source)

    def _singles(self) -> list[tuple[Term, RewardSource]]:
        terms = [t for term in self.terms for t in (_members(term.source) or (term,))]
        return [(term, term.source) for term in terms if not isinstance(term.source, Ensemble)]

    def _ask_all(self, completions: Completions) -> dict[str, list[float]]:
        """Scores by name: one source after the other, then all that wait for others at once."""
        waiting = {n: s for n, s in self.sources.items() if _waits(s)}
        found = {
            name: caught(lambda source=source: source.score(completions))  # type: ignore[misc]
            for name, source in self.sources.items()
            if name not in waiting
        }

        async def ask() -> list[list[float] | TrainingError]:
            return await asyncio.gather(*(_caught(s, completions) for s in waiting.values()))

        if waiting:
            found |= zip(waiting, run_async(ask()), strict=True)
        faults = [fault for fault in found.values() if isinstance(fault, TrainingError)]
        # A number that is not finite has a roll-back; any other fault ends the run.
        faults.sort(key=lambda fault: isinstance(fault, NotFinite))
        return {name: raised(faults[0] if faults else scores) for name, scores in found.items()}


def combined(scores: Sequence[float], combine: Combine, std_coef: float) -> float:
    """One row's scores of an ensemble's members as one; who abstained is left out.

    `minimum` is the worst-case optimisation of Coste et al. 2023 (arXiv:2310.02743, sec. 3);
    `mean_minus_std` is near its uncertainty-weighted one, which takes the variance off: a standard
    deviation is in the unit of the scores, so that `std_coef` means the same on every scale. It is
    that of the members as they are (divided by their number).
    """
    known = [score for score in scores if not math.isnan(score)]
    if not known:
        return ABSTAINED
    if combine == "minimum":
        return min(known)
    mean = statistics.fmean(known)
    return mean if combine == "mean" else mean - std_coef * statistics.pstdev(known)


# --- what others ask of rewards, whether they are one source or several ---------------------------


def measured(rewards: RewardSource, completions: Completions) -> Scores:
    """The scores, with those of each source where there are several."""
    if isinstance(rewards, WeightedSum):
        return rewards.measure(completions)
    return Scores(rewards.score(completions), {})


def names_of(rewards: RewardSource) -> list[str]:
    """The names in `Scores.by_source`."""
    return rewards.names if isinstance(rewards, WeightedSum) else []


def models_of(rewards: RewardSource | None) -> dict[str, Handle | nn.Module]:
    """The models among the sources, by the sources' names."""
    found: dict[str, Handle | nn.Module] = {}
    sources = rewards.sources if isinstance(rewards, WeightedSum) else {"": rewards}
    for name, source in sources.items():
        if isinstance(source, ModelReward):
            found[name] = source.handle
        elif isinstance(source, SequenceClassificationReward):
            found[name] = source.model
    return found


def reward_roles(models: dict[str, Handle | nn.Module]) -> dict[str, Handle | nn.Module]:
    """The models by their roles: `reward` if there is one, else each with its source's name."""
    if len(models) == 1:
        return {"reward": next(iter(models.values()))}
    return {f"reward {name}": model for name, model in models.items()}


@dataclass(frozen=True)
class WeightedModel:
    """A reward model of ours and what it counts for: weight x (score - shift)."""

    handle: Handle
    weight: float = 1.0
    shift: float = 0.0


def weighted_models(rewards: RewardSource | None) -> list[WeightedModel]:
    """The reward models of ours that count among the sources (of several, not with weight 0)."""
    if isinstance(rewards, ModelReward):
        return [WeightedModel(rewards.handle)]
    if not isinstance(rewards, WeightedSum):
        return []
    return [
        WeightedModel(source.handle, outer.weight * inner.weight, inner.shift)
        for outer in rewards.terms
        for inner in (_members(outer.source) or (Term("", 1.0, outer.shift, outer.source),))
        if isinstance(source := inner.source, ModelReward) and outer.weight * inner.weight
    ]


def _members(source: RewardSource | Ensemble) -> tuple[Term, ...]:
    return source.members if isinstance(source, Ensemble) else ()


def _waits(source: RewardSource | None) -> bool:
    return isinstance(source, HttpReward) or (
        isinstance(source, FunctionReward) and source.is_async
    )


async def _caught(source: RewardSource, completions: Completions) -> list[float] | TrainingError:
    assert isinstance(source, HttpReward | FunctionReward)
    try:
        return await source.score_async(completions)
    except TrainingError as error:
        return error
