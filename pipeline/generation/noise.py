"""Gumbel noise that depends on what it is for, not on when it is drawn.

argmax(logits + Gumbel noise) is a sample of softmax(logits) (Gumbel-max trick). Hashing the noise
from (seed, stream, sample index, position, token) makes a sample independent of batch size, row
order, number of processes and interruptions.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment, 2^64 / golden ratio


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's int64 shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 with wrap-around (Steele et al. 2014, OOPSLA)."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def row_keys(seed: int, stream: int, sample_indices: Tensor) -> Tensor:
    """A 64-bit key a row (B,) for its whole response."""
    start = torch.tensor(_signed(seed), dtype=torch.int64, device=sample_indices.device)
    key = _mix(_mix(start) + _signed(stream * _GOLDEN))
    return _mix(key + sample_indices.long() * _signed(_GOLDEN))


def gumbel(keys: Tensor, positions: Tensor, vocabulary_size: int, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise (B, V) for rows with `keys` (B,) at response `positions` (B,)."""
    golden = _signed(_GOLDEN)
    step = _mix(keys + (positions.long() + 1) * golden)  # (B,)
    tokens = torch.arange(1, vocabulary_size + 1, device=keys.device)
    bits = _shift_right(_mix(step.unsqueeze(1) + tokens * golden), 11)  # 53 bits, (B, V)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-53
    # -log(1 - u) is Exp(1); small u, where large noise comes from, keeps its precision in float32.
    return -torch.log(-torch.log1p(-uniform.to(dtype)))
