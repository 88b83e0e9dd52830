"""What `rlhf check` predicts is what a run then has in memory and on disk, byte for byte."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from pipeline.config import ArchitectureSection
from pipeline.models.loading import build_from_config, train_tokenizer
from pipeline.resume import States
from pipeline.yaml_config import read_config
from stages.cli import app
from stages.config import RunConfig
from stages.memory import predicted_files

ROWS = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
CONFIG = """
run: {device: cpu, trackers: [], name: tiny}
model: {path: model}
data: {demonstrations: d.jsonl, rankings: r.jsonl, max_prompt_tokens: 16, max_response_tokens: 16}
lora: {rank: 2}
sft: {max_steps: 2, batch_size: 8, checkpoint_every: 1}
reward: {max_steps: 2, batch_size: 8, checkpoint_every: 1, normalisation: {num_samples: 4}}
ppo:
  iterations: 2
  checkpoint_every: 1
  rollout: {prompts_per_iteration: 8, max_new_tokens: 8}
  optim: {ppo_epochs: 1}
  held_out: {num_prompts: 2}
evaluation: {prompts: 2, max_new_tokens: 4, max_n: 2}
"""


@pytest.fixture
def rlhf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The command line in a folder with data, a config and a model with an output layer apart."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    tokenizer = train_tokenizer(["good bad"], 300)
    shape = ArchitectureSection(
        hidden_size=8, num_attention_heads=2, intermediate_size=16, tie_word_embeddings=False
    )
    build_from_config(shape, tokenizer, torch.float32).save_pretrained("model")
    tokenizer.save_pretrained("model")
    write("r.jsonl", ROWS)
    write("d.jsonl", [{"prompt": row["prompt"], "response": "x"} for row in ROWS])
    Path("c.yaml").write_text(CONFIG)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.stderr
        return " ".join(result.stdout.split())

    return run


def write(name: str, rows: list[dict[str, str]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def memory(stage: str) -> dict[str, Any]:
    return json.loads(Path(f"runs/tiny/{stage}/memory.json").read_text(encoding="utf-8"))


def on_disk(folder: Path) -> int:
    """Bytes of the tensors in a folder's weight files, but for AdamW's step counts."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [key for key in file.keys() if not key.startswith("step/")]  # noqa: SIM118
            tensors = [file.get_tensor(key) for key in names]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of the largest state that each stage left: they go when it has finished."""
    sizes: dict[str, int] = {}
    own = States._complete

    def complete(self: States, folder: Path, step: int, logged: int) -> None:
        (folder / "rank-0.safetensors").rename("random.safetensors")
        sizes[self.stage] = max(sizes.get(self.stage, 0), on_disk(folder))
        Path("random.safetensors").rename(folder / "rank-0.safetensors")
        own(self, folder, step, logged)

    monkeypatch.setattr(States, "_complete", complete)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("value", ["separate", "shared"])
@pytest.mark.parametrize(
    "tuned",
    [
        {"sft": "full", "reward": "lora", "ppo": "lora"},
        {"sft": "lora", "reward": "lora", "ppo": "lora"},
        {"sft": "lora", "reward": "full", "ppo": "full"},
        {"sft": "full", "reward": "lora", "ppo": "full", "ppo.reference.dtype": "bfloat16"},
    ],
    ids=["quickstart", "lora", "full", "full-bf16"],
)
def test_a_run_has_what_was_predicted(
    rlhf: Callable[..., str], states: dict[str, int], tuned: dict[str, str], value: str
) -> None:
    overrides = [f"{key if '.' in key else f'{key}.tuning'}={how}" for key, how in tuned.items()]
    overrides += [f"ppo.value={value}", "export.merged=true"]
    rlhf("run", "c.yaml", *overrides)
    for stage in ("sft", "reward", "ppo"):
        found = memory(stage)
        assert found["predicted"] == found["measured"], stage
        assert found["peak"]["resident"] > 10**8  # torch alone takes more
    config = read_config(Path("c.yaml"), overrides, RunConfig)
    files = predicted_files(config, ["sft", "reward", "ppo", "export"])
    for file in files:
        folder = Path("runs/tiny") / file.stage
        if "states" in file.what:
            # Two are kept, and one more is there while it is written.
            assert 3 * states[file.stage] == file.size, file
        elif file.what.startswith("checkpoints"):
            # The best and the last, which may be one.
            steps = list((folder / "checkpoints").iterdir())
            assert on_disk(folder / "checkpoints") * 2 == file.size * len(steps)
        else:
            assert on_disk(folder / file.what) == file.size, file
    shown = rlhf("show", "runs/tiny")
    assert "Each number is predicted / measured" in shown


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_goes_through_the_whole_chain(rlhf: Callable[..., str], bits: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = [f"{stage}.tuning=lora" for stage in ("sft", "reward", "ppo")]
    rlhf("run", "c.yaml", *lora, f"model.quantization={bits}", "export.merged=true")
    for stage in ("sft", "reward", "ppo"):
        found = memory(stage)
        assert found["predicted"] == found["measured"], stage
    # The export is plain: the adapter on the base as it is on disk is the merged model.
    base = AutoModelForCausalLM.from_pretrained("model")
    adapted = PeftModel.from_pretrained(base, "runs/tiny/export/adapter")
    merged = AutoModelForCausalLM.from_pretrained("runs/tiny/export/merged")
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in (merged, adapted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_value_warm_up_does_not_spoil_the_measurement(rlhf: Callable[..., str]) -> None:
    rlhf("run", "c.yaml", "ppo.optim.value_warmup_iterations=1", "reward.tuning=lora")
    found = memory("ppo")
    assert found["predicted"] == found["measured"]
    assert found["measured"]["policy"]["optimiser"] > 0


def test_check_predicts_memory_and_disk(rlhf: Callable[..., str]) -> None:
    out = rlhf("check", "c.yaml")
    assert "ppo policy" in out or "ppo base" in out
    assert "Each number is predicted; activations and rollouts come on top." in out
    assert "checkpoints: the best policy and the last" in out
    assert " are free in runs" in out
    assert not Path("runs").exists()


def test_check_warns_of_a_disk_that_is_too_small(
    rlhf: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.check.free_disk", lambda folder: 5)
    out = rlhf("check", "c.yaml", "run.folder=elsewhere/runs")
    assert "warning: " in out and "do not fit in elsewhere/runs" in out
    assert "make room, or set run.folder to another disk" in out


def test_models_that_the_config_names_are_counted(rlhf: Callable[..., str]) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    shape = AutoConfig.from_pretrained("model", num_labels=1, pad_token_id=0)
    judge = AutoModelForSequenceClassification.from_config(shape)
    judge.save_pretrained("judge")
    size = sum(p.numel() * 4 for p in judge.parameters())
    size += sum(b.numel() * 4 for b in judge.buffers())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"model/{name}", f"judge/{name}")
    overrides = ["ppo.policy=model", "ppo.rewards=judge", "ppo.tuning=full"]
    rlhf("ppo", "c.yaml", *overrides)
    found = memory("ppo")
    assert found["predicted"] == found["measured"]
    assert found["measured"]["reward"] == {"weights": size, "gradients": 0, "optimiser": 0}
    # A policy of that run, as another one starts from it.
    rlhf("ppo", "c.yaml", "ppo.policy=runs/tiny/ppo", "ppo.rewards=judge", "run.name=second")
    second = json.loads(Path("runs/second/ppo/memory.json").read_text(encoding="utf-8"))
    assert second["predicted"] == second["measured"]
