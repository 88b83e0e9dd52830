"""Disks that are full or read-only, in a mount namespace of their own: root minds no modes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_chain import ROOT, assert_same, rlhf, write_config

INSIDE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Run a script in a folder with an SFT model; skips where there are no namespaces."""
    try:
        possible = subprocess.run([*INSIDE, "mount -t tmpfs x /mnt"], capture_output=True)
    except OSError as error:
        pytest.skip(f"no mount namespace here: {error}")
    if possible.returncode:
        pytest.skip(f"no mount namespace here: {possible.stderr.decode().strip()}")
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    rlhf("sft", "run.name=parents")

    def run(script: str) -> subprocess.CompletedProcess[str]:
        paths = {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        return subprocess.run(
            [*INSIDE, script], capture_output=True, text=True, timeout=120,
            env=os.environ | paths | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )  # fmt: skip

    return run


READ_ONLY = """
mkdir place && mount --bind runs place && mount -o remount,ro,bind place
python -m stages ppo c.yaml run.name=r run.folder=place --from runs/parents; echo "exit code $?"
python -m stages sft c.yaml run.name=parents run.folder=place sft.max_steps=3; echo "exit code $?"
"""


@pytest.mark.slow
def test_a_read_only_folder_is_refused_before_anything_runs(inside, tmp_path):
    before = sorted(p for p in (tmp_path / "runs").rglob("*"))
    done = inside(READ_ONLY)
    assert done.stdout.count("exit code 2") == 2, done.stdout + done.stderr
    assert "run folder place/r: Read-only file system. Set run.folder to a folder you own" in (
        done.stderr
    )
    assert "run folder place/parents cannot be written: Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p for p in (tmp_path / "runs").rglob("*")) == before


# At the fifth update the disk is filled under a run that is under way.
UNDER_WAY = r"""
mkdir disk && mount -t tmpfs -o size=20M disk disk && cp -r runs/parents disk/parents
ppo="ppo c.yaml run.folder=disk run.name=r --from disk/parents ppo.held_out.every=6"
export COMMAND="head -c \$(df --output=avail -B1 disk | tail -n 1) /dev/zero > disk/ballast"
python -m tests.killing stages.ppo.run:Training.update 5 shell $ppo; echo "exit code $?"
ls disk/r/ppo/checkpoints
rm disk/ballast
python -m stages $ppo; echo "exit code $?"
cp -r disk/r/ppo "$OUT"
"""


@pytest.mark.slow
def test_a_disk_that_fills_under_the_samples_leaves_states_intact(inside, tmp_path, monkeypatch):
    rlhf("ppo", "run.name=whole", "--from", "runs/parents", "ppo.held_out.every=6")
    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    done = inside(UNDER_WAY)
    assert "cannot write disk/r/ppo/samples/rank0-00000.parquet" in done.stderr, done.stderr
    assert (
        "No space left on device. Make room there" in done.stderr and "Traceback" not in done.stderr
    )
    first, _, second = done.stdout.partition("exit code 2\n")
    assert "going on" not in first
    assert second.startswith("state-2\nstate-4\nstep-0\n"), done.stdout
    assert "going on after step 4" in second and second.rstrip().endswith("exit code 0")
    assert_same(out, tmp_path / "runs/whole/ppo")
