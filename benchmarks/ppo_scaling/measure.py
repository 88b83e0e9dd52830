"""One point, measured in this process: seconds and peak memory by phase, and the expectations."""

import ctypes
import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ppo_peer.flops import cost
from benchmarks.ppo_peer.meter import MB, PHASES, Meter, resident_bytes
from benchmarks.ppo_scaling.points import Point, expected_flops, working_bytes


class PhaseMeter(Meter):
    """Counts processor time too, and gives freed memory back before a phase begins."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.cpu_iterations: list[dict[str, float]] = []
        self._cpu: dict[str, float] = defaultdict(float)
        self._running: tuple[str, float] | None = None

    def switch(self, phase: str | None) -> None:
        """See `Meter`."""
        now = time.process_time()
        super().switch(None)
        if self._running is not None:
            name, since = self._running
            self._cpu[name] += now - since
        _give_back()
        super().switch(phase)
        self._running = None if phase is None else (phase, time.process_time())

    def end_iteration(self, *, timed: bool) -> None:
        """See `Meter`."""
        super().end_iteration(timed=timed)
        if timed:
            self.cpu_iterations.append(dict(self._cpu))
        self._cpu.clear()


def _give_back() -> None:
    """Return freed memory to the system (glibc; elsewhere peaks hold what earlier phases freed)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure(point: Point, seconds: float, iterations: int) -> dict[str, Any]:
    """Up to `iterations` timed iterations, fewer where `seconds` are over; and the expectations."""
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.ppo_peer import weights
    from pipeline.models import footprint
    from pipeline.models.trunk import LOGITS_AT_A_TIME

    disable_progress_bar()
    tiny = Point(point.tuning, 4, 4, 2, 1, 32, 1, 64)
    with tempfile.TemporaryDirectory() as folder:
        # Libraries fault in their code and set up what they keep before the memory is read.
        meter = PhaseMeter()
        with meter:
            _program(tiny, Path(folder) / "tiny").iterate(1, 1, meter)
        weights.make(point.workload(), Path(folder) / "point")
        _give_back()
        meter = PhaseMeter()
        with meter:
            program = _program(point, Path(folder) / "point")
            program.iterate(1, 1, meter)
            meter.end_iteration(timed=False)
            resting = resident_bytes() - meter.baseline
            meter.peaks.clear()
            began = time.perf_counter()
            while not meter.iterations or (
                len(meter.iterations) < iterations and time.perf_counter() - began < seconds
            ):
                program.iterate(1 + len(meter.iterations), 1, meter)
                meter.end_iteration(timed=True)
            peaks = {phase: meter.peaks[phase] - meter.baseline for phase in PHASES}
    policy = program.models.policy
    trained = [p for group in program.updater.groups.values() for p in group]
    roles = program.models.roles(program.rewards)
    static = list(footprint.expected(roles, trained).values())
    rest = sum(role.weights + role.optimiser for role in static)
    budget = policy.trunk.token_budget(point.micro_batch_tokens)
    gradients = sum(role.gradients for role in static)
    working = working_bytes(point, budget, gradients, LOGITS_AT_A_TIME)
    adapter = sum(p.numel() for p in policy.parameters()) if point.tuning == "lora" else 0
    return {
        "point": asdict(point),
        "seconds": _least(meter.iterations),
        "cpu_seconds": _least(meter.cpu_iterations),
        "flops": expected_flops(point, cost(point.shape), adapter),
        "peak_mb": {phase: peaks[phase] / MB for phase in PHASES},
        "expected_peak_mb": {phase: (rest + working[phase]) / MB for phase in PHASES},
        "working_mb": {phase: (peaks[phase] - resting) / MB for phase in PHASES},
        "expected_working_mb": {phase: working[phase] / MB for phase in PHASES},
        "resting_mb": resting / MB,
        "expected_resting_mb": rest / MB,
        "iterations": len(meter.iterations),
    }


def _program(point: Point, folder: Path) -> Any:
    """PPO on random weights, with `responses_per_prompt` rows a prompt."""
    from benchmarks.ppo_peer import weights
    from benchmarks.ppo_peer.our_side import Program

    workload = point.workload()
    if not folder.exists():
        weights.make(workload, folder)
    program = Program(workload, folder, "separate", "cpu")
    repeats = range(point.responses_per_prompt)
    program.prompts = [prompt for prompt in program.prompts for _ in repeats]
    program.prompt_ids = [ids for ids in program.prompt_ids for _ in repeats]
    return program


def _least(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {phase: min(row[phase] for row in rows) for phase in PHASES}
