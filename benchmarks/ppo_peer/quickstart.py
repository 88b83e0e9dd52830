"""W4: the wall time in which each program learns the quickstart's task.

For each seed the pipeline trains SFT and the reward model of `configs/quickstart.yaml` once; both
programs start PPO from these weights, with the same reward model, penalty, prompts and settings.
A learning curve has a point an iteration: the mean reward (score less the penalty of responses
without an end) of the responses sampled in it, at the seconds of work before it. The target is the
SFT policy's reward plus 80% of TRL's final gain; a curve reaches it where the line between two
points first does. Loading, held-out scoring and files count for neither side.

Ours runs twice, with a value adapter of its own and with the value head on the policy's trunk. In
the end our code scores all final policies on the same held-out prompts with the same noise: a speed
counts only if our policy is as good, within noise, at no larger KL.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ppo_peer.environments import ROOT, run_module
from benchmarks.ppo_peer.report import cell, spread

CONFIG = ROOT / "configs" / "quickstart.yaml"
OURS = Path(sys.executable)
SHARE_OF_GAIN = 0.8
TARGET = 3.0
VALUES = {"own value": "separate", "shared value": "shared"}  # our sides, and their ppo.value
LAST = 3  # iterations whose mean is a final reward
KL_TOLERANCE = 0.15
# Of the pipeline's PPO: nothing that the other side does not do either.
PLAIN = ["ppo.keep=last", "ppo.held_out.every=1000000", "ppo.samples.enabled=false"]
QUICK = [
    *("sft.epochs=1", "reward.epochs=0.3", "reward.normalisation.num_samples=16"),
    *("ppo.iterations=4", "ppo.rollout.prompts_per_iteration=16"),
]


def compare(
    seeds: Sequence[int],
    runs: Path,
    peer: Path,
    *,
    quick: bool = False,
    overrides: Sequence[str] = (),
    trl_value: str = "lora",
) -> dict[str, Any]:
    """What all seeds come to, for each of our sides. `overrides` are for our PPO alone."""
    results = []
    for seed in seeds:
        print(f"W4, seed {seed} ...", file=sys.stderr)
        results.append(run_seed(seed, runs, peer, QUICK if quick else [], overrides, trl_value))
    return {side: summarise([result[side] for result in results]) for side in VALUES}


def run_seed(
    seed: int,
    runs: Path,
    peer: Path,
    common: Sequence[str],
    overrides: Sequence[str],
    trl_value: str,
) -> dict[str, Any]:
    """All from the same SFT and reward model: curves and final policies of TRL and each side."""
    name = f"ppo-vs-trl-{'quick-' if common else ''}seed-{seed}"
    base = runs.absolute() / name
    settings = [f"run.seed={seed}", "run.trackers=[]", *common]
    for stage in ("sft", "reward"):
        pipeline(stage, [*settings, f"run.name={name}", f"run.folder={runs.absolute()}"])
    # Beside the run that it starts from, whose files it takes over as links.
    with tempfile.TemporaryDirectory(dir=runs.absolute(), prefix=f"{name}-") as folder:
        place = Path(folder)
        spec = {"run": str(base), "folder": folder, "value": trl_value, "seed": seed}
        exported = run_module("benchmarks.ppo_peer.quickstart_ours", OURS, spec)
        trl = run_module("benchmarks.ppo_peer.quickstart_trl", peer, spec | exported)
        policies, curves = {"trl": trl["policy"]}, {}
        for side, value in VALUES.items():
            ours = place / value
            where = [f"run.name={ours.name}", f"run.folder={ours.parent}", f"ppo.value={value}"]
            pipeline("ppo", [*settings, *PLAIN, *where, *overrides, "--from", str(base)])
            policies[side] = str(ours)
            curves[side] = our_curve(ours / "ppo" / "metrics.jsonl")
        judged = run_module(
            "benchmarks.ppo_peer.quickstart_ours", OURS, spec | {"policies": policies}
        )
    return {
        side: {
            "seed": seed,
            "probe_difference": trl["probe_difference"],
            "trl_settings": trl["settings"],
            "curves": {"ours": curve, "trl": trl["curve"]},
            "final": {"sft": judged["sft"], "trl": judged["trl"], "ours": judged[side]},
            **times(curve, trl["curve"]),
        }
        for side, curve in curves.items()
    }


def pipeline(stage: str, arguments: Sequence[str]) -> None:
    """One stage of the pipeline, in a process of its own."""
    command = [str(OURS), "-m", "stages", stage, str(CONFIG), *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(f"{stage} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def our_curve(metrics: Path) -> list[dict[str, float]]:
    """A point an iteration from the stage's metrics."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "seconds": row["seconds_collect"] + row["seconds_update"],
            "reward": row["reward"],
            "kl": row["kl"],
            "eos_rate": row["eos_rate"],
        }
        for row in rows
        if "seconds_update" in row
    ]


