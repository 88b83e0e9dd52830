"""What a process runs in: its place among others; versions, commit and hardware of a run."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Set by `--launch`: the number of processes that was asked for.
ASKED_PROCESSES = "RLHF_ASKED_PROCESSES"


def process_index() -> int:
    """This process among those that torchrun or `accelerate launch` started, from 0."""
    return int(os.environ.get("RANK", "0"))


def num_processes() -> int:
    """How many processes torchrun or `accelerate launch` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def environment() -> dict[str, Any]:
    """Versions, commit and hardware as JSON values."""
    versions = {}
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": _accelerators(),
        "versions": versions,
        "commit": _commit(),
        "command": sys.argv,
    }


def _accelerators() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _commit() -> str | None:
    """The commit of this software, where it runs from a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None  # no git here
    return result.stdout.strip() or None
