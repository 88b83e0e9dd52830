"""The mathematics of PPO for language models: tensors in, sums and tensors out.

Suffixes: B responses, T response tokens. `mask` (B, T) is true on real response tokens and
contiguous in each row; what lies behind a false mask never matters, NaN included. Losses and
statistics are *sums* over response tokens: divided by the global count of the optimiser step they
do not depend on micro-batches, padding or world size.

Sources: PPO (Schulman et al. 2017, arXiv:1707.06347), GAE (Schulman et al. 2015, arXiv:1506.02438),
PPO for language models (Ziegler et al. 2019, arXiv:1909.08593), dual clip (Ye et al. 2020,
arXiv:1912.09729), decoupled and length-adaptive GAE (VC-PPO, arXiv:2503.01491; VAPO,
arXiv:2504.05118), k1/k2/k3 (Schulman 2020, http://joschu.net/blog/kl-approx.html).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.tensors import masked_sum, widen

# exp(20) = 4.9e8: far past every clip range, and finite in float32 when squared.
MAX_LOG_RATIO = 20.0

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs_bt: Tensor, ref_logprobs_bt: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate (B, T), in nats, of KL(policy || reference) from the policy's samples.

    With d = logp - logp_ref: k1 = d (unbiased, may be negative, never clamped); k2 = d^2 / 2 (low
    variance, biased); k3 = exp(-d) - 1 + d (unbiased, never negative).
    """
    difference_bt = widen(logprobs_bt) - widen(ref_logprobs_bt)
    if estimator == "k1":
        return difference_bt
    if estimator == "k2":
        return difference_bt**2 / 2
    return torch.expm1(-difference_bt.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + difference_bt


def length_normalised(scores_b: Tensor, lengths_b: Tensor, reference_length: float) -> Tensor:
    """Scores (B,) times reference_length / length, of responses of `lengths_b` (B,) tokens.

    A response of the reference length keeps its score, so that the scale of scores against the KL
    penalty stays; 1 gives the score a token.
    """
    return scores_b * (reference_length / lengths_b.to(scores_b.dtype))


def final_scores(
    scores_b: Tensor,
    ended_b: Tensor,
    missing_eos: Literal["subtract", "replace", "keep"],
    penalty: float,
    clip: float | None,
) -> Tensor:
    """Scores (B,) after the missing-EOS rule, then clipped to +-`clip`.

    A response that was cut (`ended_b` false) loses `penalty` (TRL) or scores -`penalty` (N+
    details, arXiv:2403.17031, sec. 2.6).
    """
    if missing_eos == "subtract":
        scores_b = torch.where(ended_b, scores_b, scores_b - penalty)
    elif missing_eos == "replace":
        scores_b = torch.where(ended_b, scores_b, -penalty)
    return scores_b if clip is None else scores_b.clamp(-clip, clip)


def token_rewards(
    logprobs_bt: Tensor,
    ref_logprobs_bt: Tensor,
    scores_b: Tensor,
    mask_bt: Tensor,
    kl_coef: float | Tensor,
) -> Tensor:
    """Rewards (B, T): -kl_coef (logp - logp_ref) on every token, the score on the last real one.

    `kl_coef` is one number, or one a response (B,).
    """
    k1_bt = kl_estimate(logprobs_bt, ref_logprobs_bt, "k1")
    if isinstance(kl_coef, Tensor):
        kl_coef = kl_coef.to(k1_bt.dtype).unsqueeze(1)
    penalty_bt = -kl_coef * k1_bt
    rewards_bt = penalty_bt.masked_fill(~mask_bt, 0.0)
    return rewards_bt + widen(scores_b).unsqueeze(1) * last_token(mask_bt)


def last_token(mask_bt: Tensor) -> Tensor:
    """(B, T), true on each row's last real token only."""
    following_bt = torch.cat([mask_bt[:, 1:], torch.zeros_like(mask_bt[:, :1])], dim=1)
    return mask_bt & ~following_bt


def length_adaptive_lambda(lengths_b: Tensor, alpha: float) -> Tensor:
    """1 - 1 / (alpha l) (B,), float64, for responses of l tokens (VAPO, sec. 4.2); never below 0.

    The weights lambda^k of a long response's errors then add up to alpha l: a fixed lambda of 0.95
    sees 20 tokens of a response, however long it is.
    """
    return (1.0 - 1.0 / (alpha * lengths_b.double())).clamp(min=0.0)


def gae(
    rewards_bt: Tensor,
    values_bt: Tensor,
    mask_bt: Tensor,
    gamma: float,
    gae_lambda: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T), 0 outside the mask (GAE, eqs. 11 and 16).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}, with V and A 0 after
    a response's end; returns are A + V, before any whitening. V_t is the value of the state before
    response token t. `gae_lambda` is one number, or one a response (B,). No gradient flows through.
    """
    rewards_bt = widen(rewards_bt.detach()).masked_fill(~mask_bt, 0.0)
    values_bt = widen(values_bt.detach()).masked_fill(~mask_bt, 0.0)
    if isinstance(gae_lambda, Tensor):
        gae_lambda = gae_lambda.to(values_bt.dtype)
    advantages_bt = torch.zeros_like(values_bt)
    next_value_b = next_advantage_b = torch.zeros_like(values_bt[:, 0])
    for t in reversed(range(values_bt.shape[1])):
        delta_b = rewards_bt[:, t] + gamma * next_value_b - values_bt[:, t]
        next_advantage_b = (delta_b + gamma * gae_lambda * next_advantage_b) * mask_bt[:, t]
        next_value_b = values_bt[:, t]
        advantages_bt[:, t] = next_advantage_b
    return advantages_bt, advantages_bt + values_bt


def moments(x_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """(3,) float64: count, sum and sum of squares over the mask; add them up over ranks."""
    x_bt = x_bt.detach().double()
    return torch.stack(
        [mask_bt.sum().double(), masked_sum(x_bt, mask_bt), masked_sum(x_bt**2, mask_bt)]
    )


def mean_variance(moments_3: Tensor) -> tuple[float, float]:
    """Mean and variance (divided by the count) from `moments`; 0 and 0 of nothing."""
    count, total, squares = moments_3.tolist()
    mean = total / max(count, 1.0)
    # A constant's variance may come out as a rounding below 0; NaN must stay NaN.
    variance = squares / max(count, 1.0) - mean**2
    return mean, 0.0 if variance < 0 else variance


def whiten(
    x_bt: Tensor, mask_bt: Tensor, moments_3: Tensor, *, shift_mean: bool, eps: float = 1e-8
) -> Tensor:
    """(x - mean) / sqrt(variance + eps), with the global moments; 0 outside the mask.

    `shift_mean=False` scales only: rewards keep their mean, for it carries their sign.
    """
    mean, variance = mean_variance(moments_3)
    centred_bt = widen(x_bt) - (mean if shift_mean else 0.0)
    return (centred_bt / (variance + eps) ** 0.5).masked_fill(~mask_bt, 0.0)


def explained_variance(residual_moments_3: Tensor, return_moments_3: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant.

    0 where returns do not vary, for there is nothing to explain.
    """
    _, unexplained = mean_variance(residual_moments_3)
    _, total = mean_variance(return_moments_3)
    return 1.0 - unexplained / total if total > 0 else 0.0


