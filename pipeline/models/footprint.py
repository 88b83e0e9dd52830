"""What each role of a stage costs in memory: weights, gradients and optimiser state, in bytes.

Every distinct storage counts once. What several roles stand on, frozen, is the `base`'s; trained
weights, adapters and heads are of the first role that has them. Measured are live storages;
expected are those of models without memory (`pipeline.models.empty`), trained with AdamW.

Not in it: activations, the engine's cache, rollouts, and the copy of the best weights that SFT and
reward training keep in main memory (`keep: best`), which is as large as the trained weights.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed.sharding import local
from pipeline.models.adapters import is_of
from pipeline.models.trunk import Handle
from pipeline.runfolder import read_json, write_json_atomic

BASE, OTHER = "base", "other"
_ADAM_MOMENTS, _ADAM_COUNTER = 2, 4  # moments as large as the weight, and a float32 step count


@dataclass(frozen=True)
class Cost:
    """Bytes of one role."""

    weights: int = 0
    gradients: int = 0
    optimiser: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimiser

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimiser + other.optimiser,
        )


Footprint = dict[str, Cost]
Roles = Mapping[str, Handle | nn.Module]  # a module where a model is not ours


def expected(roles: Roles, trained: Collection[nn.Parameter]) -> Footprint:
    """The cost when `trained` have gradients of their own type and AdamW's state."""
    chosen = {id(parameter) for parameter in trained}

    def training(tensor: Tensor) -> tuple[int, int]:
        if id(tensor) not in chosen:
            return 0, 0
        size = tensor.numel() * tensor.element_size()
        return size, _ADAM_MOMENTS * size + _ADAM_COUNTER

    return _account(roles, training)


def divided(whole: Footprint, processes: int, parts: Collection[str]) -> Footprint:
    """The cost in one process where `parts` lie over all of them."""

    def share(part: str, size: int) -> int:
        return math.ceil(size / processes) if part in parts else size

    return {
        role: Cost(**{part: share(part, size) for part, size in asdict(cost).items()})
        for role, cost in whole.items()
    }


def measured(roles: Roles, optimiser: torch.optim.Optimizer) -> Footprint:
    """The cost now: the storages that weights, their gradients and the optimiser hold."""
    seen: set[int] = set()

    def training(tensor: Tensor) -> tuple[int, int]:
        gradient = 0 if tensor.grad is None else _new_bytes(tensor.grad, seen)
        state = optimiser.state.get(tensor, {}).values()
        return gradient, sum(_new_bytes(part, seen) for part in state if torch.is_tensor(part))

    return _account(roles, training)


def at_first_step(optimiser: Any, then: Callable[[torch.optim.Optimizer], None]) -> None:
    """Call `then` once: after the first step with gradients in every group, before they are freed.

    A step that trains a part only (the value model while it warms up) has not all state yet.
    """
    inner: torch.optim.Optimizer = getattr(optimiser, "optimizer", optimiser)  # accelerate's wrap
    waiting = [then]

    def look(*_: Any) -> None:
        groups = [group["params"] for group in inner.param_groups if group["params"]]
        complete = all(any(p.grad is not None for p in group) for group in groups)
        if waiting and complete:
            waiting.pop()(inner)

    inner.register_step_post_hook(look)


def measure_at_first_step(optimiser: Any, roles: Roles, memory_json: Path) -> None:
    """Write what the roles cost into a stage's `memory.json` once there is all to measure.

    DeepSpeed's engine keeps gradients and optimiser in its own places, which are left out.
    """
    inner = getattr(optimiser, "optimizer", optimiser)
    if not isinstance(inner, torch.optim.Optimizer):
        return
    at_first_step(optimiser, lambda inner: record(memory_json, measured=measured(roles, inner)))


