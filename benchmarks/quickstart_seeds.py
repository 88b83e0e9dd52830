"""The quickstart for several seeds: is the alignment real, seed after seed?

Runs `rlhf run configs/quickstart.yaml` in a process of its own for each seed, one after another,
reads each run's evaluation/metrics.json and prints the table of the README, failures included.
Finished runs are reused, so a table can be printed again at no cost.

    python benchmarks/quickstart_seeds.py [--seeds 1 2 3 4 5] [--json FILE] [--figure FILE.svg]
                                          [--write README.md] [section.field=value ...]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
MARKS = ("<!-- quickstart-table -->", "<!-- /quickstart-table -->")

# What the built-in task must show for every seed, and in what time and memory on two cores.
TARGETS = {
    "RM accuracy / ceiling": (">=", 0.90),
    "PPO preferred (gold)": (">=", 0.75),
    "95% lower bound": (">", 0.65),
    "EOS rate": (">=", 0.98),
    "distinct-2 / SFT's": (">=", 0.80),
    "seconds": ("<=", 300.0),
    "peak MB": ("<=", 2048.0),
}


def run_seed(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One run of the quickstart; returns its metrics with the wall time of the whole process."""
    name = f"quickstart-seed-{seed}"
    started = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "stages", "run", str(CONFIG)),
            *(f"run.seed={seed}", f"run.name={name}", f"run.folder={folder}", *overrides),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    wall = time.perf_counter() - started
    run = folder / name
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    # Stages that were reused took their time in an earlier process.
    worked = sum(metrics["seconds"].values())
    return {"seed": seed, "wall": max(wall, worked), "run": str(run), **metrics}


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """The figures that TARGETS judges."""
    policies, reward = result["policies"], result["reward_model"]
    preferred = result["win_rate"]["ppo_vs_sft"]
    return {
        "RM accuracy / ceiling": reward["accuracy"] / reward["ceiling"],
        "PPO preferred (gold)": preferred["rate"],
        "95% lower bound": preferred["low"],
        "EOS rate": policies["ppo"]["eos_rate"],
        "distinct-2 / SFT's": policies["ppo"]["distinct_2"] / policies["sft"]["distinct_2"],
        "seconds": result["wall"],
        "peak MB": result["peak_rss_mb"],
    }


def meets(name: str, value: float) -> bool:
    """Whether a figure reaches its target."""
    sign, target = TARGETS[name]
    return {">=": value >= target, ">": value > target, "<=": value <= target}[sign]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row a seed, the medians, the targets."""
    header = [
        *("seed", "RM accuracy", "ceiling", "gold: SFT", "PPO", "best of n", "PPO preferred"),
        *("KL", "EOS", "distinct-2 / SFT's", "seconds", "peak MB", "targets"),
    ]
    rows = [_row(result) for result in results]
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + " ---: |" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    met = sum(all(meets(n, v) for n, v in numbers(r).items()) for r in results)
    targets = ", ".join(f"{name} {sign} {value:g}" for name, (sign, value) in TARGETS.items())
    n = results[0]["win_rate"]["ppo_vs_sft"]["n"]
    lines += [
        "",
        f"{met} of {len(results)} seeds meet all targets ({targets}). *PPO preferred*: share of "
        f"{n} held-out prompts on which the gold judge prefers PPO's response to SFT's, ties half, "
        "with the 95% interval. *gold*: mean gold score, -4 to 4; best of n is SFT's best of n by "
        "the reward model, n nearest PPO's KL. *ceiling*: accuracy of the gold order on the same "
        "noisy held-out pairs.",
    ]
    return "\n".join(lines)


def _row(result: dict[str, Any]) -> list[str]:
    policies, reward = result["policies"], result["reward_model"]
    preferred, figures = result["win_rate"]["ppo_vs_sft"], numbers(result)
    missed = [name for name, value in figures.items() if not meets(name, value)]
    best = policies.get("best_of_n")
    gold = f"{best['gold']:+.2f} (n={result['about']['best_of_n']})" if best else "-"
    return [
        str(result["seed"]),
        f"{reward['accuracy']:.1%} ({figures['RM accuracy / ceiling']:.0%} of ceiling)",
        f"{reward['ceiling']:.1%}",
        f"{policies['sft']['gold']:+.2f}",
        f"{policies['ppo']['gold']:+.2f}",
        gold,
        f"**{preferred['rate']:.1%}** [{preferred['low']:.1%}, {preferred['high']:.1%}]",
        f"{policies['ppo']['kl']:.1f}",
        f"{figures['EOS rate']:.1%}",
        "{:.0%}".format(figures["distinct-2 / SFT's"]),
        f"{figures['seconds']:.0f}",
        f"{figures['peak MB']:.0f}",
        "met" if not missed else "missed: " + ", ".join(missed),
    ]


def draw(results: list[dict[str, Any]], image: Path) -> None:
    """Held-out score and KL over PPO's iterations, and who the gold judge prefers, by seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    score, kl, wins = figure.subplots(1, 3)
    for result in results:
        path = Path(result["run"]) / "ppo" / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        held_out = [row for row in rows if "held_out_score" in row]
        steps = [row["step"] for row in held_out]
        label = f"seed {result['seed']}"
        score.plot(steps, [row["held_out_score"] for row in held_out], label=label)
        kl.plot(steps, [row["held_out_kl"] for row in held_out], label=label)
    score.set(title="reward model's score, held out", xlabel="PPO iteration")
    kl.set(title="KL to SFT, nats a response", xlabel="PPO iteration")
    score.legend(fontsize=7)
    for offset, (name, colour) in enumerate((("ppo", "tab:blue"), ("best_of_n", "tab:gray"))):
        found = [(r["seed"], r["win_rate"].get(f"{name}_vs_sft")) for r in results]
        kept = [(seed, rate) for seed, rate in found if rate]
        rates = [rate["rate"] for _, rate in kept]
        wins.bar(
            [seed + 0.4 * offset - 0.2 for seed, _ in kept],
            rates,
            width=0.38,
            color=colour,
            label={"ppo": "PPO", "best_of_n": "best of n"}[name],
            yerr=[
                [rate["rate"] - rate["low"] for _, rate in kept],
                [rate["high"] - rate["rate"] for _, rate in kept],
            ],
        )
    wins.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    wins.set(title="preferred to SFT by the gold judge", xlabel="seed", ylim=(0, 1))
    wins.legend(fontsize=7, loc="lower right")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


def main() -> None:
    """Run, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--figure", type=Path, help="draw the runs here (SVG or PNG)")
    parser.add_argument("--write", type=Path, help="put the table between the marks of this file")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    args = parser.parse_intermixed_args()
    results = [run_seed(seed, args.folder, args.overrides) for seed in args.seeds]
    text = table(results)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if args.figure:
        draw(results, args.figure)
    if args.write:
        before, rest = args.write.read_text(encoding="utf-8").split(MARKS[0])
        _, after = rest.split(MARKS[1])
        page = f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"
        args.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
