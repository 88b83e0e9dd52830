"""Metrics reach their file whatever the trackers do."""

import io
import json
import math

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import PipelineError
from pipeline.tracking import Tracker


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_on_disk_at_once_and_bad_numbers_are_null(tmp_path):
    tracker = Tracker(tmp_path, "r", (), Console(quiet=True))
    tracker.log(1, {"loss": 0.5})
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5}]  # before close
    tracker.log(2, {"loss": math.nan, "score": math.inf})
    assert rows(tmp_path)[1] == {"step": 2, "loss": None, "score": None}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    tracker = Tracker(tmp_path, "r", ("tensorboard",), Console(quiet=True))
    for step, loss in [(1, 0.5), (2, 0.25)]:
        tracker.log(step, {"loss": loss})
    tracker.close()
    (events,) = tmp_path.rglob("events.*")
    accumulator = EventAccumulator(str(events.parent)).Reload()
    assert [(e.step, e.value) for e in accumulator.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_a_stage_without_metrics_leaves_no_files(tmp_path):
    Tracker(tmp_path, "r", ("tensorboard",), Console(quiet=True)).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["start", "log"])
def test_a_tracker_that_fails_is_dropped_with_one_message(tmp_path, monkeypatch, fails):
    class Offline:
        requires_logging_directory = False
        name = "wandb"

        def __init__(self, run_name):
            if fails == "start":
                raise ConnectionError("no route to host")

        def log(self, values, step):
            raise ConnectionError("no route to host")

        def finish(self):
            pass

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Offline)
    screen = io.StringIO()
    tracker = Tracker(tmp_path, "r", ("wandb",), Console(file=screen, width=200))
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert len(rows(tmp_path)) == 3
    assert screen.getvalue().count("tracker wandb is off: no route to host") == 1


def test_other_processes_write_nothing(tmp_path):
    tracker = Tracker(tmp_path, "r", (), Console(quiet=True), active=False)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_does_not_hide_behind_another_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = Tracker(tmp_path, "r", (), Console(quiet=True))
    for action in (lambda: tracker.log(1, {"loss": 0.5}), tracker.close):
        with pytest.raises(PipelineError, match=r"metrics\.jsonl: No space left on device"):
            action()
