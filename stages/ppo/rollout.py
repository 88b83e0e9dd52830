"""Collecting rollouts: prompts in order, sampled responses, log-probs, values and scores.

A rollout is ragged: ids and lengths, one row a response. Log-probs are recomputed by the trunk's
own training forward, whatever the engine reports: the ratio at the first minibatch is then 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.batches import TokenBatch
from pipeline.generation import Engine, Sampling
from pipeline.inference import infer
from pipeline.models.trunk import Handle
from pipeline.records import Prompt
from pipeline.rewards import Completions, RewardSource
from stages.ppo.config import RolloutSection
from stages.ppo.objective import final_scores

TRAINING_STREAM, HELD_OUT_STREAM = 0, 1


@dataclass(frozen=True)
class Rollout:
    """B responses with all that the update needs; R is the longest response."""

    prompts: list[Prompt]
    sample_indices: list[int]  # number of each response in the whole run
    batch: TokenBatch
    texts: list[str]
    ended: Tensor  # (B,) bool: the policy ended it, not the limit
    scores: Tensor  # (B,) as the reward source gave them
    rewards: Tensor  # (B,) after the missing-EOS rule and clipping
    logprobs: Tensor  # (B, R) of the policy that sampled
    ref_logprobs: Tensor  # (B, R)
    entropy: Tensor  # (B, R)
    values: Tensor  # (B, R); zeros without a value model

    @property
    def mask(self) -> Tensor:
        """(B, R), true on response tokens."""
        return self.batch.response_mask

    def __len__(self) -> int:
        return len(self.sample_indices)


class PromptOrder:
    """The order in which a run asks its prompts: each epoch a permutation of all of them.

    Stateless: the prompts of an iteration follow from the seed and its number alone, so a resumed
    run, or one with more processes, asks the same.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        assert prompts, "no prompts"
        self.prompts = prompts
        self.seed = seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def draw(
        self, iteration: int, section: RolloutSection, rank: int = 0, world_size: int = 1
    ) -> tuple[list[Prompt], list[int]]:
        """This rank's prompts of an iteration, one entry a response, and their sample indices.

        The responses to one prompt follow one another; rank r takes prompts r, r + world_size, ...
        """
        prompts: list[Prompt] = []
        indices: list[int] = []
        per_prompt = section.responses_per_prompt
        first = iteration * section.prompts_per_iteration
        for position in range(first + rank, first + section.prompts_per_iteration, world_size):
            epoch, place = divmod(position, len(self.prompts))
            prompts += [self.prompts[int(self._order(epoch)[place])]] * per_prompt
            indices += range(position * per_prompt, (position + 1) * per_prompt)
        return prompts, indices

    def asked(self, iterations: int, section: RolloutSection) -> list[Prompt]:
        """The prompts that this many iterations ask, over all ranks, each of them once."""
        count = iterations * section.prompts_per_iteration
        return [self.prompts[int(place)] for place in self._order(0)[:count]]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, random.permutation(len(self.prompts))
        return self._permutation


def collect(
    policy: Handle,
    reference: Handle,
    value: Handle | None,
    engine: Engine,
    rewards: RewardSource,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    sample_indices: Sequence[int],
    section: RolloutSection,
    *,
    seed: int,
    stream: int = TRAINING_STREAM,
    reward_clip: float | None = None,
) -> Rollout:
    """Sample one response a prompt (`prompt_ids` are its tokens) and measure it.

    Raises:
        TrainingError: the policy's logits are not finite, or the reward source failed.
    """
    codec = policy.codec
    sampling = Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        seed=seed,
        stream=stream,
    )
    sampled = engine.generate(policy, prompt_ids, list(sample_indices), sampling)
    completions = Completions.decode(
        codec, prompts, prompt_ids, sampled.response_ids, sampled.ended
    )
    batch = TokenBatch.from_ragged(
        prompt_ids, sampled.response_ids, codec.pad_id, policy.trunk.device
    )
    policy_wants = ["logprobs", "entropy"]
    # A head on the policy's own trunk and adapter is read in the same pass.
    shared = value is not None and shares_trunk(policy, value)
    budget, temperature = section.micro_batch_tokens, section.temperature
    if value is not None and shared:
        own = infer(value, batch, [*policy_wants, "values"], budget, temperature)
    else:
        own = infer(policy, batch, policy_wants, budget, temperature)
    if value is None:
        own["values"] = torch.zeros_like(own["logprobs"])
    elif not shared:
        own |= infer(value, batch, ["values"], budget, temperature)
    ended = torch.tensor(sampled.ended, device=batch.response_ids.device)
    raw = rewards.score(completions)
    scores = torch.tensor(raw, dtype=own["logprobs"].dtype, device=ended.device)
    return Rollout(
        prompts=list(prompts),
        sample_indices=list(sample_indices),
        batch=batch,
        texts=list(completions.texts),
        ended=ended,
        scores=scores,
        rewards=final_scores(
            scores, ended, section.missing_eos, section.missing_eos_penalty, reward_clip
        ),
        ref_logprobs=infer(reference, batch, ["logprobs"], budget, temperature)["logprobs"],
        **own,
    )


def shares_trunk(policy: Handle, value: Handle) -> bool:
    """Whether the value is a head on the policy's own hidden states."""
    return policy.trunk is value.trunk and policy.role.adapter == value.role.adapter
