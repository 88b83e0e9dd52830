"""PPO side by side with TRL 1.12.0, the last release of TRL that had it.

Both programs get the same weights, prompts and hyperparameters. Each run is a process of its own;
the sides alternate, and the first iteration of each run, which warms up, is left out. The tables
show medians over all timed iterations (memory: over runs) with their range; ranges of ratios are
over rounds. Memory is the peak resident size above what the imports alone take; on CUDA, what torch
allocated.

W1 to W3 measure speed and memory on random weights of 17M parameters (`ppo_peer/workloads.py`), W4
the wall time in which each learns the quickstart's task (`ppo_peer/quickstart.py`). With
`--device cuda` the workloads are G1 to G3, random weights in bfloat16.

TRL runs in a virtual environment of its own, `.venv-trl`, which is made on first use.

    python benchmarks/ppo_vs_trl.py [--workloads W1 W2 W3 W4] [--rounds N] [--iterations N]
                                    [--seeds 1 2 3 4 5] [--quick] [--json FILE]
    python benchmarks/ppo_vs_trl.py --device cuda [--peak-tflops 989]
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ppo_peer import quickstart, report
from benchmarks.ppo_peer.environments import ROOT, describe, peer_python, run_module
from benchmarks.ppo_peer.workloads import CPU, CUDA, Workload, quick

OURS = Path(sys.executable)


def measure(workload: Workload, options: argparse.Namespace, peer: Path | None) -> dict[str, Any]:
    """Alternate the sides over the rounds; the comparison."""
    runs: dict[str, list[dict[str, Any]]] = {}
    sides = (["trl"] if workload.against_trl and peer else []) + list(workload.values)
    with tempfile.TemporaryDirectory() as folder:
        run_module("benchmarks.ppo_peer.weights", OURS, given(workload, Path(folder)))
        for number in range(options.rounds):
            for side in sides:
                print(f"{workload.name}, round {number + 1}: {side} ...", file=sys.stderr)
                spec = given(workload, Path(folder)) | {
                    "device": options.device,
                    "warmup": 1,
                    "iterations": options.iterations,
                    "seed": 1000 + number,
                }
                if side == "trl":
                    assert peer is not None
                    run = run_trl(workload, spec, peer)
                else:
                    run = run_module("benchmarks.ppo_peer.our_side", OURS, spec | {"value": side})
                runs.setdefault(side, []).append(run)
    return report.compare(workload, runs)


def given(workload: Workload, folder: Path) -> dict[str, Any]:
    """What every process is told."""
    return {"workload": workload.to_dict(), "folder": str(folder)}


def run_trl(workload: Workload, spec: dict[str, Any], peer: Path) -> dict[str, Any]:
    """One run of TRL's; with half the episodes an iteration as long as GPU memory is short.

    TRL keeps the logits of a whole rollout, in float32 and more than once.
    """
    module, episodes = "benchmarks.ppo_peer.trl_side", workload.prompts
    while True:
        smaller = replace(workload, prompts=episodes)
        spec = spec | {"workload": smaller.to_dict()}
        run = run_module(module, peer, spec, allow_failure=episodes > 1)
        if not run.get("out_of_memory"):
            return run | {"episodes": episodes}
        episodes //= 2
        print(f"  out of memory; {episodes} episodes an iteration ...", file=sys.stderr)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workloads", nargs="+", choices=[*CPU, "W4", *CUDA], help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of W4")
    parser.add_argument("--quick", action="store_true", help="tiny models: only whether it works")
    parser.add_argument("--peer-venv", type=Path, default=ROOT / ".venv-trl", help="TRL's")
    parser.add_argument("--without-trl", action="store_true", help="measure our side only")
    parser.add_argument(
        "--ours",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="settings of our side below `ppo`, in JSON: optim.micro_batch_tokens=4096",
    )
    parser.add_argument("--trl-rows", type=int, help="rows that TRL trains at a time (8)")
    parser.add_argument(
        "--trl-value",
        choices=("lora", "full"),
        default="lora",
        help="what TRL trains of its value model in W4",
    )
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="bf16, of one H200")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where W4 keeps its runs")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    options.workloads = options.workloads or (
        list(CUDA) if options.device == "cuda" else [*CPU, "W4"]
    )
    return options


def chosen(options: argparse.Namespace) -> list[Workload]:
    """The workloads that were asked for, as they were asked for."""
    found = []
    pairs = [item.split("=", 1) for item in options.ours]
    for name in options.workloads:
        if name == "W4":
            continue
        workload = (CPU | CUDA)[name]
        workload = quick(workload) if options.quick else workload
        settings = {path: json.loads(value) for path, value in pairs}
        workload = replace(workload, ours=workload.ours | settings)
        if options.trl_rows:
            workload = replace(workload, trl_rows=options.trl_rows)
        found.append(workload)
    return found


def main() -> None:
    """Compare, print the tables, exit 1 if a target is missed."""
    options = arguments()
    about = describe(options.device)
    peer = None if options.without_trl else peer_python(options.peer_venv.absolute())
    rows = [measure(workload, options, peer) for workload in chosen(options)]
    numbers: dict[str, Any] = {"environment": about, "comparisons": rows}
    met = report.reached(rows)
    if rows:
        print(report.table(rows), report.memory_table(rows), sep="\n\n", end="\n\n")
        if options.device == "cuda":
            print(report.cuda_table(rows, options.peak_tflops), end="\n\n")
    if "W4" in options.workloads and peer is not None:
        results = quickstart.compare(
            options.seeds,
            options.runs,
            peer,
            quick=options.quick,
            overrides=[f"ppo.{item}" for item in options.ours],
            trl_value=options.trl_value,
        )
        numbers["quickstart"] = results
        print(quickstart.table(results), end="\n\n")
        met = met and (options.quick or any(side["reached"] for side in results.values()))
    print(f"Measured with {json.dumps(about)}")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
