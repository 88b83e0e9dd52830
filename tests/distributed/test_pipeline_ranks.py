"""The whole chain by two processes (gloo), by DDP and by FSDP2, against one process.

Everything is in float64: rollouts agree token for token, losses and weights to 1e-9. Sums over
processes are added in another order, so that they are not bit-equal.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny_chain import ROOT, assert_close, assert_close_stage, head, rows, samples

# 9 prompts an iteration: 5 and 4 a process; 3 rows a minibatch, of which a process may have none.
# 5 rankings and 5 demonstrations a step: 3 and 2, with smaller steps at the end of a pass.
CONFIG = f"""{head("one", dtype="float64")}
sft: {{max_steps: 11, batch_size: 5, micro_batch_tokens: 200, optim: {{learning_rate: 5.0e-3}}}}
reward:
  {{max_steps: 8, batch_size: 5, micro_batch_tokens: 500, optim: {{learning_rate: 5.0e-3}},
    normalisation: {{num_samples: 7}}}}
ppo:
  iterations: 3
  keep: last
  rollout: {{prompts_per_iteration: 9, max_new_tokens: 12}}
  optim:
    {{learning_rate: 5.0e-3, ppo_epochs: 2, minibatches: 3, micro_batch_tokens: 120,
      ptx_coef: 0.1, entropy_coef: 0.01, value_warmup_iterations: 1}}
  held_out: {{every: 2, num_prompts: 5}}
