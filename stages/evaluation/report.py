"""The evaluation for a reader: the same numbers as a table on the screen and as `report.md`.

`report.md` also says what the numbers do not show. The limits are derived from the numbers, so that
a run with a collapsed policy or without a gold judge says so itself.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.runfolder import write_bytes_atomic
from stages.evaluation.metrics import best_of_n_kl

NAMES = {"sft": "SFT", "ppo": "PPO", "best_of_n": "best of n"}
COLUMNS = {
    "score": ("reward", "{:+.3f}"),
    "score_std": ("std", "{:.3f}"),
    "gold": ("gold", "{:+.3f}"),
    "kl": ("KL", "{:.2f}"),
    "length": ("tokens", "{:.1f}"),
    "eos_rate": ("ended", "{:.1%}"),
    "distinct_2": ("distinct-2", "{:.3f}"),
    "rouge_l": ("ROUGE-L", "{:.3f}"),
    "n": ("n", "{:d}"),
}


def policy_name(policy: str, metrics: dict[str, Any]) -> str:
    """Heading of a policy, with best-of-n's n."""
    n = metrics["about"]["best_of_n"]
    return f"best of {n}" if policy == "best_of_n" and n else NAMES[policy]


def policy_rows(
    metrics: dict[str, Any], columns: Iterable[str] = COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Header and one row of text a policy, with those of the columns that this run has."""
    policies = metrics["policies"]
    # A number that was not finite is null in metrics.json.
    used = [k for k in columns if any(numbers.get(k) is not None for numbers in policies.values())]
    header = ["policy", *(COLUMNS[key][0] for key in used)]
    rows = [
        [
            policy_name(policy, metrics),
            *(
                "" if numbers.get(key) is None else COLUMNS[key][1].format(numbers[key])
                for key in used
            ),
        ]
        for policy, numbers in policies.items()
    ]
    return header, rows


def source_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a policy of the mean scores by reward source, where there are several."""
    policies = {p: n["scores"] for p, n in metrics["policies"].items() if n.get("scores")}
    names = list(dict.fromkeys(name for scores in policies.values() for name in scores))
    rows = [
        [
            policy_name(policy, metrics),
            *("" if scores.get(n) is None else f"{scores[n]:+.3f}" for n in names),
        ]
        for policy, scores in policies.items()
    ]
    return ["reward by source", *names], rows


def win_lines(metrics: dict[str, Any]) -> list[str]:
    """One sentence a comparison."""
    return [
        f"{policy_name(name.removesuffix('_vs_sft'), metrics)} preferred over SFT on "
        f"{win['rate']:.1%} of {win['n']} prompts "
        f"(95% interval {win['low']:.1%} to {win['high']:.1%}), judge: {win['judge']}."
        for name, win in metrics["win_rate"].items()
    ]


def reward_lines(metrics: dict[str, Any]) -> list[str]:
    """What is known of the reward model's agreement with held-out rankings."""
    reward = metrics["reward_model"]
    if reward is None:
        return []
    line = (
        f"Reward model: {reward['accuracy']:.1%} of {reward['n']} held-out pairs ordered as the "
        f"labelers did, calibration error (ECE) {reward['ece']:.3f}"
    )
    if "ceiling" not in reward:
        return [f"{line}."]
    share = reward["accuracy"] / reward["ceiling"] if reward["ceiling"] else float("nan")
    return [
        f"{line}; the gold judge's order reaches {reward['ceiling']:.1%} on the same noisy pairs, "
        f"and the model {share:.1%} of that ceiling."
    ]


def limits(metrics: dict[str, Any]) -> list[str]:
    """What a reader must not conclude from these numbers."""
    about, policies = metrics["about"], metrics["policies"]
    found = [
        "One run with one seed: the intervals cover the choice of prompts and the sampling noise, "
        "not the spread between training runs.",
        "All policies meet the same prompts"
        + (" and the same sampling noise" if about["decoding"]["method"] == "sample" else "")
        + (
            ", so the first candidate of best-of-n is the SFT policy's own response."
            if "best_of_n" in policies
            else "."
        ),
    ]
    if about["gold"] is None:
        found.append(
            f"There is no gold judge: the win rates are judged by the reward that PPO maximised "
            f"({about['rewards']}), which cannot show over-optimisation."
        )
    else:
        found.append(
            f"The gold judge ({about['gold']}) is code, a stand-in for people: it sees only what "
            "it was written to see."
        )
    if about["prompts"] < about["prompts_wanted"]:
        found.append(
            f"Only {about['prompts']} held-out prompts exist where {about['prompts_wanted']} were "
            "asked for."
        )
    if about["prompts_cut"]:
        found.append(
            f"{about['prompts_cut']} of the {about['prompts']} prompts are longer than "
            "data.max_prompt_tokens: the policies saw only their ends."
        )
    if about["chosen_on_the_same_prompts"]:
        found.append(
            "PPO's policy was chosen by its reward on some of these prompts, for lack of others, "
            "which favours it a little."
        )
    found += _decoding_limits(about)
    if "best_of_n" in policies and "ppo" in policies:
        ppo_kl, other = policies["ppo"]["kl"], policies["best_of_n"]["kl"]
        n = about["best_of_n"]
        if about["n"] is not None:
            found.append(
                f"Best-of-n's n was set (evaluation.n = {n}): its KL is {other:.2f} nats, PPO's "
                f"{ppo_kl:.2f}."
            )
        elif n == about["max_n"] and ppo_kl > best_of_n_kl(n + 1):
            found.append(
                f"PPO's KL ({ppo_kl:.2f} nats) is beyond that of the largest n "
                f"({other:.2f} nats at n = {n}): the two are not at equal KL."
            )
        if n == 1 and about["n"] is None:
            found.append(
                "PPO's KL is nearest that of n = 1, which is the SFT policy itself: best-of-n says "
                "nothing here."
            )
        found.append(
            "PPO's KL is an estimate from one response a prompt; that of best-of-n is the closed "
            "form log n - (n - 1) / n, an upper bound where scores tie."
        )
    return found + _symptoms(policies)


def _decoding_limits(about: dict[str, Any]) -> list[str]:
    """What KL and best-of-n mean where responses are not drawn from the whole distribution."""
    decoding = about["decoding"]
    if decoding["method"] != "sample":
        kind = "greedy" if decoding["method"] == "greedy" else "found by a beam search"
        return [
            f"Responses are {kind}, so kl is the log-ratio of the most likely responses, "
            "not an estimate of the KL, and best-of-n has nothing to choose from."
        ]
    if decoding["top_k"] or decoding["top_p"] < 1:
        return [
            "Responses are drawn from truncated distributions (top-k, top-p) and kl is the mean "
            "log-ratio of the whole ones at these responses: it is not the KL of what was drawn, "
            "and an n of best-of-n that was chosen by it is not at equal KL."
        ]
    return []


def decoding_words(about: dict[str, Any]) -> str:
    """How the responses came about, in a few words."""
    decoding = about["decoding"]
    if decoding["method"] == "beam":
        return f"beam search of {decoding['num_beams']}"
    if decoding["method"] == "greedy":
        return "greedy"
    parts = [f"temperature {about['temperature']:g}"]
    if decoding["top_k"]:
        parts.append(f"top-k {decoding['top_k']}")
    if decoding["top_p"] < 1:
        parts.append(f"top-p {decoding['top_p']:g}")
    return ", ".join(parts)


def _symptoms(policies: dict[str, dict[str, Any]]) -> list[str]:
    ppo, sft = policies.get("ppo"), policies["sft"]
    if ppo is None:
        return []
    found = []
    if ppo["eos_rate"] < 0.9:
        found.append(f"PPO ends only {ppo['eos_rate']:.1%} of its responses; the rest are cut.")
    if sft["distinct_2"] and ppo["distinct_2"] < 0.8 * sft["distinct_2"]:
        found.append(
            f"PPO's distinct-2 is {ppo['distinct_2'] / sft['distinct_2']:.0%} of SFT's: "
            "its responses have become alike."
        )
    if "gold" in ppo and ppo["score"] > sft["score"] and ppo["gold"] < sft["gold"]:
        found.append(
            "PPO's reward rose while its gold score fell: the reward model is over-optimised."
        )
    return found


def markdown(metrics: dict[str, Any]) -> str:
    """`report.md`: tables, win rates and limits."""
    header, rows = policy_rows(metrics)
    about = metrics["about"]
    sampling = (
        f"{about['prompts']} held-out prompts, {decoding_words(about)}, at most "
        f"{about['max_new_tokens']} new tokens, seed {about['seed']}, rewards: {about['rewards']}."
    )
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in metrics["seconds"].items())
    sections = [
        ["# Evaluation", sampling],
        [_markdown_table(header, rows)],
        [_markdown_table(*source_rows(metrics))] if source_rows(metrics)[1] else [],
        [f"- {line}" for line in (*win_lines(metrics), *reward_lines(metrics))],
        ["## Limits"],
        [f"- {line}" for line in limits(metrics)],
        ["## Cost"],
        [f"Seconds: {seconds}. Peak resident memory: {metrics['peak_rss_mb']:.0f} MiB."],
    ]
    return (
        "\n\n".join(
            ("\n\n" if section[0].startswith("#") else "\n").join(section)
            for section in sections
            if section
        )
        + "\n"
    )