def times(ours: list[dict[str, float]], trl: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds of each side to SFT's reward + 80% of TRL's final gain, and their ratio.

    Both first iterations sample from the SFT policy: its reward is their mean.
    """
    start = statistics.fmean([ours[0]["reward"], trl[0]["reward"]])
    final = statistics.fmean(point["reward"] for point in trl[-LAST:])
    target = start + SHARE_OF_GAIN * (final - start)
    ours_to, trl_to = time_to(ours, target), time_to(trl, target)
    return {
        "sft_reward": start,
        "trl_final_reward": final,
        "target_reward": target,
        "seconds_to_target": {"ours": ours_to, "trl": trl_to},
        "ratio": trl_to / ours_to if trl_to and ours_to else None,
        "seconds": {
            name: sum(point["seconds"] for point in curve)
            for name, curve in (("ours", ours), ("trl", trl))
        },
    }


def time_to(curve: Sequence[dict[str, float]], target: float) -> float | None:
    """Seconds of work until the reward first reaches `target`, between points on a line."""
    before: tuple[float, float] | None = None
    elapsed = 0.0
    for point in curve:
        reward = point["reward"]  # of the policy as it was before this iteration's update
        if reward >= target:
            if before is None:
                return elapsed
            then, was = before
            return then + (elapsed - then) * (target - was) / (reward - was)
        before = (elapsed, reward)
        elapsed += point["seconds"]
    return None


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median ratio, and whether the final policies are as good at no larger KL."""
    ratios = [result["ratio"] for result in results if result["ratio"] is not None]
    missed = len(results) - len(ratios)
    gaps = [r["final"]["ours"]["reward"] - r["final"]["trl"]["reward"] for r in results]
    errors = [
        (r["final"]["ours"]["standard_error"] ** 2 + r["final"]["trl"]["standard_error"] ** 2)
        for r in results
    ]
    # Seeds differ by more than sampling: with several, their own spread is the error.
    error = sum(errors) ** 0.5 / len(errors)
    if len(gaps) > 1:
        error = max(error, statistics.stdev(gaps) / len(gaps) ** 0.5)
    kl = {
        side: statistics.fmean(r["final"][side]["kl"] for r in results) for side in ("ours", "trl")
    }
    gap = statistics.fmean(gaps)
    as_good = gap >= -2 * error and kl["ours"] <= (1 + KL_TOLERANCE) * kl["trl"]
    # A seed on which one side never reached the target counts as a loss.
    counted = sorted([*ratios, *([0.0] * missed)])
    return {
        "seeds": results,
        "ratio": spread(counted),
        "reward_gap": {"mean": gap, "standard_error": error},
        "kl": kl,
        "as_good": as_good,
        "reached": as_good and statistics.median(counted) >= TARGET,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """For each of our sides one line a seed, then the verdict."""
    return "\n\n".join(side_table(side, result) for side, result in results.items())


def side_table(side: str, result: dict[str, Any]) -> str:
    """One line a seed, then the verdict."""
    lines = [
        "| seed | reward: SFT | target | s to target: TRL | ours | times faster "
        "| s in all: TRL | ours | held-out reward: SFT | TRL | ours | KL: TRL | ours "
        "| EOS: TRL | ours |",
        "|" + " ---: |" * 15,
    ]
    for row in result["seeds"]:
        to, final = row["seconds_to_target"], row["final"]
        cells = [
            f"{row['sft_reward']:.2f}",
            f"{row['target_reward']:.2f}",
            *("never" if to[side] is None else f"{to[side]:.1f}" for side in ("trl", "ours")),
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
            *(f"{row['seconds'][side]:.1f}" for side in ("trl", "ours")),
            *(f"{final[side]['reward']:.2f}" for side in ("sft", "trl", "ours")),
            *(f"{final[side]['kl']:.1f}" for side in ("trl", "ours")),
            *(f"{final[side]['eos_rate']:.1%}" for side in ("trl", "ours")),
        ]
        lines.append(f"| {row['seed']} | " + " | ".join(cells) + " |")
    gap = result["reward_gap"]
    lines += [
        "",
        f"W4, ours with {side}: {cell(result['ratio'], 2)} times faster to SFT's reward + "
        f"{SHARE_OF_GAIN:.0%} of TRL's final gain (target {TARGET:g}). Held-out reward, ours less "
        f"TRL's: {gap['mean']:+.3f} (standard error {gap['standard_error']:.3f}), at a KL of "
        f"{result['kl']['ours']:.1f} against {result['kl']['trl']:.1f} nats: "
        f"{'as good' if result['as_good'] else 'NOT as good, so the speed does not count'}.",
    ]
    return "\n".join(lines)
