"""Reward sources behind one protocol; judges of evaluation use the same."""

from pipeline.rewards.source import Completions, RewardSource
from pipeline.rewards.sources import (
    FunctionReward,
    ModelReward,
    SequenceClassificationReward,
    open_reward,
)

__all__ = [
    "Completions",
    "FunctionReward",
    "ModelReward",
    "RewardSource",
    "SequenceClassificationReward",
    "open_reward",
]
