"""Two nodes, each in a network namespace of its own, against one process.

A veth pair is all that joins them, so that whatever the processes say to one another goes over it,
and rendezvous and gloo find no other way. The namespaces are those of an unprivileged user
namespace: the machine's own network is not touched, and they end with the processes in them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.test_pipeline_ranks import (
    CONFIG,
    ENVIRONMENT,
    FORMS,
    RLHF,
    children,
    rlhf,
)
from tests.tiny_chain import ROOT, assert_close_stage, rows

INTERFACE = "net0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29500  # the nodes' own: nothing else listens in a new namespace
FORM = FORMS["lora"]
pytestmark = pytest.mark.timeout(600)  # up to five runs


@dataclass(frozen=True)
class Node:
    """A namespace; `inside` is what a command starts with to run there."""

    inside: list[str]

    def run(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            [*self.inside, *command], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout

    def received(self) -> int:
        """Bytes that came over the pair so far."""
        line = next(x for x in self.run("cat", "/proc/net/dev").splitlines() if INTERFACE in x)
        return int(line.partition(":")[2].split()[0])


@contextmanager
def held(*command: str) -> Iterator[Node]:
    """The namespaces that `command` (unshare) makes, for as long as its process sleeps."""
    with subprocess.Popen([*command, "sleep", "600"], stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 10
            while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.skip(f"no network namespaces here: {process.communicate()[1].strip()}")
                time.sleep(0.02)
            enter = ["nsenter", f"--target={process.pid}", "--user", "--net"]
            yield Node([*enter, "--preserve-credentials"])
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two namespaces that see each other and nothing else."""
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (iproute2, util-linux) to make two networks")
    with ExitStack() as stack:
        outer = stack.enter_context(held("unshare", "--user", "--map-root-user", "--net"))
        pair = [stack.enter_context(held(*outer.inside, "unshare", "--net")) for _ in ADDRESSES]
        pids = [node.inside[1].partition("=")[2] for node in pair]
        link = ["ip", "link", "add", INTERFACE, "netns", pids[0], "type", "veth"]
        try:
            outer.run(*link, "peer", "name", INTERFACE, "netns", pids[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no pair of network interfaces here: {error.stderr.strip()}")
        for node, address in zip(pair, ADDRESSES, strict=True):
            node.run("ip", "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                node.run("ip", "link", "set", interface, "up")
        yield pair


@contextmanager
def launched(
    nodes: list[Node], folder: Path, *arguments: str, name: str = "ddp-multi-node"
) -> Iterator[list[subprocess.Popen[str]]]:
    """`rlhf ARGUMENTS` by a process on each node; what still runs at the end is ended."""
    # A node's name leads to 127.0.0.1 here, as on many machines: gloo is told where the other is.
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": INTERFACE}
    launchers = []
    try:
        for rank, node in enumerate(nodes):
            settings = ["--launch", name, "--machines=2", "--processes=2", f"--machine-rank={rank}"]
            settings += [f"--rendezvous={ADDRESSES[0]}:{PORT}", "run.device=cpu"]
            launchers.append(
                subprocess.Popen(
                    [*node.inside, *RLHF, *arguments, *settings],
                    cwd=folder, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        yield launchers
    finally:
        for launcher in launchers:
            end(launcher)


def end(process: subprocess.Popen[str]) -> None:
    """End a process that still runs, and what it has started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()


def by_two_nodes(nodes: list[Node], folder: Path, *arguments: str, name: str) -> list[str]:
    """What each node printed, after both are done."""
    with launched(nodes, folder, *arguments, name=name) as launchers:
        texts = [launcher.communicate(timeout=150)[0] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(texts)
    return texts


def wait_for_steps(metrics: Path, count: int, launchers: list[subprocess.Popen[str]]) -> None:
    """Until so many steps are logged."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        ended = [launcher.communicate()[0] for launcher in launchers if launcher.poll()]
        assert not ended, ended
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "form"), [("ddp", "lora"), ("fsdp2", "full")])
def test_two_nodes_compute_what_one_process_does(nodes, tmp_path, strategy, form):
    (tmp_path / "c.yaml").write_text(CONFIG)
    name = f"{strategy}-multi-node"
    settings = ["c.yaml", *FORMS[form], "sft.max_steps=6", "reward.max_steps=4", "ppo.iterations=2"]
    for verb in ("sft", "reward", "ppo"):
        done = rlhf(tmp_path, verb, *settings, "run.name=one")
        assert done.returncode == 0, done.stdout + done.stderr
    before = [node.received() for node in nodes]
    first, second = by_two_nodes(nodes, tmp_path, "sft", *settings, "run.name=two", name=name)
    assert f"2 processes on cpu, {strategy.upper()}" in first
    assert strategy.upper() not in second  # the main process alone speaks
    # Each step's gradients, at least: 8 bytes a weight, which two processes exchange both ways.
    # FSDP2 also gathers weights, for every pass.
    (path,) = (tmp_path / "runs/two/sft/artifact").rglob("*.safetensors")
    exchanged = 6 * 8 * sum(tensor.numel() for tensor in load_file(path).values())
    received = [node.received() - old for node, old in zip(nodes, before, strict=True)]
    most = {"ddp": 2, "fsdp2": 20}[strategy] * exchanged
    assert all(exchanged < size < most for size in received), (exchanged, received)
    assert_close_stage(tmp_path / "runs/one/sft", tmp_path / "runs/two/sft")
    again = [*settings, "run.name=ppo", "--from", "runs/one"]
    by_two_nodes(nodes, tmp_path, "ppo", *again, name=name)
    assert_close_stage(tmp_path / "runs/one/ppo", tmp_path / "runs/ppo/ppo")


@pytest.mark.slow
def test_nodes_stop_together(nodes, tmp_path):
    """Asked to stop on one node, both stop after the same step and go on; killed, both end."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    training = ["sft", "c.yaml", "sft.max_steps=100000", "sft.epochs=100000"]
    training += ["sft.log_every=1", "sft.checkpoint_every=100000"]
    metrics = tmp_path / "runs/one/sft/metrics.jsonl"
    with launched(nodes, tmp_path, *training) as launchers:
        wait_for_steps(metrics, 1, launchers)
        launchers[1].terminate()
        texts = [launcher.communicate(timeout=90)[0] for launcher in launchers]
    (state,) = metrics.parent.glob("checkpoints/state-*")
    step = json.loads((state / "manifest.json").read_text())["summary"]["step"]
    assert f"SFT: stopped after step {step}, as asked" in texts[0]
    assert [launcher.returncode for launcher in launchers] == [143, 143], texts
    with launched(nodes, tmp_path, *training) as launchers:
        wait_for_steps(metrics, step + 1, launchers)
        (worker,) = children(launchers[1].pid)
        began = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        texts = [launcher.communicate(timeout=90)[0] for launcher in launchers]
    assert f"going on after step {step}" in texts[0]
    assert time.monotonic() - began < 60
    assert all(launcher.returncode == 2 for launcher in launchers), texts
    assert texts[1].count("error: rank 1 was ended by SIGKILL") == 1


# Runs a command on each node, as srun does: a node's number in SLURM_NODEID, signals passed on.
SRUN = """
import json, os, signal, subprocess, sys
from pathlib import Path

command = sys.argv[1:]
while command[0].startswith("--"):
    command = command[1:]
steps = []
for number, inside in enumerate(json.loads(Path("nodes.json").read_text())):
    environment = os.environ | {"SLURM_NODEID": str(number)}
    steps.append(subprocess.Popen([*inside, *command], env=environment))
signal.signal(signal.SIGTERM, lambda *_: [step.terminate() for step in steps])
sys.exit(max(step.wait() for step in steps))
"""
SCONTROL = f"""
import sys
if sys.argv[1] == "show":
    print(*{ADDRESSES}, sep="\\n")
else:
    print("queued again:", sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo-ddp", "ppo-fsdp2"])
def test_the_slurm_script_stops_and_goes_on(nodes, tmp_path, name):
    """A script of docs/slurm on two nodes, with stand-ins for srun and scontrol."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    settings = [*FORM, "ppo.iterations=30", "sft.max_steps=2", "reward.max_steps=2"]
    for verb in ("sft", "reward"):
        done = rlhf(tmp_path, verb, "c.yaml", *settings, "run.name=parents")
        assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "nodes.json").write_text(json.dumps([node.inside for node in nodes]))
    for command, code in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / command).write_text(f"#!{sys.executable}\n{code}")
        (tmp_path / command).chmod(0o755)
    here = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    here |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = [str(ROOT / f"docs/slurm/{name}.sbatch"), "c.yaml", *settings, "run.device=cpu"]

    @contextmanager
    def job() -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            ["bash", *script, "--from", "runs/parents"],
            env=ENVIRONMENT | here | {"PATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield process
        finally:
            end(process)

    with job() as first:
        wait_for_steps(tmp_path / "runs/one/ppo/metrics.jsonl", 2, [first])
        first.terminate()
        text = first.communicate(timeout=90)[0]
    assert first.returncode not in (0, 143), text  # srun's code, not that of the interrupted wait
    assert "ppo: stopped after step" in text
    assert text.count("queued again: ['requeue', '7']") == 1, text
    with job() as second:
        text = second.communicate(timeout=150)[0]
    assert second.returncode == 0, text
    assert "going on after step" in text and "queued again" not in text
    assert len(rows(tmp_path / "runs/one/ppo")) == 31
