"""What a trunk is called with besides a batch of tokens, and what it answers."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import register_dataclass


@dataclass
class TrunkOutput:
    """What was asked of a forward pass: (B, R) over response tokens, zeros on padding; (B,)."""

    logprobs: Tensor | None = None  # (B, R) log p(response token t | everything before it)
    entropy: Tensor | None = None  # (B, R) of the distribution token t was drawn from
    values: Tensor | None = None  # (B, R) head at the state before response token t
    scores: Tensor | None = None  # (B,) head at the last response token


# FSDP2 looks for the tensors that the backward pass begins at.
register_dataclass(TrunkOutput)


@dataclass
class DecodeStep:
    """One step of generation: S new tokens a row, the mask over all T in the cache, and the cache.

    Without a mask every row fills all T.
    """

    input_ids: Tensor  # (B, S)
    position_ids: Tensor  # (B, S)
    attention_mask: Tensor | None = None  # (B, T)
    cache: Any = None


@dataclass(frozen=True)
class Writing:
    """A call of transformers' `generate`, which makes as many steps of the model as it takes."""

    input_ids: Tensor  # (B, P)
    settings: dict[str, Any]


@dataclass
class DecodeOutput:
    """Logits of the next token (B, V), the head's values before it, and the cache."""

    logits: Tensor
    values: Tensor | None = None  # (B,)
    cache: Any = None
