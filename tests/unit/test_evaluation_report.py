"""What report.md says: the numbers as they are, and the limits that follow from them."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest

from stages.evaluation.report import limits, markdown, plot_curves, policy_rows, print_report

METRICS: dict[str, Any] = {
    "reward_model": {"accuracy": 0.72, "ece": 0.031, "n": 600, "ceiling": 0.75},
    "policies": {
        "sft": {
            "score": 0.0125, "score_std": 1.0, "gold": 1.5, "kl": 0.0, "length": 14.25,
            "eos_rate": 0.98, "distinct_2": 0.4, "n": 500,
        },
        "ppo": {
            "score": 1.5, "score_std": 0.75, "gold": 2.5, "kl": 1.8, "length": 13.0,
            "eos_rate": 0.996, "distinct_2": 0.39, "n": 500,
        },
        "best_of_n": {
            "score": 1.25, "score_std": 0.5, "gold": 2.25, "kl": 1.835, "length": 13.5,
            "eos_rate": 1.0, "distinct_2": 0.395, "n": 500,
        },
    },
    "win_rate": {
        "ppo_vs_sft": {"rate": 0.8125, "low": 0.776, "high": 0.844, "n": 500, "judge": "gold"},
        "best_of_n_vs_sft": {"rate": 0.77, "low": 0.731, "high": 0.805, "n": 500, "judge": "gold"},
    },
    "seconds": {"sft": 60.0, "reward": 50.25, "ppo": 100.0, "evaluation": 30.0},
    "peak_rss_mb": 1234.4,
    "about": {
        "seed": 3, "prompts": 500, "prompts_wanted": 500, "temperature": 1.0,
        "decoding": {"method": "sample", "top_k": 0, "top_p": 1.0, "num_beams": 1},
        "max_new_tokens": 48, "rewards": "reward model", "gold": "gold", "best_of_n": 16,
        "max_n": 16, "n": None,
        "chosen_on_the_same_prompts": False, "prompts_cut": 0, "versions": {},
    },
}  # fmt: skip


def changed(**about: Any) -> dict[str, Any]:
    metrics = copy.deepcopy(METRICS)
    metrics["about"].update(about)
    return metrics


def decoded(method: str, **settings: Any) -> dict[str, Any]:
    return changed(decoding={**METRICS["about"]["decoding"], "method": method, **settings})


def test_rows_hold_the_columns_that_exist_and_name_n() -> None:
    header, rows = policy_rows(METRICS)
    assert "gold" in header and "ROUGE-L" not in header
    assert rows[2][:2] == ["best of 16", "+1.250"]
    assert all(len(row) == len(header) for row in rows)


def test_markdown_states_the_numbers() -> None:
    text = markdown(METRICS)
    assert "| SFT | +0.013 | 1.000 | +1.500 | 0.00 | 14.2 | 98.0% | 0.400 | 500 |" in text
    assert (
        "PPO preferred over SFT on 81.2% of 500 prompts (95% interval 77.6% to 84.4%), judge: gold."
    ) in text
    # 0.72 / 0.75 = 0.96
    assert "the gold judge's order reaches 75.0% on the same noisy pairs" in text
    assert "and the model 96.0% of that ceiling" in text
    assert "Seconds: sft 60.0, reward 50.2, ppo 100.0, evaluation 30.0." in text
    assert "Peak resident memory: 1234 MiB." in text


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (METRICS, "500 held-out prompts, temperature 1, at most 48 new tokens"),
        (decoded("greedy"), "prompts, greedy, at most"),
        (decoded("beam", num_beams=4), "prompts, beam search of 4, at most"),
        (
            decoded("sample", top_k=20, top_p=0.9),
            "prompts, temperature 1, top-k 20, top-p 0.9, at most",
        ),
    ],
)
def test_markdown_says_how_the_responses_came_about(metrics: dict[str, Any], words: str) -> None:
    assert words in markdown(metrics)


def test_noise_is_only_claimed_where_there_is_some() -> None:
    assert "same sampling noise" in "\n".join(limits(METRICS))
    for method in ("greedy", "beam"):
        assert "noise" not in "\n".join(limits(decoded(method))[1:2])


def test_screen_shows_the_same_numbers() -> None:
    from rich.console import Console

    screen = io.StringIO()
    print_report(METRICS, Console(file=screen, width=140))
    assert "+1.250" in screen.getvalue() and "81.2% of 500 prompts" in screen.getvalue()


def test_every_column_fits_a_screen_of_80() -> None:
    from rich.console import Console

    metrics = copy.deepcopy(METRICS)
    for numbers in metrics["policies"].values():
        numbers |= {"rouge_l": 0.345, "eos_rate": 1.0, "gold": -3.047, "score": -1.083}
    out = io.StringIO()
    print_report(metrics, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    (heading,) = [line for line in lines if "ROUGE-L" in line]
    assert heading.split() == [
        *("policy", "reward", "std", "gold", "KL", "tokens", "ended", "distinct-2", "ROUGE-L")
    ]
    assert sum(line.lstrip().startswith(("SFT ", "best of 16 ")) for line in lines) >= 2


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (changed(gold=None), "cannot show over-optimisation"),
        (changed(prompts=40), "Only 40 held-out prompts exist where 500"),
        (changed(best_of_n=1), "the SFT policy itself"),
        (decoded("greedy"), "not an estimate of the KL"),
        (decoded("greedy"), "Responses are greedy"),
        (decoded("beam", num_beams=4), "Responses are found by a beam search"),
        (decoded("sample", top_k=5), "not the KL of what was drawn"),
        (decoded("sample", top_p=0.9), "not the KL of what was drawn"),
        (changed(chosen_on_the_same_prompts=True), "chosen by its reward on some of these"),
    ],
)
def test_limits_follow_from_the_settings(metrics: dict[str, Any], words: str) -> None:
    assert words in "\n".join(limits(metrics))
    assert words not in "\n".join(limits(METRICS))


@pytest.mark.parametrize(
    ("policy", "numbers", "words"),
    [
        # 0.30 / 0.4 = 75%, below 80%; KL beyond that of n = 17: log 17 - 16/17 = 1.892.
        ("ppo", {"distinct_2": 0.30}, "distinct-2 is 75% of SFT's"),
        ("ppo", {"eos_rate": 0.5}, "ends only 50.0%"),
        ("ppo", {"gold": 1.0}, "over-optimised"),
        ("ppo", {"kl": 1.9}, "not at equal KL"),
    ],
)
def test_limits_follow_from_the_numbers(policy: str, numbers: dict[str, float], words: str) -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["policies"][policy].update(numbers)
    assert words in "\n".join(limits(metrics))
    assert words not in "\n".join(limits(METRICS))


def test_plot_draws_the_columns_that_exist(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log, image = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    curves = {"kl": "KL, nats", "absent": "absent"}
    assert not plot_curves(log, image, curves)
    rows = [{"step": 0, "held_out_kl": 0.0}, {"step": 1, "kl": 0.1}, {"step": 2, "kl": None}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_curves(log, image, curves)
    assert image.read_bytes().startswith(b"\x89PNG")
