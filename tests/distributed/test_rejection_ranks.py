"""Rejection sampling by two processes (gloo), by DDP and by FSDP2, against one process: 1e-9."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_pipeline_ranks import LAUNCHES, rlhf
from tests.tiny_chain import assert_close_stage, head, rows, samples

pytestmark = pytest.mark.slow

# 5 prompts an iteration, 3 and 2 a process, with 4 responses each; of the 10 kept, 5 a minibatch.
CONFIG = f"""{head("one", dtype="float64")}
sft: {{max_steps: 8, batch_size: 5, micro_batch_tokens: 200, optim: {{learning_rate: 5.0e-3}}}}
reward: {{max_steps: 4, batch_size: 5, optim: {{learning_rate: 5.0e-3}}}}
ppo:
  algorithm: rejection_sampling
  iterations: 3
  keep: last
  rejection: {{keep: 2}}
  rollout: {{prompts_per_iteration: 5, responses_per_prompt: 4, max_new_tokens: 12}}
  optim:
    {{learning_rate: 5.0e-3, ppo_epochs: 2, minibatches: 2, micro_batch_tokens: 120,
      ptx_coef: 0.1, entropy_coef: 0.01}}
  held_out: {{every: 2, num_prompts: 5}}
evaluation: {{prompts: 5, max_new_tokens: 4}}
"""


@pytest.mark.parametrize(
    ("tuning", "strategy"),
    [
        ("lora", "DDP"),
        ("full", "FSDP2"),
        ("full", "DDP"),
    ],
)
def test_two_processes_compute_what_one_does(tuning: str, strategy: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    asked = [f"ppo.tuning={tuning}", "reward.tuning=lora"]
    for stage in ("sft", "reward"):
        done = rlhf(tmp_path, stage, "c.yaml", *asked, "run.name=one")
        assert done.returncode == 0, done.stdout + done.stderr
    for name, launch in (("one", []), ("two", LAUNCHES[strategy])):
        own = [f"run.name={name}", "--from", "runs/one"] if name == "two" else []
        done = rlhf(tmp_path, "ppo", "c.yaml", *asked, *own, *launch)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = tmp_path / "runs/one/ppo", tmp_path / "runs/two/ppo"
    assert_close_stage(one, two)
    for path in (one, two):
        kept = [row for row in samples(path) if any(row["advantages"])]
        assert len(samples(path)) == 3 * 5 * 4 and len(kept) == 3 * 5 * 2
        roles = json.loads((path / "memory.json").read_text())["measured"]
        assert "policy" in roles and "value" not in roles
        assert rows(path)[1]["kept_responses"] == 10
