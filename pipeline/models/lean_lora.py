"""Plain LoRA on plain linear layers in as few passes over memory as it takes.

peft computes `base(x) + B(A(x)) * scaling`: with the backward pass that is five passes over tensors
of the layer's whole width besides the matrix products, which on small widths cost as much as they
do. Here the scaling goes to the rank-r side and the sums into the products. The numbers are peft's
up to rounding, and everything unusual (DoRA, dropout, mixed types, several adapters) is left to it.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class LeanLoraLinear(Linear):
    """peft's LoRA layer with another forward; `slim` makes a layer one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapter's."""
        name = self._active_adapter[0] if len(self._active_adapter) == 1 else None
        if args or kwargs or self._disable_adapters or name is None or not self._is_plain(name, x):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base: Any = self.base_layer
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        weights = base.weight, base.bias, a.weight, b.weight
        x_nd, scaling = x.reshape(-1, x.shape[-1]), self.scaling[name]
        out: Tensor
        if torch.is_grad_enabled():
            out = _LoraProduct.apply(x_nd, *weights, scaling)
        else:  # a step of decoding is short enough to feel the detour
            out = _product(x_nd, *weights, scaling)[0]
        return out.view(*x.shape[:-1], out.shape[-1])

    def _is_plain(self, name: str, x: Tensor) -> bool:
        if self.merged_adapters or name not in self.lora_A or name in self.lora_variant:
            return False
        base: Any = self.base_layer
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        dropout = self.lora_dropout[name]
        return (
            type(base) is nn.Linear
            and type(a) is nn.Linear
            and type(b) is nn.Linear
            and all(getattr(layer, "bias", None) is None for layer in (a, b))
            and not (dropout.training and isinstance(dropout, nn.Dropout))
            and x.dtype == base.weight.dtype == a.weight.dtype
            # The backward below makes none; and autocast would not see the products.
            and not base.weight.requires_grad
            and not torch.is_autocast_enabled(x.device.type)
        )


def slim(model: nn.Module) -> None:
    """Give every LoRA layer of peft's plain kind the lean forward; names and weights stay."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LeanLoraLinear


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """x W' + bias + s (x A') B', and x A'."""
    low = x @ a.t()  # (N, r)
    out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    return out.addmm_(low, b.t(), alpha=s), low


class _LoraProduct(torch.autograd.Function):
    """out = x W' + bias + s (x A') B', for frozen W and bias.

    With g = d loss / d out (N, o): dB = s g' (x A'), dA = s (g B)' x, dx = g W + s (g B) A.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        out, low = _product(x, weight, bias, a, b, s)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = s
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, weight, a, b, low = ctx.saved_tensors
        s = ctx.scaling
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        g_low = (g @ b).mul_(s)  # (N, r)
        dx = torch.mm(g, weight).addmm_(g_low, a) if needs_x else None
        da = g_low.t() @ x if needs_a else None
        # (r, o) first: the other way round is half as fast on wide layers.
        db = (low.t() @ g).mul_(s).t().contiguous() if needs_b else None
        return dx, None, None, da, db, None