class PolicyLoss(NamedTuple):
    """Sums over response tokens (scalars); all but `loss` are without gradient."""

    loss: Tensor
    clipped: Tensor  # tokens where a clip decides, hence whose gradient is 0
    approx_kl: Tensor  # k3 of KL(old policy || new policy), in nats
    ratio: Tensor
    ratio_max: Tensor  # a maximum, not a sum


def policy_loss(
    logprobs_bt: Tensor,
    old_logprobs_bt: Tensor,
    advantages_bt: Tensor,
    mask_bt: Tensor,
    clip_range: float,
    dual_clip: float | None = None,
    weights_bt: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate (PPO, eq. 7): sum of max(-A r, -A clip(r, 1 - eps, 1 + eps)).

    `dual_clip` c > 1 bounds it by -A c where A < 0 (Ye et al., eq. 5), for stale samples whose
    ratio has exploded. The log-ratio is clamped to +-20 so that r stays finite. `weights_bt` are
    importance weights of tokens that another engine sampled (see `importance_weights`).
    """
    difference_bt = (widen(logprobs_bt) - widen(old_logprobs_bt)).masked_fill(~mask_bt, 0.0)
    log_ratio_bt = difference_bt.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_bt = log_ratio_bt.exp()
    advantages_bt = widen(advantages_bt).masked_fill(~mask_bt, 0.0)
    plain_bt = -advantages_bt * ratio_bt
    bounded_bt = -advantages_bt * ratio_bt.clamp(1 - clip_range, 1 + clip_range)
    losses_bt = torch.maximum(plain_bt, bounded_bt)
    clipped_bt = bounded_bt > plain_bt
    if dual_clip is not None:
        ceiling_bt = -advantages_bt * dual_clip
        beyond_bt = (advantages_bt < 0) & (losses_bt > ceiling_bt)
        losses_bt = torch.where(beyond_bt, ceiling_bt, losses_bt)
        clipped_bt = clipped_bt | beyond_bt
    if weights_bt is not None:
        losses_bt = losses_bt * widen(weights_bt).masked_fill(~mask_bt, 0.0)
    log_ratio_bt, ratio_bt = log_ratio_bt.detach(), ratio_bt.detach()
    return PolicyLoss(
        loss=masked_sum(losses_bt, mask_bt),
        clipped=masked_sum(clipped_bt, mask_bt),
        approx_kl=masked_sum(torch.expm1(log_ratio_bt) - log_ratio_bt, mask_bt),
        ratio=masked_sum(ratio_bt, mask_bt),
        ratio_max=ratio_bt.masked_fill(~mask_bt, 0.0).max(),
    )


def importance_weights(
    logprobs_bt: Tensor, sampler_logprobs_bt: Tensor, mask_bt: Tensor, cap: float
) -> Tensor:
    """min(pi(token) / mu(token), cap) (B, T), 0 outside the mask, without gradient.

    `mu` is the policy as the engine that sampled computed it, `pi` the same weights in the training
    forward: where kernels or number formats differ, so do the two. Truncated importance sampling
    (Ionides 2008, doi:10.1198/106186008X320456) bounds the variance that the correction adds.
    """
    difference_bt = (widen(logprobs_bt) - widen(sampler_logprobs_bt)).detach()
    ratio_bt = difference_bt.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ratio_bt.clamp(max=cap).masked_fill(~mask_bt, 0.0)


class ValueLoss(NamedTuple):
    """Sums over response tokens (scalars); `clipped` is without gradient."""

    loss: Tensor
    clipped: Tensor  # tokens where the clip decides


def value_loss(
    values_bt: Tensor,
    old_values_bt: Tensor,
    returns_bt: Tensor,
    mask_bt: Tensor,
    clip_range: float | None,
) -> ValueLoss:
    """Sum of 1/2 max((V - R)^2, (clip(V, V_old +- eps) - R)^2); plain 1/2 (V - R)^2 without clip.

    The maximum is pessimistic: clipping can only take gradient away, never hide an error
    (arXiv:1909.08593 and N+ details, arXiv:2403.17031, sec. 3).
    """
    values_bt = widen(values_bt).masked_fill(~mask_bt, 0.0)
    old_values_bt = widen(old_values_bt).masked_fill(~mask_bt, 0.0)
    returns_bt = widen(returns_bt).masked_fill(~mask_bt, 0.0)
    errors_bt = (values_bt - returns_bt) ** 2
    if clip_range is None:
        return ValueLoss(masked_sum(errors_bt, mask_bt) / 2, torch.zeros_like(errors_bt[0, 0]))
    near_bt = values_bt.clamp(old_values_bt - clip_range, old_values_bt + clip_range)
    near_errors_bt = (near_bt - returns_bt) ** 2
    loss = masked_sum(torch.maximum(errors_bt, near_errors_bt), mask_bt) / 2
    return ValueLoss(loss, masked_sum(near_errors_bt > errors_bt, mask_bt).detach())
