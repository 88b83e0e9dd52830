"""Faults that a run survives, each made for real, in this process; docs/reliability.md lists them.

Runs that end by SIGKILL are in test_resume.py, numbers that are not finite in test_not_finite.py.
"""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.resume import State
from pipeline.runfolder import read_manifest, write_manifest
from stages.ppo.run import Training
from stages.ppo.update import Updater
from stages.sft.trainer import SftTrainer
from tests.tiny_chain import Killed, assert_same, rlhf, rows, samples, states, write_config

PPO = ["--from", "runs/parents"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The SFT model of all runs, a PPO run that met no fault, and one killed after state 4."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_config(folder)
        rlhf("sft", "run.name=parents")
        rlhf("ppo", "run.name=whole", *PPO)
        end_before_update(patch, 6)
        with pytest.raises(Killed):
            rlhf("ppo", "run.name=killed", *PPO)
    assert states(folder / "runs/killed/ppo") == ["state-2", "state-4"]
    return folder


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """A copy of that folder to run in."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def end_before_update(patch: pytest.MonkeyPatch, iteration: int) -> None:
    own = Training.update

    def update(self, experience, number):
        if number == iteration:
            raise Killed
        return own(self, experience, number)

    patch.setattr(Training, "update", update)


def at_call(patch: pytest.MonkeyPatch, owner, name: str, nth: int, action) -> None:
    """Do that before the n-th call of `owner.name`, from 1."""
    own, calls = getattr(owner, name), [0]

    def call(self, *arguments, **settings):
        calls[0] += 1
        if calls[0] == nth:
            action(self)
        return own(self, *arguments, **settings)

    patch.setattr(owner, name, call)


# --- asked to stop ---


@pytest.mark.parametrize("where", ["rollout", "update", "evaluation"])
def test_sigterm_at_any_moment_finishes_the_iteration_and_saves_it(place, where):
    def ask(_owner):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        if where == "rollout":  # within a token of iteration 3: 8 tokens a rollout or evaluation
            from pipeline.generation.native import _Writing

            at_call(patch, _Writing, "step", 7 * 5 + 3, ask)
        elif where == "update":
            at_call(patch, Updater, "_gradients", 4 * 2 + 3, ask)
        else:
            at_call(patch, Training, "evaluate", 4, ask)
        output = rlhf("ppo", "run.name=r", *PPO, code=143)
    assert "stopping after this step; once more to stop at once" in output
    assert "ppo: stopped after step 3, as asked" in output
    assert states(place / "runs/r/ppo") == ["state-2", "state-3"]
    assert "going on after step 3" in rlhf("ppo", "run.name=r", *PPO)
    assert_same(place / "runs/r/ppo", place / "runs/whole/ppo")


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("ppo", signal.SIGINT),
        pytest.param("ppo", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("sft", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_asked_again_while_a_state_is_written_the_older_ones_stay(place, stage, kind):
    def ask_twice(_state):
        os.kill(os.getpid(), kind)
        time.sleep(1.1)  # what comes within a second is the same request
        os.kill(os.getpid(), kind)

    arguments = PPO if stage == "ppo" else ["run.seed=2"]
    if stage == "sft":
        rlhf("sft", "run.name=whole-sft", *arguments)
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, State, "write", 4, ask_twice)  # of state 4, that of the process
        rlhf(stage, "run.name=r", *arguments, code=130)
    run = place / f"runs/r/{stage}"
    assert (run / "checkpoints/state-2/manifest.json").exists()
    assert not (run / "checkpoints/state-4/manifest.json").exists()
    assert "going on after step 2" in rlhf(stage, "run.name=r", *arguments)
    assert_same(run, place / ("runs/whole/ppo" if stage == "ppo" else "runs/whole-sft/sft"))


# --- disks ---


def test_a_disk_that_fills_under_the_log_ends_the_run_and_says_so(place):
    def fill(training):
        tracker = training.context.tracker
        os.dup2(os.open("/dev/full", os.O_WRONLY), tracker._file.fileno())

    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, Training, "update", 5, fill)
        output = rlhf("ppo", "run.name=r", *PPO, code=2)
    assert "cannot write runs/r/ppo/metrics.jsonl: No space left on device. Make room" in output
    assert states(place / "runs/r/ppo") == ["state-2", "state-4"]
    assert "going on after step 4" in rlhf("ppo", "run.name=r", *PPO)
    assert_same(place / "runs/r/ppo", place / "runs/whole/ppo")


# --- states ---


@pytest.mark.parametrize(
    "name", ["run.safetensors", "run.json", "rank-0.safetensors", "rank-0.json", "manifest.json"]
)
def test_a_state_without_one_of_its_files_is_passed_over(place, name):
    run = place / "runs/killed/ppo"
    (run / "checkpoints/state-4" / name).unlink()
    output = rlhf("ppo", "run.name=killed", *PPO)
    if name != "manifest.json":  # without that it is no state at all
        assert f"checkpoints/state-4/{name} is missing" in output
    assert_same(run, place / "runs/whole/ppo")


@pytest.mark.parametrize("what", ["exp_avg", "exp_avg_sq", "step", "weights"])
def test_a_state_without_a_number_of_the_optimiser_is_refused(place, what):
    """Not damage, which hashes show: a state that some other program wrote."""
    folder = place / "runs/killed/ppo/checkpoints/state-4"
    tensors = load_file(folder / "run.safetensors")
    gone = next(name for name in tensors if name.startswith(f"{what}/"))
    del tensors[gone]
    save_file(tensors, folder / "run.safetensors")
    found = read_manifest(folder)
    kept = {"stage": found.stage, "key": found.key, "material": found.material}
    write_manifest(folder, **kept, summary=found.summary, seconds=0.0)
    output = rlhf("ppo", "run.name=killed", *PPO, code=2)
    assert f"the state has no {what} of {gone.removeprefix(what + '/')}" in output


def test_changes_that_a_state_cannot_take_are_refused_even_if_allowed(place):
    changed = [*PPO, "lora.rank=3", "--allow-changes"]
    output = rlhf("ppo", "run.name=killed", *changed, code=2)
    assert "of shape (2, 16), not (3, 16): it is of another model" in output


def test_a_state_in_a_pickle_is_not_read(place):
    """Pickles run code when they are loaded; a state is safetensors and JSON, or none."""
    import torch

    class Bomb:
        def __reduce__(self):
            return (Path("exploded").touch, ())

    folder = place / "runs/killed/ppo/checkpoints/state-4"
    for name in ("run", "rank-0"):
        torch.save({"weights": Bomb()}, folder / f"{name}.bin")
        (folder / f"{name}.pkl").write_bytes((folder / f"{name}.bin").read_bytes())
        (folder / f"{name}.safetensors").unlink()
    found = read_manifest(folder)
    kept = {"stage": found.stage, "key": found.key, "material": found.material}
    write_manifest(folder, **kept, summary=found.summary, seconds=0.0)
    output = rlhf("ppo", "run.name=killed", *PPO, code=2)
    assert "state-4 is no state that this software wrote" in output
    assert "rank-0.safetensors. Remove it to go on from an older one" in output
    assert not Path("exploded").exists()


# --- another run than the one that was interrupted ---


@pytest.mark.parametrize("changed", ["dataset", "base", "tokenizer"])
def test_an_interrupted_training_of_something_else_is_refused(place, changed):
    lines = Path(place, "runs/parents/config.yaml").read_text()
    source = next(w for w in lines.split() if w.endswith("demonstrations.jsonl")).strip('"')
    shutil.copy(source, place / "own.jsonl")
    shutil.copytree(place / "runs/parents/sft/artifact/model", place / "base")
    for path in (place / "runs/parents/sft/artifact/tokenizer").iterdir():
        shutil.copy(path, place / "base")
    arguments = ["run.name=r", "model.init=pretrained", "model.path=base", "model.architecture={}"]
    arguments += ["data.demonstrations.path=own.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, SftTrainer, "training_step", 4, lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            rlhf("sft", *arguments)
    assert states(place / "runs/r/sft") == ["state-2"]
    if changed == "dataset":
        rest = (place / "own.jsonl").read_text().splitlines(True)
        (place / "own.jsonl").write_text("".join(rest[1:]))
    elif changed == "base":
        weights = load_file(place / "base/model.safetensors")
        save_file({k: v * 1.5 for k, v in weights.items()}, place / "base/model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
    else:
        path = place / "base/tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 99}))
    output = rlhf("sft", *arguments, code=2)
    field = "data" if changed == "dataset" else "resources.model.path"
    assert f"holds an unfinished sft of another configuration: {field}" in output, output
    assert "--allow-changes" in output
    assert states(place / "runs/r/sft") == ["state-2"]


# --- policies that end at once, or never ---


@pytest.mark.parametrize(("bias", "eos_rate", "tokens"), [(50.0, 1.0, 1.0), (-50.0, 0.0, 8.0)])
@pytest.mark.parametrize("value", ["separate", pytest.param("shared", marks=pytest.mark.slow)])
def test_a_policy_that_ends_at_once_or_never_trains_on(place, bias, eos_rate, tokens, value):
    """Phi has a bias in its output layer: there the end's probability is set to 1 or to 0."""
    phi = ["model.architecture.model_type=phi"]
    rlhf("sft", "run.name=phi", "sft.max_steps=1", *phi)
    shutil.copytree(place / "runs/phi/sft/artifact/model", place / "policy")
    for path in (place / "runs/phi/sft/artifact/tokenizer").iterdir():
        shutil.copy(path, place / "policy")
    weights = load_file(place / "policy/model.safetensors")
    end = json.loads((place / "policy/config.json").read_text())["eos_token_id"]
    weights["lm_head.bias"][end] = bias
    save_file(weights, place / "policy/model.safetensors", metadata={"format": "pt"})
    arguments = ["run.name=r", "ppo.policy=policy", f"ppo.value={value}", *phi]
    rlhf("ppo", *arguments, "ppo.iterations=3")
    found = rows(place / "runs/r/ppo")
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    for row in found:
        assert all(value is not None and math.isfinite(value) for value in row.values()), row
    assert {row["eos_rate"] for row in found[1:]} == {eos_rate}
    assert {row["response_tokens"] for row in found[1:]} == {tokens}
    responses = {row["response"] for row in samples(place / "runs/r/ppo")}
    assert responses == {""} if bias > 0 else "" not in responses


# --- trackers ---


def test_a_tracker_whose_folder_cannot_be_made_does_not_stop_training(place):
    """TensorBoard itself: a file lies where its folder, named after the run, has to be."""

    def block(training):
        (training.context.folder.root / "r").write_text("not a folder")

    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, Training, "start", 1, block)
        output = rlhf("ppo", "run.name=r", *PPO, "run.trackers=[tensorboard]")
    assert output.count("tracker tensorboard is off: ") == 1 and "metrics.jsonl goes on" in output
    assert [row["step"] for row in rows(place / "runs/r/ppo")] == list(range(7))
    assert rows(place / "runs/r/ppo") == rows(place / "runs/whole/ppo")
