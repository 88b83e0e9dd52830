"""What keeps a library trainer from leaving traces in a model, and the best weights for later."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed.sharding import Part, is_sharded, local, rows_like
from pipeline.saved_rows import Saved


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
    """A copy of the trained parameters in main memory (of sharded ones, of the rows here)."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.step = 0
        self.saved: list[Tensor] = []

    def save(self, step: int) -> None:
        """Copy the weights as they are after `step`."""
        self.step = step
        if not self.saved:
            self.saved = [local(p).detach().to("cpu", copy=True) for p in self.parameters]
            return
        for parameter, saved in zip(self.parameters, self.saved, strict=True):
            saved.copy_(local(parameter).detach())  # in place: never two copies of a large model

    def tensors(self) -> dict[str, Any]:
        """The copy, for a state to go on from."""
        pairs = zip(self.saved, self.parameters, strict=False)  # nothing is saved at first
        return {
            f"best/{i}": Part(saved) if is_sharded(parameter) else saved
            for i, (saved, parameter) in enumerate(pairs)
        }

    def load(self, tensors: Saved, step: int) -> None:
        """Go back to the copy of a state."""
        self.step = step
        self.saved = [
            rows_like(tensors[f"best/{i}"], parameter).to("cpu", copy=True)
            for i, parameter in enumerate(self.parameters)
            if f"best/{i}" in tensors
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copied weights back into the module."""
        for parameter, saved in zip(self.parameters, self.saved, strict=True):
            local(parameter).copy_(saved)
