"""Kills runs at random moments and starts them again: is anything lost, does anything differ?

A small chain (SFT, reward model, PPO, evaluation, export; a state after every step) runs once to
its end. Then the same run is started in other folders, killed by SIGKILL at random moments, started
again with the same command until it finishes, and compared: metrics (times apart), weights, samples
and texts have to be the same bytes. Every second run writes its states in the background.

    python benchmarks/kill_resume.py --kills 50
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = f"""
run: {{name: whole, trackers: [], device: cpu}}
model:
  init: config
  vocabulary_size: 400
  architecture:
    {{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128,
      max_position_embeddings: 192}}
lora: {{rank: 4, alpha: 8}}
data:
  demonstrations: {{path: "{ROOT}/data/quickstart/demonstrations.jsonl", limit: 200}}
  rankings: {{path: "{ROOT}/data/quickstart/rankings.jsonl", limit: 100}}
  prompts: {{path: "{ROOT}/data/quickstart/prompts.jsonl", limit: 100}}
  held_out_fraction: 0.25
  max_prompt_tokens: 96
  max_response_tokens: 48
sft:
  {{epochs: 2, batch_size: 8, checkpoint_every: 1, log_every: 1, optim: {{learning_rate: 2.0e-3}}}}
reward:
  {{epochs: 2, batch_size: 8, checkpoint_every: 1, log_every: 1, optim: {{learning_rate: 2.0e-3}}}}
ppo:
  iterations: 20
  checkpoint_every: 1
  rollout: {{prompts_per_iteration: 16, max_new_tokens: 24}}
  optim: {{learning_rate: 2.0e-3, ppo_epochs: 2, minibatches: 2}}
  held_out: {{every: 2, num_prompts: 8}}
  samples: {{rows_per_file: 100}}
evaluation: {{prompts: 16, max_new_tokens: 24}}
"""
TIMES = ("seconds", "per_second")
EXACT = (".safetensors", ".parquet")


def main() -> None:
    """Kill, start again, compare, and print what was found; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "c.yaml").write_text(CONFIG, encoding="utf-8")
        began = time.monotonic()
        if (code := start(folder, "whole", None)) != 0:
            sys.exit(f"the run that is not killed fails with exit code {code}")
        whole = time.monotonic() - began
        print(f"the run that is not killed takes {whole:.1f} s", flush=True)
        kills, runs, lost, differing = 0, 0, 0, 0
        stages: dict[str, int] = {}
        while kills < arguments.kills:
            runs += 1
            run = f"killed-{runs}"
            settings = [f"run.save_in_background={'true' if runs % 2 == 0 else 'false'}"]
            code = None
            while code is None and kills < arguments.kills:
                code = start(folder, run, moments.uniform(2.0, whole), settings)
                if code is None:
                    kills += 1
                    stage = newest_stage(folder / "runs" / run)
                    stages[stage] = stages.get(stage, 0) + 1
            if code is None:
                code = start(folder, run, None, settings)
            if code != 0:
                lost += 1
                print(f"{run}: lost, exit code {code}", flush=True)
                continue
            different = differences(folder / "runs/whole", folder / "runs" / run)
            differing += bool(different)
            print(
                f"{run}: {kills} kills so far, {len(different)} differences",
                *different[:5],
                flush=True,
            )
        print(f"kills {kills}, in {stages}; runs {runs}, lost {lost}, with differences {differing}")
        sys.exit(bool(lost or differing))


def start(
    folder: Path, run: str, kill_after: float | None, settings: Sequence[str] = ()
) -> int | None:
    """Run the chain; its exit code, or None if it was killed after so many seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "run", "c.yaml", f"run.name={run}", *settings],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def newest_stage(run: Path) -> str:
    """The stage that was at work."""
    stages = [s for s in ("sft", "reward", "ppo", "evaluation", "export") if (run / s).exists()]
    return stages[-1] if stages else "start"


def differences(whole: Path, run: Path) -> list[str]:
    """Files of the stages that are missing, or say something else than those of the whole run."""
    found = []
    for path in sorted(whole.rglob("*")):
        name = path.relative_to(whole)
        other = run / name
        if not path.is_file():
            continue
        if not other.exists():
            found.append(f"{name} is missing")
        elif name.name == "metrics.jsonl":
            found += [str(name)] * (timeless(path) != timeless(other))
        elif path.suffix in EXACT or name.name in ("texts.jsonl", "samples.jsonl"):
            found += [str(name)] * (path.read_bytes() != other.read_bytes())
    found += [f"{p.relative_to(run)} is left over" for p in run.rglob("state-*")]
    return found


def timeless(path: Path) -> list[dict[str, object]]:
    """Rows of metrics without times."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows]


if __name__ == "__main__":
    main()
