"""Reward sources behind one protocol; judges of evaluation use the same."""

from pipeline.rewards.classifier import SequenceClassificationReward
from pipeline.rewards.function import FunctionReward
from pipeline.rewards.model import ModelReward
from pipeline.rewards.open import open_reward
from pipeline.rewards.source import Completions, RewardSource

__all__ = [
    "Completions",
    "FunctionReward",
    "ModelReward",
    "RewardSource",
    "SequenceClassificationReward",
    "open_reward",
]
