"""What a stage needs to know about processes and devices, and nothing more.

Every collective is right with one process and with many; stages never ask which it is.
"""

import gc
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config import RunSection
from pipeline.distributed import sharding
from pipeline.distributed.steps import Steps
from pipeline.distributed.strategy import claim
from pipeline.environment import ASKED_PROCESSES, num_processes, process_index
from pipeline.errors import ConfigError, PipelineError
from pipeline.not_finite import together

if TYPE_CHECKING:
    from pipeline.distributed.sharding import Shards
    from pipeline.distributed.zero_shards import ZeroShards
    from pipeline.models.trunk import Trunk

T = TypeVar("T")
# The others wait while one process writes a large artifact, or its reward function is slow. (The
# launcher ends them when a process fails: nobody waits for this to be over then.)
PATIENCE = timedelta(hours=6)


class Runtime:
    """The processes of a run, through accelerate. One precision a process."""

    def __init__(self, run: RunSection) -> None:
        self.run = run
        # Before accelerate reads what the launcher left in the environment.
        self.asked = claim()
        self.shards, self.in_step = self.asked.shards, self.asked.in_step
        self._sharded: list[Trunk] = []

    @cached_property
    def accelerator(self) -> Any:
        """accelerate's Accelerator, made when it is first needed."""
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        accelerator = Accelerator(
            mixed_precision=self.run.mixed_precision,
            cpu=self.run.device == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        refuse_fallback(str(accelerator.distributed_type), accelerator.num_processes)
        return accelerator

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device(self.accelerator.device)

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""
        return process_index()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return num_processes()

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def strategy(self) -> str:
        """How accelerate really distributes, for people."""
        if self.world_size == 1:
            return f"1 process on {self.device.type}"
        self.accelerator  # noqa: B018  # refuses what would become another one
        return f"{self.world_size} processes on {self.device.type}, {self.asked.name}"

    def seed(self, *names: str | int) -> int:
        """A seed of 63 bits for one purpose, derived from `run.seed` and the names."""
        text = ":".join(str(part) for part in (self.run.seed, *names))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def seed_all(self, *names: str | int) -> None:
        """Seed python, numpy and torch for one purpose."""
        from accelerate.utils import set_seed

        set_seed(self.seed(*names) % 2**32)

    def shard(self, *trunks: "Trunk") -> None:
        """Leave each process its rows of the weights, where the launch asks for that.

        What is trainable is fixed by now, and every adapter and head is there.
        """
        if not self.shards:
            return
        device = self.device  # the process group comes with it
        for trunk in trunks:
            if trunk.shards is None:
                trunk.shards = self._shards_of(trunk, device)
                trunk.place(device)
        self._sharded += trunks

    def _shards_of(self, trunk: "Trunk", device: torch.device) -> "Shards | ZeroShards":
        if not self.asked.zero_stage:
            half = self.run.mixed_precision == "bf16"
            heads = trunk.heads.values()  # of float32, whatever the base is
            return sharding.shard(trunk, trunk.layers(), heads, device, half=half)
        from pipeline.distributed import zero_settings, zero_shards

        config = zero_settings.engine(self.run, device)
        # Whether it is worth it depends on the rows, and processes have to call the same modules.
        trunk.last_layer = (None,)
        return zero_shards.ZeroShards(trunk, trunk.readers(), config, device)

    def forget_sharded(self) -> None:
        """Let go of what a stage sharded: no trunk of it passes any more."""
        for trunk in self._sharded:
            if trunk.shards is not None:
                trunk.shards.release()
        if self._sharded:
            self._sharded = []
            gc.collect()  # modules and their hooks know one another
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def prepare(self, module: nn.Module, optimiser: Any, *, skips_some: bool = False) -> Steps:
        """Wrap a module and its optimiser for training; what is trainable is fixed by now.

        `skips_some`: a pass may leave trainable weights unused, and DDP has to look for them.
        """
        # The main process's weights are copied to the others one by one, whatever their names.
        names = [f"{name} {tuple(x.shape)}" for name, x in module.state_dict().items()]
        assert len(set(self.gather_objects([tuple(names)]))) == 1, "processes hold unlike models"
        if self.asked.zero_stage:
            from pipeline.distributed import zero

            kind = zero.Zero3Steps if self.shards else zero.Zero2Steps
            return kind(module, optimiser, self)
        if self.shards:  # its trunks reduce their gradients themselves
            return Steps(module, optimiser, self, module)
        from accelerate import DistributedDataParallelKwargs

        settings = DistributedDataParallelKwargs(find_unused_parameters=skips_some)
        self.accelerator.ddp_handler = settings
        wrapped, optimiser = self.accelerator.prepare(module, optimiser)
        return Steps(wrapped, optimiser, self, module)

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's mixed precision."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def most(self, passes: int) -> int:
        """How many passes with gradient a process makes: as many as any, where they are in step."""
        return sharding.most(passes, self.device) if self.in_step else passes

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over processes."""
        if self.world_size == 1:
            return tensor
        # Collectives want a tensor on the device; sums of rollouts are made on the host.
        total: Tensor = self.accelerator.reduce(tensor.to(self.device), reduction="sum")
        return total.to(tensor.device)

    def any_of(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return bool(self.all_sum(torch.tensor(int(flag))))

    def gather_objects(self, rows: Sequence[T]) -> list[T]:
        """All processes' rows, in rank order, on every process."""
        if self.world_size == 1:
            return list(rows)
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object(list(rows))
        return gathered

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns in the main process, which alone does it, in every process.

        Raises:
            PipelineError: whatever of that kind the main process raised, in every process.
        """
        if self.world_size == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None, None]  # result, failure
        if self.is_main:
            try:
                told[0] = work()
            except PipelineError as error:
                error.everywhere = True
                told[1] = error
        self.accelerator  # noqa: B018  # the process group comes with it
        result, failure = broadcast_object_list(told)
        if failure is not None:
            raise failure
        return result

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            self.accelerator.wait_for_everyone()

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """End the process group after what is within.

        Threads of gloo's that outlive the interpreter end it in SIGABRT now and then
        (https://github.com/pytorch/pytorch/issues/190489). NCCL's group ends by a collective: a
        process that fails alone does not wait for the others in it.
        """
        all_leave = False
        try:
            yield
            all_leave = True
        except PipelineError as error:
            all_leave = error.everywhere
            raise
        finally:
            joined = self.world_size > 1 and torch.distributed.is_initialized()
            if joined and (all_leave or torch.distributed.get_backend() == "gloo"):
                torch.distributed.destroy_process_group()

    def divided(self, total: int, work: Callable[[Sequence[int]], Iterable[T]]) -> list[T]:
        """What `work(rows)` gives for each of `total` rows, every process doing its share of them.

        All do all where there are fewer rows than processes: none may be left without, since passes
        through sharded weights are made together.

        Raises:
            TrainingError: `work` raised it, in whichever process.
        """
        if total < self.world_size:
            return list(work(range(total)))
        own = self.share(total)
        results = together(lambda: list(work(own)), self)
        found = self.gather_objects(list(zip(own, results, strict=True)))
        return [result for _, result in sorted(found, key=lambda pair: pair[0])]

    def share(self, total: int) -> range:
        """This process's indices of `total` rows: rank, rank + world size, ..."""
        return range(self.rank, total, self.world_size)


def refuse_fallback(distributed_type: str, processes: int) -> None:
    """Refuse another strategy, or another number of processes, than the launch asked for.

    Raises:
        ConfigError: says what was asked for and what there would be.
    """
    kind = distributed_type.removeprefix("DistributedType.")
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ConfigError(
            f"the launch asks for {kind}, which no stage trains with: use a configuration of "
            "configs/accelerate/"
        )
    asked = int(os.environ.get(ASKED_PROCESSES, processes))
    if asked != processes:
        raise ConfigError(
            f"the launch asks for {asked} processes, but accelerate runs {processes}: look at "
            "distributed_type, num_processes and num_machines in its configuration"
        )
