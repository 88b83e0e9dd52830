"""States written in the background: what they hold, when they count, and what a failure leaves."""

import json
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pipeline import resume
from pipeline.errors import PipelineError
from pipeline.resume import State, States, complete_states


@pytest.fixture
def states(tmp_path):
    """The states of a training in `tmp_path`, written in the background."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    stage = SimpleNamespace(
        root=tmp_path,
        checkpoints=tmp_path / "checkpoints",
        metrics_jsonl=tmp_path / "metrics.jsonl",
    )
    runtime = SimpleNamespace(
        is_main=True, rank=0, world_size=1, barrier=lambda: None, from_main=lambda work: work(),
        device=torch.device("cpu"), run=SimpleNamespace(save_in_background=True),
    )  # fmt: skip
    return States(stage, "key", {}, runtime)


@pytest.fixture
def gate(monkeypatch):
    """Files are written once this event is set."""
    event, own = threading.Event(), resume._write_tensors

    def write(*args):
        assert event.wait(10)
        own(*args)

    monkeypatch.setattr(resume, "_write_tensors", write)
    return event


def steps(states: States) -> list[int]:
    return [step for step, _ in complete_states(states.folder)]


def test_a_state_is_of_the_moment_it_was_saved_at(states, gate):
    weights, losses = torch.ones(3), [1.0]
    states.metrics_jsonl.write_text("a row\n")
    states.save(1, State({"w": weights}, {"losses": losses}), State())
    weights += 1  # training goes on
    losses.append(2.0)
    states.metrics_jsonl.write_text("a row\nanother\n")
    assert steps(states) == []
    gate.set()
    states.settle()
    found = states.newest(Console(quiet=True))
    assert found.run.tensors["w"].tolist() == [1, 1, 1]
    assert found.run.numbers == {"losses": [1.0]}
    assert states.metrics_jsonl.read_text() == "a row\n"


def test_older_states_stay_until_the_new_one_is_complete(states, gate):
    gate.set()
    for step in (1, 2):
        states.save(step, State({"w": torch.ones(1)}), State())
    states.settle()
    gate.clear()
    states.save(3, State({"w": torch.ones(1)}), State())
    assert steps(states) == [2, 1]
    gate.set()
    states.save(4, State({"w": torch.ones(1)}), State())  # waits for the third
    assert 3 in steps(states)
    states.settle()
    assert steps(states) == [4, 3]


def test_a_failure_is_told_by_the_next_save(states, monkeypatch):
    states.save(1, State({"w": torch.ones(1 << 18)}), State())
    states.settle()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "_write_tensors", full)
    states.save(2, State({"w": torch.ones(1 << 18)}), State())
    with pytest.raises(PipelineError, match=r"No space left .* This checkpoint needs 1\.0 MiB"):
        states.save(3, State({"w": torch.ones(1)}), State())
    assert steps(states) == [1]
    assert [path.name for path in states.folder.iterdir()] == ["state-1"]


def test_a_part_that_another_process_cannot_write_is_not_waited_for(states):
    states.runtime.world_size = 2
    states.save(1, State({"w": torch.ones(1)}), State())
    folder = states.folder / "state-1"
    while not (folder / "rank-0.json").exists():
        time.sleep(0.01)
    shutil.rmtree(folder)  # which the other does
    with pytest.raises(PipelineError, match="another process could not write its part"):
        states.settle(together=False)


def test_the_main_process_waits_for_the_files_of_the_others(states):
    states.runtime.world_size = 2
    states.save(1, State({"w": torch.ones(1)}), State())
    folder = states.folder / "state-1"
    states._writing.join(0.3)
    assert states._writing.is_alive() and steps(states) == []
    State({"x": torch.ones(1)}, {"own": 1}).write(folder / "rank-1")  # the other process
    states.settle()
    assert steps(states) == [1]
    assert "rank-1.safetensors" in json.loads((folder / "manifest.json").read_text())["files"]
