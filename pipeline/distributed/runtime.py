"""What a stage needs to know about processes and devices, and nothing more.

Every collective is right with one process and with many; stages never ask which it is.
"""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config import RunSection

T = TypeVar("T")


class Runtime:
    """The processes of a run, through accelerate. One precision a process."""

    def __init__(self, run: RunSection) -> None:
        self.run = run

    @cached_property
    def accelerator(self) -> Any:
        """accelerate's Accelerator, made when it is first needed."""
        from accelerate import Accelerator

        return Accelerator(mixed_precision=self.run.mixed_precision, cpu=self.run.device == "cpu")

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device(self.accelerator.device)

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def strategy(self) -> str:
        """How accelerate really distributes, for the log."""
        kind = str(self.accelerator.distributed_type).removeprefix("DistributedType.")
        return f"{kind} x {self.world_size} on {self.device.type}"

    def seed(self, *names: str | int) -> int:
        """A seed of 63 bits for one purpose, derived from `run.seed` and the names."""
        text = ":".join(str(part) for part in (self.run.seed, *names))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def seed_all(self, *names: str | int) -> None:
        """Seed python, numpy and torch for one purpose."""
        from accelerate.utils import set_seed

        set_seed(self.seed(*names) % 2**32)

    def prepare(self, module: nn.Module, *others: Any) -> Any:
        """Wrap a module (and its optimiser) for training; what is trainable is fixed by now."""
        return self.accelerator.prepare(module, *others)

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module inside its wrapper."""
        inner: nn.Module = self.accelerator.unwrap_model(module)
        return inner

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's mixed precision."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def backward(self, loss: Tensor) -> None:
        """Backward through accelerate (which scales, where the strategy asks for it)."""
        self.accelerator.backward(loss)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Accumulate gradients without reducing them over processes."""
        context: AbstractContextManager[Any] = self.accelerator.no_sync(module)
        return context

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip the global gradient norm; returns the norm before clipping."""
        norm: Tensor = self.accelerator.clip_grad_norm_(list(parameters), max_norm)
        return norm

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over processes."""
        if self.world_size == 1:
            return tensor
        # Collectives want a tensor on the device; sums of rollouts are made on the host.
        total: Tensor = self.accelerator.reduce(tensor.to(self.device), reduction="sum")
        return total.to(tensor.device)

    def gather_objects(self, rows: Sequence[T]) -> list[T]:
        """All processes' rows, in rank order, on every process."""
        if self.world_size == 1:
            return list(rows)
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object(list(rows))
        return gathered

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def share(self, total: int) -> range:
        """This process's indices of `total` rows: rank, rank + world size, ..."""
        return range(self.rank, total, self.world_size)
