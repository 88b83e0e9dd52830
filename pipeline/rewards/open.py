"""The reward sources that a user names."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config import ModelSection, function_reference
from pipeline.errors import ConfigError, ModelError
from pipeline.models.store import ModelStore, find_artifact
from pipeline.models.trunk import Handle
from pipeline.reward_config import OWN, FunctionEntry, HttpEntry, ModelEntry, RewardEntry
from pipeline.reward_list import EnsembleEntry, Rewards, reward_entries, source_names
from pipeline.rewards.builtin import BuiltinReward
from pipeline.rewards.classifier import SequenceClassificationReward
from pipeline.rewards.function import FunctionReward
from pipeline.rewards.http import HttpReward
from pipeline.rewards.model import ModelReward
from pipeline.rewards.source import RewardSource
from pipeline.rewards.weighted_sum import Ensemble, Term, WeightedSum


@dataclass(frozen=True)
class Opener:
    """What opening a source takes; `own` gives the run's own reward model."""

    store: ModelStore
    section: ModelSection
    token_budget: int | None  # of a forward pass of a model of ours
    own: Callable[[], Handle]

    def open(self, rewards: Rewards) -> RewardSource:
        """The source, or the weighted sum of sources, that `ppo.rewards` names.

        Raises:
            ConfigError: no such function, or a secret or package that is missing.
            ModelError: a model cannot be opened, or gives no single score.
        """
        entries = reward_entries(rewards)
        if rewards is None or isinstance(rewards, str):
            return self._single(entries[0], is_alone=True)
        names = iter(source_names(rewards))
        return WeightedSum([self._term(entry, next(names), names) for entry in entries])

    def _term(self, entry: RewardEntry, name: str, names: Iterator[str]) -> Term:
        if isinstance(entry, EnsembleEntry):
            members = tuple(self._term(member, next(names), names) for member in entry.ensemble)
            ensemble = Ensemble(members, entry.combine, entry.std_coef)
            return Term(name, entry.weight, entry.shift, ensemble)
        source = self._single(entry, is_alone=False)
        source.name = name
        return Term(name, entry.weight, entry.shift, source)

    def _single(self, entry: RewardEntry, *, is_alone: bool) -> RewardSource:
        match entry:
            case ModelEntry(model=model) if model == OWN:
                return ModelReward(self.own(), self.token_budget)
            case ModelEntry(model=model, batch_rows=rows, reads=reads):
                return open_reward(model, self.store, self.section, self.token_budget, rows, reads)
            case FunctionEntry(function=function, timeout_seconds=seconds):
                return FunctionReward(function, seconds, may_abstain=not is_alone)
            case HttpEntry():
                return HttpReward(entry)
        return BuiltinReward(entry)


def open_reward(
    resource: str,
    store: ModelStore,
    section: ModelSection,
    token_budget: int | None,
    batch_rows: int = 16,
    reads: Literal["auto", "text", "pair"] = "auto",
) -> RewardSource:
    """The one source that a resource names: a function, a run or artifact of ours, a classifier.

    `token_budget` is that of a forward pass of a model of ours; `batch_rows` and `reads` are of a
    classifier.
    """
    if resource.endswith(".py"):
        raise ConfigError(f"{resource} names no function: write {resource}:NAME")
    if function_reference(resource):
        return FunctionReward(resource)
    if find_artifact(resource, "reward") or (Path(resource) / "config.yaml").exists():
        handle = store.resolve(resource, "reward")
        if handle.role.head is None:
            raise ModelError(f"{resource} holds a {handle.role.name} model, which gives no scores")
        return ModelReward(handle, token_budget)
    return SequenceClassificationReward(resource, section, store.computes_on, batch_rows, reads)
