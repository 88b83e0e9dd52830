"""Gumbel noise that depends on what it is for, not on when it is drawn.

argmax(logits + Gumbel noise) is a sample of softmax(logits) (Gumbel-max trick). Hashing the noise
from (seed, stream, sample index, position, token) makes a sample independent of batch size, row
order, number of processes and interruptions.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment, 2^64 / golden ratio
_BLOCK = 1 << 16  # tokens hashed at a time: 512 KiB of int64, twice, fit a CPU's L2 cache


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _xor_shifted_(x: Tensor, bits: int, spare: Tensor) -> Tensor:
    """x ^= x >> bits in place, the shift a logical one: torch's int64 shift copies the sign."""
    torch.bitwise_right_shift(x, bits, out=spare)
    return x.bitwise_xor_(spare.bitwise_and_((1 << (64 - bits)) - 1))


def _mix_(x: Tensor, spare: Tensor | None = None) -> Tensor:
    """splitmix64's finaliser on int64 with wrap-around, in place (Steele et al. 2014, OOPSLA).

    `spare` is a tensor like x to work in.
    """
    spare = torch.empty_like(x) if spare is None else spare
    _xor_shifted_(x, 30, spare).mul_(_signed(0xBF58476D1CE4E5B9))
    _xor_shifted_(x, 27, spare).mul_(_signed(0x94D049BB133111EB))
    return _xor_shifted_(x, 31, spare)


def row_keys(seed: int, stream: int, sample_indices: Tensor) -> Tensor:
    """A 64-bit key a row (B,) for its whole response."""
    start = torch.tensor(_signed(seed), dtype=torch.int64, device=sample_indices.device)
    key = _mix_(_mix_(start) + _signed(stream * _GOLDEN))
    return _mix_(key + sample_indices.long() * _signed(_GOLDEN))


def gumbel(keys: Tensor, positions: Tensor, vocabulary_size: int, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise (B, V) for rows with `keys` (B,) at response `positions` (B,)."""
    golden = _signed(_GOLDEN)
    steps = _mix_(keys + (positions.long() + 1) * golden).unsqueeze(1)  # (B, 1)
    tokens = torch.arange(1, vocabulary_size + 1, device=keys.device).mul_(golden)
    noise = torch.empty(len(keys), vocabulary_size, dtype=dtype, device=keys.device)
    # On a CPU each block of rows passes through the whole hash while it lies in the cache.
    rows = max(1, _BLOCK // vocabulary_size if keys.device.type == "cpu" else len(keys))
    for step, out in zip(steps.split(rows), noise.split(rows), strict=True):
        x = step + tokens
        _mix_(x, spare := torch.empty_like(x))
        torch.bitwise_right_shift(x, 11, out=spare)
        out.copy_(spare.bitwise_and_((1 << 53) - 1))  # 53 bits
        _to_gumbel_(out)
    return noise


def _to_gumbel_(bits: Tensor) -> None:
    """Standard Gumbel noise in place of whole numbers in [0, 2^53)."""
    # A uniform that rounds to 1 would be noise of minus infinity.
    largest = 1 - torch.finfo(bits.dtype).eps / 2
    minus_u = bits.add_(0.5).mul_(-(2.0**-53)).clamp_(min=-largest)
    # -log(1 - u) is Exp(1); small u, where large noise comes from, keeps its precision in float32.
    minus_u.log1p_().neg_().log_().neg_()
