"""Every family through the whole chain by the command line, from a folder as users have it.

SFT, reward model, PPO, evaluation and export; then plain `transformers` and `peft` read what was
written and give the run's numbers: log-probs of each sampled token, and scores of each response.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline.batches import TokenBatch
from pipeline.config import DataSection, ModelSection
from pipeline.inference import infer
from pipeline.models.store import ModelStore
from tests.families import (
    FAMILIES,
    ROWS,
    final_state,
    plain_logprobs,
    plain_model,
    write_model,
    write_rows,
)
from tests.tiny_chain import rlhf, samples

TOLERANCE = 1e-4  # in float32
TEMPERATURE = 0.7
CONFIG = f"""
run: {{name: r, trackers: [], device: cpu}}
model: {{path: base}}
lora: {{rank: 2}}
data:
  {{demonstrations: d.jsonl, rankings: d.jsonl, max_prompt_tokens: 32, max_response_tokens: 16,
    held_out_fraction: 0.25}}
sft: {{tuning: lora, max_steps: 2, batch_size: 8, optim: {{learning_rate: 1.0e-2}}}}
reward:
  {{tuning: lora, max_steps: 2, batch_size: 8, optim: {{learning_rate: 1.0e-2}},
    normalisation: {{num_samples: 4}}}}
ppo:
  tuning: lora
  iterations: 2
  keep: last
  rollout: {{prompts_per_iteration: 6, max_new_tokens: 8, temperature: {TEMPERATURE}}}
  optim: {{ppo_epochs: 2, minibatches: 2, learning_rate: 1.0e-2}}
  held_out: {{num_prompts: 2, every: 2}}
evaluation: {{prompts: 2, max_new_tokens: 4, max_n: 2}}
export: {{merged: true}}
"""
# Near relatives of others in the table: `make test` leaves them out.
SLOW = {"opt", "opt-350m", "gemma", "gemma3", "mixtral", "phi", "xglm", "flan-t5"}


def run_chain(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *settings: str, rows: Any = ROWS
) -> Path:
    """The chain of a family in `folder`; returns its run."""
    write_model(name, folder / "base")
    write_rows(folder / "d.jsonl", rows)
    (folder / "c.yaml").write_text(CONFIG)
    monkeypatch.chdir(folder)
    before = file_hashes(folder / "base")
    rlhf("run", *settings)
    assert file_hashes(folder / "base") == before
    return folder / "runs/r"


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of its files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def adapted(run: Path, folder: str) -> Any:
    """The base in plain transformers with an adapter of the run, by plain peft."""
    base = plain_model(run.parents[1] / "base")
    return PeftModel.from_pretrained(base, run / folder).eval()


def assert_logprobs(model: Any, rows: list[dict[str, Any]], column: str) -> None:
    """What the run wrote of sampled responses, by a plain pass each."""
    assert rows
    for row in rows:
        wanted = plain_logprobs(model, row["prompt_ids"], row["response_ids"], TEMPERATURE)
        assert row[column] == pytest.approx(wanted, abs=TOLERANCE)


def assert_scores(model: Any, head: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> None:
    """score = (w h + b - shift) / scale of the final state at the response's last token."""
    for row in rows:
        state = final_state(model, row["prompt_ids"], row["response_ids"])
        score = (state @ head["weight"] + head["bias"] - head["shift"]) / head["scale"]
        assert row["score"] == pytest.approx(score.item(), abs=TOLERANCE)


def assert_exported(run: Path, model: Any, rows: list[dict[str, Any]]) -> None:
    """A plain model's log-probs of the sampled responses are those of the run's policy."""
    handle = ModelStore(ModelSection(path="unused"), DataSection()).open(run / "ppo/artifact")
    ids = [[row[f"{part}_ids"] for row in rows] for part in ("prompt", "response")]
    batch = TokenBatch.from_ragged(*ids, pad_id=handle.codec.pad_id)
    found = infer(handle, batch, ["logprobs"], None)["logprobs"]
    for row, prompt, response in zip(found.tolist(), *ids, strict=True):
        wanted = plain_logprobs(model, prompt, response)
        assert row[: len(response)] == pytest.approx(wanted, abs=TOLERANCE)


