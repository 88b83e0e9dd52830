"""Run folders: locks, atomic writes, manifests that tell the truth."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from pipeline.errors import CheckpointError, PipelineError
from pipeline.runfolder import (
    RunFolder,
    json_hash,
    json_line,
    link_tree,
    read_manifest,
    verify,
    write_bytes_atomic,
    write_json_atomic,
    write_manifest,
    writing,
)


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "artifact"
    (folder / "model").mkdir(parents=True)
    (folder / "model/weights.safetensors").write_bytes(b"\x01\x02\x03")
    (folder / "notes.txt").write_text("안녕", encoding="utf-8")
    write_manifest(
        folder, stage="sft", key="k1", material={"a": 1}, summary={"loss": 0.5}, seconds=1.25
    )
    return folder


def test_a_manifest_holds_every_file_and_verifies(artifact):
    manifest = verify(artifact)
    assert set(manifest.files) == {"model/weights.safetensors", "notes.txt"}
    # sha256 of the bytes 01 02 03
    assert manifest.files["model/weights.safetensors"] == (
        "039058c6f2c0cb492c533b0a4d14ef77cc0f78abccced5287d84a1a2011cfb81"
    )
    assert (manifest.stage, manifest.key, manifest.summary) == ("sft", "k1", {"loss": 0.5})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b"\x01\x02\x02"), "damaged"),  # one bit flipped
        (lambda p: p.write_bytes(b"\x01\x02"), "damaged"),  # truncated
        (lambda p: p.unlink(), "missing"),
    ],
)
def test_damage_is_found_and_the_file_named(artifact, damage, message):
    damage(artifact / "model/weights.safetensors")
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors is {message}"):
        verify(artifact)


def test_an_artifact_without_a_manifest_is_not_finished(artifact):
    (artifact / "manifest.json").unlink()
    assert read_manifest(artifact) is None
    with pytest.raises(CheckpointError, match="not a finished artifact"):
        verify(artifact)


def test_a_damaged_manifest_is_an_error_that_names_it(artifact):
    (artifact / "manifest.json").write_text('{"stage": "sft"')
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(artifact)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_json_atomic(path, {"step": 1})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PipelineError, match=r"state\.json: No space left on device"):
        write_json_atomic(path, {"step": 2})
    assert path.read_text() == '{\n  "step": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_json_keeps_any_script_readable(tmp_path):
    write_json_atomic(tmp_path / "x.json", {"이름": "값"})
    assert "이름" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_hashes_do_not_depend_on_the_order_of_keys():
    assert json_hash({"a": 1, "b": [1, 2]}) == json_hash({"b": [1, 2], "a": 1})
    assert json_hash({"a": 1}) != json_hash({"a": 1.5})


HOLD = "import sys; from pathlib import Path; from pipeline.runfolder import RunFolder\n" + (
    "with RunFolder(Path(sys.argv[1])).lock():\n    print('locked', flush=True); sys.stdin.read()\n"
)


def test_a_live_process_keeps_others_out_and_a_dead_one_does_not(tmp_path):
    folder = RunFolder(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "locked\n"
    refused = rf"in use by process {holder.pid}: wait for it"
    with pytest.raises(PipelineError, match=refused), folder.lock():
        pass
    holder.kill()
    holder.wait()
    with folder.lock():
        pass


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PipelineError, match=r"not empty and holds no run.*thesis\.tex"):
        RunFolder(tmp_path).create()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "runs").write_text("x")
    with pytest.raises(PipelineError, match=r"Set run\.folder"):
        RunFolder(tmp_path / "runs/a").create()


def test_linked_copies_verify_and_survive_the_original(artifact, tmp_path):
    link_tree(artifact, tmp_path / "copy")
    for path in sorted(artifact.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert verify(tmp_path / "copy").key == "k1"


def test_an_atomic_write_replaces_a_linked_file_only_here(artifact, tmp_path):
    link_tree(artifact, tmp_path / "copy")
    write_bytes_atomic(tmp_path / "copy/notes.txt", b"changed")
    assert verify(artifact).key == "k1"


def test_an_edit_in_place_changes_one_copy_only(artifact, tmp_path):
    link_tree(artifact, tmp_path / "copy")
    with (tmp_path / "copy/notes.txt").open("a") as stream:
        stream.write("changed")
    assert verify(artifact).key == "k1"
    weights = [folder / "model/weights.safetensors" for folder in (artifact, tmp_path / "copy")]
    assert os.path.samefile(*weights)  # of weights there is one on the disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device")]),
    ],
)
def test_what_fails_to_write_names_the_place_and_what_to_do(tmp_path, error):
    expected = r"cannot write .*adapter: .*No space left on device.*set run\.folder"
    with pytest.raises(PipelineError, match=expected), writing(tmp_path / "adapter"):
        raise error


def test_a_manifest_is_written_after_its_files_and_folders_are_synced(artifact, monkeypatch):
    (artifact / "manifest.json").unlink()
    synced = []

    def sync(descriptor, fsync=os.fsync):
        if not (artifact / "manifest.json").exists():
            synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write_manifest(artifact, stage="sft", key="k1", material={}, summary={}, seconds=0)
    for name in ("", "model", "model/weights.safetensors", "notes.txt"):
        assert (artifact / name).stat().st_ino in synced, name


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    value = {"a": [1.5, math.nan], "b": {"c": -math.inf, "d": "NaN"}}
    expected = {"a": [1.5, None], "b": {"c": None, "d": "NaN"}}
    write_json_atomic(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads(json_line(value)) == expected
