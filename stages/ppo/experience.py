"""From a rollout to what the update learns from: token rewards, advantages, returns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.tensors import masked_sum
from stages.ppo.learning_config import AdvantageSection, KlSection
from stages.ppo.objective import (
    explained_variance,
    gae,
    kl_estimate,
    length_adaptive_lambda,
    mean_variance,
    moments,
    token_rewards,
    whiten,
)
from stages.ppo.rollout import Rollout

AllSum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Experience:
    """A rollout with its advantages and returns, (B, R) each, zeros on padding."""

    rollout: Rollout
    advantages: Tensor
    returns: Tensor
    explained_variance: float  # of the returns, by the values before this iteration's update
    mean_lambda: float | None = None  # of the policy's advantages, over responses, if it varies


def appraise(
    rollout: Rollout, kl_coef: float | Tensor, section: AdvantageSection, all_sum: AllSum
) -> Experience:
    """Token rewards, GAE and whitening with the moments of all processes' tokens.

    `kl_coef` is one number, or one a response (B,). Returns are the advantages of the value's own
    lambda + values, before whitening. `all_sum` adds a tensor up over processes.
    """
    mask = rollout.mask
    rewards = token_rewards(rollout.logprobs, rollout.ref_logprobs, rollout.rewards, mask, kl_coef)
    if section.whiten_rewards:
        rewards = whiten(rewards, mask, all_sum(moments(rewards, mask)), shift_mean=False)
    advantages, returns, mean_lambda = _decoupled_gae(rewards, rollout, section, all_sum)
    explained = explained_variance(
        all_sum(moments(returns - rollout.values, mask)), all_sum(moments(returns, mask))
    )
    if section.whiten:
        advantages = whiten(advantages, mask, all_sum(moments(advantages, mask)), shift_mean=True)
    return Experience(rollout, advantages, returns, explained, mean_lambda)


def _decoupled_gae(
    rewards: Tensor, rollout: Rollout, section: AdvantageSection, all_sum: AllSum
) -> tuple[Tensor, Tensor, float | None]:
    """Advantages by the policy's lambda, returns by the value's (B, R); its mean if it varies."""
    mask, values, gamma = rollout.mask, rollout.values, section.gamma
    policy_lambda: float | Tensor = section.gae_lambda
    mean_lambda: float | None = None
    if section.length_adaptive_alpha is not None:
        lengths = rollout.batch.response_lengths
        policy_lambda = length_adaptive_lambda(lengths, section.length_adaptive_alpha)
        counted = torch.stack([policy_lambda, torch.ones_like(policy_lambda)])
        total, responses = all_sum(counted.sum(1)).tolist()
        mean_lambda = total / responses
    advantages, returns = gae(rewards, values, mask, gamma, policy_lambda)
    value_lambda = section.gae_lambda if section.value_lambda is None else section.value_lambda
    if isinstance(policy_lambda, Tensor) or value_lambda != policy_lambda:
        _, returns = gae(rewards, values, mask, gamma, value_lambda)
    return advantages, returns, mean_lambda


def rollout_metrics(
    rollout: Rollout, kl: KlSection, all_sum: AllSum, importance_cap: float | None = None
) -> dict[str, float]:
    """Means over all processes' responses and response tokens, never over padding.

    `kl` is the mean k1 sum of a response, in nats: what the controller steers and the penalty sees.
    The mean of importance weights, where there are any, is 1 but for chance and the cap.
    """
    mask = rollout.mask
    k1 = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")
    logged = kl_estimate(rollout.logprobs, rollout.ref_logprobs, kl.estimator)
    ones = torch.ones(len(rollout), 1, dtype=torch.bool)
    scores = all_sum(moments(rollout.scores.unsqueeze(1), ones))
    score, score_variance = mean_variance(scores)
    totals = all_sum(
        torch.stack(
            [
                masked_sum(k1.double(), mask),
                masked_sum(logged.double(), mask),
                masked_sum(rollout.entropy.double(), mask),
                rollout.rewards.sum().double(),
                rollout.ended.sum().double(),
                mask.sum().double(),
            ]
        )
    ).tolist()
    k1_sum, logged_sum, entropy_sum, reward_sum, ended, tokens = totals
    responses = float(scores[0])
    return {
        **_importance_metrics(rollout, all_sum, importance_cap),
        **source_metrics(rollout, all_sum),
        "score": score,
        "score_std": score_variance**0.5,
        "reward": reward_sum / responses,
        "kl": k1_sum / responses,
        f"kl_{kl.estimator}_per_token": logged_sum / tokens,
        "entropy": entropy_sum / tokens,
        "response_tokens": tokens / responses,
        "eos_rate": ended / responses,
        "responses": responses,
    }


def source_metrics(rollout: Rollout, all_sum: AllSum) -> dict[str, float]:
    """`scores/NAME/mean` and `scores/NAME/std` of each source over the rows that it scored.

    Left out of a source that scored none. Every process has the same sources in the same order.
    """
    found: dict[str, float] = {}
    for name, scores in rollout.source_scores.items():
        known = ~scores.isnan()
        sums = all_sum(moments(scores.nan_to_num().unsqueeze(1), known.unsqueeze(1)))
        if sums[0] > 0:
            mean, variance = mean_variance(sums)
            found |= {f"scores/{name}/mean": mean, f"scores/{name}/std": variance**0.5}
    return found


def _importance_metrics(rollout: Rollout, all_sum: AllSum, cap: float | None) -> dict[str, float]:
    if rollout.importance is None or cap is None:
        return {}
    mask = rollout.mask
    capped = (rollout.importance >= cap) & mask
    total = all_sum(
        torch.stack(
            [
                masked_sum(rollout.importance.double(), mask),
                capped.sum().double(),
                mask.sum().double(),
            ]
        )
    ).tolist()
    return {"importance_mean": total[0] / total[2], "importance_capped": total[1] / total[2]}
