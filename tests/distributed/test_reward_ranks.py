"""Lists of rewards in two processes: the same numbers as in one, and faults that end both."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_chain import CONFIG, ROOT, rlhf, rows, samples

pytestmark = pytest.mark.slow
LIST = """
    - {model: own, weight: 0.5}
    - f.py:vowels
    - f.py:some
    - {ensemble: [own, {builtin: length_penalty, target: 3}], combine: mean_minus_std}"""
FUNCTIONS = """
import os
def vowels(completions, **rest):
    if os.environ.get("FAULT") == "error" and os.environ["RANK"] == "1":
        raise ValueError("no")
    return [sum(text.count(c) for c in "aeiou") for text in completions]
async def some(completions, **rest):
    fault = os.environ.get("FAULT") == "nan" and os.environ["RANK"] == "1"
    scores = [1.0 if len(text) % 2 else None for text in completions]
    return [*scores[:-1], float("nan")] if fault else scores
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    config = CONFIG.replace("rewards: judge.py:score", f"rewards:{LIST}")
    # Rollouts of one process and of two agree token for token in float64.
    (folder / "c.yaml").write_text(config.replace("dtype: float32", "dtype: float64"))
    (folder / "f.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("sft", "reward"):
            rlhf(stage, "run.name=parents")
    return folder


def ppo(folder: Path, name: str, *arguments: str, fault: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stages", "ppo", "c.yaml", f"run.name={name}"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    return subprocess.run(
        [*command, "--from", "runs/parents", *arguments],
        cwd=folder, env=os.environ | environment | {"FAULT": fault}, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip


def test_two_processes_log_the_same_scores_by_source(folder):
    for name, launch in (("one", []), ("two", ["--launch", "cpu2"])):
        done = ppo(folder, name, "ppo.iterations=2", *launch)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (rows(folder / f"runs/{name}/ppo") for name in ("one", "two"))
    names = ["own", "vowels", "some", "ensemble", "own-2", "length_penalty"]
    keys = {f"scores/{name}/{what}" for name in names for what in ("mean", "std")}
    assert keys | {f"held_out_{key}" for key in keys} <= one[1].keys() | {
        "scores/some/mean", "scores/some/std"
    }  # fmt: skip
    for line, other in zip(one, two, strict=True):
        assert line.keys() == other.keys()
        for key in line:
            assert line[key] == pytest.approx(other[key], rel=1e-8, abs=1e-8), key
    scored = [
        sorted((row["sample_index"], *(row[f"scores/{name}"] for name in names[:2]))
               for row in samples(folder / f"runs/{name}/ppo"))
        for name in ("one", "two")
    ]  # fmt: skip
    assert scored[0] == [pytest.approx(row) for row in scored[1]]


@pytest.mark.parametrize("launch", ["cpu2", "fsdp2"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", "reward f.py:vowels raised ValueError: no"),
        ("nan", "reward some returned nan for 1 of"),
    ],
)
def test_a_source_that_fails_in_one_process_ends_both(folder, launch, fault, message):
    """FSDP2: the reward model's weights lie over both, so that neither may leave its pass out."""
    began = time.monotonic()
    processes = ["--processes", "2"] * (launch == "fsdp2")
    name = f"{launch}-{fault}"
    done = ppo(folder, name, "--launch", launch, *processes, fault=fault)
    assert time.monotonic() - began < 150
    assert done.returncode == 2, done.stdout + done.stderr
    text = done.stderr.replace(f"{folder}/", "")
    assert text.count(message) == 1 and "Traceback" not in text, text