def record(path: Path, **entries: Footprint | Mapping[str, int] | None) -> None:
    """Add entries to the `memory.json` of a stage: bytes by role, or by place."""
    content = read_json(path) if path.exists() else {"format": 1, "unit": "bytes"}
    for name, entry in entries.items():
        content[name] = entry and {
            key: asdict(value) if isinstance(value, Cost) else value for key, value in entry.items()
        }
    write_json_atomic(path, content)


def peaks() -> dict[str, int]:
    """Most memory that this process has held so far: resident, and allocated on its accelerator."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    found = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.max_memory_allocated()
    return found


# --- accounting ---


def _account(roles: Roles, training: Callable[[Tensor], tuple[int, int]]) -> Footprint:
    """Costs by row; `training` gives a weight's bytes of gradient and of optimiser state."""
    found: Footprint = {}
    seen: set[int] = set()
    for row, tensor in _rows(roles):
        weights = _new_bytes(tensor, seen)
        if weights:
            found[row] = found.get(row, Cost()) + Cost(weights, *training(tensor))
    rows = dict.fromkeys((BASE, *roles, OTHER))
    return {row: found.get(row, Cost()) for row in rows if row in found or row in roles}


def _rows(roles: Roles) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with the row that it counts in; tensors that share a storage come again."""
    handles = {name: role for name, role in roles.items() if isinstance(role, Handle)}
    for name, handle in handles.items():
        for parameter in _own(handle):
            yield name, parameter
    done: set[int] = set()
    for handle in handles.values():
        trunk = handle.trunk
        if id(trunk) in done:
            continue
        done.add(id(trunk))
        extra = {
            id(parameter)
            for key, parameter in trunk.named_parameters()
            if key.startswith("heads.") or any(is_of(key, a) for a in _adapters(trunk.model))
        }
        row = _base_row({n: h for n, h in handles.items() if h.trunk is trunk})
        for tensor in _tensors(trunk.model):
            yield (OTHER if id(tensor) in extra else row), tensor
        for tensor in _tensors(trunk.heads):
            yield OTHER, tensor
    for name, role in roles.items():
        if not isinstance(role, Handle):
            for tensor in _tensors(role):
                yield name, tensor


def _base_row(users: Mapping[str, Handle]) -> str:
    """Where a trunk's own weights count: with their one user, or the first that trains them."""
    names = list(users)
    if len(names) == 1:
        return names[0]
    trunk = users[names[0]].trunk
    bare = [name for name in names if users[name].role.adapter is None]
    if bare and any(parameter.requires_grad for _, parameter in trunk.base_parameters()):
        return bare[0]
    return BASE


def _own(handle: Handle) -> Iterator[Tensor]:
    """A role's adapter and head."""
    trunk, role = handle.trunk, handle.role
    if role.adapter is not None:
        for key, parameter in trunk.model.named_parameters():
            if is_of(key, role.adapter):
                yield parameter
    if role.head is not None:
        yield from _tensors(trunk.heads[role.head])


def _adapters(model: Any) -> Collection[str]:
    return getattr(model, "peft_config", {})


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and what bitsandbytes keeps beside them in Python attributes."""
    yield from module.parameters()
    yield from module.buffers()
    for parameter in module.parameters():
        yield from _beside(parameter)
    for part in module.modules():
        state = vars(part).get("state")  # of an 8-bit layer, after its first forward
        if state is not None and not torch.is_tensor(state):
            yield from _beside(state)


def _beside(thing: Any) -> Iterator[Tensor]:
    for name, value in list(getattr(thing, "__dict__", {}).items()):
        if torch.is_tensor(value):
            yield value
        elif name in ("quant_state", "state2"):
            yield from _beside(value)


def _new_bytes(tensor: Tensor, seen: set[int]) -> int:
    """Bytes of a tensor's storage the first time that it is seen, 0 afterwards."""
    storage = local(tensor).untyped_storage()
    key = storage._cdata  # the storage itself: on the meta device all have the data pointer 0
    if key in seen:
        return 0
    seen.add(key)
    return storage.nbytes()
