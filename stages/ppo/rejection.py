"""Rejection sampling: the best of several responses to each prompt, and cross-entropy on them.

Each iteration samples `responses_per_prompt` responses a prompt, keeps the best by reward and
trains the policy to say those: RAFT (Dong et al. 2023, arXiv:2304.06767), rejection-sampling
fine-tuning in Llama 2 (Touvron et al. 2023, arXiv:2307.09288, sec. 3.2.3). No value model, no
ratio, no advantage: the cheap baseline beside PPO, under the same rewards, KL and stop rules.

Two deliberate choices. Responses rank by what PPO maximises, reward - kl_coef x KL, where the
papers rank by the reward alone (`ppo.kl_coef: 0`). The loss is that of the distribution which was
sampled, temperature and forbidden tokens included: at temperature 1 the two are the same, below it
plain cross-entropy would make each iteration's policy colder than the one before.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipeline.tensors import masked_sum, send
from stages.ppo.experience import AllSum, Experience
from stages.ppo.losses import SUMS
from stages.ppo.objective import MAX_LOG_RATIO, kl_estimate
from stages.ppo.rollout import Rollout
from stages.ppo.update import Step, Updater, language_metrics


def best_responses(
    rollout: Rollout, kl_coef: float | Tensor, keep: int, responses_per_prompt: int
) -> Experience:
    """The rollout with advantage 1 on the tokens of the responses that are kept, 0 on others'.

    Of each prompt's responses (`responses_per_prompt` sample indices in a row) the `keep` with the
    largest reward - kl_coef x sum of log(policy / reference) over the response; of equal ones the
    first. `kl_coef` is of all responses or of each, (B,). The reward is that after the missing-EOS
    rule, so that a cut response ranks behind.
    """
    kl_b = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")
    kl_b = kl_b.masked_fill(~rollout.mask, 0.0).sum(1)
    ranked = (rollout.rewards - kl_coef * kl_b).tolist()
    indices = rollout.sample_indices
    order = sorted(range(len(rollout)), key=lambda row: indices[row])
    kept: list[int] = []
    for _, rows in groupby(order, key=lambda row: indices[row] // responses_per_prompt):
        kept += sorted(rows, key=lambda row: -ranked[row])[:keep]  # stable: the first of equals
    advantages = torch.zeros_like(rollout.logprobs)
    advantages[kept] = 1.0
    advantages = advantages.masked_fill(~rollout.mask, 0.0)
    return Experience(rollout, advantages, torch.zeros_like(advantages), 0.0)


def kept_rows(experience: Experience) -> list[int]:
    """The rows that `best_responses` kept."""
    found: list[int] = experience.advantages.any(1).nonzero().flatten().tolist()
    return found


class RejectionUpdater(Updater):
    """Cross-entropy on the kept responses, in the steps of PPO's updater."""

    def update(
        self, experience: Experience, iteration: int, *, train_policy: bool = True
    ) -> list[Step]:
        """See `Updater.update`; responses that were not kept take no part."""
        rollout = take(experience.rollout, kept_rows(experience))
        nothing = torch.zeros_like(rollout.logprobs)  # no advantages, no returns: they all count
        kept = Experience(rollout, nothing, nothing, 0.0)
        return super().update(kept, iteration, train_policy=train_policy)

    def metrics(self, experience: Experience, steps: Sequence[Step]) -> dict[str, float]:
        """See `Updater.metrics`."""
        found = rejection_metrics(experience, steps, self.runtime.all_sum)
        return found | language_metrics(steps)

    def _passes(self, train_policy: bool) -> list[list[str]]:
        assert train_policy, "there is no value model to warm up"
        return [["logprobs", "entropy"] if self.section.entropy_coef else ["logprobs"]]

    def _losses(
        self, experience: Experience, rows: list[int], want: Collection[str]
    ) -> tuple[Tensor, Tensor]:
        rollout = experience.rollout
        batch = rollout.batch.take(rows)
        with self.runtime.autocast():
            out = self.steps.module(batch, want, self.temperature, self.forbidden)
        device = out.logprobs.device
        mask = send(batch.response_mask, device)
        old = send(rollout.logprobs[list(rows), : mask.shape[1]], device)
        return cross_entropy(out.logprobs, old, mask, out.entropy, self.section.entropy_coef)


def cross_entropy(
    logprobs_bt: Tensor,
    old_logprobs_bt: Tensor,
    mask_bt: Tensor,
    entropy_bt: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """-sum log p over response tokens, less an entropy bonus; and (len(SUMS) + 1,), as `losses`.

    `policy_loss` is the cross-entropy. Ratio and KL are to the policy that sampled: how far this
    iteration has moved, for `target_kl` and the metrics; no gradient flows through them.
    """
    nll = -masked_sum(logprobs_bt, mask_bt)
    difference_bt = (logprobs_bt.detach() - old_logprobs_bt).masked_fill(~mask_bt, 0.0)
    log_ratio_bt = difference_bt.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_bt = log_ratio_bt.exp().masked_fill(~mask_bt, 0.0)
    found = {
        "policy_loss": nll,
        "approx_kl": masked_sum(torch.expm1(log_ratio_bt) - log_ratio_bt, mask_bt),
        "ratio_mean": ratio_bt.sum(),
        "ratio_max": ratio_bt.max(),
    }
    loss = nll
    if entropy_bt is not None:
        found["entropy"] = masked_sum(entropy_bt, mask_bt)
        loss = loss - entropy_coef * found["entropy"]
    sums = [found.get(name, nll.new_zeros(())) for name in (*SUMS, "ratio_max")]
    return loss, torch.stack([item.detach().double() for item in sums])


def take(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Some of a rollout's responses, no wider than the longest of them needs."""
    chosen = list(rows)
    batch = rollout.batch.take(chosen)
    width = batch.response_ids.shape[1]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[chosen] if value.dim() == 1 else value[chosen, :width]
        if isinstance(value, dict):  # scores by source
            return {name: cut(x) for name, x in value.items()}
        return None if value is None else [value[row] for row in chosen]

    parts = {f.name: cut(getattr(rollout, f.name)) for f in fields(rollout) if f.name != "batch"}
    return Rollout(batch=batch, **parts)


def rejection_metrics(
    experience: Experience, steps: Iterable[Step], all_sum: AllSum
) -> dict[str, float]:
    """What was kept (means over all processes), and means over the tokens of all steps."""
    rollout, rows = experience.rollout, kept_rows(experience)
    kept = take(rollout, rows)
    count, score, ended, tokens = all_sum(
        torch.tensor(
            [
                len(rows),
                float(kept.scores.sum()),
                float(kept.ended.sum()),
                float(kept.mask.sum()),
            ],
            dtype=torch.float64,
        )
    ).tolist()
    taken = [step for step in steps if step.grad_norms]
    metrics = {
        "kept_responses": count,
        "kept_score": score / count,
        "kept_eos_rate": ended / count,
        "kept_response_tokens": tokens / count,
        "optimiser_steps": float(len(taken)),
    }
    if not taken:
        return metrics
    total = sum(step.tokens for step in taken)
    for name, shown in (("policy_loss", "cross_entropy"), ("approx_kl", "approx_kl")):
        metrics[shown] = sum(step.sums[name] for step in taken) / total
    metrics["ratio_max"] = max(step.ratio_max for step in taken)
    norms = [step.grad_norms["policy"] for step in taken]
    return metrics | {"grad_norm_policy": sum(norms) / len(norms)}
