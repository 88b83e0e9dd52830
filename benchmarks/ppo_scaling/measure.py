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
from benchmarks.ppo_scaling.points import Point, decoding_bytes, expected_flops, working_bytes

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


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
        give_back()
        super().switch(phase)
        self._running = None if phase is None else (phase, time.process_time())

    def end_iteration(self, *, timed: bool) -> None:
        """See `Meter`."""
        super().end_iteration(timed=timed)
        if timed:
            self.cpu_iterations.append(dict(self._cpu))
        self._cpu.clear()


def give_back() -> None:
    """Return freed memory to the system (glibc; elsewhere peaks hold what earlier phases freed)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure(point: Point, seconds: float, iterations: int) -> dict[str, Any]:
    """Up to `iterations` timed iterations, fewer where `seconds` are over.

    Returns seconds, resident memory, and what the mathematics needs, by phase.
    """
    with tempfile.TemporaryDirectory() as folder:
        program, meter = _warm(point, Path(folder))
        with meter:
            began = time.perf_counter()
            while not meter.iterations or (
                len(meter.iterations) < iterations and time.perf_counter() - began < seconds
            ):
                program.iterate(2, 1, meter)
                meter.end_iteration(timed=True)
    return {
        "point": asdict(point),
        "iterations": len(meter.iterations),
        "seconds": _least(meter.iterations),
        "cpu_seconds": _least(meter.cpu_iterations),
        "resident_mb": _peaks(meter),
        **_expectations(point, program),
    }


def measure_held(point: Point) -> dict[str, Any]:
    """Memory that an iteration holds, by phase: every tensor has pages of its own.

    glibc otherwise keeps holes between tensors of unlike size, as much again as the activations,
    which differ from run to run. Pages of their own cost time, so nothing is timed here. Must run
    in a fresh process: what malloc has kept it gives out first.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    with tempfile.TemporaryDirectory() as folder:
        program, meter = _warm(point, Path(folder))
        resting = (resident_bytes() - meter.baseline) / MB
        with meter:
            program.iterate(2, 1, meter)
            meter.end_iteration(timed=False)
    held = _peaks(meter)
    working = {phase: held[phase] - resting for phase in PHASES}
    return {"resting_mb": resting, "held_mb": held, "working_mb": working}


def _warm(point: Point, folder: Path) -> tuple[Any, PhaseMeter]:
    """The program after an iteration of one row, which makes AdamW's state; and a meter.

    A tiny program runs before the meter reads what the imports take: libraries fault in their code
    and set up what they keep.
    """
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.ppo_peer import weights

    disable_progress_bar()
    tiny = Point(point.tuning, 4, 4, 2, 1, 32, 1, 64)
    _program(tiny, folder / "tiny").iterate(1, 1, PhaseMeter())
    weights.make(point.workload(), folder / "point")
    give_back()
    meter = PhaseMeter()
    program = _program(point, folder / "point")
    prompts, prompt_ids = program.prompts, program.prompt_ids
    program.prompts, program.prompt_ids = prompts[:1], prompt_ids[:1]
    program.iterate(1, 1, meter)
    program.prompts, program.prompt_ids = prompts, prompt_ids
    meter.end_iteration(timed=False)
    meter.peaks.clear()
    return program, meter


def _expectations(point: Point, program: Any) -> dict[str, Any]:
    """FLOPs, bytes that decoding reads, and memory."""
    from pipeline.models import footprint
    from pipeline.models.trunk import LOGITS_AT_A_TIME

    policy = program.models.policy
    trained = [weight for group in program.updater.groups.values() for weight in group]
    roles = program.models.roles(program.rewards)
    static = list(footprint.expected(roles, trained).values())
    rest = sum(role.weights + role.optimiser for role in static)
    budget = policy.trunk.token_budget(point.micro_batch_tokens)
    gradients = sum(role.gradients for role in static)
    working = working_bytes(point, budget, gradients, LOGITS_AT_A_TIME)
    adapter = sum(p.numel() for p in policy.parameters()) if point.tuning == "lora" else 0
    model = cost(point.shape)
    return {
        "flops": expected_flops(point, model, adapter),
        "decoding_bytes": decoding_bytes(point, model, adapter),
        "expected_held_mb": {phase: (rest + working[phase]) / MB for phase in PHASES},
        "expected_working_mb": {phase: working[phase] / MB for phase in PHASES},
        "expected_resting_mb": rest / MB,
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


def _peaks(meter: Meter) -> dict[str, float]:
    """Peaks of each phase in MiB."""
    return {phase: (meter.peaks[phase] - meter.baseline) / MB for phase in PHASES}


def _least(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {phase: min(row[phase] for row in rows) for phase in PHASES}
