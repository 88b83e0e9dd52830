"""Runs whose `ppo.rewards` is a list, through the command line: sums, ensembles, resume."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipeline.runfolder import read_manifest
from stages.cli import app
from stages.ppo.run import Training
from tests.scorer import Scorer
from tests.tiny_chain import CONFIG, Killed, assert_same, rlhf, rows, samples

FUNCTIONS = """
import random
def vowels(completions, **rest):
    return [sum(text.count(c) for c in "aeiou") for text in completions]
async def noise(completions, **rest):
    return [random.random() if len(text) % 4 else None for text in completions]
"""
LISTS = {
    "sum": """
    - {model: own, weight: 0.5, shift: 0.25}
    - {function: f.py:vowels, weight: 2.0}
    - f.py:noise
    - {builtin: length_penalty, target: 3, span: 2, weight: 0.1}""",
    "ensemble": """
    - ensemble: [own, {model: runs/other, weight: 2.0}]
      combine: minimum
    - {builtin: repetition_penalty, ngram: 1, unit: tokens}""",
}


def config(name: str) -> str:
    text = CONFIG.replace("rewards: judge.py:score", f"rewards:{LISTS[name]}")
    assert text != CONFIG
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished SFT, and with reward models of two seeds on it."""
    folder = tmp_path_factory.mktemp("lists")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "f.py").write_text(FUNCTIONS)
        (folder / "c.yaml").write_text(config("sum"))
        rlhf("sft", "run.name=parents")
        rlhf("reward", "run.name=parents")
        rlhf("sft", "run.name=other", "run.seed=2")
        rlhf("reward", "run.name=other", "run.seed=2")
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Runs a stage with one of LISTS."""
    monkeypatch.chdir(folder)

    def start(rewards: str, stage: str, name: str, *arguments: str) -> str:
        (folder / "c.yaml").write_text(config(rewards))
        return rlhf(stage, f"run.name={name}", "--from", "runs/parents", *arguments)

    return start


def test_a_sum_of_four_sources(folder, run):
    run("sum", "ppo", "sum")
    ppo = folder / "runs/sum/ppo"
    # Each row's score is the weighted sum of what its columns say.
    found = samples(ppo)
    assert len(found) == 6 * 4 and any(row["scores/noise"] is None for row in found)
    for row in found:
        expected = 0.5 * (row["scores/own"] - 0.25) + 2 * row["scores/vowels"]
        expected += (row["scores/noise"] or 0.0) + 0.1 * row["scores/length_penalty"]
        assert row["score"] == pytest.approx(expected, abs=1e-5)
        assert row["scores/vowels"] == sum(row["response"].count(c) for c in "aeiou")
        assert row["scores/length_penalty"] == -max(0, len(row["response_ids"]) - 3) / 2
    # Metrics are means and deviations of the same numbers.
    for number, line in enumerate(rows(ppo)[1:], start=1):
        for name in ("own", "vowels", "noise", "length_penalty"):
            known = [r[f"scores/{name}"] for r in found if r["iteration"] == number]
            numbers = torch.tensor([x for x in known if x is not None], dtype=torch.float64)
            if not len(numbers):  # it said nothing about any
                assert f"scores/{name}/mean" not in line
                continue
            mean, std = numbers.mean().item(), numbers.std(correction=0).item()
            assert line[f"scores/{name}/mean"] == pytest.approx(mean, abs=1e-5)
            assert line[f"scores/{name}/std"] == pytest.approx(std, abs=1e-4)
            assert f"held_out_scores/{name}/mean" in line


def test_the_evaluation_keeps_each_source_apart(folder, run):
    run("sum", "ppo", "sum")
    run("sum", "evaluate", "sum")
    place = folder / "runs/sum/evaluation"
    metrics = json.loads((place / "metrics.json").read_text())
    lines = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    names = ["own", "vowels", "noise", "length_penalty"]
    assert metrics["about"]["rewards"] == "0.5 x own + 2 x vowels + noise + 0.1 x length_penalty"
    assert metrics["reward_model"]["accuracy"] >= 0
    for policy in ("sft", "ppo"):
        answers = [line[policy] for line in lines]
        for answer in answers:
            assert list(answer["scores"]) == names
            own, vowels, noise, length = answer["scores"].values()
            expected = 0.5 * (own - 0.25) + 2 * vowels + (noise or 0.0) + 0.1 * length
            assert answer["score"] == pytest.approx(expected, abs=1e-5)
        mean = sum(answer["scores"]["vowels"] for answer in answers) / len(answers)
        assert metrics["policies"][policy]["scores"]["vowels"] == pytest.approx(mean)
    report = (place / "report.md").read_text()
    assert "| reward by source | own | vowels | noise | length_penalty |" in report


def test_the_minimum_of_two_reward_models(folder, run):
    run("ensemble", "ppo", "pair")
    found = samples(folder / "runs/pair/ppo")
    assert len({row["scores/own"] < 2 * row["scores/other"] for row in found}) == 2
    for row in found:
        worst = min(row["scores/own"], 2 * row["scores/other"])
        assert row["scores/ensemble"] == pytest.approx(worst, abs=1e-6)
        ids = row["response_ids"]
        repeated = len(set(ids)) / len(ids) - 1
        assert row["scores/repetition_penalty"] == pytest.approx(repeated, abs=1e-6)
        assert row["score"] == pytest.approx(worst + repeated, abs=1e-5)
    memory = json.loads((folder / "runs/pair/ppo/memory.json").read_text())
    assert {"reward own", "reward other"} <= memory["measured"].keys()
    assert memory["predicted"].keys() == memory["measured"].keys()
    for role in memory["measured"]:
        assert memory["predicted"][role]["weights"] == memory["measured"][role]["weights"], role
    manifest = read_manifest(folder / "runs/pair/ppo/artifact")
    assert list(manifest.material["resources"]) == ["ppo.rewards.0.ensemble.1.model"]
    assert manifest.material["parents"].keys() == {"sft", "reward"}
    shown = CliRunner().invoke(app, ["show", "runs/pair"], env={"COLUMNS": "300"}).output
    assert "finished" in shown and "stale" not in shown
    checked = rlhf("check")
    assert "ppo.rewards.0.ensemble.1" in checked and "finished reward stage" in checked
    assert "reward other" in checked and "everything is in order" in checked


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(folder, run, monkeypatch):
    """The async function draws from Python's generator, whose state belongs to the run's."""
    run("sum", "ppo", "whole")
    with monkeypatch.context() as patch:
        own = Training.collect

        def collect(self, number):
            if number == 4:
                raise Killed
            return own(self, number)

        patch.setattr(Training, "collect", collect)
        with pytest.raises(Killed):
            run("sum", "ppo", "killed")
    assert "going on after step 2" in run("sum", "ppo", "killed")
    assert_same(folder / "runs/killed/ppo", folder / "runs/whole/ppo")


def test_a_source_that_fails_ends_the_run_and_is_named(folder, run):
    (Path("bad.py")).write_text("def score(completions, **rest):\n    return [1.0]\n")
    name = "run.name=bad"
    (folder / "c.yaml").write_text(config("sum"))
    rewards = "ppo.rewards=[own, {function: bad.py:score, name: helpful}]"
    output = rlhf("ppo", name, "--from", "runs/parents", rewards, code=2)
    assert "reward helpful returned 1 scores for 3 completions (rows 0 to 2, prompts at" in output


def test_a_scorer_behind_an_address_as_the_one_source(folder, run):
    scorer = Scorer()
    run("sum", "ppo", "remote", f"ppo.rewards={scorer.url}", "ppo.iterations=1")
    scorer.server.shutdown()
    found = samples(folder / "runs/remote/ppo")
    assert [row["score"] for row in found] == [len(row["response"]) for row in found]
    assert len(found) == 4 and not any(key.startswith("scores/") for key in found[0])
    prompts = [prompt for body in scorer.asked for prompt in body["prompts"]]
    assert {row["prompt"] for row in found} <= set(prompts)