evaluation: {{prompts: 5, max_new_tokens: 4}}
export: {{merged: true}}
"""
FORMS = {
    "full": ["sft.tuning=full", "reward.tuning=full", "ppo.tuning=full", "ppo.value=separate"],
    "full-shared": ["sft.tuning=full", "reward.tuning=full", "ppo.tuning=full", "ppo.value=shared"],
    "lora": [
        "sft.tuning=full",
        "reward.tuning=lora",
        "ppo.tuning=lora",
        "ppo.value=separate",
        "ppo.keep=best",
    ],
    "lora-shared": ["sft.tuning=full", "reward.tuning=lora", "ppo.tuning=lora", "ppo.value=shared"],
    "lora-encoder-decoder": [
        "model.architecture.model_type=bart",
        # A process draws dropout of its own.
        "model.architecture.extra={dropout: 0.0, attention_dropout: 0.0}",
        "sft.tuning=full",
        "reward.tuning=lora",
        "ppo.tuning=lora",
    ],
}
LAUNCHES = {
    "DDP": ["--launch", "cpu2"],
    "FSDP2": ["--launch", "fsdp2", "--processes", "2", "run.device=cpu"],
}
SLOW = [
    ("full", "DDP"),
    ("lora", "FSDP2"),
    ("lora-shared", "FSDP2"),
    ("full-shared", "FSDP2"),
    ("lora-shared", "DDP"),
    ("full-shared", "DDP"),
    ("lora-encoder-decoder", "DDP"),
    ("lora-encoder-decoder", "FSDP2"),
]


RLHF = [sys.executable, "-m", "stages"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def rlhf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RLHF, *arguments],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((form, strategy), marks=[pytest.mark.slow] * ((form, strategy) in SLOW))
        for form in FORMS
        for strategy in LAUNCHES
    ],
    ids="-".join,
)
def runs(request, tmp_path_factory):
    """A folder with `runs/one` and `runs/two`, by one process and by two; and what two printed."""
    name, strategy = request.param
    folder = tmp_path_factory.mktemp(name)
    (folder / "c.yaml").write_text(CONFIG)
    form = FORMS[name]
    done = [
        rlhf(folder, verb, "c.yaml", *form, "run.name=one")
        for verb in ("sft", "reward", "ppo", "evaluate", "export")
    ]
    done.append(rlhf(folder, "run", "c.yaml", *form, "run.name=two", *LAUNCHES[strategy]))
    for one in done:
        assert one.returncode == 0, one.stdout + one.stderr
    return folder / "runs", done[-1].stdout + done[-1].stderr, strategy


def test_two_processes_compute_what_one_does(runs):
    folder, *_ = runs
    for stage in ("sft", "reward", "ppo"):
        assert_close_stage(folder / "one" / stage, folder / "two" / stage)


def test_what_is_exported_is_the_same(runs):
    folder, *_ = runs
    assert any("merged" in path.parts for path in (folder / "one/export").rglob("*.safetensors"))
    assert_close(folder / "one/export", folder / "two/export")


def test_memory_is_that_of_one_process(runs):
    folder, _, strategy = runs
    if folder.parent.name.startswith("lora"):
        pytest.skip("adapters on a float64 base are predicted as float32")
    share = 2 if strategy == "FSDP2" else 1
    for stage in ("sft", "reward", "ppo"):
        paths = (folder / name / stage / "memory.json" for name in ("one", "two"))
        one, two = (json.loads(path.read_text()) for path in paths)
        assert two["processes"]["number"] == 2
        for part in ("weights", "gradients", "optimiser"):
            accounts = (one["measured"], two["predicted"], two["measured"])
            whole, *own = (sum(cost[part] for cost in x.values()) for x in accounts)
            # To rows that do not divide by two, and heads.
            assert own == pytest.approx([whole / share] * 2, rel=0.01), (stage, part)


def test_the_evaluation_is_divided_and_the_same(runs):
    folder, *_ = runs
    one, two = (json.loads((folder / name / "evaluation/metrics.json").read_text())
                for name in ("one", "two"))  # fmt: skip
    for name, numbers in one["policies"].items():
        assert numbers == pytest.approx(two["policies"][name], rel=1e-9, abs=1e-9), name
    assert one["win_rate"] == two["win_rate"]
    assert one["policies"]["sft"]["n"] == 5  # 3 and 2 a process


def responses(run: Path) -> dict[int, tuple]:
    """Of each sample of PPO: iteration, prompt ids, response ids, whether it ended."""
    return {
        row["sample_index"]: tuple(
            row[name] for name in ("iteration", "prompt_ids", "response_ids", "ended")
        )
        for row in samples(run / "ppo")
    }


def test_rollouts_agree_token_for_token(runs):
    folder, *_ = runs

    one, two = (responses(folder / name) for name in ("one", "two"))
    assert one == two and len(two) == 3 * 9
    assert {path.name[:5] for path in (folder / "two/ppo/samples").iterdir()} == {"rank0", "rank1"}


def test_two_processes_speak_once(runs):
    _, output, strategy = runs
    assert output.count(f"2 processes on cpu, {strategy}") == 5  # all stages, export the last
    for words in ("supervised fine-tuning ─", "reward model ─", "✓ ppo", "Look at the run with"):
        assert output.count(words) == 1, output
    assert "Warning" not in output


def test_a_killed_process_brings_all_down(tmp_path):
    with training(tmp_path) as (launcher, processes):
        begin = time.monotonic()
        os.kill(processes[1], signal.SIGKILL)
        _, errors = launcher.communicate(timeout=90)
    assert time.monotonic() - begin < 60
    assert launcher.returncode == 2
    assert errors.count("error: rank 1 was ended by SIGKILL") == 1, errors
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes.values())


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["rank 1", "launcher"])
def test_all_processes_stop_after_the_same_step(tmp_path, asked):
    with training(tmp_path) as (launcher, processes):
        os.kill(processes[1] if asked == "rank 1" else launcher.pid, signal.SIGTERM)
        out, errors = launcher.communicate(timeout=90)
    assert launcher.returncode == 128 + signal.SIGTERM, out + errors
    (state,) = (tmp_path / "runs/one/sft/checkpoints").glob("state-*")
    manifest = json.loads((state / "manifest.json").read_text())
    assert manifest["summary"]["processes"] == 2
    step = manifest["summary"]["step"]
    assert errors.count(f"SFT: stopped after step {step}, as asked") == 1, errors
    assert "Traceback" not in errors


@contextmanager
def training(folder: Path) -> Iterator[tuple[subprocess.Popen[str], dict[int, int]]]:
    """SFT by two processes, under way: the launcher, and the process id of each rank."""
    (folder / "c.yaml").write_text(CONFIG)
    settings = ["sft.max_steps=100000", "sft.log_every=1", "sft.checkpoint_every=100000"]
    with subprocess.Popen(
        [*RLHF, "sft", "c.yaml", *settings, "--launch", "cpu2"],
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as launcher:  # fmt: skip
        metrics = folder / "runs/one/sft/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.stat().st_size == 0:
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        processes = {rank_of(pid): pid for pid in children(launcher.pid)}
        assert processes.keys() == {0, 1}
        yield launcher, processes


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK="))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "strategy"), [("lora", "DDP"), ("lora", "FSDP2"), ("full", "FSDP2")]
)
def test_two_killed_processes_go_on_as_if_they_had_not_been(tmp_path, form, strategy):
    (tmp_path / "c.yaml").write_text(CONFIG)
    form = [*FORMS[form], "ppo.checkpoint_every=1", "model.dtype=float32"]
    two = LAUNCHES[strategy]
    for stage in ("sft", "reward"):
        made = rlhf(tmp_path, stage, "c.yaml", *form, "run.name=parents", *two)
        assert made.returncode == 0, made.stdout + made.stderr
    ppo = ["ppo", "c.yaml", *form, "--from", "runs/parents"]
    assert rlhf(tmp_path, *ppo, "run.name=whole", *two).returncode == 0
    killing = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    killing += ["-m", "tests.killing", "stages.ppo.run:Training.update", "3"]
    for name in ("two", "alone"):
        arguments = [*ppo, f"run.name={name}", "run.device=cpu"]
        asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if strategy == "FSDP2" else {}
        subprocess.run(
            [*killing, *arguments],
            cwd=tmp_path, env=ENVIRONMENT | asked, capture_output=True, timeout=120,
        )  # fmt: skip
    done = rlhf(tmp_path, *ppo, "run.name=two", *two)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after step 2" in done.stdout
    for path in sorted((tmp_path / "runs/whole/ppo").rglob("*")):
        if path.suffix in (".safetensors", ".parquet"):
            other = tmp_path / "runs/two/ppo" / path.relative_to(tmp_path / "runs/whole/ppo")
            assert other.read_bytes() == path.read_bytes(), path.name
    # What two left, one takes up: not bit for bit, and it says so.
    done = rlhf(tmp_path, *ppo, "run.name=alone")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after step 2" in done.stdout
    assert "the state is of another number of processes" in done.stdout
    assert [row["step"] for row in rows(tmp_path / "runs/alone/ppo")] == [0, 1, 2, 3]
