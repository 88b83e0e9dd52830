"""What many processes say to one another in a PPO iteration, and what each of them holds.

The whole PPO stage runs, on processors with gloo, as `accelerate launch` starts it: a Llama with
random weights, the built-in task, 2 epochs of 2 minibatches.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ppo_peer.meter import PHASES
from benchmarks.ppo_scaling.points import HEAD_WIDTH, QUICK, Point, Tuning

ROOT = Path(__file__).parents[2]
# The accelerate configuration of each strategy; one process needs none.
STRATEGIES = {"ddp": "cpu2", "fsdp2": "fsdp2"}
VALUES = {"own": "separate", "shared": "shared"}
EPOCHS = MINIBATCHES = 2
RANK = 8
TIMEOUT = 1200  # seconds of one run


@dataclass(frozen=True)
class Case:
    """One PPO run."""

    strategy: str
    tuning: Tuning
    value: str
    processes: int


def cases(
    strategies: Sequence[str],
    tunings: Iterable[Tuning],
    values: Sequence[str],
    processes: Sequence[int],
) -> list[Case]:
    """All combinations; with one process there is nothing to choose a strategy for."""
    return [
        Case(strategy, tuning, value, count)
        for tuning in tunings
        for value in values
        for count in processes
        for strategy in (["none"] if count == 1 else strategies)
    ]


def point_of(tuning: Tuning, *, quick: bool) -> Point:
    """The model's size and an iteration's."""
    size: dict[str, Any] = {"width": 256, "layers": 8, "vocabulary": 1024, "prompts": 16}
    if quick:
        size = QUICK | {"vocabulary": 400}
    return Point(tuning, **size)


def configuration(point: Point) -> dict[str, Any]:
    """The run: a step of SFT and of reward training, and PPO."""
    data = ROOT / "data" / "quickstart"
    short = {"max_steps": 1, "batch_size": 4}
    return {
        "run": {"name": "parents", "device": "cpu", "trackers": []},
        "model": {
            "init": "config",
            "vocabulary_size": point.vocabulary,
            "architecture": {
                "hidden_size": point.width,
                "intermediate_size": point.inner_width,
                "num_hidden_layers": point.layers,
                "num_attention_heads": max(point.width // HEAD_WIDTH, 1),
                "max_position_embeddings": point.tokens + 128,  # those of evaluation
            },
        },
        "lora": {"rank": RANK, "alpha": 2 * RANK},
        "data": {
            "demonstrations": {"path": str(data / "demonstrations.jsonl"), "limit": 100},
            "rankings": {"path": str(data / "rankings.jsonl"), "limit": 40},
            "prompts": {"path": str(data / "prompts.jsonl"), "limit": 100},
            "held_out_fraction": 0.2,
            "max_prompt_tokens": point.prompt_tokens,
            "max_response_tokens": point.response_tokens,
        },
        "sft": short | {"tuning": "full"},
        "reward": short | {"tuning": point.tuning, "normalisation": {"num_samples": 4}},
        "ppo": {
            "tuning": point.tuning,
            "iterations": 3,
            "rollout": {
                "prompts_per_iteration": point.prompts,
                "max_new_tokens": point.response_tokens,
                "generation_rows": point.generation_rows,
            },
            "optim": {"ppo_epochs": EPOCHS, "minibatches": MINIBATCHES, "learning_rate": 1e-6},
            "held_out": {"every": 100, "num_prompts": 4, "num_texts": 1},
            "samples": {"enabled": False},
        },
    }


def parents(folder: Path, point: Point) -> None:
    """SFT and reward model of a tuning, which all its cases start from, in `folder`/runs/parents.

    Raises:
        SystemExit: a stage failed.
    """
    folder.mkdir(parents=True)
    (folder / "c.yaml").write_text(yaml.safe_dump(configuration(point)), encoding="utf-8")
    for verb in ("sft", "reward"):
        _run([sys.executable, "-m", "stages", verb, "c.yaml"], folder)


def measure_case(case: Case, folder: Path) -> list[dict[str, Any]]:
    """One PPO run from the `parents` in `folder`; the report of each process.

    Raises:
        SystemExit: the run failed.
    """
    name = f"{case.strategy}-{case.value}-{case.processes}"
    out = folder / name
    out.mkdir()
    module = ["-m", "benchmarks.ppo_scaling.counted_run", str(out)]
    settings = ["ppo", "c.yaml", "--from", "runs/parents", f"run.name={name}"]
    settings.append(f"ppo.value={VALUES[case.value]}")
    command = [sys.executable]
    if case.processes > 1:
        config = ROOT / "configs" / "accelerate" / f"{STRATEGIES[case.strategy]}.yaml"
        command += ["-m", "accelerate.commands.accelerate_cli", "launch"]
        command += [f"--config_file={config}", f"--num_processes={case.processes}"]
        command.append("--main_process_port=0")
    _run([*command, *module, *settings], folder)
    files = [out / f"rank{rank}.json" for rank in range(case.processes)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")


def measure_all(chosen: Sequence[Case], *, quick: bool) -> list[dict[str, Any]]:
    """Every case with its reports."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            place = Path(folder) / case.tuning
            if not place.exists():
                print(f"{case.tuning}: SFT and reward model ...", file=sys.stderr)
                parents(place, point_of(case.tuning, quick=quick))
            print(f"{case} ...", file=sys.stderr)
            rows.append({"case": vars(case), "ranks": measure_case(case, place)})
    return rows


# --- tables ---------------------------------------------------------------------------------------


def communication_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: payload of an iteration by phase and collective, in KB; and calls."""
    lines = ["| strategy | tuning | value | processes | phase | collective | calls | KB |"]
    lines.append("|---|---|---|---:|---|---|---:|---:|")
    for row in rows:
        case = row["case"]
        counts = row["ranks"][0]["collectives"]
        for phase in (*PHASES, "rest"):
            for name, entry in sorted(counts.get(phase, {}).items()):
                cells = [case["strategy"], case["tuning"], case["value"], str(case["processes"])]
                cells += [phase, name, str(entry["calls"]), f"{entry['bytes'] / 1000:,.1f}"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: MB that each process holds; of several, the least and the most."""
    parts = ("weights", "gradients", "optimiser")
    header = ["strategy", "tuning", "value", "processes", "trained", *parts]
    header += [f"peak in {phase}" for phase in PHASES]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "---:|" * (len(header) - 3)]
    for row in rows:
        case, ranks = row["case"], row["ranks"]
        cells = [case["strategy"], case["tuning"], case["value"], str(case["processes"])]
        cells.append(f"{ranks[0]['trained']:,}")
        cells += [_range([rank[f"{part}_mb"] for rank in ranks]) for part in parts]
        cells += [_range([rank["resident_mb"][phase] for rank in ranks]) for phase in PHASES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"
