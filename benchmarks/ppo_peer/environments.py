"""The peer's virtual environment, and what the numbers were measured with."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TRL = "1.12.0"  # the last release with PPO
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "psutil", "pandas")


def peer_python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`, which is made if it is not there.

    All other packages have the versions of ours; torch is pinned to the very build that runs here,
    so that pip does not choose another (of several GB, with CUDA).

    Raises:
        SystemExit: pip failed, or what lies there has another TRL.
    """
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        print(f"Making {folder} with TRL {TRL} (a minute or more)", file=sys.stderr)
        venv.create(folder, with_pip=True)
    if _version_of("trl", python) is None:
        _install(python)
    found = _version_of("trl", python)
    if found != TRL:
        sys.exit(f"{folder} has TRL {found}, not {TRL}: remove it, or name another --peer-venv")
    for package in ("torch", "transformers"):
        theirs = _version_of(package, python)
        if theirs != version(package):
            sys.exit(
                f"{folder} has {package} {theirs}, but ours is {version(package)}: the two would "
                "not be compared. Remove the folder, and it is made anew"
            )
    return python


def _install(python: Path) -> None:
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith(("#", "trl==", "torch=="))
    ]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        own = [f"torch=={version('torch')}", f"trl=={TRL}"]
        constraints.write_text("\n".join([*pins, *own]) + "\n", encoding="utf-8")
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        command += ["--constraint", str(constraints), f"trl=={TRL}", *PACKAGES]
        if subprocess.run(command).returncode:
            sys.exit(f"pip could not install TRL {TRL}: see its message above")


def _version_of(package: str, python: Path) -> str | None:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def describe(device: str) -> dict[str, Any]:
    """Versions, machine and load."""
    packages = ("torch", "transformers", "peft", "accelerate")
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "trl": TRL,
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average_1min": round(os.getloadavg()[0], 1),
    }
    if device == "cuda":
        import torch

        about["gpu"] = torch.cuda.get_device_name()
    return about


def run_module(
    module: str, python: Path, spec: dict[str, Any], *, allow_failure: bool = False
) -> dict[str, Any]:
    """Run `python -m module SPEC RESULT` in a process of its own; returns its result.

    With `allow_failure` a process that ran out of GPU memory gives {"out_of_memory": True}.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "spec.json", Path(folder) / "result.json"
        task.write_text(json.dumps(spec), encoding="utf-8")
        done = subprocess.run(
            [str(python), "-m", module, str(task), str(result)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        )
        if done.returncode == 0:
            answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return answer
        if allow_failure and "OutOfMemoryError" in done.stderr:
            return {"out_of_memory": True}
        sys.exit(f"{module} failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
