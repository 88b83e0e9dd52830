"""The command line in this process, on models so small that a stage takes a second."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from stages.cli import app

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "per_second")


def head(
    name: str,
    *,
    width: int = 32,
    layers: int = 2,
    dtype: str = "float32",
    lora: str = "{rank: 4, alpha: 8}",
    limits: tuple[int, int, int] = (60, 40, 60),  # demonstrations, rankings, prompts
    max_prompt_tokens: int = 96,
) -> str:
    """A configuration up to its stages: a small model, and files of the built-in task."""
    demonstrations, rankings, prompts = limits
    files = f"{ROOT}/data/quickstart"
    return f"""
run: {{name: {name}, trackers: [], device: cpu}}
model:
  init: config
  dtype: {dtype}
  vocabulary_size: 400
  architecture:
    {{hidden_size: {width}, num_hidden_layers: {layers}, num_attention_heads: 2,
      intermediate_size: {2 * width}, max_position_embeddings: 128}}
lora: {lora}
data:
  demonstrations: {{path: "{files}/demonstrations.jsonl", limit: {demonstrations}}}
  rankings: {{path: "{files}/rankings.jsonl", limit: {rankings}}}
  prompts: {{path: "{files}/prompts.jsonl", limit: {prompts}}}
  held_out_fraction: 0.25
  max_prompt_tokens: {max_prompt_tokens}
  max_response_tokens: 24
"""


SMALLEST = head(
    "r", width=16, layers=1, lora="{rank: 2, alpha: 4}", limits=(40, 20, 40), max_prompt_tokens=64
)
CONFIG = f"""{SMALLEST}
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


def assert_close(one: Path, two: Path, tolerance: float = 1e-9) -> None:
    """The weights in all files of two folders agree."""
    paths = sorted(one.rglob("*.safetensors"))
    assert paths
    for path in paths:
        found = load_file(two / path.relative_to(one))
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


def assert_close_stage(
    one: Path, two: Path, tolerance: float = 1e-9, metrics: float = 1e-9
) -> None:
    """Two runs of a stage agree but for rounding: metrics, and the artifact's weights."""
    rows_of_one, rows_of_two = rows(one), rows(two)
    assert len(rows_of_one) == len(rows_of_two) >= 3
    for row, other in zip(rows_of_one, rows_of_two, strict=True):
        assert row.keys() == other.keys()
        for key, number in row.items():
            close = math.isclose(number, other[key], rel_tol=tolerance, abs_tol=metrics)
            assert close, (one.name, key, number, other[key])
    assert_close(one / "artifact", two / "artifact", tolerance)


def assert_same(stage: Path, whole: Path) -> None:
    """Two runs of a stage are equal: metrics, weights, samples and texts, bit for bit."""
    assert rows(stage) == rows(whole)
    names = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    assert names == {p.relative_to(stage) for p in stage.rglob("*") if p.is_file()}
    exact = [n for n in names if n.suffix in (".safetensors", ".parquet") or n.stem == "texts"]
    assert exact
    for name in exact:
        assert (stage / name).read_bytes() == (whole / name).read_bytes(), name
