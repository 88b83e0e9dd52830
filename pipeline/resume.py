"""States that a training goes on from: tensors and numbers, saved whole or not at all.

`checkpoints/state-N/` is what step N left: `run.safetensors` and `run.json` of the run, a pair
`rank-R` of each process, and a manifest, written last. Of sharded tensors each process leaves its
rows, in `rows-R.safetensors`; another number of processes can read them. There is no pickle in it.
"""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pipeline.distributed.sharding import is_sharded, local
from pipeline.errors import CheckpointError, PipelineError
from pipeline.runfolder import (
    Manifest,
    read_json,
    read_manifest,
    verify,
    write_manifest,
    write_text_atomic,
    writing,
)
from pipeline.saved_rows import rows_path, saved_rows

if TYPE_CHECKING:
    from pipeline.distributed import Runtime
    from pipeline.runfolder import StageFolder

PREFIX = "state-"
KEPT_STATES = 2


@dataclass(frozen=True)
class State:
    """Named tensors, and what JSON can hold. Sharded tensors that were read are still in files."""

    tensors: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def write(self, stem: Path) -> None:
        """Leave `STEM.safetensors` and `STEM.json`."""
        _write_tensors(self.tensors, stem.with_suffix(".safetensors"))
        # Python's JSON: numbers come back bit for bit, and so do infinities.
        write_text_atomic(stem.with_suffix(".json"), json.dumps(dict(self.numbers)))

    @classmethod
    def read(cls, stem: Path) -> "State":
        """What `write` left.

        Raises:
            CheckpointError: a file of the two is not there, and no manifest named it.
        """
        from safetensors.torch import load_file

        try:
            tensors = load_file(stem.with_suffix(".safetensors"))
            return cls(tensors, read_json(stem.with_suffix(".json")))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{stem.parent} is no state that this software wrote: {error}. Remove it to go on "
                "from an older one"
            ) from error

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, path)


@dataclass(frozen=True)
class Resumed:
    """The state that a training goes on from; `own` is None if it was of other processes."""

    step: int
    run: State
    own: State | None


class States:
    """The states of one training: the newest `KEPT_STATES` of them.

    Where training computes on an accelerator, a state is copied to the host and written while
    training goes on (`run.save_in_background`). On a processor the copy would take the memory, and
    the writing the cores, that training works with.
    """

    def __init__(
        self, stage: "StageFolder", key: str, material: Mapping[str, Any], runtime: "Runtime"
    ) -> None:
        self.folder, self.metrics_jsonl = stage.checkpoints, stage.metrics_jsonl
        self.stage, self.key, self.material = stage.root.name, key, material
        self.runtime = runtime
        self._writing: _Writing | None = None

    @property
    def in_background(self) -> bool:
        """Whether training goes on while a state is written."""
        asked = self.runtime.run.save_in_background
        return self.runtime.device.type != "cpu" if asked is None else asked

    def save(self, step: int, run: State, own: State) -> None:
        """Leave the state of a step: `run` by the main process, `own` by each.

        Older states go when this one is complete, which in the background is later than the return
        (`settle`).

        Raises:
            PipelineError: no room, for this one or the one before it; older states are intact.
        """
        self.settle()
        folder, logged = self.folder / f"{PREFIX}{step}", self._logged()
        is_main = self.runtime.is_main
        rows = {name: local(x) for name, x in run.tensors.items() if is_sharded(x)}
        # Of what all have, the main process's is written.
        whole = {n: x for n, x in run.tensors.items() if n not in rows} if is_main else {}
        if self.in_background:
            rows, whole, run = _copied(rows), _copied(whole), State({}, deepcopy(run.numbers))
        self.runtime.from_main(lambda: self._begin(folder))

        def write() -> None:
            if is_main:
                State(whole, run.numbers).write(folder / "run")
            if rows:
                _write_tensors(rows, rows_path(folder, self.runtime.rank))
            own.write(folder / f"rank-{self.runtime.rank}")

        def complete() -> None:
            if is_main:
                self._complete(folder, step, logged)

        size = State(rows | whole).size + own.size
        self._writing = _Writing(folder, size, write, complete, self.runtime.world_size)
        if self.in_background:
            self._writing.start()
        else:
            self._writing.by_hand(self.runtime.barrier)
            self.settle()

    def settle(self, *, together: bool = True) -> None:
        """Wait until the last state is complete, in all processes or (one that fails) in this one.

        Raises:
            PipelineError: it could not be written; older states are intact.
        """
        last, self._writing = self._writing, None
        if last is not None:
            last.settle()
            if together:
                self.runtime.barrier()

    def newest(self, console: Console) -> Resumed | None:
        """The newest state whose files are all there and unchanged, or None.

        A damaged one is named, and the one before it is taken. What was logged after it is cut off
        metrics.jsonl; trackers keep theirs.
        """
        self.settle()
        step = self.runtime.from_main(lambda: self._newest_whole(console))
        if step is None:
            return None
        folder = self.folder / f"{PREFIX}{step}"
        ranks = len(list(folder.glob("rank-*.json")))
        own = None
        if ranks == self.runtime.world_size:
            own = State.read(folder / f"rank-{self.runtime.rank}")
        run = State.read(folder / "run")
        return Resumed(step, State({**run.tensors, **saved_rows(folder)}, run.numbers), own)

    def forget_after(self, step: int) -> None:
        """Remove the states of later steps, if there is an earlier one to go back to."""

        def remove() -> None:
            found = complete_states(self.folder)
            if any(at <= step for at, _ in found):
                for folder in (folder for at, folder in found if at > step):
                    shutil.rmtree(folder, ignore_errors=True)

        self.settle()
        self.runtime.from_main(remove)

    def numbers_of_kept(self) -> list[Mapping[str, Any]]:
        """The run's numbers in each state that is whole, the newest first."""

        def read() -> list[Mapping[str, Any]]:
            found = []
            for _, folder in complete_states(self.folder):
                with suppress(CheckpointError):
                    verify(folder)
                    found.append(read_json(folder / "run.json"))
            return found

        return self.runtime.from_main(read)

    def _begin(self, folder: Path) -> None:
        with writing(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)

    def _complete(self, folder: Path, step: int, logged: int) -> None:
        write_manifest(
            folder,
            stage=self.stage,
            key=self.key,
            material=self.material,
            summary={"step": step, "processes": self.runtime.world_size, "metrics": logged},
            seconds=0.0,
        )
        for _, old in complete_states(self.folder)[KEPT_STATES:]:
            shutil.rmtree(old, ignore_errors=True)

    def _newest_whole(self, console: Console) -> int | None:
        for step, folder in complete_states(self.folder):
            try:
                manifest = verify(folder)
            except CheckpointError as error:
                console.print(f"[yellow]{error}: going on from an older state[/]")
                continue
            if self.metrics_jsonl.exists():
                with writing(self.metrics_jsonl):
                    os.truncate(self.metrics_jsonl, manifest.summary["metrics"])
            return step
        return None

    def _logged(self) -> int:
        """Bytes of metrics.jsonl."""
        return self.metrics_jsonl.stat().st_size if self.metrics_jsonl.exists() else 0