def assert_chain(run: Path) -> list[dict[str, Any]]:
    """Plain libraries give the numbers of all roles; returns the rollouts."""
    rows = samples(run / "ppo")
    assert len(rows) == 2 * 6
    start = adapted(run, "sft/artifact/adapter")
    assert_logprobs(start, rows, "ref_logprobs")
    assert_logprobs(start, [row for row in rows if row["iteration"] == 1], "logprobs")
    reward = run / "reward/artifact"
    head = load_file(reward / "head.safetensors")
    assert_scores(adapted(run, "reward/artifact/adapter"), head, rows)
    policy = adapted(run, "export/adapter")
    assert_exported(run, policy, rows)
    assert_exported(run, plain_model(run / "export/merged"), rows)
    # Training moved it, so that none of this compares a model with itself.
    moved = [
        abs(a - b)
        for row in rows
        for a, b in zip(
            plain_logprobs(policy, row["prompt_ids"], row["response_ids"], TEMPERATURE),
            row["ref_logprobs"],
            strict=True,
        )
    ]
    assert max(moved) > 0.01
    return rows


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES]
)
def test_chain(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_chain(tmp_path, name, monkeypatch)
    rows = assert_chain(run)
    ours, base = (AutoTokenizer.from_pretrained(f) for f in (run / "export/merged", "base"))
    assert ours.get_vocab() == base.get_vocab()
    assert ours.pad_token == base.pad_token  # none, the end token, or one of its own
    ends = json.loads((run / "export/merged/generation_config.json").read_text())["eos_token_id"]
    # A response ends at one of them, and nowhere but at its end.
    for row in rows:
        *inside, last = row["response_ids"]
        assert not set(inside) & set(ends) and row["ended"] == (last in ends)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("gpt2", "lora.use_dora=true"),  # on transposed layers (Conv1D)
        ("llama3", "lora.use_rslora=true"),
        ("qwen3-moe", "lora.use_rslora=true"),
    ],
)
@pytest.mark.slow
def test_unusual_adapters(name, setting, tmp_path, monkeypatch) -> None:
    run = run_chain(tmp_path, name, monkeypatch, setting)
    assert_chain(run)
    saved = json.loads((run / "export/adapter/adapter_config.json").read_text())
    assert saved[setting.removeprefix("lora.").removesuffix("=true")] is True
    if "dora" in setting:
        weights = load_file(run / "export/adapter/adapter_model.safetensors")
        assert any("lora_magnitude_vector" in key for key in weights)


@pytest.mark.parametrize("name", ["phi", pytest.param("qwen3-moe", marks=pytest.mark.slow)])
def test_all_weights(name, tmp_path, monkeypatch) -> None:
    """Full fine-tuning of every role: an output layer of its own with a bias, and experts."""
    full = [f"{stage}.tuning=full" for stage in ("sft", "reward", "ppo")]
    run = run_chain(tmp_path, name, monkeypatch, *full, "ppo.keep=best")
    rows = samples(run / "ppo")
    start = plain_model(run / "sft/artifact/model")
    assert_logprobs(start, rows, "ref_logprobs")
    assert_logprobs(start, [row for row in rows if row["iteration"] == 1], "logprobs")
    reward = run / "reward/artifact"
    assert_scores(plain_model(reward / "model"), load_file(reward / "head.safetensors"), rows)
    assert_exported(run, plain_model(run / "export/merged"), rows)
    exported = load_file(run / "sft/artifact/model/model.safetensors")
    base = load_file(tmp_path / "base/model.safetensors")
    assert exported.keys() == base.keys()
    moved = {key for key in base if not torch.equal(exported[key], base[key])}
    assert "lm_head.bias" in moved if name == "phi" else any(".experts." in key for key in moved)


def test_conversations_without_a_template(tmp_path, monkeypatch) -> None:
    """They are rendered with the plain template, which the export has then, and says so."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]
    run = run_chain(tmp_path, "gpt-neox", monkeypatch, "data.max_prompt_tokens=48", rows=rows)
    sampled = assert_chain(run)
    assert all(row["prompt"].startswith("\n\nHuman: say ") for row in sampled)
    tokenizer = AutoTokenizer.from_pretrained(run / "export/adapter")
    turns = [{"role": "user", "content": "say good 3"}]
    shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert shown == "\n\nHuman: say good 3\n\nAssistant:"
    codec = json.loads((run / "ppo/artifact/tokenizer/codec.json").read_text())
    assert (codec["template_source"], codec["rendered_turns"]) == ("plain", True)
    assert "as a plain transcript" in (run / "export/adapter/README.md").read_text()
