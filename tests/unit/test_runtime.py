"""How processes fail and end: all in the same way, and out of their group."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import RunSection
from pipeline.distributed import Runtime
from pipeline.errors import ConfigError, Interrupted, PipelineError, TrainingError
from pipeline.not_finite import NotFinite, together

NAN = NotFinite("score", "a score is NaN", [{"row": 1}])
SERVER = TrainingError("the server is gone")


@pytest.fixture(params=["gloo", "nccl"])
def left(monkeypatch, request):
    """One of two processes, as far as it can tell; counts how often its group is ended."""
    calls = []
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: request.param)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append(1))
    return calls


def said_by_all(message: str) -> PipelineError:
    error = PipelineError(message)
    error.everywhere = True
    return error


def test_the_group_is_left_at_the_end(left):
    with Runtime(RunSection()).leaving_together():
        assert left == []
    assert left == [1]


@pytest.mark.parametrize("error", [said_by_all("no room"), Interrupted("stopped", 143)])
def test_the_group_is_left_where_all_fail(left, error):
    with pytest.raises(type(error)), Runtime(RunSection()).leaving_together():
        raise error
    assert left == [1]


@pytest.mark.parametrize("error", [ConfigError("a reward is missing"), KeyError("x")])
def test_one_that_fails_alone_does_not_wait_for_the_others(left, error, request):
    """NCCL's group ends by a collective, which they may never come to; gloo's by closing lines."""
    with pytest.raises(type(error)), Runtime(RunSection()).leaving_together():
        raise error
    assert left == ([1] if "gloo" in request.node.callspec.id else [])


def test_one_process_has_no_group(left, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with Runtime(RunSection()).leaving_together():
        pass
    assert left == []


@pytest.mark.parametrize(
    ("faults", "kind", "message"),
    [
        ([NAN, None], NotFinite, "NaN"),
        ([None, NAN], NotFinite, "NaN"),
        ([SERVER, None], TrainingError, "gone"),
        # A roll-back answers the one and not the other: all end.
        ([NAN, SERVER], TrainingError, "gone"),
        ([SERVER, NAN], TrainingError, "gone"),
    ],
)
def test_processes_raise_the_same_kind(faults, kind, message):
    all_told = [None if fault is None else _told(fault) for fault in faults]
    runtime = SimpleNamespace(gather_objects=lambda own: all_told)
    for fault in faults:
        with pytest.raises(kind, match=message) as found:
            together(partial(_raise, fault), runtime)
        assert type(found.value) is kind and found.value.everywhere
        own = fault is NAN and kind is NotFinite
        assert getattr(found.value, "rows", []) == ([{"row": 1}] if own else [])


def _told(fault):
    """What a process tells the others of its fault."""
    heard = []

    def gather(own):
        heard.extend(own)
        return own

    with pytest.raises(TrainingError):
        together(partial(_raise, fault), SimpleNamespace(gather_objects=gather))
    return heard[0]


def _raise(fault):
    if fault is not None:
        raise fault


def test_without_a_fault_each_has_its_own():
    runtime = SimpleNamespace(gather_objects=lambda own: [*own, None])
    assert together(lambda: "done", runtime) == "done"
