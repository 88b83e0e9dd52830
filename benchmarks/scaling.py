"""How seconds and memory of a PPO iteration grow with lengths, batch and model size.

From a base point (a Llama of 4 layers, width 256, vocabulary 4,096; 8 prompts x (64+64) tokens, one
epoch, float32, random weights, a separate value model) one quantity at a time is doubled four
times, with full fine-tuning and with LoRA. The table gives the slopes of log(seconds) and
log(bytes) over the upper three points of each axis, by phase, beside those of what the mathematics
needs over the same points:

- time: FLOPs of the matrix products with weights and of attention (`expected_flops`);
- memory: weights, gradients, AdamW's state, and what a phase holds besides (`working_bytes`):
  *working* is this last part alone, measured as the peak less what rests between iterations.

A measured slope more than 0.15 above the expected one is marked with `!`. Fixed costs only lower a
slope: they weigh most at the small end.

Each point runs in a process of its own, on one thread unless OMP_NUM_THREADS says otherwise.
Memory is resident size above the imports; what was freed is given back between phases, so that a
phase's peak is its own. Seconds are the least of the timed iterations, after one that warms up; the
slopes are those of processor time, which holds on a busy machine too; wall time stands beside it.

    python benchmarks/scaling.py [--axes prompt_tokens ...] [--tunings full lora] [--quick]
                                 [--json FILE]
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ppo_peer.environments import describe
from benchmarks.ppo_peer.flops import Cost, cost
from benchmarks.ppo_peer.meter import MB, PHASES, Meter, resident_bytes
from benchmarks.ppo_peer.workloads import Shape, Workload

HEAD_WIDTH = 32
FLOAT = 4  # bytes
FITTED = 3  # points of an axis, from its upper end
TOLERANCE = 0.15
# Imported once, in the process that the points are forked from.
PRELOAD = (
    "accelerate",
    "peft",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "stages.ppo.models",
    "stages.ppo.update",
    "pipeline.generation.slots",
)


@dataclass(frozen=True)
class Point:
    """One measurement; every row has the same lengths, and no response ends early."""

    tuning: str
    prompt_tokens: int = 64
    response_tokens: int = 64
    prompts: int = 8
    responses_per_prompt: int = 1
    width: int = 256
    layers: int = 4
    vocabulary: int = 4096
    generation_rows: int = 8  # responses generated at a time: the batch grows past it
    micro_batch_tokens: int | None = None  # of passes with and without gradient; None: the default

    @property
    def rows(self) -> int:
        """Responses of the iteration."""
        return self.prompts * self.responses_per_prompt

    @property
    def tokens(self) -> int:
        """Of one row."""
        return self.prompt_tokens + self.response_tokens

    @property
    def shape(self) -> Shape:
        """The model."""
        fields = {
            "hidden_size": self.width,
            "intermediate_size": self.inner_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(self.width // HEAD_WIDTH, 1),
            "tie_word_embeddings": True,
        }
        return Shape("llama", self.vocabulary, fields)

    @property
    def inner_width(self) -> int:
        """Of the MLP."""
        return 11 * self.width // 4

    def workload(self) -> Workload:
        """What `ppo_peer.our_side` runs."""
        settings = {
            "rollout.generation_rows": self.generation_rows,
            "rollout.responses_per_prompt": self.responses_per_prompt,
            "rollout.micro_batch_tokens": self.micro_batch_tokens,
            "optim.micro_batch_tokens": self.micro_batch_tokens,
        }
        return Workload(
            name="scaling",
            title="",
            shape=self.shape,
            tuning=self.tuning,  # type: ignore[arg-type]
            prompts=self.prompts,
            prompt_tokens=(self.prompt_tokens, self.prompt_tokens),
            response_tokens=self.response_tokens,
            end_probability=None,
            against_trl=False,
            ours=settings,
            ppo_epochs=1,
        )


@dataclass(frozen=True)
class Axis:
    """What is doubled, and what differs from the base point meanwhile."""

    values: tuple[int, ...]
    fixed: dict[str, int] = field(default_factory=dict)


AXES = {
    "prompt_tokens": Axis((32, 64, 128, 256, 512)),
    "response_tokens": Axis((16, 32, 64, 128, 256)),
    "prompts": Axis((2, 4, 8, 16, 32)),
    "responses_per_prompt": Axis((1, 2, 4, 8, 16), {"prompts": 2}),
    "width": Axis((32, 64, 128, 256, 512)),
    "layers": Axis((1, 2, 4, 8, 16)),
    # Micro-batches with so many response tokens that the largest vocabularies need several chunks.
    "vocabulary": Axis(
        (4096, 8192, 16384, 32768, 65536), {"prompts": 16, "micro_batch_tokens": 2048}
    ),
}
QUICK = {"prompts": 4, "prompt_tokens": 16, "response_tokens": 16, "width": 64, "layers": 2}


def points(name: str, tuning: str, quick: bool) -> list[Point]:
    """The points of an axis; `quick` ones show only that it works."""
    axis = AXES[name]
    base = replace(Point(tuning), **(QUICK if quick else {}) | axis.fixed)
    values = axis.values[:FITTED] if quick else axis.values
    return [replace(base, **{name: value}) for value in values]


# --- what the mathematics needs ---


def expected_flops(point: Point, model: Cost, adapter: float) -> dict[str, float]:
    """FLOPs by phase: weights and attention, no padding, no logits but a response's.

    `model` is the base, `adapter` the weights of one LoRA adapter (0: full fine-tuning). A prompt's
    keys and values serve all its responses. Training is worth three forward passes, or two through
    frozen weights. Sampling, norms, activations and the optimiser are not counted.
    """
    p, r = point.prompt_tokens, point.response_tokens
    body = model.trunk + 2 * adapter
    prefill = body * p + model.pair * p * (p + 1) / 2
    decode = (body + model.head) * r + model.pair * (r * p + r * (r + 1) / 2)
    attention = model.attention(p, r)
    # Reference, reward and value; then policy and value, trained.
    scoring = 3 * (body * (p + r) + attention) + model.head * r
    trained = 2.0 if adapter else 3.0
    update = 2 * ((trained * model.trunk + 6 * adapter) * (p + r) + 3 * attention)
    update += trained * model.head * r
    return {
        "rollout": point.prompts * prefill + point.rows * decode,
        "scoring": point.rows * scoring,
        "update": point.rows * update,
    }


def working_bytes(point: Point, budget: int, trained: int, chunk: int) -> dict[str, float]:
    """Bytes by phase besides weights and AdamW's state.

    `budget`: tokens of a micro-batch; `trained`: bytes of gradients; `chunk`: logits made at a
    time. A Llama layer keeps 10 x width + 4 x inner width numbers a token for the backward pass
    (inputs and outputs of two norms, q, k, v and what attention gives; gate, its activation, up,
    their product); policy and value are trained in one pass.
    """
    d, inner = point.width, point.inner_width
    rows = min(max(budget // point.tokens, 1), point.rows)
    generated = min(point.generation_rows, point.rows)
    cache = 2 * point.layers * d * generated * point.tokens
    sampling = 4 * generated * point.vocabulary  # logits, noise, probabilities and their products
    layer = rows * point.tokens * (6 * d + 3 * inner)
    logits = min(rows * point.response_tokens * point.vocabulary, chunk)
    kept = 2 * point.layers * rows * point.tokens * (10 * d + 4 * inner)
    return {
        "rollout": FLOAT * (cache + max(sampling, layer * point.prompt_tokens / point.tokens)),
        "scoring": FLOAT * (layer + logits),
        "update": trained + FLOAT * (kept + 2 * logits),  # logits and their gradient
    }


# --- one point, in a process of its own ---


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
        with PhaseMeter() as meter:
            _program(tiny, Path(folder) / "tiny").iterate(1, 1, meter)
        weights.make(point.workload(), Path(folder) / "point")
        _give_back()
        with PhaseMeter() as meter:
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
    static = footprint.expected(program.models.roles(program.rewards), trained).values()
    rest = sum(cost.weights + cost.optimiser for cost in static)
    budget = policy.trunk.token_budget(point.micro_batch_tokens)
    gradients = sum(cost.gradients for cost in static)
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


# --- slopes and the table ---

SLOPES = {
    "flops": "expected time",
    "cpu_seconds": "processor time",
    "seconds": "wall time",
    "expected_peak_mb": "expected memory",
    "peak_mb": "memory",
    "expected_working_mb": "expected working",
    "working_mb": "working",
}
JUDGED = {
    "cpu_seconds": "flops",
    "peak_mb": "expected_peak_mb",
    "working_mb": "expected_working_mb",
}


def fit(name: str, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slopes of one axis, one row a phase."""
    import numpy as np

    upper = found[-FITTED:]
    x = np.log([row["point"][name] for row in upper])
    rows = []
    for phase in PHASES:
        slopes = {
            key: float(np.polyfit(x, np.log([max(row[key][phase], 1e-3) for row in upper]), 1)[0])
            for key in SLOPES
        }
        excess = {key: slopes[key] - slopes[expected] for key, expected in JUDGED.items()}
        rows.append(
            {
                "axis": name,
                "tuning": found[0]["point"]["tuning"],
                "phase": phase,
                "range": [row["point"][name] for row in found],
                "largest": {key: found[-1][key][phase] for key in SLOPES},
                "slopes": slopes,
                "above": sorted(key for key, value in excess.items() if value > TOLERANCE),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: slopes, and what the largest point took."""
    header = ["axis", "tuning", "phase", "seconds", "expected", "processor time", "wall time"]
    header += ["MB", "expected", "measured", "working MB", "expected", "measured"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "---:|" * (len(header) - 3)]
    for row in rows:
        slopes, largest = row["slopes"], row["largest"]

        def slope(key: str, row: dict[str, Any] = row) -> str:
            return f"{row['slopes'][key]:.2f}" + (" !" if key in row["above"] else "")

        low, *_, high = row["range"]
        cells = [f"{row['axis']} {low} to {high}", row["tuning"], row["phase"]]
        cells += [f"{largest['cpu_seconds']:.2f}", f"{slopes['flops']:.2f}"]
        cells += [slope("cpu_seconds"), slope("seconds")]
        for key in ("peak_mb", "working_mb"):
            cells += [f"{largest[key]:.0f}", slope(f"expected_{key}"), slope(key)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the axes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--tunings", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--iterations", type=int, default=3, help="timed ones of a point, at most")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of a point, after which no iteration begins"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: only whether it works")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    # One thread: what the slopes are about does not depend on it, and processor time stays work.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    about = {name: value for name, value in describe("cpu").items() if name != "trl"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    known: dict[Point, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        for name in options.axes:
            for tuning in options.tunings:
                asked = points(name, tuning, options.quick)
                for point in asked:
                    if point in known:
                        continue
                    print(f"{tuning}, {name} = {getattr(point, name)} ...", file=sys.stderr)
                    limits = (options.seconds, options.iterations)
                    known[point] = processes.submit(measure, point, *limits).result()
                rows += fit(name, [known[point] for point in asked])
    print(table(rows))
    print(f"\nMeasured with {json.dumps(about)}")
    if options.json:
        numbers = {"environment": about, "slopes": rows, "points": list(known.values())}
        options.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
