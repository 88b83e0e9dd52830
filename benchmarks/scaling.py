"""How seconds and memory of a PPO iteration grow with lengths, batch and model size.

From a base point (a Llama of 4 layers, width 256, vocabulary 4,096; 8 prompts x (64+64) tokens, 8
generated at a time, one epoch, float32, random weights, a separate value model) one quantity at a
time is doubled four times, with full fine-tuning and with LoRA. The table gives the slopes of
log(seconds) and log(bytes) over the upper three points of each axis, by phase, beside those of what
the mathematics needs over the same points:

- time: FLOPs of the products with weights and of attention (`expected_flops`); for rollouts the
  bytes that decoding reads (`decoding_bytes`), where these grow faster;
- memory: weights, gradients, AdamW's state, and what a phase holds besides (`working_bytes`);
  *working* is this last part alone, measured as the peak less what rests between iterations.

A measured slope more than 0.15 above the expected one is marked with `!`. Fixed costs only lower a
slope: they weigh most at the small end.

Each point runs in processes of its own, on one thread unless OMP_NUM_THREADS says otherwise.
Seconds are the least of the timed iterations; the slopes are judged in processor time, which holds
on a busy machine too. Memory is resident size above the imports in a process of its own, in which
freed memory goes back to the system at once: what the program holds. *Resident* is the peak of the
timed iterations, with what the allocator (glibc) keeps between tensors of unlike size.

    python benchmarks/scaling.py [--axes prompt_tokens ...] [--tunings full lora] [--quick]
                                 [--json FILE]

In place of that, what many processes say to one another and hold (`ppo_scaling/processes.py`):

    python benchmarks/scaling.py --processes 1 2 4 [--strategies ddp fsdp2] [--tunings full lora]
                                 [--values own shared] [--quick] [--json FILE]

And what many GPUs would take, by arithmetic (`ppo_scaling/plan.py`):

    python benchmarks/scaling.py --plan
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ppo_peer.environments import describe
from benchmarks.ppo_peer.meter import PHASES
from benchmarks.ppo_scaling import plan_tables
from benchmarks.ppo_scaling.measure import measure, measure_held
from benchmarks.ppo_scaling.points import AXES, FITTED, Point, points
from benchmarks.ppo_scaling.processes import (
    STRATEGIES,
    VALUES,
    cases,
    communication_table,
    measure_all,
    memory_table,
)

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
# What slopes are fitted to, and which of them must not exceed which.
SLOPES = (
    *("flops", "cpu_seconds", "seconds", "resident_mb"),
    *("expected_held_mb", "held_mb", "expected_working_mb", "working_mb"),
)
JUDGED = {
    "cpu_seconds": "needed",
    "held_mb": "expected_held_mb",
    "working_mb": "expected_working_mb",
}


def fit(name: str, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slopes of one axis, one row a phase."""
    import numpy as np

    upper = found[-FITTED:]
    x = np.log([row["point"][name] for row in upper])

    def slope(values: list[float]) -> float:
        return float(np.polyfit(x, np.log(values), 1)[0])

    rows = []
    for phase in PHASES:
        slopes = {key: slope([max(row[key][phase], 1e-3) for row in upper]) for key in SLOPES}
        slopes["needed"] = slopes["flops"]
        if phase == "rollout":
            decoding = slope([row["decoding_bytes"] for row in upper])
            slopes["needed"] = max(slopes["flops"], decoding)
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
    header += ["MB", "expected", "measured", "working MB", "expected", "measured", "resident MB"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "---:|" * (len(header) - 3)]
    for row in rows:
        slopes, largest = row["slopes"], row["largest"]

        def slope(key: str, row: dict[str, Any] = row) -> str:
            return f"{row['slopes'][key]:.2f}" + (" !" if key in row["above"] else "")

        low, *_, high = row["range"]
        cells = [f"{row['axis']} {low} to {high}", row["tuning"], row["phase"]]
        cells += [f"{largest['cpu_seconds']:.2f}", f"{slopes['needed']:.2f}"]
        cells += [slope("cpu_seconds"), slope("seconds")]
        for key in ("held_mb", "working_mb"):
            cells += [f"{largest[key]:.0f}", slope(f"expected_{key}"), slope(key)]
        cells.append(f"{largest['resident_mb']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--tunings", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--iterations", type=int, default=3, help="timed ones of a point, at most")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of a point, after which no iteration begins"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: only whether it works")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument(
        "--processes", nargs="+", type=int, metavar="N", help="measure many processes instead"
    )
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=["ddp"], help="of many processes"
    )
    parser.add_argument(
        "--values", nargs="+", choices=VALUES, default=list(VALUES), help="of many processes"
    )
    parser.add_argument("--plan", action="store_true", help="print the plan on paper instead")
    options = parser.parse_args()
    if options.plan:
        print(plan_tables.text())
        return
    # One thread: what the slopes are about does not depend on it, and processor time stays work.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    about = {name: value for name, value in describe("cpu").items() if name != "trl"}
    numbers = _many_processes(options) if options.processes else _axes(options)
    print(f"\nMeasured with {json.dumps(about)}")
    if options.json:
        text = json.dumps({"environment": about, **numbers}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


def _many_processes(options: argparse.Namespace) -> dict[str, Any]:
    """Measure processes, print two tables."""
    chosen = cases(options.strategies, options.tunings, options.values, options.processes)
    found = measure_all(chosen, quick=options.quick)
    print(communication_table(found))
    print()
    print(memory_table(found))
    return {"cases": found}


def _axes(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the axes, print the table."""
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
                    known[point] = {
                        **processes.submit(measure, point, *limits).result(),
                        **processes.submit(measure_held, point).result(),
                    }
                rows += fit(name, [known[point] for point in asked])
    print(table(rows))
    return {"slopes": rows, "points": list(known.values())}


if __name__ == "__main__":
    main()
