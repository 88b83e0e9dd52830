"""From the runs of both sides to a comparison: medians, ranges, ratios, targets, Markdown."""

import statistics
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

from benchmarks.ppo_peer.meter import PHASES
from benchmarks.ppo_peer.workloads import Target, Workload

Run = dict[str, Any]

# Both read the same weights in float32 (bfloat16 on CUDA); another model differs by more than 0.1.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
LENGTH_TOLERANCE = 0.10


def compare(workload: Workload, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The comparison of one workload; `runs` by side: `trl`, `separate`, `shared`.

    Raises:
        SystemExit: the sides did not have the same models, or their responses differ in length.
    """
    check_probes(workload, runs)
    check_lengths(runs)
    sides = {side: summary(workload, found) for side, found in runs.items()}
    row: dict[str, Any] = {"workload": workload.to_dict(), "sides": sides, "ratios": {}}
    if "trl" in runs:
        for side in runs.keys() - {"trl"}:
            ratios = _ratios(runs["trl"], runs[side], sides["trl"], sides[side])
            target = workload.targets.get(side)
            row["ratios"][side] = ratios | _judge(ratios, target)
    goal = workload.samples_per_second
    if goal is not None:
        median = sides["separate"]["episodes_per_second"]["median"]
        row["samples_per_second_target"] = goal
        row["reached"] = median >= goal
    return row


def summary(workload: Workload, runs: Sequence[Run]) -> dict[str, Any]:
    """Seconds by phase over all timed iterations, and memory over the runs of one side."""
    iterations = list(chain.from_iterable(run["iterations"] for run in runs))
    totals = [sum(seconds.values()) for seconds in iterations]
    episodes = runs[0].get("episodes", workload.prompts)
    return {
        "episodes": episodes,
        "seconds": {name: spread([s[name] for s in iterations]) for name in PHASES}
        | {"total": spread(totals)},
        "episodes_per_second": spread([episodes / total for total in totals]),
        "peak_mb": {
            name: spread([run["peak_mb"][name] for run in runs]) for name in (*PHASES, "overall")
        },
        "response_tokens": statistics.fmean(lengths_of(runs)),
        "runs": list(runs),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def lengths_of(runs: Sequence[Run]) -> list[int]:
    """Tokens of every response of these runs."""
    return [length for run in runs for lengths in run["lengths"] for length in lengths]


def _ratios(
    theirs: Sequence[Run], ours: Sequence[Run], trl: dict[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """How many times TRL's speed, and which share of its memory; ranges over rounds."""

    def middle(run: Run) -> float:
        return statistics.median(sum(seconds.values()) for seconds in run["iterations"])

    pairs = list(zip(theirs, ours, strict=True))
    per_episode = trl["episodes"] / own["episodes"]
    by_round = [middle(a) / middle(b) / per_episode for a, b in pairs]
    memory = [b["peak_mb"]["overall"] / a["peak_mb"]["overall"] for a, b in pairs]
    speed = own["episodes_per_second"]["median"] / trl["episodes_per_second"]["median"]
    share = own["peak_mb"]["overall"]["median"] / trl["peak_mb"]["overall"]["median"]
    return {
        "speed": spread(by_round) | {"median": speed},
        "memory": spread(memory) | {"median": share},
    }


def _judge(ratios: dict[str, Any], target: Target | None) -> dict[str, Any]:
    if target is None:
        return {}
    fast = ratios["speed"]["median"] >= target.speed
    small = target.memory is None or ratios["memory"]["median"] <= target.memory
    return {"target": {"speed": target.speed, "memory": target.memory}, "reached": fast and small}


def check_probes(workload: Workload, runs: dict[str, list[Run]]) -> None:
    """Refuse to compare programs that do not compute with the same models."""
    first, *others = [run["probe"] for found in runs.values() for run in found]
    for other in others:
        for name in ("scores", "logprobs"):
            apart = max(abs(a - b) for a, b in zip(first[name], other[name], strict=True))
            if not apart <= PROBE_TOLERANCE[workload.dtype]:
                sys.exit(f"{workload.name}: the sides' {name} differ by {apart:.3g} on the probes")


def check_lengths(runs: dict[str, list[Run]]) -> None:
    """Refuse to compare programs whose responses differ in length.

    Lengths are drawn: a difference counts if it is above 10% and above three standard errors.
    """
    first, *others = (lengths_of(found) for found in runs.values())
    for other in others:
        a, b = statistics.fmean(first), statistics.fmean(other)
        error = sum(statistics.pvariance(x) / len(x) for x in (first, other)) ** 0.5
        if abs(a - b) > max(LENGTH_TOLERANCE * a, 3 * error):
            sys.exit(f"mean response lengths differ: {a:.1f} and {b:.1f} tokens")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All comparisons in Markdown: one line a side."""
    header = [
        *("workload", "program", "rollout s", "scoring s", "update s", "iteration s"),
        *(
            "episodes/s",
            "times TRL",
            "target",
            "peak MB",
            "of TRL's",
            "target",
            "tokens a response",
        ),
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * 2 + " ---: |" * (len(header) - 2)]
    for row in rows:
        for side in ("trl", "separate", "shared"):
            if side in row["sides"]:
                lines.append("| " + " | ".join(_line(row, side)) + " |")
    return "\n".join(lines)


NAMES = {"trl": "TRL 1.12", "separate": "ours, own value", "shared": "ours, shared value"}


def _line(row: dict[str, Any], side: str) -> list[str]:
    found = row["sides"][side]
    ratios = row["ratios"].get(side)
    target = (ratios or {}).get("target")
    speed = memory = speed_target = memory_target = "-"
    if ratios:
        speed, memory = cell(ratios["speed"], 2), cell(ratios["memory"], 2)
    if target:
        speed_target = f">= {target['speed']:g}"
        memory_target = f"<= {target['memory']:g}" if target["memory"] else "-"
    name = NAMES[side]
    if found["episodes"] != row["workload"]["prompts"]:
        name += f" ({found['episodes']} episodes at a time: more ran out of memory)"
    return [
        f"{row['workload']['name']} {row['workload']['title']}",
        name,
        *(cell(found["seconds"][phase], 2) for phase in (*PHASES, "total")),
        cell(found["episodes_per_second"], 2),
        speed,
        speed_target,
        cell(found["peak_mb"]["overall"], 0),
        memory,
        memory_target,
        f"{found['response_tokens']:.1f}",
    ]


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Peak memory by phase, in MiB."""
    lines = [
        "| workload | program | rollout MB | scoring MB | update MB | whole run MB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        for side, found in row["sides"].items():
            cells = [cell(found["peak_mb"][name], 0) for name in (*PHASES, "overall")]
            lines.append(
                f"| {row['workload']['name']} | {NAMES[side]} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines)


def cuda_table(rows: Sequence[dict[str, Any]], peak_tflops: float) -> str:
    """Tokens a second and model FLOPs utilisation of rollout and update."""
    from benchmarks.ppo_peer.flops import iteration_flops

    lines = [
        "| workload | program | rollout tokens/s | rollout MFU | update tokens/s | update MFU |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        workload = Workload.from_dict(row["workload"])
        for side, found in row["sides"].items():
            share = found["episodes"] / workload.prompts
            value = "shared" if side == "shared" else "separate"
            flops = iteration_flops(workload, value, found["response_tokens"])
            seconds = {name: found["seconds"][name]["median"] for name in ("rollout", "update")}
            sampled = found["episodes"] * found["response_tokens"]
            trained = sampled + share * sum(workload.prompt_lengths())
            mfu = {n: share * flops[n] / seconds[n] / (peak_tflops * 1e12) for n in seconds}
            found["mfu"] = mfu
            found["tokens_per_second"] = {
                "rollout": sampled / seconds["rollout"],
                "update": workload.ppo_epochs * trained / seconds["update"],
            }
            rates = found["tokens_per_second"]
            lines.append(
                f"| {workload.name} | {NAMES[side]} | {rates['rollout']:,.0f} "
                f"| {mfu['rollout']:.1%} | {rates['update']:,.0f} | {mfu['update']:.1%} |"
            )
    return "\n".join(lines)


def cell(numbers: dict[str, float], digits: int) -> str:
    """Median (low to high)."""
    middle, low, high = (f"{numbers[key]:,.{digits}f}" for key in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def reached(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether every target that there is was reached."""
    verdicts = [ratios.get("reached", True) for row in rows for ratios in row["ratios"].values()]
    return all(verdicts) and all(row.get("reached", True) for row in rows)
