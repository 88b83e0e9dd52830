"""What an engine takes and returns, and what it can promise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.models.trunk import Handle
from pipeline.not_finite import NotFinite

# Told (row, token) as soon as a row's next token is chosen: for text that is read as it is written.
Listener = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    `seed` and `stream` (the PPO iteration, say) choose the noise; the row's sample index, the
    position and the token do the rest. Rollouts of PPO use temperature only: `top_k`, `top_p` and
    beams are for readers, for they would bias PPO's ratios.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    seed: int = 0
    stream: int = 0
    top_k: int = 0  # sample among the k most likely tokens; 0 takes all
    top_p: float = 1.0  # sample among the likeliest tokens that together reach this probability
    num_beams: int = 1  # beam search, if above 1

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the whole distribution, one by one, or greedily."""
        return self.top_k == 0 and self.top_p == 1.0 and self.num_beams == 1


@dataclass
class Generations:
    """Ragged responses, in the order of the prompts asked for.

    A response includes the token that ended it, a stop id or the last of a stop string; `ended` is
    False where the length cut it.
    `logprobs` are those of the sampled tokens at the sampling temperature (1 when greedy).
    """

    response_ids: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    # A number a response token, each; None where the engine does not tell.
    logprobs: list[list[float]] | None = None
    entropy: list[list[float]] | None = None  # of the distribution the token was drawn from
    values: list[list[float]] | None = None  # of the role's head, before the token
    # Whether these numbers are the training forward's to float32 rounding: exact enough for ratios.
    exact: bool = False


class Engine(Protocol):
    """Generates responses and says what it can promise.

    What ends a response and what is never sampled are the codec's: `stop_ids`, `stop_strings`,
    `forbidden_ids`.
    """

    name: str
    deterministic: bool  # the same seed gives the same text, whatever the batch size

    def generate(
        self,
        handle: Handle,
        prompt_ids: Sequence[Sequence[int]],
        sample_indices: Sequence[int],
        sampling: Sampling,
    ) -> Generations:
        """One response a row; `sample_indices` name the rows globally, for their noise."""
        ...


def logits_not_finite(written: Mapping[int, Sequence[int]], handle: Handle) -> NotFinite:
    """The error for rows whose next logits are NaN or infinite; `written` is what they had so far.

    Rows count from 0, in the order of the prompts asked for.
    """
    row, ids = min(written.items())
    rows = [
        {"row": row, "response": handle.codec.text(list(ids)), "response_tokens": len(ids)}
        for row, ids in sorted(written.items())
    ]
    return NotFinite(
        "logits",
        f"the model's logits are not finite at response token {len(ids)} of row {row}: its weights "
        "have diverged",
        rows,
    )
