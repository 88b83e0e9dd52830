"""What an optimiser trains, as named tensors: the same names in every strategy."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed.sharding import local, rows_like, shape
from pipeline.errors import CheckpointError
from pipeline.saved_rows import Saved, SavedRows


def training_tensors(
    trained: Iterable[tuple[str, nn.Parameter]], optimiser: Any
) -> dict[str, Tensor]:
    """Weights by name, and the optimiser's numbers of each."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained:
        tensors[f"weights/{name}"] = parameter
        for what, value in optimiser.state[parameter].items():
            tensors[f"{what}/{name}"] = value
    return tensors


@torch.no_grad()
def restore_training_tensors(
    tensors: Saved, trained: Iterable[tuple[str, nn.Parameter]], optimiser: Any
) -> None:
    """Set weights and the optimiser's numbers to what `training_tensors` found."""
    trained = list(trained)
    names = {name for name, _ in trained}
    parts = (key.partition("/") for key in tensors)  # a state may hold other tensors, too
    numbers = {what for what, _, name in parts if name in names} - {"weights"}
    for name, parameter in trained:
        weight = fitting_weight(tensors, numbers, name, parameter)
        local(parameter).copy_(rows_like(weight, parameter))
        kept = {w: tensors[f"{w}/{name}"] for w in numbers if f"{w}/{name}" in tensors}
        optimiser.state[parameter] = {what: _laid_like(x, parameter) for what, x in kept.items()}


def _laid_like(full: Tensor | SavedRows, parameter: nn.Parameter) -> Tensor:
    """A number of the optimiser's where its parameter lies; a step count is a scalar."""
    if not isinstance(full, SavedRows) and full.dim() == 0:
        return full.to(parameter.device)
    laid = torch.empty_like(parameter, dtype=full.dtype, requires_grad=False)
    local(laid).copy_(rows_like(full, parameter))
    return laid


def fitting_weight(
    tensors: Saved, numbers: set[str], name: str, parameter: nn.Parameter
) -> Tensor | SavedRows:
    """The weight in a state; what a state lacks would go on from zero, without a word.

    A weight not trained yet (the policy's, while the value warms up) has no numbers at all.

    Raises:
        CheckpointError: the state is not of this model.
    """
    lacking = sorted(what for what in numbers if f"{what}/{name}" not in tensors)
    if f"weights/{name}" not in tensors:
        fault = f"no weights of {name}"
    elif 0 < len(lacking) < len(numbers):
        fault = f"no {', '.join(lacking)} of {name}"
    else:
        weight, whole = tensors[f"weights/{name}"], shape(parameter)
        # DeepSpeed's processes leave stretches of flattened weights.
        if weight.shape in (whole, (whole.numel(),)):
            return weight
        fault = f"{name} of shape {tuple(weight.shape)}, not {tuple(whole)}"
    raise CheckpointError(
        f"the state has {fault}: it is of another model or another version of this software. Set "
        "the configuration back, or choose another run.name to start anew"
    )
