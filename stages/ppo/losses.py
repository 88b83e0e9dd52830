"""From the outputs of a forward pass to the loss and the statistics of some rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.models.calls import TrunkOutput
from pipeline.tensors import masked_sum, send
from stages.ppo.experience import Experience
from stages.ppo.learning_config import PpoOptimSection
from stages.ppo.objective import policy_loss, value_loss

# Sums over response tokens that each micro-batch reports, in this order.
SUMS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "clip_fraction",
    "value_clip_fraction",
    "approx_kl",
    "ratio_mean",
)


def losses(
    section: PpoOptimSection, experience: Experience, rows: Sequence[int], out: TrunkOutput
) -> tuple[Tensor, Tensor]:
    """Summed loss of `rows`, and (len(SUMS) + 1,): their SUMS and largest ratio.

    Of the policy and the value model, those whose outputs are there count; the others' are 0.
    """
    device = next(x.device for x in (out.values, out.logprobs, out.entropy) if x is not None)
    mask = experience.rollout.batch.take(rows).response_mask
    chosen, width = list(rows), mask.shape[1]

    def cut(x_br: Tensor) -> Tensor:
        return send(x_br[chosen, :width], device)

    mask = send(mask, device)
    rollout = experience.rollout
    found: dict[str, Tensor] = {}
    loss = torch.zeros((), dtype=rollout.logprobs.dtype, device=device)
    if out.values is not None:
        value = value_loss(
            out.values,
            cut(rollout.values),
            cut(experience.returns),
            mask,
            section.value_clip_range,
        )
        loss = loss + section.value_coef * value.loss
        found |= {"value_loss": value.loss, "value_clip_fraction": value.clipped}
    if out.logprobs is not None:
        policy = policy_loss(
            out.logprobs,
            cut(rollout.logprobs),
            cut(experience.advantages),
            mask,
            section.clip_range,
            section.dual_clip,
            None if rollout.importance is None else cut(rollout.importance),
        )
        loss = loss + policy.loss
        found |= {
            "policy_loss": policy.loss,
            "clip_fraction": policy.clipped,
            "approx_kl": policy.approx_kl,
            "ratio_mean": policy.ratio,
            "ratio_max": policy.ratio_max,
        }
    if out.entropy is not None:
        found["entropy"] = masked_sum(out.entropy, mask)
        loss = loss - section.entropy_coef * found["entropy"]
    sums = [found.get(name, loss.new_zeros(())) for name in (*SUMS, "ratio_max")]
    return loss, torch.stack([item.detach().double() for item in sums])


def together(one: Tensor, other: Tensor) -> Tensor:
    """The statistics of two passes over the same rows: sums added, the larger of the ratios."""
    return torch.cat([one[:-1] + other[:-1], torch.maximum(one[-1:], other[-1:])])
