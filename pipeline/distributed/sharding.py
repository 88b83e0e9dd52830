"""Weights that lie over the processes, each with its rows of every tensor: torch's FSDP2.

accelerate launches and configures it (`--launch fsdp2`, its `fsdp_*` settings). `fully_shard` is
called here, on GPUs and on processors alike: accelerate has no FSDP on a processor, and takes one
model an optimiser, where PPO has up to four models and trains two of them.

Each layer gathers its weights for its own pass and lets go of them (ZeRO-3, arXiv:1910.02054); what
belongs to no layer (embeddings, output layer) is gathered once a pass. Gathering is a collective:
processes make the same number of passes (`Shards.most`), some of them for nothing.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError

# accelerate's word for it, which its launcher sets; ours, once it is ours to do.
_THEIRS, _OURS = "ACCELERATE_USE_FSDP", "RLHF_FSDP2"


def claim() -> bool:
    """Whether the launch asks for FSDP, which is then done here and no longer by accelerate.

    Raises:
        ConfigError: it asks for the first FSDP.
    """
    if os.environ.get(_THEIRS, "false").lower() in ("1", "true"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "the launch asks for FSDP of version 1: set fsdp_version to 2 in its configuration "
                "(configs/accelerate/fsdp2.yaml is one)"
            )
        # accelerate and transformers would shard, load on the meta device and wrap once more.
        del os.environ[_THEIRS]
        os.environ[_OURS] = "true"
    return os.environ.get(_OURS) == "true"


class Shards:
    """How the weights of one module lie over the processes."""

    def __init__(self, root: Any, units: list[Any], device: torch.device) -> None:
        self.root, self.units, self.device = root, units, device
        self.is_whole = False

    def most(self, passes: int) -> int:
        """The most passes that any process makes; all of them make as many."""
        return most(passes, self.device)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it every process has all weights: its passes wait for nobody."""
        if self.is_whole:
            yield
            return
        modules = [self.root, *self.units]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False
            for module in self.units:
                module.set_reshard_after_forward(True, recurse=False)
            for module in modules:
                module.reshard()

    def rest(self) -> None:
        """Let go of what the last pass without gradient left gathered."""
        if not self.is_whole:
            self.root.reshard()


def shard(module: nn.Module, units: Iterable[nn.Module], device: torch.device) -> Shards:
    """Leave each process its rows of the weights of `module`, in place, on `device`.

    `units` are gathered apart, each for its own pass. What is trainable is fixed by now. Modules
    that are not on the device yet get there unit by unit.
    """
    from torch.distributed.fsdp import fully_shard

    # Nobody writes into what a pass returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    settings = {"mesh": _mesh(device.type), **_settings()}
    apart = list(units)
    for unit in apart:
        fully_shard(unit, **settings)
    fully_shard(module, **settings)
    return Shards(module, apart, device)


def most(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    from torch import distributed

    found = torch.tensor(number, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


@cache
def _mesh(kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (torch.distributed.get_world_size(),))


@cache
def _settings() -> dict[str, Any]:
    """accelerate's, from its configuration file: offloading to the host, and when to let go."""
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    return {
        "offload_policy": plugin.cpu_offload,
        "reshard_after_forward": plugin.reshard_after_forward,
    }


# --- tensors that lie over the processes ---


class Part:
    """The rows that a process has of a tensor which no device holds (a copy on the host)."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def to_local(self) -> Tensor:
        """The rows, as a sharded tensor gives its own."""
        return self.rows


def is_sharded(x: Any) -> bool:
    """Whether a process has only its rows of the tensor."""
    return hasattr(x, "to_local")


def local(x: Any) -> Tensor:
    """The rows that are here, in place; all of a tensor that is not sharded."""
    rows: Tensor = x.to_local() if is_sharded(x) else x
    return rows


def whole(x: Any) -> Tensor:
    """All of the tensor, in every process: they ask together."""
    found: Tensor = x.full_tensor() if is_sharded(x) else x
    return found


def rows_like(full: Tensor, like: Any) -> Tensor:
    """The rows of `full` of which `like` has its own here; all of them if it is not sharded."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank nothing is sent: every process has all of `full`.
    laid = distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
    return local(laid)
