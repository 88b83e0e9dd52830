"""Optimiser steps of one module: passes, gradients, clipping, and the state to go on from.

Here for one process, for DDP and for FSDP2. `pipeline.distributed.zero` has the same for DeepSpeed,
whose engine keeps gradients and optimiser out of sight; nobody else reads a gradient.
"""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.distributed.sharding import local, rows_like, whole
from pipeline.distributed.training_tensors import restore_training_tensors, training_tensors
from pipeline.saved_rows import Saved, SavedRows

if TYPE_CHECKING:
    from pipeline.distributed.runtime import Runtime


class Steps:
    """The steps of one optimiser, whose groups of parameters have names (or are numbered).

    A step is `begin`, passes (each within `passing`, ended by `backward`), `clip` and `step`.
    """

    # Whether every forward pass has to go through `module`, one for all that a micro-batch wants.
    takes_one_pass = False
    module: Any  # what a pass with gradient calls

    def __init__(
        self, module: nn.Module, optimiser: Any, runtime: "Runtime", inner: nn.Module
    ) -> None:
        """`inner` is what `module` wraps; `optimiser` is prepared for the wrapper."""
        self.module, self.optimiser, self.runtime = module, optimiser, runtime
        self.takes_one_pass = module is not inner
        self.groups = named_groups(optimiser)
        self.trained = trained(inner, self.groups)
        self.stepping: Collection[str] = self.groups  # the groups that the step in hand trains

    # --- one step ---

    def begin(self, names: Collection[str] | None = None) -> None:
        """Begin a step of the named groups (default: all); the others rest, gradient or not.

        Their gradients are zeros in memory that all steps share until `let_go`. Allocated by the
        first backward pass they lie scattered among its activations, and memory in between is hard
        to use again: with two models of 17 million weights 60 MB of 900.
        """
        self.stepping = self.groups if names is None else names
        for name in self.stepping:
            for parameter in self.groups[name]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                else:
                    parameter.grad.zero_()

    def passing(self, last: bool) -> AbstractContextManager[Any]:
        """Round a forward and a backward pass: under DDP only the last of a step reduces.

        Processes may then make different numbers of passes; each makes a last one.
        """
        if last or self.runtime.shards:  # sharded gradients would be whole until they are reduced
            return nullcontext()
        context: AbstractContextManager[Any] = self.runtime.accelerator.no_sync(self.module)
        return context

    def backward(self, loss: Tensor) -> None:
        """Backward of this process's share of the loss: gradients are summed over processes."""
        # Wrappers average over processes; times their number that is a sum.
        self.runtime.accelerator.backward(loss * self.runtime.world_size)

    def clip(self, max_norm: float, name: str | None = None) -> float:
        """Clip the norm of a group's gradient (default: of all); returns it before clipping."""
        parameters = self.module.parameters() if name is None else self.groups[name]
        norm = self.runtime.accelerator.clip_grad_norm_(list(parameters), max_norm)
        return float(whole(norm))

    def step(self) -> None:
        """Change the weights of the groups that this step trains."""
        for name in self.groups.keys() - set(self.stepping):
            # A value head on the policy's trunk sends gradient into the policy too.
            for parameter in self.groups[name]:
                parameter.grad = None
        self.optimiser.step()

    def let_go(self) -> None:
        """Free the memory of gradients."""
        self.optimiser.zero_grad()

    # --- learning rates ---

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each group."""
        groups = zip(self.groups, self.optimiser.param_groups, strict=True)
        return {name: group["lr"] for name, group in groups}

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate of each group."""
        for name, group in zip(self.groups, self.optimiser.param_groups, strict=True):
            group["lr"] = rates[name]

    # --- the state to go on from ---

    def tensors(self) -> dict[str, Any]:
        """What training changes: weights by name, and the optimiser's numbers of each."""
        return training_tensors(self.trained, self.optimiser)

    def restore(self, tensors: Saved) -> None:
        """Go back to what `tensors` found, in this strategy or another."""
        restore_training_tensors(tensors, self.trained, self.optimiser)

    def weights(self, name: str) -> dict[str, Any]:
        """A group's weights by name: of each what is here, as in `tensors`."""
        return dict(self._of_group(name))

    @torch.no_grad()
    def set_weights(self, rows: Mapping[str, Tensor]) -> None:
        """Set weights by name, of each what is here."""
        for name, parameter in self.trained:
            if name in rows:
                local(parameter).copy_(rows[name])

    def own_rows(self, name: str, full: Tensor | SavedRows) -> Tensor:
        """Of a tensor like the weight of that name, what is here of the weight."""
        return rows_like(full, dict(self.trained)[name])

    def _of_group(self, name: str) -> list[tuple[str, nn.Parameter]]:
        own = {id(parameter) for parameter in self.groups[name]}
        return [(name, parameter) for name, parameter in self.trained if id(parameter) in own]

    def close(self) -> None:
        """Training is over; handles on the module live on."""


def named_groups(optimiser: Any) -> dict[str, list[nn.Parameter]]:
    """An optimiser's parameters by the names of their groups, which are numbers without one."""
    groups = enumerate(optimiser.param_groups)
    return {group.get("name", str(i)): list(group["params"]) for i, group in groups}


def trained(
    module: nn.Module, groups: Mapping[str, Collection[nn.Parameter]]
) -> list[tuple[str, nn.Parameter]]:
    """The module's parameters that are in a group, by name."""
    known = {id(parameter) for parameters in groups.values() for parameter in parameters}
    return [(name, p) for name, p in module.named_parameters() if id(p) in known]
