"""A command line of TRL's ppo.py, converted, checked and run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

from pipeline.models.loading import train_tokenizer
from stages.cli import app

COMMAND = """accelerate launch --num_processes 1 ppo.py \\
    --dataset_name ./prompts.jsonl --output_dir models/tiny --use_cpu \\
    --sft_model_path ./policy --reward_model_path ./reward --model_name_or_path ./policy \\
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --total_episodes 20 \\
    --response_length 6 --missing_eos_penalty 0.5 --stop_token eos --bf16 false \\
    --num_mini_batches 2 --num_ppo_epochs 1 --num_sample_generations 1
"""


def rlhf(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout


def test_a_converted_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["a red lamp", "노란 우산"], 270)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=1024, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained("policy")
    LlamaForSequenceClassification(shape).save_pretrained("reward")
    for folder in ("policy", "reward"):
        tokenizer.save_pretrained(folder)
    rows = [{"prompt": f"lost {number} keys"} for number in range(60)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("ppo.sh").write_text(COMMAND)
    Path("ppo.yaml").write_text(rlhf("config", "--from-trl", "ppo.sh"))
    assert "everything is in order" in rlhf("check", "ppo.yaml")
    rlhf("ppo", "ppo.yaml")
    # 4 x 2 prompts an iteration, 20 / 8 = 2.5 of them: 3.
    assert yaml.safe_load(Path("ppo.yaml").read_text())["ppo"]["iterations"] == 3
    lines = Path("models/tiny/ppo/metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {0, 1, 2, 3}  # 0: before training
    assert Path("models/tiny/ppo/artifact/model/model.safetensors").is_file()
