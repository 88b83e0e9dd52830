"""The fence with two processes (gloo): the same weights as one process, and as a plain loop.

Started by torchrun as a subprocess: a fork after torch has run would hang.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    assert done.stdout.count("both ended") == 2


def worker() -> None:
    from torch import Tensor, nn

    from pipeline.not_finite import NOT_FINITE, NotFinite
    from tests.unit.test_hf_trainer import (
        PointRows,
        Settings,
        SquaredError,
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

    class Spoilt(SquaredError):
        def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
            spoilt = self.runtime.rank == 1 and self.state.global_step == 2
            return super().loss_sum(model, batch) * (math.nan if spoilt else 1.0)

    with tempfile.TemporaryDirectory() as folder:
        module = linear()
        with pytest.raises(NotFinite, match="the loss is nan at step 3") as caught:
            fit(module, Path(folder), Settings(), trainer=Spoilt)
        # The main process writes the rows of rank 1, which it did not have.
        rows = caught.value.rows
        assert bool(rows) == (os.environ["RANK"] == "1")
        if not rows:
            assert json.loads((Path(folder) / NOT_FINITE).read_text())["rows"]
        two_steps = linear()
        fit(two_steps, Path(folder), Settings(max_steps=2))
        assert_same_weights(module, two_steps)
        print("both ended", flush=True)


if __name__ == "__main__":
    worker()
