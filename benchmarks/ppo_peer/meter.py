"""Seconds and peak memory by phase, the same way on both sides. Needs torch on CUDA only."""

import threading
import time
from collections import defaultdict
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

PHASES = ("rollout", "scoring", "update")
INTERVAL_SECONDS = 0.02
MB = 2**20


class Meter:
    """A clock that is told which phase begins, and a thread that watches resident memory.

    Memory on CPU is resident size above `baseline`, what the imports alone take; the thread reads
    it every 20 ms. On CUDA it is what torch has allocated, which needs no baseline. Iterations that
    end with `end_iteration(timed=False)` count for memory and not for seconds.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.baseline = resident_bytes() if device == "cpu" else 0
        self.iterations: list[dict[str, float]] = []
        self.peaks: dict[str, int] = defaultdict(int)
        self._phase: str | None = None
        self._since = 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Meter":
        if self.device == "cpu":
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self.device == "cpu":
            self._thread.join()

    def switch(self, phase: str | None) -> None:
        """End the phase that runs, and begin another (None: nothing that is measured)."""
        self._sample()
        now = self._now()
        if self._phase is not None:
            self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def end_iteration(self, *, timed: bool) -> None:
        """Close the phase; keep the iteration's seconds if it is `timed`."""
        self.switch(None)
        if timed:
            self.iterations.append({name: self._seconds[name] for name in PHASES})
        self._seconds.clear()

    def report(self) -> dict[str, Any]:
        """Seconds of each timed iteration, and peaks in MiB."""
        peaks = {name: (self.peaks[name] - self.baseline) / MB for name in PHASES}
        overall = max(self.peaks.values())
        if self.device == "cpu":
            overall = max(overall, highest_resident_bytes())
        return {
            "iterations": self.iterations,
            "peak_mb": peaks | {"overall": (overall - self.baseline) / MB},
            "imports_mb": self.baseline / MB,
        }

    def _now(self) -> float:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        phase = self._phase
        if self.device == "cpu":
            if phase is not None:
                self.peaks[phase] = max(self.peaks[phase], resident_bytes())
            return
        import torch

        if phase is not None:
            self.peaks[phase] = max(self.peaks[phase], torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()


def resident_bytes() -> int:
    """Resident size of this process now."""
    size: int = _this_process().memory_info().rss
    return size


@cache
def _this_process() -> Any:
    import psutil

    return psutil.Process()


def highest_resident_bytes() -> int:
    """Largest resident size that this process has had.

    Linux's VmHWM where there is one: ru_maxrss of a process also counts the parent it was forked
    from.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
