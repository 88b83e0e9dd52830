"""Rankings a second of reward training: K responses at once, against TRL's RewardTrainer on pairs.

Both train the same Llama (4 layers, 256 wide, random weights) in full, float32, AdamW, on the same
rankings in the same order, the same number of rankings an optimiser step and of tokens a forward
pass. TRL gets every ranking expanded to its K(K-1)/2 pairs, already tokenised. All rows are equally
long, so that nobody pads. The losses of all steps are compared: both must have trained the same.

Each run is a process of its own; runs alternate, and the first step of each, which warms up, is
left out. The table shows medians over all timed steps, with the range over runs. Processor seconds
stand beside wall time: they hold on a machine that does other work as well.

    python benchmarks/reward_vs_trl.py [--quick] [--k K] [--rounds N] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

VOCABULARY = 8192
LEARNING_RATE = 1e-4
SEED = 1
TARGETS = {4: 2.5, 9: 5.0}  # times as many rankings a second as TRL
LOSS_TOLERANCE = 1e-3  # float32 with different batch shapes; wrong pairs differ by 1e-1


@dataclass(frozen=True)
class Setting:
    """One comparison."""

    k: int  # responses a ranking
    rankings_per_step: int
    steps: int  # the first one is not timed
    layers: int
    width: int
    prompt_tokens: int = 64
    response_tokens: int = 64

    @property
    def row_tokens(self) -> int:
        """Tokens of a prompt with one response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def pairs(self) -> int:
        """Pairs of a ranking."""
        return self.k * (self.k - 1) // 2

    @property
    def micro_batch_rows(self) -> int:
        """Rows a forward pass: as near 96 as whole rankings' pairs allow."""
        return max(1, 96 // (2 * self.pairs)) * 2 * self.pairs


def settings(quick: bool) -> list[Setting]:
    """The comparisons of a run."""
    size = (
        {"layers": 2, "width": 128, "steps": 3}
        if quick
        else {"layers": 4, "width": 256, "steps": 4}
    )
    return [Setting(4, 8, **size), Setting(9, 4, **size)]


def make_rankings(setting: Setting) -> list[Any]:
    """Random token ids in a random order of preference."""
    import random

    from stages.reward.rankings import EncodedRanking

    rng = random.Random(SEED)

    def ids(count: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(count)]

    return [
        EncodedRanking(
            prompt_ids=ids(setting.prompt_tokens),
            response_ids=[ids(setting.response_tokens) for _ in range(setting.k)],
            ranks=tuple(rng.sample(range(setting.k), setting.k)),
            ratings=None,
            annotator=None,
        )
        for _ in range(setting.rankings_per_step * setting.steps)
    ]


def make_model(setting: Setting) -> tuple[Any, Any]:
    """The same weights whenever it is called: a causal model, and a scalar head for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.models.heads import ScalarHead

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setting.width,
        intermediate_size=11 * setting.width // 4,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.width // 64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    head = ScalarHead(setting.width)
    head.init_normal(torch.Generator().manual_seed(SEED))
    return LlamaForCausalLM(config), head


def step_timer() -> Any:
    """A Trainer callback that notes when each optimiser step ended, in wall and processor time."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append((time.perf_counter(), time.process_time()))

    return Timer()


def run_ours(setting: Setting, folder: Path) -> dict[str, Any]:
    """Train K-wise."""
    from pipeline.config import RunSection
    from pipeline.models.origin import BaseOrigin
    from pipeline.models.trunk import Handle, Role, Trunk
    from stages.reward.config import RewardSection
    from stages.reward.rankings import RankingRows
    from stages.reward.trainer import RankingTrainer

    model, head = make_model(setting)
    trunk = Trunk(model, BaseOrigin("benchmark", "random"))
    trunk.add_head("reward", head)
    section = RewardSection.model_validate(
        {
            "batch_size": setting.rankings_per_step,
            "micro_batch_tokens": setting.micro_batch_rows * setting.row_tokens,
            "optim": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
            "log_every": 1,
        }
    )
    losses: list[float] = []
    trainer = RankingTrainer(
        Handle(trunk, Role("reward", None, "reward"), codec=None),  # type: ignore[arg-type]
        section,
        RunSection(device="cpu", seed=SEED),
        folder,
        RankingRows(make_rankings(setting), pad_id=0),
        None,
        lambda _step, metrics: losses.append(metrics["loss"]),
    )
    timer = step_timer()
    trainer.add_callback(timer)
    trainer.fit()
    return {"ends": timer.ends, "losses": losses}


def run_trl(setting: Setting, folder: Path) -> dict[str, Any]:
    """Train on pairs, in the order that ours has."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    from pipeline.row_order import plan_steps
    from stages.reward.rankings import RankingRows

    rankings = make_rankings(setting)
    rows = RankingRows(rankings, pad_id=0)
    plan = plan_steps(rows.lengths, setting.rankings_per_step, 1, SEED)
    pairs = []
    for index in (index for step in plan.steps for index in step):
        ranking = rankings[index]
        for i, j in combinations(range(setting.k), 2):
            best, worst = (i, j) if ranking.ranks[i] < ranking.ranks[j] else (j, i)
            pairs.append(
                {
                    "chosen_ids": ranking.prompt_ids + ranking.response_ids[best],
                    "rejected_ids": ranking.prompt_ids + ranking.response_ids[worst],
                }
            )
    causal, head = make_model(setting)
    causal.config.num_labels = 1
    model = LlamaForSequenceClassification(causal.config)
    model.model.load_state_dict(causal.model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(head.weight.unsqueeze(0))
    words = {"<pad>": 0, "<end>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
    )
    pairs_per_step = setting.rankings_per_step * setting.pairs
    args = RewardConfig(
        output_dir=str(folder),
        per_device_train_batch_size=setting.micro_batch_rows // 2,
        gradient_accumulation_steps=2 * pairs_per_step // setting.micro_batch_rows,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        bf16=False,
        activation_checkpointing=False,  # on by default in TRL, and a third more work; ours is off
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    timer = step_timer()
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=[timer],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"ends": timer.ends, "losses": losses}


SIDES = {"ours": run_ours, "trl": run_trl}


def work(side: str, setting: Setting, out: Path) -> None:
    """One run, in this process; its numbers go to `out`."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        result = SIDES[side](setting, Path(folder))
    steps = list(pairwise(result["ends"]))
    out.write_text(
        json.dumps(
            {
                "wall_seconds": [after[0] - before[0] for before, after in steps],
                "cpu_seconds": [after[1] - before[1] for before, after in steps],
                "losses": result["losses"],
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


def run_in_process(side: str, setting: Setting) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [
            sys.executable,
            __file__,
            "--worker",
            side,
            json.dumps(asdict(setting)),
            str(out),
        ]
        # Threads that wait for one another sleep instead of spinning: on a machine that does other
        # work as well, spinning takes the time of the thread waited for, on both sides.
        environ = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
        done = subprocess.run(command, capture_output=True, text=True, env=environ)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stdout}\n{done.stderr}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def compare(setting: Setting, rounds: int) -> dict[str, Any]:
    """Alternate the two sides; medians and ranges, and how far their losses are apart."""
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": []}
    for _ in range(rounds):
        for side in runs:
            runs[side].append(run_in_process(side, setting))
    losses = {side: results[0]["losses"] for side, results in runs.items()}
    distance = max(abs(a - b) for a, b in zip(losses["ours"], losses["trl"], strict=True))
    if distance > LOSS_TOLERANCE:
        sys.exit(f"K={setting.k}: the two did not train the same: losses {losses}")
    rankings = setting.rankings_per_step
    row: dict[str, Any] = {"setting": asdict(setting), "largest_loss_difference": distance}
    for side, results in runs.items():
        row[side] = {
            "rankings_per_second": spread([rankings / t for t in step_times(results, "wall")]),
            "rankings_per_cpu_second": spread([rankings / t for t in step_times(results, "cpu")]),
            "peak_rss_mb": statistics.median(result["peak_rss_mb"] for result in results),
        }
    for kind in ("wall", "cpu"):
        medians = {s: statistics.median(step_times(results, kind)) for s, results in runs.items()}
        by_round = [
            statistics.median(theirs[f"{kind}_seconds"])
            / statistics.median(ours[f"{kind}_seconds"])
            for theirs, ours in zip(runs["trl"], runs["ours"], strict=True)
        ]
        row[f"{kind}_ratio"] = {
            "median": medians["trl"] / medians["ours"],
            "low": min(by_round),
            "high": max(by_round),
        }
    target = TARGETS[setting.k]
    return row | {"target": target, "reached": row["wall_ratio"]["median"] >= target}


def step_times(results: list[dict[str, Any]], kind: str) -> list[float]:
    """Seconds of every timed step of every run."""
    return list(chain.from_iterable(result[f"{kind}_seconds"] for result in results))


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    packages = ("torch", "transformers", "trl", "accelerate")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 1),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison in Markdown."""

    def cell(numbers: dict[str, float], digits: int) -> str:
        middle, low, high = (f"{numbers[k]:.{digits}f}" for k in ("median", "low", "high"))
        return f"{middle} ({low} to {high})"

    lines = [
        "| K | TRL, rankings/s | ours, rankings/s | ratio | ratio in processor time | target "
        "| TRL, MB | ours, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        trl, ours = row["trl"], row["ours"]
        lines.append(
            f"| {row['setting']['k']} | {cell(trl['rankings_per_second'], 2)} "
            f"| {cell(ours['rankings_per_second'], 2)} | {cell(row['wall_ratio'], 2)} "
            f"| {cell(row['cpu_ratio'], 2)} | {row['target']} "
            f"| {trl['peak_rss_mb']:.0f} | {ours['peak_rss_mb']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare, print the table, exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer runs")
    parser.add_argument("--k", type=int, choices=TARGETS, help="this comparison only")
    parser.add_argument("--rounds", type=int, help="runs of each side (default: 3, quick: 2)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, setting, out = options.worker
        work(side, Setting(**json.loads(setting)), Path(out))
        return
    about = environment()
    rounds = options.rounds or (2 if options.quick else 3)
    chosen = [one for one in settings(options.quick) if options.k in (None, one.k)]
    rows = [compare(setting, rounds) for setting in chosen]
    print(table(rows))
    numbers = {"environment": about, "comparisons": rows}
    print(json.dumps(numbers, indent=2))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")
    sys.exit(0 if all(row["reached"] for row in rows) else 1)


if __name__ == "__main__":
    main()
