"""Scalar heads: one number a hidden state, for rewards and values."""

import math

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """score = (weight . hidden + bias - shift) / scale, in float32 or wider.

    `shift` and `scale` are buffers: the normalisation of a trained reward model, part of its
    artifact. They are 0 and 1 while the head is trained.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))  # (1,): FSDP2 shards no scalars
        self.register_buffer("shift", torch.zeros((), dtype=dtype))
        self.register_buffer("scale", torch.ones((), dtype=dtype))

    def init_normal(self, generator: torch.Generator | None = None) -> None:
        """Weight ~ N(0, 1/(d+1)), bias 0 (arXiv:2009.01325; N+, arXiv:2403.17031)."""
        std = 1 / math.sqrt(self.weight.numel() + 1)
        with torch.no_grad():
            drawn = torch.randn(self.weight.numel(), generator=generator, dtype=torch.float64)
            self.weight.copy_(drawn * std)
            self.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores of hidden states (..., d) -> (...)."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = hidden.to(self.weight.dtype) @ self.weight + self.bias
            return (raw - self.shift) / self.scale

    def normalise(self, mean: float, std: float = 1.0) -> None:
        """Make scores that were distributed as (mean, std) have mean 0 and deviation 1."""
        self.shift.add_(mean * self.scale)
        self.scale.mul_(std)

    def folded(self, weight: float = 1.0, shift: float = 0.0) -> "ScalarHead":
        """A head for weight x (score - shift), all of it folded into its weight and bias."""
        head = ScalarHead(self.weight.numel(), self.weight.dtype).to(self.weight.device)
        with torch.no_grad():
            head.weight.copy_(weight * self.weight / self.scale)
            head.bias.copy_(weight * ((self.bias - self.shift) / self.scale - shift))
        return head
