"""Runs that are killed and started again, against the run that was never killed: bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runfolder import MANIFEST
from tests.tiny_chain import ROOT, assert_same, head, rows

CONFIG = f"""{head("whole")}
sft:
  {{max_steps: 12, batch_size: 5, checkpoint_every: 3, log_every: 1, eval_every: 2,
    optim: {{learning_rate: 5.0e-3, schedule: cosine, warmup_fraction: 0.3}}}}
reward:
  {{max_steps: 8, batch_size: 5, checkpoint_every: 2, log_every: 3, eval_every: 1, patience: 3,
    optim: {{learning_rate: 2.0e-2}}, normalisation: {{num_samples: 7}}}}
ppo:
  iterations: 6
  checkpoint_every: 2
  rollout: {{prompts_per_iteration: 6, max_new_tokens: 12}}
  kl: {{controller: adaptive}}
  optim:
    {{learning_rate: 2.0e-2, ppo_epochs: 2, minibatches: 2, ptx_coef: 0.1, entropy_coef: 0.01,
      warmup_fraction: 0.3, value_warmup_iterations: 1}}
  held_out: {{every: 1, num_prompts: 5}}
  samples: {{rows_per_file: 10}}
evaluation: {{prompts: 4, max_new_tokens: 4}}
"""
FORMS = {
    "lora": ["ppo.tuning=lora", "ppo.value=separate"],
    "full": ["ppo.tuning=full", "ppo.value=separate"],
    "shared": ["ppo.tuning=lora", "ppo.value=shared"],
    "background": ["ppo.tuning=lora", "ppo.value=separate", "run.save_in_background=true"],
}
UPDATE = "stages.ppo.run:Training.update"
COMPLETE, TENSORS = "pipeline.resume:write_manifest", "pipeline.resume:State.write"
FINISH = "stages.ppo.checkpoints:Checkpoints.finish"


def start(
    folder: Path, *arguments: str, kill: tuple[str, int] | None = None, stage: str = "ppo"
) -> subprocess.CompletedProcess[str]:
    module = ["tests.killing", kill[0], str(kill[1])] if kill else ["stages"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", *module, stage, "c.yaml", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the finished SFT and reward model that all runs take over."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "c.yaml").write_text(CONFIG)
    for stage in ("sft", "reward"):
        done = start(folder, "run.name=parents", stage=stage)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """Where the run of a form lies that nobody killed."""
    made: dict[str, Path] = {}

    def make(form: str) -> Path:
        if form not in made:
            done = start(folder, *FORMS[form], f"run.name=whole-{form}", "--from", "runs/parents")
            assert done.returncode == 0, done.stdout + done.stderr
            made[form] = folder / f"runs/whole-{form}/ppo"
        return made[form]

    return make


@pytest.mark.parametrize(
    ("form", "place", "nth", "step"),
    [
        pytest.param("lora", UPDATE, 2, None, marks=pytest.mark.slow),  # there was no state yet
        ("lora", UPDATE, 4, 2),
        # In writing the second state: the pair of the run, that of the process, the manifest.
        pytest.param("lora", TENSORS, 3, 2, marks=pytest.mark.slow),
        pytest.param("lora", TENSORS, 4, 2, marks=pytest.mark.slow),
        ("lora", COMPLETE, 2, 2),
        pytest.param("lora", FINISH, 1, 6, marks=pytest.mark.slow),
        pytest.param("full", UPDATE, 5, 4, marks=pytest.mark.slow),
        pytest.param("shared", UPDATE, 5, 4, marks=pytest.mark.slow),
        # Killed while the second state is written in the background, in whichever iteration.
        pytest.param("background", TENSORS, 3, 2, marks=pytest.mark.slow),
        pytest.param("background", COMPLETE, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(folder, whole, form, place, nth, step):
    name = f"k-{form}-{place[-9:].replace(':', '.')}-{nth}"
    arguments = [*FORMS[form], f"run.name={name}", "--from", "runs/parents"]
    killed = start(folder, *arguments, kill=(place, nth))
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    done = start(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("going on after step" in done.stdout) == (step is not None)
    if step is not None:
        assert f"going on after step {step}\n" in done.stdout
    assert_same(folder / "runs" / name / "ppo", whole(form))


STEP = "pipeline.hf_trainer:PlannedTrainer.training_step"
STORED = "pipeline.models.store:ModelStore.write"


@pytest.mark.parametrize(
    ("stage", "place", "nth", "step"),
    [
        ("sft", STEP, 8, 6),
        pytest.param("sft", TENSORS, 3, 3, marks=pytest.mark.slow),
        pytest.param("sft", STORED, 1, 9, marks=pytest.mark.slow),
        ("reward", STEP, 6, 4),
        pytest.param("reward", COMPLETE, 2, 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("tuning", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_killed_training_goes_on_as_if_it_had_not_been(folder, stage, tuning, place, nth, step):
    name = f"{stage}-{tuning}-{place[-9:].replace(':', '.')}-{nth}"
    arguments = ["--from", "runs/parents"]
    if stage == "sft":  # in another run than the parents', whose seed is 1
        arguments = ["run.seed=2"]
        if tuning == "lora":
            base = "model.path=runs/parents/sft/artifact/model"
            arguments += ["sft.tuning=lora", "model.init=pretrained", base]
    else:
        arguments += [f"reward.tuning={tuning}", "reward.optim.learning_rate=0.01"]
    whole = start(folder, f"run.name=whole-{stage}-{tuning}", *arguments, stage=stage)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    killed = start(folder, f"run.name={name}", *arguments, kill=(place, nth), stage=stage)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    done = start(folder, f"run.name={name}", *arguments, stage=stage)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after step {step}\n" in done.stdout
    assert_same(folder / f"runs/{name}/{stage}", folder / f"runs/whole-{stage}-{tuning}/{stage}")


@pytest.fixture
def killed(folder, whole):
    """A run with states of steps 2 and 4, and how to start it again."""
    template = folder / "runs/killed-template"
    arguments = [*FORMS["lora"], "run.name=killed-template", "--from", "runs/parents"]
    if not template.exists():
        start(folder, *arguments, kill=(UPDATE, 6))
    assert {p.name for p in (template / "ppo/checkpoints").glob("state-*")} == {
        "state-2",
        "state-4",
    }
    run = folder / "runs/killed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(template, run)
    arguments[2] = "run.name=killed"
    return run / "ppo", lambda *more: start(folder, *arguments, *more)


@pytest.mark.parametrize(
    "name",
    [
        "run.safetensors",
        pytest.param("run.json", marks=pytest.mark.slow),
        pytest.param("rank-0.json", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_it_taken(killed, whole, name):
    run, again = killed
    path = run / "checkpoints/state-4" / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1  # of JSON it makes no JSON
    path.write_bytes(data)
    done = again()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{path.relative_to(run.parents[2])} is damaged" in done.stdout
    assert_same(run, whole("lora"))


@pytest.mark.slow
def test_a_truncated_manifest_is_no_state(killed, whole):
    run, again = killed
    path = run / "checkpoints/state-4" / MANIFEST
    path.write_bytes(path.read_bytes()[:100])
    done = again()
    assert "going on after step 2\n" in done.stdout
    assert_same(run, whole("lora"))


def test_another_configuration_is_refused_or_asked_for(killed):
    run, again = killed
    refused = again("ppo.kl_coef=0.2")
    assert refused.returncode == 2
    assert "unfinished ppo of another configuration: ppo.kl_coef" in refused.stderr
    assert (
        "0.05" in refused.stderr and "0.2" in refused.stderr and "--allow-changes" in refused.stderr
    )
    assert (run / "checkpoints/state-4" / MANIFEST).exists()
    done = again("ppo.kl_coef=0.2", "--allow-changes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in rows(run)] == list(range(7))


FULL_DISK = """
mkdir disk && mount -t tmpfs -o size=20M disk disk && cp -r runs/parents disk/parents
ppo="ppo c.yaml run.folder=disk run.name=run --from disk/parents $FORM"
python -m tests.killing stages.ppo.run:Training.update 4 $ppo > /dev/null
head -c $(($(df --output=avail -B1 disk | tail -n 1) - 80000)) /dev/zero > disk/ballast
python -m stages $ppo; echo "exit code $?"; ls disk/run/ppo/checkpoints
rm disk/ballast
python -m stages $ppo; echo "exit code $?"
cp -r disk/run/ppo "$OUT"
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_state_intact(folder, tmp_path):
    """On a small tmpfs, in a mount namespace of its own; a state takes more than is free."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    possible = subprocess.run([*inside, "mount -t tmpfs x /mnt"], capture_output=True, check=False)
    if possible.returncode:
        pytest.skip(f"no mount namespace here: {possible.stderr.decode().strip()}")
    form = [*FORMS["lora"], "ppo.held_out.every=6", "ppo.samples.enabled=false"]
    whole = start(folder, *form, "run.name=whole-disk", "--from", "runs/parents")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    shutil.copytree(folder, tmp_path / "place")
    out = tmp_path / "out"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200", "FORM": " ".join(form),
        "OUT": str(out), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [*inside, FULL_DISK], cwd=tmp_path / "place", env=environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert "cannot write disk/run/ppo/checkpoints/state-4" in done.stderr
    assert "No space left on device" in done.stderr
    assert "This checkpoint needs 0.1 MiB" in done.stderr
    first, _, second = done.stdout.partition("exit code 2\n")
    assert "going on after step 2" in first
    assert second.startswith("state-2\nstep-0\n"), done.stdout
    assert "going on after step 2" in second and second.rstrip().endswith("exit code 0")
    assert_same(out, folder / "runs/whole-disk/ppo")


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("ppo", signal.SIGTERM),
        pytest.param("ppo", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("sft", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_the_step_in_hand(folder, stage, kind):
    name = f"asked-{stage}-{kind.name}"
    never = [f"{s}.checkpoint_every={n}" for s, n in (("ppo", 1000), ("sft", 100000))]
    longer = ["ppo.iterations=1000", "ppo.samples.enabled=false", "sft.max_steps=100000"]
    arguments = [*FORMS["lora"], f"run.name={name}", *never, *longer]
    if stage == "ppo":
        arguments += ["--from", "runs/parents", "sft.max_steps=12", "sft.checkpoint_every=3"]
    with running(folder, stage, *arguments) as process:
        wait_for_rows(folder / f"runs/{name}/{stage}/metrics.jsonl", 3, process)
        process.send_signal(kind)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + kind
    assert "stopping after this step; once more to stop at once" in out
    (state,) = (folder / f"runs/{name}/{stage}/checkpoints").glob("state-*")
    step = int(state.name.removeprefix("state-"))
    assert f"{stage}: stopped after step {step}, as asked" in errors.replace("SFT", "sft")
    metrics = folder / f"runs/{name}/{stage}/metrics.jsonl"
    logged = metrics.read_text().count("\n")  # evaluations have rows of their own
    with running(folder, stage, *arguments) as process:
        wait_for_rows(metrics, logged + 2, process)
        process.send_signal(kind)
        out, _ = process.communicate(timeout=60)
    assert f"going on after step {step}\n" in out
    found = [json.loads(line)["step"] for line in
             (folder / f"runs/{name}/{stage}/metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert next(row for row in found if row > step) == step + 1


def test_asked_twice_it_stops_at_once(folder):
    arguments = [*FORMS["lora"], "run.name=twice", "--from", "runs/parents"]
    place = "stages.ppo.run:Training.update"
    # An update that takes for ever: only the second signal can end it.
    with running(folder, "ppo", *arguments, sleep=(place, 3)) as process:
        wait_for_rows(folder / "runs/twice/ppo/metrics.jsonl", 3, process)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert time.monotonic() - begin < 10
    assert process.returncode == 130
    assert {p.name for p in (folder / "runs/twice/ppo/checkpoints").glob("state-*")} == {"state-2"}


def running(
    folder: Path, stage: str, *arguments: str, sleep: tuple[str, int] | None = None
) -> subprocess.Popen[str]:
    module = ["tests.killing", sleep[0], str(sleep[1]), "sleep"] if sleep else ["stages"]
    return subprocess.Popen(
        [sys.executable, "-m", *module, stage, "c.yaml", *arguments], cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
