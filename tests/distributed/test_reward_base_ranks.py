"""Two processes (gloo) train a reward model on an encoder to what one does, in float64."""

import os
import subprocess
import sys

import pytest

from tests.tiny_chain import ROOT, assert_close_stage, head
from tests.tiny_encoders import save_encoder

pytestmark = pytest.mark.slow

# Without dropout, whose numbers each process draws for itself. 5 rankings a step: 3 and 2.
CONFIG = f"""{head("one", dtype="float64")}
reward:
  {{base: bert, pooling: mean, max_steps: 6, batch_size: 5, micro_batch_tokens: 300, log_every: 1,
    eval_every: 3, optim: {{learning_rate: 5.0e-3}}, normalisation: {{mode: none}}}}
ppo: {{rollout: {{max_new_tokens: 8}}}}
evaluation: {{max_new_tokens: 8}}
"""
LAUNCHES = {
    "DDP": ["--launch", "cpu2"],
    "FSDP2": ["--launch", "fsdp2", "--processes", "2", "run.device=cpu"],
}


@pytest.mark.parametrize(
    ("tuning", "strategy"),
    [
        ("full", "DDP"),
        ("lora", "DDP"),
        ("full", "FSDP2"),
        ("lora", "FSDP2"),
    ],
)
def test_two_processes_compute_what_one_does(tmp_path, tuning, strategy):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    save_encoder("bert", tmp_path / "bert", **dropout)
    (tmp_path / "c.yaml").write_text(CONFIG)
    for name, launch in (("one", []), ("two", LAUNCHES[strategy])):
        arguments = ["c.yaml", f"run.name={name}", f"reward.tuning={tuning}", *launch]
        done = subprocess.run(
            [sys.executable, "-m", "stages", "reward", *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "runs"
    assert_close_stage(runs / "one/reward", runs / "two/reward")
