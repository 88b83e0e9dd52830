"""Reward sources behind one protocol; judges of evaluation use the same."""

from pipeline.rewards.builtin import BuiltinReward
from pipeline.rewards.classifier import SequenceClassificationReward
from pipeline.rewards.function import FunctionReward
from pipeline.rewards.http import HttpReward
from pipeline.rewards.model import ModelReward
from pipeline.rewards.open import Opener, open_reward
from pipeline.rewards.source import Completions, RewardSource, Scores
from pipeline.rewards.weighted_sum import (
    WeightedModel,
    WeightedSum,
    measured,
    models_of,
    names_of,
    reward_roles,
    weighted_models,
)

__all__ = [
    "Completions",
    "RewardSource",
    "Scores",
    "ModelReward",
    "SequenceClassificationReward",
    "FunctionReward",
    "HttpReward",
    "BuiltinReward",
    "WeightedSum",
    "WeightedModel",
    "Opener",
    "open_reward",
    "measured",
    "models_of",
    "names_of",
    "reward_roles",
    "weighted_models",
]
