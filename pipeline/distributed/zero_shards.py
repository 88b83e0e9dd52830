"""Weights that lie over the processes by DeepSpeed's ZeRO-3, behind the interface of `Shards`.

A process has one stretch of every parameter, flattened. DeepSpeed hooks every module: its weights
are gathered for its pass, and let go of after it. A parameter that lies so answers as a sharded
tensor of torch does (`to_local`, `full_tensor`), so that saving asks nobody's kind.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed.sharding import most
from pipeline.saved_rows import SavedRows, stretch


class ZeroShards:
    """How the weights of one module lie over the processes."""

    def __init__(
        self,
        module: nn.Module,
        readers: Iterable[nn.Module],
        config: dict[str, Any],
        device: torch.device,
    ) -> None:
        """Leave each process its stretch of the weights, in place, on `device`.

        `readers` read weights of modules within them without calling those, so that all of these
        are gathered for a reader's pass. What is trainable is fixed by now. Who trains it makes the
        engine that hooks it; everything else is hooked here.
        """
        import deepspeed

        self.module, self.config, self.device = module, config, device
        self.is_whole = False
        self.engine: Engine | None = None
        self.offload: Any = None  # what gathers, of the engine in force
        deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for parameter in module.parameters():
            _answer(parameter)
        self.borrowed = [
            partial(deepspeed.zero.register_external_parameter, part, parameter)
            for part in readers
            for parameter in part.parameters()
        ]
        if not any(parameter.requires_grad for parameter in module.parameters()):
            self.hook()

    def most(self, passes: int) -> int:
        """The most passes that any process makes; all of them make as many."""
        return most(passes, self.device)

    def calls(self, number: int) -> int:
        """How often a pass calls a module: its weights are gathered each time, by all processes."""
        return number if self.is_whole else self.most(number)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it every process has all weights: its passes wait for nobody."""
        if self.is_whole:
            yield
            return
        import deepspeed

        self.rest()
        with (
            deepspeed.zero.GatheredParameters(list(self.module.parameters())),
            _unhooked(self.module),
        ):
            self.is_whole = True
            try:
                yield
            finally:
                self.is_whole = False

    def rest(self) -> None:
        """Let go of what the last pass without gradient left gathered."""
        if not self.is_whole:
            self.offload.partition_all_parameters()

    def hook(self) -> None:
        """Gather for each pass; nothing is trained."""
        self.engine = Engine(self.module, self.config)
        self.follow(self.engine.engine.optimizer)

    def follow(self, offload: Any) -> None:
        """Have what is in an engine's force gather."""
        self.offload = offload
        for register in self.borrowed:
            register()

    def release(self) -> None:
        """Gather no more: another engine does, or the module is let go of."""
        if self.engine is not None:
            self.engine.release()
        self.engine = self.offload = None


class Engine:
    """A DeepSpeed engine, and what it leaves on the module and its parameters."""

    def __init__(self, module: nn.Module, config: dict[str, Any], optimiser: Any = None) -> None:
        import deepspeed

        self.inner = module
        self.before = [(x, vars(x).keys() | ()) for x in (*module.modules(), *module.parameters())]
        self.engine: Any = deepspeed.initialize(model=module, optimizer=optimiser, config=config)[0]

    def release(self) -> None:
        """Take it off the module, whose weights stay as they lie."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        zero = self.engine.optimizer
        offload = getattr(zero, "parameter_offload", zero)
        if hasattr(offload, "partition_all_parameters"):
            offload.partition_all_parameters()
        self.engine.destroy()
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        for thing, names in self.before:
            for name in vars(thing).keys() - names:
                del vars(thing)[name]
        for part in self.inner.modules():
            if type(part._parameters) is not dict:
                part._parameters = dict(part._parameters)
        # DeepSpeed's list of the modules under way, for which it keeps every engine's root.
        gone = {id(part) for part in self.inner.modules()}
        FWD_MODULE_STACK[:] = [part for part in FWD_MODULE_STACK if id(part) not in gone]
        self.engine = None


def _answer(parameter: Any) -> None:
    """Have a parameter answer as a sharded tensor of torch does."""
    parameter.to_local = partial(_to_local, parameter)
    parameter.full_tensor = partial(_full_tensor, parameter)
    parameter.rows_of = partial(_rows_of, parameter)


def _to_local(parameter: Any) -> Tensor:
    """The stretch of this process, in place and without padding."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    own: Tensor = parameter.ds_tensor.data[: max(0, min(size, parameter.ds_numel - rank * size))]
    return own


def _full_tensor(parameter: Any) -> Tensor:
    own = parameter.ds_tensor.data
    found = own.new_empty(own.numel() * torch.distributed.get_world_size())
    torch.distributed.all_gather_into_tensor(found, own.contiguous())
    return found[: parameter.ds_numel].view(parameter.ds_shape)


def _rows_of(parameter: Any, full: Tensor | SavedRows) -> Tensor:
    own, rank = _to_local(parameter), torch.distributed.get_rank()
    start = rank * parameter.ds_tensor.numel()
    return stretch(full, start, start + own.numel()).to(own.device)


@contextmanager
def _unhooked(module: nn.Module) -> Iterator[None]:
    """Within it the hooks on passes are off, all of which are DeepSpeed's."""
    parts = list(module.modules())
    tables = [t for part in parts for t in (part._forward_hooks, part._forward_pre_hooks)]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)
