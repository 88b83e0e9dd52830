"""`rlhf check`: data and models are opened and fitted together, without training."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.config import ArchitectureSection
from stages.cli import app
from tests.families import write_model

runner = CliRunner()

ROWS = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]


def write_rows(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows("rankings.jsonl", ROWS)
    write_rows("demonstrations.jsonl", [{"prompt": r["prompt"], "response": "x"} for r in ROWS])
    Path("c.yaml").write_text(
        "model:\n"
        "  init: config\n"
        "  vocabulary_size: 300\n"
        "  architecture: {hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2,"
        " intermediate_size: 16}\n"
        "data: {demonstrations: demonstrations.jsonl, rankings: rankings.jsonl}\n"
        "lora: {rank: 2}\n"
    )
    before = sorted(os.listdir())
    yield tmp_path
    assert sorted(set(os.listdir()) - {"model"}) == before  # nothing is written


def check(*arguments: str) -> tuple[int, str, str]:
    result = runner.invoke(app, ["check", "c.yaml", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.stdout.split()), result.stderr


@pytest.fixture
def model() -> Path:
    """A folder with a tiny Llama of 300 tokens and 1,024 positions."""
    import torch

    from pipeline.models.loading import build_from_config, train_tokenizer

    tokenizer = train_tokenizer(["한국어 text"], 300)
    shape = ArchitectureSection(hidden_size=8, num_attention_heads=2, intermediate_size=16)
    build_from_config(shape, tokenizer, torch.float32).save_pretrained("model")
    tokenizer.save_pretrained("model")
    return Path("model")


def test_reports_rows_sizes_and_the_work_to_do() -> None:
    write_rows("rankings.jsonl", [*ROWS, {**ROWS[0], "prompt": " "}])
    code, out, err = check("ppo.iterations=3", "ppo.rollout.responses_per_prompt=2")
    assert (code, err) == (0, "")
    assert "stages: sft, reward, ppo, evaluation, export" in out
    assert "rankings pairs 41 " in out
    assert "first at " in out and "rankings.jsonl:41: " in out
    # Embedding 300 x 8 (tied), attention 4 x 8 x 8, feed-forward 3 x 8 x 16, three norms of 8:
    # 2400 + 256 + 384 + 24 = 3064 parameters of 4 bytes. Rank 2 on four 8x8 matrices adds
    # 4 x 2 x (8 + 8) = 128, on three of 8x16 it adds 3 x 2 x (8 + 16) = 144: 272 = 8.88%.
    assert "random weights, 3.06 thousand parameters, 0.00 GB in float32; " in out
    assert "an adapter has 272 (8.88%)" in out
    assert "PPO: 3 iterations x 128 prompts x 2 responses = 768 rollouts; 4 optimiser steps" in out
    assert out.endswith("everything is in order")


def test_offline_lists_what_was_not_looked_at() -> None:
    code, out, err = check(
        "--offline", "data.rankings=org/set", "model={path: org/base}", "ppo.rewards=org/judge"
    )
    assert (code, err) == (0, "")
    assert "data.rankings: org/set: not checked (offline)" in out
    assert "model.path org/base not checked (offline)" in out
    # What is on this machine is still read: 40 rows, none left out.
    assert re.search(r"demonstrations \S+ 40 \d+ \d+ 0 ", out)
    assert out.endswith(
        "everything else is in order; not checked (offline): data.rankings, model.path, ppo.rewards"
    )


def test_a_model_in_a_folder_fits(model: Path) -> None:
    code, out, err = check("model={path: model}")
    assert (code, err) == (0, "")
    assert "llama, " in out and "no chat template" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.max_prompt_tokens=600",
            "has 1024 positions but data.max_prompt_tokens + data.max_response_tokens = "
            "600 + 512 = 1112 tokens: lower one of them",
        ),
        (
            "lora.target_modules=[query]",
            "lora.target_modules has 'query', but LlamaForCausalLM has no such layer",
        ),
        (
            "generation.forbidden_tokens=[zebra]",
            "generation.forbidden_tokens has 'zebra', which is 5 tokens",
        ),
    ],
)
def test_a_model_that_does_not_fit(model: Path, override: str, message: str) -> None:
    code, _, err = check("model={path: model}", override)
    assert code == 2
    assert err.startswith("error: 1 of the checks failed:\nmodel.path: ")
    assert message in err


@pytest.mark.parametrize("asked", ["ppo.rollout.engine=vllm", "export.vllm=true"])
def test_experts_that_vllm_would_not_take_are_said_before_anything_is_trained(asked: str) -> None:
    write_model("mixtral", Path("model"))
    limits = ["data.max_prompt_tokens=20", "data.max_response_tokens=20"]
    limits += ["ppo.rollout.max_new_tokens=20", "evaluation.max_new_tokens=20"]
    setting = asked.partition("=")[0]
    code, _, err = check("model={path: model}", *limits, asked)
    assert code == 2
    assert f"{setting}: vLLM cannot load the policy's adapter" in err
    assert "set lora.target_parameters to []" in err
    code, out, _ = check("model={path: model}", *limits, asked, "lora.target_parameters=[]")
    assert code == 0 and "vLLM takes adapters on mixtral" in out


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    code, _, err = check("model={path: model}")
    assert code == 2
    assert "has no .safetensors weights; pickled ones are refused" in err


def test_all_faults_are_listed_together() -> None:
    write_rows("rankings.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 9)
    Path("judge.py").write_text("def score(prompts): ...\n")
    code, out, err = check("evaluation.gold=judge.py:scores")
    os.remove("judge.py")
    assert code == 2
    assert err.startswith("error: 2 of the checks failed:\n")
    assert "9 of 9 rows are bad" in err
    assert "evaluation.gold: " in err and "has no function 'scores'; it has score" in err
    assert "evaluation.gold" in out and "see below" in out


def test_a_run_without_the_stage_is_named() -> None:
    os.makedirs("model/reward/artifact")
    Path("model/config.yaml").touch()
    code, _, err = check("ppo.policy=./model")
    assert code == 2
    assert "is a run without a finished sft stage (it has reward): run `rlhf sft` there" in err


def test_a_quantised_base_needs_its_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    lora = [f"{stage}.tuning=lora" for stage in ("sft", "reward", "ppo")]
    code, _, err = check("model={path: model, quantization: 4bit}", *lora)
    assert code == 2
    assert "model.path: model.quantization is 4bit, which needs the bitsandbytes package" in err
