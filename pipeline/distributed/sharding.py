"""Weights that lie over the processes, each with its rows of every tensor: torch's FSDP2.

accelerate launches and configures it (`--launch fsdp2`, its `fsdp_*` settings); `fully_shard` is
called here. DeepSpeed's ZeRO-3 has the same interface in `pipeline.distributed.zero_shards`.

Each layer gathers its weights for its own pass and lets go of them (ZeRO-3, arXiv:1910.02054); what
belongs to no layer (embeddings, output layer) is gathered once a pass. Gathering is a collective:
processes make the same number of passes (`Shards.most`), some of them for nothing.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.saved_rows import SavedRows, stretch


class Shards:
    """How the weights of one module lie over the processes."""

    def __init__(self, root: Any, units: list[Any], device: torch.device) -> None:
        self.root, self.units, self.device = root, units, device
        self.is_whole = False

    def most(self, passes: int) -> int:
        """The most passes that any process makes; all of them make as many."""
        return most(passes, self.device)

    def calls(self, number: int) -> int:
        """How often a pass calls a module: its weights are gathered once a pass."""
        return number

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it every process has all weights: its passes wait for nobody."""
        if self.is_whole:
            yield
            return
        modules = [self.root, *self.units]
        for module in modules:
            module.unshard()
        for module in self.units:  # the root never lets go of its own after a forward pass
            module.set_reshard_after_forward(False, recurse=False)
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False
            lets_go = _settings()["reshard_after_forward"]
            for module in self.units:
                module.set_reshard_after_forward(lets_go, recurse=False)
            for module in modules:
                module.reshard()

    def rest(self) -> None:
        """Let go of what the last pass without gradient left gathered."""
        if not self.is_whole:
            self.root.reshard()

    def release(self) -> None:
        """Nothing is held but by the module itself."""


def shard(
    module: nn.Module,
    layers: Iterable[nn.Module],
    heads: Iterable[nn.Module],
    device: torch.device,
    *,
    half: bool,
) -> Shards:
    """Leave each process its rows of the weights of `module`, in place, on `device`.

    Layers and heads are gathered apart, each for its own pass. What is trainable is fixed by now.
    Modules that are not on the device yet get there one by one.

    `half`: passes run under autocast to bfloat16. Layers of float32 are then cast before they are
    gathered, which autocast would do after it, with copies that live until the backward pass. The
    states between them keep the type that autocast gives them, and processes' gradients are summed
    in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Nobody writes into what a pass returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    settings = {"mesh": _mesh(device.type), **_settings()}
    as_it_is = MixedPrecisionPolicy()
    cast = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    layers, heads = list(layers), list(heads)
    for layer in layers:
        policy = cast if half and _takes_cast(layer, device) else as_it_is
        fully_shard(layer, mp_policy=policy, **settings)
    for head in heads:
        fully_shard(head, **settings)
    # What belongs to no unit stays gathered from a pass to its backward pass (torch's None).
    fully_shard(module, **settings | {"reshard_after_forward": None})
    return Shards(module, [*layers, *heads], device)


def _takes_cast(layer: nn.Module, device: torch.device) -> bool:
    """Whether the layer computes in bfloat16 what autocast would, given weights of bfloat16.

    Products do, and what norms round is their weights alone. Other vectors (DoRA's magnitudes,
    decays of recurrent layers) go into sums and quotients that autocast leaves in float32.
    """
    if not any(parameter.dtype == torch.float32 for parameter in layer.parameters()):
        return False
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm) and device.type == "cpu":
            return False  # takes no weights of bfloat16 there; on GPUs autocast makes them float32
        vectors = any(parameter.dim() < 2 for parameter in module.parameters(recurse=False))
        if vectors and not type(module).__name__.endswith(("Norm", "Linear", "Conv1D")):
            return False
    return True


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
    """accelerate's, from its configuration file: whether a layer lets go after its forward pass."""
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    return {"reshard_after_forward": plugin.reshard_after_forward}


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


def shape(x: Any) -> torch.Size:
    """The shape of the whole tensor; a parameter under ZeRO-3 has none of its own."""
    found: torch.Size = getattr(x, "ds_shape", x.shape)
    return found


def whole(x: Any) -> Tensor:
    """All of the tensor, in every process: they ask together."""
    found: Tensor = x.full_tensor() if is_sharded(x) else x
    return found


def rows_like(full: Tensor | SavedRows, like: Any) -> Tensor:
    """The rows of `full` of which `like` has its own here; all of them if it is not sharded.

    `full` may be flat: ZeRO's processes each leave a stretch in a state.
    """
    if not is_sharded(like):
        return stretch(full, 0, like.numel()).reshape(like.shape)
    if hasattr(like, "rows_of"):  # ZeRO-3's
        rows: Tensor = like.rows_of(full)
        return rows
    # FSDP2 deals rows out as `torch.chunk` does: as many to each, the last ones fewer or none.
    own = local(like)
    each = -(-like.shape[0] // like.device_mesh.size())
    start = min(like.device_mesh.get_local_rank() * each, like.shape[0]) * prod(like.shape[1:])
    return stretch(full, start, start + own.numel()).reshape(own.shape).to(own.device)
