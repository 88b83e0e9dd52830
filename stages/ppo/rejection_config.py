"""Settings of rejection sampling (`ppo.algorithm`), and what does not go with it."""

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.config import PositiveInt, Section

if TYPE_CHECKING:
    from stages.ppo.config import PpoSection


class RejectionSection(Section):
    """Which responses rejection sampling trains on."""

    keep: PositiveInt = Field(
        1,
        description="Responses kept of each prompt's `ppo.rollout.responses_per_prompt`: those "
        "with the largest reward - kl_coef x KL.",
    )


def check_rejection(section: "PpoSection") -> None:
    """Hold a section to what its algorithm knows.

    Raises:
        ValueError: nothing would be rejected, or a setting is the value model's or the ratio's.
    """
    keep, drawn = section.rejection.keep, section.rollout.responses_per_prompt
    if section.algorithm == "ppo":
        if keep != 1:
            raise ValueError(
                f"ppo.rejection.keep is {keep} but ppo.algorithm is ppo, which keeps every "
                "response: remove it or set ppo.algorithm to rejection_sampling"
            )
        return
    if keep >= drawn:
        raise ValueError(
            f"ppo.algorithm is rejection_sampling, but of ppo.rollout.responses_per_prompt = "
            f"{drawn} responses ppo.rejection.keep = {keep} are kept, so that none is rejected: "
            "raise responses_per_prompt (8, say, and lower prompts_per_iteration as much)"
        )
    optim, advantage = section.optim, section.advantage
    unused = {
        "ppo.value": (section.value, "separate"),
        "ppo.optim.value_learning_rate": (optim.value_learning_rate, None),
        "ppo.optim.value_warmup_iterations": (optim.value_warmup_iterations, 0),
        "ppo.optim.dual_clip": (optim.dual_clip, None),
        "ppo.advantage.value_lambda": (advantage.value_lambda, None),
        "ppo.advantage.length_adaptive_alpha": (advantage.length_adaptive_alpha, None),
    }
    for name, (value, default) in unused.items():
        if value != default:
            raise ValueError(
                f"{name} is {value} but ppo.algorithm is rejection_sampling, which has no value "
                "model and no clipped ratio: remove it or set ppo.algorithm to ppo"
            )
