"""The command line in this process, on models so small that a stage takes a second."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
from typer.testing import CliRunner

from stages.cli import app

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "per_second")
CONFIG = f"""
run: {{name: r, trackers: [], device: cpu}}
model:
  init: config
  vocabulary_size: 400
  architecture:
    {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
      max_position_embeddings: 128}}
lora: {{rank: 2, alpha: 4}}
data:
  demonstrations: {{path: "{ROOT}/data/quickstart/demonstrations.jsonl", limit: 40}}
  rankings: {{path: "{ROOT}/data/quickstart/rankings.jsonl", limit: 20}}
  prompts: {{path: "{ROOT}/data/quickstart/prompts.jsonl", limit: 40}}
  held_out_fraction: 0.25
  max_prompt_tokens: 64
  max_response_tokens: 24
sft: {{max_steps: 6, batch_size: 4, checkpoint_every: 2, log_every: 1, eval_every: 3}}
reward:
  {{epochs: 3, max_steps: 6, batch_size: 4, checkpoint_every: 2, log_every: 1, eval_every: 3,
    normalisation: {{mode: none}}}}
ppo:
  iterations: 6
  checkpoint_every: 2
  rewards: judge.py:score
  rollout: {{prompts_per_iteration: 4, max_new_tokens: 8}}
  optim: {{learning_rate: 2.0e-2, ppo_epochs: 2, minibatches: 2}}
  held_out: {{every: 1, num_prompts: 3, num_texts: 2}}
evaluation: {{prompts: 4, max_new_tokens: 4}}
"""
JUDGE = """
def score(completions, **rest):
    return [text.count("e") - 0.05 * len(text) for text in completions]
"""


class Killed(BaseException):
    """Ends a run where SIGKILL would: nothing of ours catches it."""


def write_config(folder: Path) -> None:
    """`c.yaml` and `judge.py`, the reward that it names."""
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "judge.py").write_text(JUDGE)


def rlhf(stage: str, *arguments: str, code: int = 0) -> str:
    """What `rlhf STAGE c.yaml ARGUMENTS` prints; it must end with exit code `code`."""
    done = CliRunner().invoke(app, [stage, "c.yaml", *arguments], env={"COLUMNS": "500"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return str(done.output)


def rows(stage: Path) -> list[dict[str, Any]]:
    """The metrics of a stage, without times."""
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in found]


def samples(stage: Path) -> list[dict[str, Any]]:
    """All rollouts of a PPO stage."""
    paths = sorted((stage / "samples").glob("*.parquet"))
    return [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]


def states(stage: Path) -> list[str]:
    """The names of its states, the incomplete ones included."""
    return sorted(path.name for path in (stage / "checkpoints").glob("state-*"))


def assert_same(stage: Path, whole: Path) -> None:
    """Two runs of a stage are equal: metrics, weights, samples and texts, bit for bit."""
    assert rows(stage) == rows(whole)
    names = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    assert names == {p.relative_to(stage) for p in stage.rglob("*") if p.is_file()}
    exact = [n for n in names if n.suffix in (".safetensors", ".parquet") or n.stem == "texts"]
    assert exact
    for name in exact:
        assert (stage / name).read_bytes() == (whole / name).read_bytes(), name
