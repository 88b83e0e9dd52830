"""What an engine takes and returns, and what it can promise."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.models.trunk import Handle


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature only: top-k and top-p would bias PPO's ratios.

    `seed` and `stream` (the PPO iteration, say) choose the noise; the row's sample index, the
    position and the token do the rest.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    seed: int = 0
    stream: int = 0


@dataclass
class Generations:
    """Ragged responses, in the order of the prompts asked for.

    A response includes the stop token that ended it; `ended` is False where the length cut it.
    `logprobs` are those of the sampled tokens at the sampling temperature (1 when greedy).
    """

    response_ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)


class Engine(Protocol):
    """Generates responses; PPO reads its promises to decide what to recompute."""

    deterministic: bool  # the same seed gives the same text, whatever the batch size
    returns_logprobs: bool  # exact enough for ratios

    def generate(
        self,
        handle: Handle,
        prompt_ids: Sequence[Sequence[int]],
        sample_indices: Sequence[int],
        sampling: Sampling,
    ) -> Generations:
        """One response a row; `sample_indices` name the rows globally, for their noise."""
        ...
