"""The whole chain with real files through the real command line, on a model of a minute's patience.

The chain is run once in one process and once stage by stage; everything else looks at the results.
"""

import json
import os
import re
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline.config import DataSection, ModelSection
from pipeline.models.loading import folder_identity
from pipeline.models.store import ModelStore
from stages.cli import app
from tests.tiny_chain import ROOT, head, rows

CONFIG = f"""{head("whole", dtype="float64", limits=(80, 60, 60))}
sft: {{max_steps: 6, batch_size: 8, optim: {{learning_rate: 5.0e-3}}}}
reward:
  {{tuning: lora, max_steps: 4, batch_size: 8, optim: {{learning_rate: 5.0e-3}},
    normalisation: {{num_samples: 8}}}}
ppo:
  tuning: lora
  iterations: 3
  rollout: {{prompts_per_iteration: 8, max_new_tokens: 12}}
  optim: {{learning_rate: 5.0e-3, ppo_epochs: 2, minibatches: 2}}
  held_out: {{every: 2, num_prompts: 8}}
evaluation:
  {{prompts: 8, max_new_tokens: 12, max_n: 4, gold: "{ROOT}/data/quickstart/gold.py:gold"}}
export: {{merged: true}}
"""
STAGES = ("sft", "reward", "ppo", "evaluate", "export")


def rlhf(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `runs/whole` (one process) and `runs/single` (stage by stage)."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "c.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        output = rlhf("run", "c.yaml")
        for stage in STAGES:
            rlhf(stage, "c.yaml", "run.name=single")
    (folder / "output.txt").write_text(output)
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_stage_by_stage_gives_the_same_numbers_as_one_process(folder, stage):
    whole, single = folder / "runs/whole", folder / "runs/single"
    assert len(rows(whole / stage)) >= 3
    assert rows(whole / stage) == rows(single / stage)
    weights = sorted((whole / stage / "artifact").rglob("*.safetensors"))
    assert weights
    for path in weights:
        ours, theirs = (load_file(p) for p in (path, single / path.relative_to(whole)))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


def test_evaluations_agree_too(folder):
    results = []
    for name in ("whole", "single"):
        result = json.loads((folder / f"runs/{name}/evaluation/metrics.json").read_text())
        results.append({key: result[key] for key in ("reward_model", "policies", "win_rate")})
    assert results[0] == results[1]
    assert set(results[0]["policies"]) >= {"sft", "ppo"}
    assert results[0]["win_rate"]["ppo_vs_sft"]["judge"].startswith("gold")


def test_the_shared_base_never_moves(folder):
    """Reward model and policy are adapters on the SFT weights: one hash, in memory and on disk."""
    run = folder / "runs/whole"
    base = folder_identity(run / "sft/artifact/model")
    store = ModelStore(ModelSection(path="unused", dtype="float64"), DataSection())
    sft, reward, ppo = (store.open(run / f"{s}/artifact") for s in ("sft", "reward", "ppo"))
    assert sft.trunk is reward.trunk is ppo.trunk
    for stage in ("reward", "ppo"):
        handle = json.loads((run / stage / "artifact/handle.json").read_text())
        assert handle["base"]["identity"] == base
    exported = load_file(run / "export/base/model.safetensors")
    for name, tensor in load_file(run / "sft/artifact/model/model.safetensors").items():
        assert torch.equal(tensor, exported[name]), name


def test_a_second_run_does_nothing_again(inside):
    output = rlhf("run", "c.yaml")
    assert output.count("reused from") == 5


def test_another_run_takes_over_what_is_unchanged(inside):
    output = rlhf("run", "c.yaml", "run.name=gentle", "ppo.kl_coef=0.3", "--from", "runs/whole")
    assert "sft: finished, taken over from runs/whole/sft" in output
    assert "reward: finished, taken over" in output
    assert rows(inside / "runs/gentle/ppo") != rows(inside / "runs/whole/ppo")


def test_a_changed_reward_takes_the_middle_of_the_chain_out(inside):
    (inside / "words.py").write_text(
        "def count(prompts, completions, **rest):\n"
        "    return [float(len(text.split())) for text in completions]\n"
    )
    output = rlhf(
        "run",
        "c.yaml",
        "run.name=words",
        "ppo.rewards=words.py:count",
        "--from",
        "runs/whole",
    )
    assert "sft: finished, taken over" in output
    assert not (inside / "runs/words/reward").exists()
    result = json.loads((inside / "runs/words/evaluation/metrics.json").read_text())
    assert result["reward_model"] is None


def test_show_and_check_read_the_run(inside):
    shown = rlhf("show", "runs/whole")
    for word in ("sft", "reward", "ppo", "evaluation", "export", "finished"):
        assert word in shown
    assert "stale" not in shown
    checked = rlhf("check", "c.yaml")
    assert "random weights" in checked


def test_a_changed_setting_is_shown_as_stale(inside):
    config = inside / "runs/single/config.yaml"
    config.write_text(config.read_text().replace("kl_coef: 0.05", "kl_coef: 0.2"))
    assert "ppo.kl_coef: 0.05 -> 0.2" in rlhf("show", "runs/single").replace("\n", " ")


def test_the_data_report_is_on_the_screen_and_in_the_run(folder):
    report = json.loads((folder / "runs/whole/data.json").read_text())
    assert report["rankings"]["rows"] == 60
    assert "rankings" in (folder / "output.txt").read_text()


@pytest.mark.slow
def test_accelerate_launches_a_stage(inside):
    """`accelerate launch -m stages ppo CONFIG`, from what the stages before it left."""
    subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--cpu"),
            *("--dynamo_backend", "no", "-m", "stages", "ppo", "c.yaml"),
            *("run.name=launched", "--from", "runs/whole", "ppo.kl_coef=0.2"),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=280,
    )
    assert rows(inside / "runs/launched/ppo")[-1]["kl_coef"] == 0.2


