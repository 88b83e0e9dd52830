"""Adapters on a mixture's experts by two processes (gloo), by DDP and by FSDP2, against one.

In float32: torch has no product of many experts at once in float64 on processors. Sums over
processes are added in another order.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import write_model, write_rows
from tests.tiny_chain import ROOT, assert_close, samples

CONFIG = """
run: {name: one, trackers: [], device: cpu}
model: {path: base}
lora: {rank: 2}
data:
  {demonstrations: d.jsonl, rankings: d.jsonl, max_prompt_tokens: 32, max_response_tokens: 16}
sft: {tuning: lora, max_steps: 3, batch_size: 5, optim: {learning_rate: 1.0e-2}}
reward: {tuning: lora, max_steps: 3, batch_size: 5, optim: {learning_rate: 1.0e-2}}
ppo:
  tuning: lora
  iterations: 2
  keep: last
  rollout: {prompts_per_iteration: 5, max_new_tokens: 8}
  optim: {ppo_epochs: 2, learning_rate: 1.0e-2}
  held_out: {num_prompts: 2, every: 2}
evaluation: {prompts: 2, max_new_tokens: 4, max_n: 2}
"""
LAUNCHES = {
    "DDP": ["--launch", "cpu2"],
    "FSDP2": ["--launch", "fsdp2", "--processes", "2", "run.device=cpu"],
}


def run_chain(folder: Path, name: str, *arguments: str) -> Path:
    """All stages under one launch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "stages", "run", "c.yaml", f"run.name={name}", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / name


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    write_model("qwen3-moe", folder / "base")
    write_rows(folder / "d.jsonl")
    (folder / "c.yaml").write_text(CONFIG)
    return run_chain(folder, "one")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_processes_train_the_same_experts(one: Path, launch: str) -> None:
    two = run_chain(one.parents[1], launch, *LAUNCHES[launch])
    for stage in ("sft", "reward", "ppo"):
        # Not the reward head: pairs say nothing of its bias, which follows rounding.
        adapter = f"{stage}/artifact/adapter"
        assert_close(one / adapter, two / adapter, 1e-4)  # steps of Adam move weights by 1e-2
    rows = [
        {row["sample_index"]: row["response_ids"] for row in samples(run / "ppo")}
        for run in (one, two)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 10
