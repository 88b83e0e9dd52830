"""Faults that one process of two meets: both end, or both go back, and neither waits for ever."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import NEEDS_DEEPSPEED
from tests.tiny_chain import ROOT, rlhf, rows, write_config

pytestmark = pytest.mark.slow
# NaN from the third call on, for the last row of rank 1: held-out prompts are scored first, then
# the rollouts of iterations 1 and 2. With FAULTS=1 that one call is the only one.
JUDGE = """
import os
calls = 0
def score(completions, **rest):
    global calls; calls += 1
    bad = os.environ["RANK"] == "1" and (calls == 3 if os.environ["FAULTS"] == "1" else calls > 2)
    scores = [float(len(text)) for text in completions]
    return [*scores[:-1], float(os.environ["SCORE"])] if bad else scores
"""


@pytest.fixture(
    params=[
        "cpu2",
        "fsdp2",
        pytest.param("deepspeed-zero2", marks=NEEDS_DEEPSPEED),
        pytest.param("deepspeed-zero3", marks=NEEDS_DEEPSPEED),
    ]
)
def two(request, tmp_path, monkeypatch, deepspeed_builds):
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    rlhf("sft", "run.name=parents")
    (tmp_path / "judge.py").write_text(JUDGE)

    def start(*arguments: str, faults: str, score: str = "nan") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stages", "ppo", "c.yaml", "--from", "runs/parents"]
        launch = ["--launch", request.param, *(["--processes", "2"] * (request.param != "cpu2"))]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
        environment |= deepspeed_builds
        return subprocess.run(
            [*command, *arguments, "ppo.held_out.every=10", *launch], cwd=tmp_path,
            env=os.environ | environment | {"FAULTS": faults, "SCORE": score}, capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip

    return start


@pytest.mark.parametrize("code", [0, 2])
def test_a_command_leaves_the_process_group(tmp_path, code):
    """gloo's threads would outlive the interpreter and end some processes in SIGABRT."""
    write_config(tmp_path)
    (tmp_path / "ends.py").write_text(
        "import torch\n"
        "from stages.cli import main\n"
        "own, ended = torch.distributed.destroy_process_group, []\n"
        "torch.distributed.destroy_process_group = lambda: (own(), ended.append(1))\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    print(f'code {end.code}, left {ended}', flush=True)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    if code:  # the main process cannot write: all hear of it
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs/r").write_text("")
    done = subprocess.run(
        [*command, "ends.py", "sft", "c.yaml", "sft.max_steps=2"], cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.count(f"code {code}, left [1]") == 2, done.stdout + done.stderr


def left(stage: Path) -> list[dict]:
    return json.loads((stage / "not_finite.json").read_text())["rows"]


def test_a_score_of_one_process_ends_both(two, tmp_path, request):
    begin = time.monotonic()
    done = two("run.name=r", faults="many")
    # DeepSpeed's first start builds its extension: the limit of all runs here, 120 s, has to do.
    assert time.monotonic() - begin < 60 or "deepspeed" in request.node.callspec.id
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("ppo, rollouts of iteration 2: reward score returned nan") == 1
    assert "runs/r/ppo/not_finite.json" in done.stderr and "Traceback" not in done.stderr
    # Iteration 2 asks samples 4 to 7; rank 1 has 5 and 7.
    (row,) = left(tmp_path / "runs/r/ppo")
    assert row["sample_index"] == 7 and row["score"] == "nan" and row["prompt"]


def test_a_loss_of_one_process_ends_both(two, tmp_path):
    """A score whose square is not float32's: the value loss of that one row is infinite."""
    done = two("run.name=r", "ppo.advantage.whiten=false", faults="many", score="1e30")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("value_loss is not finite in iteration 2, epoch 0") == 1
    assert "among the samples [" in done.stderr and "Traceback" not in done.stderr
    assert 7 in [row["sample_index"] for row in left(tmp_path / "runs/r/ppo")]


def test_both_go_back_and_go_on(two, tmp_path):
    done = two("run.name=r", "ppo.stop.action=roll_back", faults="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ppo goes back to iteration 0") == 1
    found = rows(tmp_path / "runs/r/ppo")
    assert [row["step"] for row in found] == list(range(7))
    assert [row["rollbacks"] for row in found[1:]] == [1] * 6
