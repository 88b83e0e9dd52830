"""The reward source that a user names."""

from pathlib import Path

from pipeline.config import ModelSection, function_reference
from pipeline.errors import ConfigError, ModelError
from pipeline.models.store import ModelStore, find_artifact
from pipeline.rewards.classifier import SequenceClassificationReward
from pipeline.rewards.function import FunctionReward
from pipeline.rewards.model import ModelReward
from pipeline.rewards.source import RewardSource


def open_reward(
    resource: str, store: ModelStore, section: ModelSection, token_budget: int | None
) -> RewardSource:
    """The reward source that a user names: a function, a run or artifact of ours, a classifier.

    `token_budget` is that of a forward pass of a model of ours.
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
    return SequenceClassificationReward(resource, section, store.computes_on)
