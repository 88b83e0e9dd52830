"""The fence with two processes (gloo): the same weights as one process, and as a plain loop.

Started by torchrun as a subprocess: a fork after torch has run would hang.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_train_like_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.test_hf_trainer_ranks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same weights") == 4  # two processes, two batch sizes


def worker() -> None:
    from tests.unit.test_hf_trainer import (
        PointRows,
        Settings,
        assert_same_weights,
        by_hand,
        fit,
        linear,
    )

    # Steps of 5 rows split unequally (3 and 2); steps of 1 leave one process without a row.
    for batch_size in (5, 1):
        settings = Settings(batch_size=batch_size, micro_batch_tokens=60)
        module = linear()
        with tempfile.TemporaryDirectory() as folder:
            fit(module, Path(folder), settings, PointRows(7))
        assert_same_weights(module, by_hand(settings))
        print("same weights", flush=True)


if __name__ == "__main__":
    worker()
