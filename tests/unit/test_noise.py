"""The hashed noise against arithmetic on Python's integers, and its tails."""

import math

import pytest
import torch

from pipeline.generation import noise
from pipeline.generation.noise import gumbel, row_keys

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(x: int) -> int:
    """The finaliser of splitmix64 as published, on unsigned integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def expected(seed: int, stream: int, index: int, position: int, token: int) -> float:
    """The noise of one token from nothing but its name."""
    key = splitmix((splitmix(seed & WORD) + stream * GOLDEN) & WORD)
    key = splitmix((key + index * GOLDEN) & WORD)
    step = splitmix((key + (position + 1) * GOLDEN) & WORD)
    bits = splitmix((step + (token + 1) * GOLDEN) & WORD) >> 11
    return -math.log(-math.log1p(-(bits + 0.5) * 2.0**-53))


@pytest.mark.parametrize("vocabulary", [7, 40_000, noise._BLOCK + 1])
def test_noise_is_the_published_hash_of_its_name(vocabulary):
    # Five rows are one block of rows, two a block, and less than a row a block.
    indices, positions = [0, 3, 1000, 2**40, 5], [0, 1, 17, 4000, 2]
    keys = row_keys(-5, 9, torch.tensor(indices))
    found = gumbel(keys, torch.tensor(positions), vocabulary, torch.float64)
    assert found.shape == (5, vocabulary)
    for row, (index, position) in enumerate(zip(indices, positions, strict=True)):
        for token in (0, 1, vocabulary // 2, vocabulary - 1):
            wanted = expected(-5, 9, index, position, token)
            assert found[row, token].item() == pytest.approx(wanted, abs=1e-12)


def test_float32_noise_is_the_float64_noise_rounded():
    keys = row_keys(1, 2, torch.arange(40))
    single = gumbel(keys, torch.zeros(40), 5000, torch.float32)
    double = gumbel(keys, torch.zeros(40), 5000, torch.float64)
    # Above 0, where tokens win, the relative error is a few ulp (6e-8); far below it u is near 1.
    large = double > 0
    assert (single[large] - double[large]).abs().max() < 1e-6
    assert (single - double).abs().max() < 0.1


def test_the_ends_of_the_uniform_give_finite_noise():
    """Whole numbers near 2^53 round to a uniform of 1, whose noise would be minus infinity."""
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0, 1, 2**53 - 1, 2**53 - 2**10]).to(dtype)
        noise._to_gumbel_(ends)
        assert ends.isfinite().all()
        # u = 2^-54: noise log(2^54) = 37.43
        assert ends[0].item() == pytest.approx(54 * math.log(2), rel=1e-6)
