"""What tests of DeepSpeed share."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'rlhf-pipeline[deepspeed]'",
)


@pytest.fixture(scope="session")
def deepspeed_builds(tmp_path_factory) -> dict[str, str]:
    """Environment variables with which DeepSpeed builds its own extension, once for all tests."""
    built = tmp_path_factory.mktemp("extensions")  # a build that was killed locks the common place
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"TORCH_EXTENSIONS_DIR": str(built), "PATH": tools}
