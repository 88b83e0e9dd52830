"""Collecting rollouts: prompts in order, sampled responses, log-probs, values and scores.

A rollout is ragged: ids and lengths, one row a response. Log-probs, entropies and values that the
engine has are used where they are the training forward's to float32 rounding; elsewhere the trunk
computes them again, and the engine's log-probs give importance weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.batches import TokenBatch, pad_numbers
from pipeline.generation import Engine, Generations, Sampling
from pipeline.inference import infer
from pipeline.models.trunk import Handle
from pipeline.records import Prompt
from pipeline.rewards import Completions, RewardSource
from stages.ppo.objective import final_scores, importance_weights
from stages.ppo.rollout_config import RolloutSection

TRAINING_STREAM, HELD_OUT_STREAM = 0, 1
Agree = Callable[[Callable[[], Any]], Any]


def alone(work: Callable[[], Any]) -> Any:
    """What `work` returns, for a process that no other waits for."""
    return work()


@dataclass(frozen=True)
class Rollout:
    """B responses with all that the update needs, on the host; R is the longest response."""

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
    importance: Tensor | None = None  # (B, R) weights where the engine's numbers were not exact

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
    agree: Agree = alone,
) -> Rollout:
    """Sample one response a prompt (`prompt_ids` are its tokens) and measure it.

    `agree` does what may fail in one process alone, and has all of them fail then: what follows may
    gather sharded weights from all.

    Raises:
        NotFinite: logits or scores; its rows count from 0 as the prompts do.
        TrainingError: the reward source failed.
    """
    codec = policy.codec
    sampling = Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        seed=seed,
        stream=stream,
    )
    # A value head on the policy's own states is read along with the logits.
    asked = value if value is not None and shares_trunk(policy, value) else policy
    indices = list(sample_indices)
    sampled = agree(lambda: engine.generate(asked, prompt_ids, indices, sampling))
    completions = Completions.decode(
        codec, prompts, prompt_ids, sampled.response_ids, sampled.ended
    )
    batch = TokenBatch.from_ragged(prompt_ids, sampled.response_ids, codec.pad_id)
    own = _own_numbers(policy, value, batch, sampled, section)
    ended = torch.tensor(sampled.ended)
    dtype = own["logprobs"].dtype
    scores = torch.tensor(agree(lambda: rewards.score(completions)), dtype=dtype)
    ref_logprobs = infer(
        reference,
        batch,
        ["logprobs"],
        section.micro_batch_tokens,
        section.temperature,
        codec.forbidden_ids,
    )["logprobs"]
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
        ref_logprobs=ref_logprobs.to(dtype),
        **own,
    )


def _own_numbers(
    policy: Handle,
    value: Handle | None,
    batch: TokenBatch,
    sampled: Generations,
    section: RolloutSection,
) -> dict[str, Tensor]:
    """logprobs, entropy, values (B, R), and importance weights where the engine was not exact."""
    known = {"logprobs": sampled.logprobs, "entropy": sampled.entropy}
    shared = value is not None and shares_trunk(policy, value)
    if shared:
        known["values"] = sampled.values
    dtype = policy.trunk.number_dtype
    own: dict[str, Tensor] = {}
    if sampled.exact:
        own = {k: pad_numbers(rows, dtype) for k, rows in known.items() if rows is not None}
    missing = [name for name in known if name not in own]
    budget, temperature = section.micro_batch_tokens, section.temperature
    if missing:
        asked = value if value is not None and shared else policy
        own |= infer(asked, batch, missing, budget, temperature, policy.codec.forbidden_ids)
    if value is None:
        own["values"] = torch.zeros_like(own["logprobs"])
    elif not shared:
        own |= infer(value, batch, ["values"], budget)
    if not sampled.exact and sampled.logprobs is not None and section.importance_cap is not None:
        theirs = pad_numbers(sampled.logprobs, dtype)
        own["importance"] = importance_weights(
            own["logprobs"], theirs, batch.response_mask, section.importance_cap
        )
    return own


def shares_trunk(policy: Handle, value: Handle) -> bool:
    """Whether the value is a head on the policy's own hidden states."""
    return policy.trunk is value.trunk and policy.role.adapter == value.role.adapter
