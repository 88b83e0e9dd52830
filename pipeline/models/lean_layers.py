"""The same functions as transformers' layers in fewer passes over memory, put in at loading.

On small widths the element-wise operations round the matrix products cost as much as they do, and
each keeps a tensor for the backward pass. What is put in is checked against what it replaces.
"""

from typing import Any

import torch
from torch import Tensor, nn


def slim(model: Any) -> None:
    """Replace `gelu_new` by torch's one kernel, and root-mean-square norms by `LeanRmsNorm`."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))
            elif type(child).__name__.endswith("RMSNorm") and _is_plain_norm(child):
                setattr(module, name, LeanRmsNorm(child.weight, child.variance_epsilon))


class LeanRmsNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) (arXiv:1910.07467), computed in float32 or wider."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised over the last dimension, in the wider type of `x` and the weight."""
        wide = x.dtype in (torch.float32, torch.float64)
        if wide and torch.promote_types(x.dtype, self.weight.dtype) == x.dtype:
            # FSDP2 gathers the weight in bfloat16 where passes run under autocast.
            out: Tensor = _RmsNorm.apply(x, self.weight.to(x.dtype), self.variance_epsilon)
            return out
        normal = x.float()
        normal = normal * torch.rsqrt(normal.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normal.to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    """y = n w with n = x r and r = (mean(x^2) + eps)^(-1/2), over d numbers.

    With g = d loss / d y and h = g w: dw = sum over rows of g n, dx = r (h - n mean(h n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        n, r, weight = ctx.saved_tensors
        dw = dx = None
        if ctx.needs_input_grad[1]:
            dw = (g * n).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            h = g * weight
            mean = (h * n).mean(-1, keepdim=True)
            dx = torch.addcmul(h, n, mean, value=-1).mul_(r)
        return dx, dw, None


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a norm computes the plain formula; Gemma's, for one, adds 1 to the weight."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or eps is None or weight.device.type == "meta":
        return False
    if weight.dim() != 1 or len(list(module.parameters())) != 1:
        return False
    x = torch.linspace(-2, 3, weight.numel(), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        theirs, ours = module(x[None]), LeanRmsNorm(weight, eps)(x[None])
    return theirs.dtype == ours.dtype and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6)
