"""How processes end: their group is left together, or not at all."""

import pytest
import torch

from pipeline.config import RunSection
from pipeline.distributed import Runtime
from pipeline.errors import ConfigError, Interrupted, PipelineError


@pytest.fixture
def left(monkeypatch):
    """One of two processes, as far as it can tell; counts how often its group is ended."""
    calls = []
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
def test_one_that_fails_alone_does_not_wait_for_the_others(left, error):
    """NCCL's group ends by a collective, which they may never come to."""
    with pytest.raises(type(error)), Runtime(RunSection()).leaving_together():
        raise error
    assert left == []


def test_one_process_has_no_group(left, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with Runtime(RunSection()).leaving_together():
        pass
    assert left == []
