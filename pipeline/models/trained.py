"""What training changes of a handle, whole, to be written by one process; and heads as files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.distributed.sharding import is_sharded, whole
from pipeline.models import adapters
from pipeline.models.heads import ScalarHead
from pipeline.models.trunk import Handle
from pipeline.runfolder import writing


@dataclass(frozen=True)
class TrainedState:
    """What training changes of a handle: its adapter's or all its weights, and its head's."""

    weights: dict[str, Tensor]
    head: dict[str, Tensor]


def trained_state(handle: Handle, *, keep: bool = True) -> TrainedState:
    """Whole tensors; of sharded ones every process has rows, and all of them ask together.

    Who writes nothing need not `keep` what it asks for.
    """
    trunk, role = handle.trunk, handle.role
    if role.adapter is None:
        weights = _gathered(trunk.base_state(), keep=keep)
    else:
        weights = adapters.adapter_state(trunk.model, role.adapter)
    head = {} if role.head is None else trunk.heads[role.head].state_dict(keep_vars=True)
    return TrainedState(weights, {n: whole(x).detach() for n, x in head.items()})


def _gathered(named: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors; sharded ones one by one in main memory, for no device need hold them all."""
    found: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, tensor in named:
        if is_sharded(tensor):
            if id(tensor) not in done:  # tied weights stay one tensor
                gathered = whole(tensor).detach()
                done[id(tensor)] = gathered.cpu() if keep else tensor
            tensor = done[id(tensor)]
        found[name] = tensor
    return found


def save_head(state: dict[str, Tensor], path: Path) -> None:
    """Write a scalar head with its shift and scale."""
    from safetensors.torch import save_file

    state = {key: value.cpu().contiguous() for key, value in state.items()}
    with writing(path):
        save_file(state, path)


def load_head(path: Path) -> ScalarHead:
    """Read a scalar head."""
    from safetensors.torch import load_file

    state = load_file(path)
    state["bias"] = state["bias"].reshape(1)  # before FSDP2 it was a scalar
    head = ScalarHead(state["weight"].numel(), state["weight"].dtype)
    head.load_state_dict(state)
    return head