@pytest.mark.slow
def test_korean_end_to_end(inside):
    """Hangul in, Hangul out: prompts, samples, texts and cards; conversations included."""
    samples = ROOT / "data/samples"
    rlhf(
        "run",
        "c.yaml",
        "run.name=korean",
        f"data.demonstrations={samples}/chat_demonstrations.jsonl",
        f"data.rankings={samples}/korean.jsonl",
        "data.prompts=null",
        "data.max_prompt_tokens=64",
        "data.held_out_fraction=0.3",
        "sft.max_steps=40",
        "evaluation.gold=null",
        "ppo.rollout.prompts_per_iteration=4",
        "ppo.held_out.num_prompts=4",
    )
    run = inside / "runs/korean"
    report = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert report["rankings"]["rows"] == 20 and not report["rankings"]["left_out"]
    originals = {
        json.loads(line)["prompt"] for line in (samples / "korean.jsonl").read_text().splitlines()
    }
    rollouts = pyarrow.parquet.read_table(next((run / "ppo/samples").glob("*.parquet")))
    asked = rollouts.column("prompt").to_pylist()
    assert any(original in asked for original in originals)
    texts = (run / "ppo/texts.jsonl").read_text(encoding="utf-8")
    assert re.search("[가-힣]", texts)  # readable in the file, not escaped


@pytest.mark.slow
def test_real_comparisons_end_to_end(inside):
    """Anthropic's harmless-base rows through every stage, bad rows and all."""
    path = ROOT.parent / "shared/data/hh-harmless/test.jsonl.gz"
    if not path.exists():
        pytest.skip("the real comparisons are not beside this checkout")
    rlhf(
        "run",
        "c.yaml",
        "run.name=hh",
        f"data.demonstrations={{path: {path}, limit: 400}}",
        f"data.rankings={{path: {path}, limit: 400}}",
        "data.prompts=null",
        "evaluation.gold=null",
    )
    report = json.loads((inside / "runs/hh/data.json").read_text())
    assert sum(reason["count"] for reason in report["rankings"]["left_out"].values()) > 0
    result = json.loads((inside / "runs/hh/evaluation/metrics.json").read_text())
    assert result["win_rate"]["ppo_vs_sft"]["judge"] != "gold"
