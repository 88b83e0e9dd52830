"""Collecting rollouts: prompts in order, sampled responses, log-probs, values and scores.

A rollout is ragged: ids and lengths, one row a response. Log-probs, entropies and values that the
engine has are used where they are the training forward's to float32 rounding; elsewhere the trunk
computes them again, and the engine's log-probs give importance weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.batches import TokenBatch, pad_numbers
from pipeline.generation import Engine, Generations, Sampling
from pipeline.inference import infer
from pipeline.models.trunk import Handle
from pipeline.records import Prompt
from pipeline.rewards import Completions, RewardSource, measured
from stages.ppo.objective import final_scores, importance_weights, length_normalised
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
    scores: Tensor  # (B,) as the reward source gave them, or their weighted sum of several
    rewards: Tensor  # (B,) after length normalisation, the missing-EOS rule and clipping
    logprobs: Tensor  # (B, R) of the policy that sampled
    ref_logprobs: Tensor  # (B, R)
    entropy: Tensor  # (B, R)
    values: Tensor  # (B, R); zeros without a value model
    source_scores: Mapping[str, Tensor] = field(default_factory=dict)  # (B,) by each of several
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
        per_prompt, count = section.responses_per_prompt, section.prompts_per_iteration
        places = self.places(iteration, count)
        for own in range(rank, count, world_size):
            position = iteration * count + own
            prompts += [self.prompts[places[own]]] * per_prompt
            indices += range(position * per_prompt, (position + 1) * per_prompt)
        return prompts, indices

    def places(self, iteration: int, count: int) -> list[int]:
        """Which prompts an iteration of `count` asks, over all ranks, in order."""
        positions = (divmod(iteration * count + i, len(self.prompts)) for i in range(count))
        return [int(self._order(epoch)[place]) for epoch, place in positions]

    def asked(self, iterations: int, section: RolloutSection) -> list[Prompt]:
        """The prompts that this many iterations ask, over all ranks, each of them once."""
        count = section.prompts_per_iteration
        every = (place for i in range(iterations) for place in self.places(i, count))
        return [self.prompts[place] for place in dict.fromkeys(every)]

    def metrics(self, iteration: int) -> dict[str, float]:
        """What is to be logged of the order in an iteration, counted from 0."""
        return {}

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
    reference_length: float | None = None,
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
    scored = agree(lambda: measured(rewards, completions))
    scores = judged = torch.tensor(scored.total, dtype=dtype)
    if reference_length is not None:
        judged = length_normalised(scores, batch.response_lengths, reference_length)
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
            judged, ended, section.missing_eos, section.missing_eos_penalty, reward_clip
        ),
        ref_logprobs=ref_logprobs.to(dtype),
        source_scores={n: torch.tensor(x, dtype=dtype) for n, x in scored.by_source.items()},
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