class _Writing(threading.Thread):
    """One process's part in writing a state, then the main one's that completes it."""

    def __init__(
        self,
        folder: Path,
        size: int,
        write: Callable[[], None],
        complete: Callable[[], None],
        processes: int,
    ) -> None:
        super().__init__(daemon=True)  # who ends at once leaves an incomplete state behind
        self.folder, self.size, self.processes = folder, size, processes
        self.write, self.complete = write, complete
        self.error: Exception | None = None

    def run(self) -> None:
        """In the background, where no collective may be made: files say who is done."""
        self.by_hand(self._wait_for_files)

    def by_hand(self, wait: Callable[[], None]) -> None:
        """Write, wait for the other processes, complete; an error is kept for `settle`."""
        try:
            with writing(self.folder):
                self.write()
            wait()
            self.complete()
        except Exception as error:  # a thread's own would be lost
            self.error = error
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            del self.write, self.complete  # and the copies of tensors that they hold

    def settle(self) -> None:
        """Wait for the end, and raise what went wrong."""
        if self.ident is not None:
            self.join()
        if self.error is not None:
            if not isinstance(self.error, PipelineError):
                raise self.error
            needed = self.size / 2**20
            raise PipelineError(
                f"{self.error} This checkpoint needs {needed:,.1f} MiB."
            ) from self.error

    def _wait_for_files(self) -> None:
        # Each process's JSON is its last file. One that cannot write takes the folder away.
        while len(list(self.folder.glob("rank-*.json"))) < self.processes:
            if not self.folder.exists():
                raise PipelineError(f"another process could not write its part of {self.folder}.")
            time.sleep(0.05)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, which training does not touch."""
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}


def complete_states(checkpoints: Path) -> list[tuple[int, Path]]:
    """Step and folder of each state with a manifest, newest first."""
    found = [
        (int(path.name.removeprefix(PREFIX)), path)
        for path in checkpoints.glob(f"{PREFIX}[0-9]*")
        if path.name.removeprefix(PREFIX).isdigit() and _has_manifest(path)
    ]
    return sorted(found, reverse=True)


def remove_states(checkpoints: Path) -> None:
    """Remove the states of a training that has finished, incomplete ones too."""
    for path in checkpoints.glob(f"{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def newest_manifest(checkpoints: Path) -> Manifest | None:
    """The manifest of the newest complete state, or None."""
    states = complete_states(checkpoints)
    return read_manifest(states[0][1]) if states else None


def _has_manifest(folder: Path) -> bool:
    try:
        return read_manifest(folder) is not None
    except CheckpointError:
        return False


# --- random numbers ---


def random_state() -> State:
    """The states of Python's, numpy's and torch's global generators."""
    tensors = {"torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        tensors[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return State(tensors, {"python": random.getstate(), "numpy": numpy})


def restore_random(state: State) -> None:
    """Set the global generators to what `random_state` found."""
    torch.set_rng_state(state.tensors["torch"])
    for name, value in state.tensors.items():
        if name.startswith("cuda:"):
            torch.cuda.set_rng_state(value, torch.device(name))
    numpy = state.numbers["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})
    version, internal, gauss = state.numbers["python"]
    random.setstate((version, tuple(internal), gauss))
