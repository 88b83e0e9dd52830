"""Where tests of PPO run: a folder that has the SFT model."""

from pathlib import Path

import pytest

from tests.tiny_chain import rlhf, write_config


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """The folder of a run that has been through SFT."""
    folder = tmp_path_factory.mktemp("parents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_config(folder)
        rlhf("sft", "run.name=parents")
    return folder / "runs/parents"


@pytest.fixture
def place(parents, tmp_path, monkeypatch) -> Path:
    """A folder to run in, with the configuration and `runs/parents`."""
    write_config(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/parents").symlink_to(parents)
    monkeypatch.chdir(tmp_path)
    return tmp_path
