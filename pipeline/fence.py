"""What keeps a library trainer from leaving traces in a model, and the best weights for later."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def fenced(module: nn.Module) -> Iterator[None]:
    """Take from `module` what a library trainer leaves behind: patched forwards and gradients.

    TRL's SFTTrainer and accelerate's autocast bind a `forward` to the instance that closes over the
    original. A later `deepcopy` would compute with the original's weights: a copied reference would
    follow the policy, and its KL stay 0 for ever.
    """
    before = {part: vars(part).get("forward") for part in module.modules()}
    try:
        yield
    finally:
        for part in module.modules():
            vars(part).pop("forward", None)
            vars(part).pop("_original_forward", None)
            if before.get(part) is not None:
                vars(part)["forward"] = before[part]
        module.zero_grad(set_to_none=True)


class BestWeights:
    """A copy of the trained parameters in main memory, to be put back at the end."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.step = 0
        self.saved: list[Tensor] = []

    def save(self, step: int) -> None:
        """Copy the weights as they are after `step`."""
        self.step = step
        if not self.saved:
            self.saved = [p.detach().to("cpu", copy=True) for p in self.parameters]
            return
        for parameter, saved in zip(self.parameters, self.saved, strict=True):
            saved.copy_(parameter.detach())  # in place: never two copies of a large model

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copied weights back into the module."""
        for parameter, saved in zip(self.parameters, self.saved, strict=True):
            parameter.copy_(saved)
