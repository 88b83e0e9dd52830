"""Counts what a process hands to torch.distributed, by phase and collective.

Bytes are a call's payload, the same on every process: what is reduced or broadcast, the whole that
an all-gather makes, the whole that a reduce-scatter takes. What a process sends of it says
`ring.sent`. The calls are seen in torch's dispatcher, where those of C++ (DDP's reducer, FSDP2)
pass too.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# c10d's and the functional collectives' operators, by what they do.
COLLECTIVES = {
    "all_reduce": ("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_"),
    "all_gather": (
        *("allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_"),
        *("all_gather_into_tensor", "all_gather_into_tensor_coalesced"),
    ),
    "reduce_scatter": (
        *("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"),
        *("reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"),
    ),
    "broadcast": ("broadcast_", "broadcast"),
}
_NAMES = {operator: name for name, operators in COLLECTIVES.items() for operator in operators}
_SILENT = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")  # send nothing
_LIBRARIES = ("c10d", "_c10d_functional")
OBJECTS, SUMS = "objects", "sums"  # pickled Python objects; numbers of losses and metrics
_OBJECT_CALLS = ("all_gather_object", "broadcast_object_list", "gather_object")

Counts = dict[str, dict[str, dict[str, int]]]  # phase, collective: calls and bytes


class Collectives(TorchDispatchMode):
    """Within it, collectives are counted under the phase that `phase` says."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: str | None = None
        self._label: str | None = None
        self._found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def counts(self) -> Counts:
        """What was counted so far."""
        counts: Counts = {}
        for (phase, name), (calls, size) in self._found.items():
            counts.setdefault(phase, {})[name] = {"calls": calls, "bytes": size}
        return counts

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Within it, all collectives count as `label`."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    @contextmanager
    def telling_objects(self) -> Iterator[None]:
        """Within it, collectives of pickled objects count as such."""
        own = {name: getattr(distributed, name) for name in _OBJECT_CALLS}
        for name, call in own.items():
            setattr(distributed, name, self.as_label(OBJECTS, call))
        try:
            yield
        finally:
            for name, call in own.items():
                setattr(distributed, name, call)

    def as_label(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its collectives counted as `label`."""

        @wraps(call)
        def labelled(*args: Any, **kwargs: Any) -> Any:
            with self.labelled(label):
                return call(*args, **kwargs)

        return labelled

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchDispatchMode`."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it turns into collectives of plain tensors, which come again
        result = func(*args, **(kwargs or {}))
        operator = func.overloadpacket.__name__
        if func.namespace in _LIBRARIES and operator not in _SILENT and self.phase is not None:
            name = _NAMES.get(operator, operator)
            entry = self._found[self.phase, self._label or name]
            entry[0] += 1
            entry[1] += _payload(name, func.namespace == "c10d", args, result)
        return result


def _payload(name: str, is_in_place: bool, args: tuple[Any, ...], result: Any) -> int:
    """Bytes of a call; collectives in place have their outputs before their inputs."""
    if name == "reduce_scatter":
        return _bytes(args[1] if is_in_place else args[0])
    if name == "all_gather" and not is_in_place:
        return _bytes(result)
    return _bytes(args[0])


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, list | tuple):
        return sum(_bytes(part) for part in tensors)
    return 0