def _markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def print_report(metrics: dict[str, Any], console: Any) -> None:
    """The table and the sentences on the screen; `console` is a rich Console.

    All columns but n, which the sentences name, fit 80 characters.
    """
    from rich import box
    from rich.table import Table

    tables = [policy_rows(metrics, [name for name in COLUMNS if name != "n"]), source_rows(metrics)]
    for header, rows in tables:
        if not rows:
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in (*win_lines(metrics), *reward_lines(metrics)):
        console.print(line, highlight=False)


def plot_curves(metrics_jsonl: Path, image: Path, curves: dict[str, str]) -> bool:
    """Draw columns of a stage's metrics.jsonl over its steps as a PNG; False if nothing was drawn.

    `curves` maps column to axis label. Drawing is optional: without matplotlib, without the file
    or without these columns nothing is written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not metrics_jsonl.is_file():
        return False
    rows = [json.loads(line) for line in metrics_jsonl.read_text(encoding="utf-8").splitlines()]
    points = {
        label: [(row["step"], row[column]) for row in rows if row.get(column) is not None]
        for column, label in curves.items()
    }
    points = {label: values for label, values in points.items() if values}
    if not points:
        return False
    figure = Figure(figsize=(3.6 * len(points), 2.8), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(1, len(points), squeeze=False)[0],
                                     points.items(), strict=True):  # fmt: skip
        axes.plot(*zip(*values, strict=True))
        axes.set_xlabel("iteration")
        axes.set_title(label)
        axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_bytes_atomic(image, png.getvalue())
    return True
