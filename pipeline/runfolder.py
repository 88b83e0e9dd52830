"""The folder of a run: paths, lock, atomic writes, manifests with hashes.

An artifact is complete when its `manifest.json` exists: it is written last, by write, fsync and
rename, with the SHA-256 of every other file. A process that dies before leaves no manifest, and the
next run starts the stage again.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, PipelineError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What an artifact is: its stage and key, what the key was made of, and every file's hash."""

    stage: str
    key: str
    material: Mapping[str, Any]
    summary: Mapping[str, Any]
    files: Mapping[str, str]
    seconds: float = 0.0
    format: int = FORMAT


@dataclass(frozen=True)
class StageFolder:
    """One stage's place in a run."""

    root: Path
    artifact: Path

    @property
    def metrics_jsonl(self) -> Path:
        """Metrics, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def memory_json(self) -> Path:
        """What each role costs in memory, predicted and measured."""
        return self.root / "memory.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints `step-N`."""
        return self.root / "checkpoints"

    def manifest(self) -> Manifest | None:
        """The artifact's manifest, or None if the stage has not finished."""
        return read_manifest(self.artifact)

    def remove(self) -> None:
        """Remove whatever lies there; afterwards the folder does not exist."""
        if self.root.exists():
            shutil.rmtree(self.root)


# Stages whose results people look up directly under the run: no `artifact/` in between.
_RESULTS = ("evaluation", "export")


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME/`: the resolved config, the environment, the data report and a folder a stage."""

    root: Path = field()

    @property
    def config_yaml(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def environment_json(self) -> Path:
        """Versions, commit and hardware of the newest process that wrote here."""
        return self.root / "environment.json"

    @property
    def data_json(self) -> Path:
        """Rows kept and left out, by reason."""
        return self.root / "data.json"

    def stage(self, name: str) -> StageFolder:
        """The folder of stage `name`."""
        root = self.root / name
        return StageFolder(root, root if name in _RESULTS else root / "artifact")

    def previous(self, name: str, key: str) -> Path:
        """Where a finished stage, or checkpoints of an unfinished one, are kept when replaced."""
        folder = f"{name}-{key[:12]}"
        if Path(folder).name != folder:  # they come from a manifest, which anyone may have written
            raise CheckpointError(f"{self.root}: a manifest there names the stage {name!r}")
        return self.root / "previous" / folder

    def create(self) -> None:
        """Make the folder.

        Raises:
            PipelineError: it cannot be made or written, or holds something else than a run.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            strangers = [p.name for p in self.root.iterdir() if not p.name.startswith(".")]
        except OSError as error:
            raise PipelineError(
                f"run folder {self.root}: {error.strerror}. Set run.folder to a folder you own."
            ) from error
        if strangers and not self.config_yaml.exists():
            raise PipelineError(
                f"run folder {self.root} is not empty and holds no run (no config.yaml): it has "
                f"{', '.join(sorted(strangers)[:3])}. Choose another run.name or run.folder."
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out; a dead process holds no lock.

        Raises:
            PipelineError: another live process works in this folder.
        """
        path = self.root / ".lock"
        try:
            stream = path.open("a+")
        except OSError as error:
            raise PipelineError(
                f"run folder {self.root} cannot be written: {error.strerror}. "
                "Set run.folder to a folder you own."
            ) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                stream.seek(0)
                raise PipelineError(
                    f"run folder {self.root} is in use by process {stream.read() or 'unknown'}: "
                    "wait for it, or choose another run.name"
                ) from error
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield


# --- writing ---


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what fails inside, libraries' own writing included, into an error that names `path`.

    Raises:
        PipelineError: the disk is full, or the place cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, shutil.Error):  # of a copied tree: (source, target, reason) a file
            reason = error.args[0][0][2]
        raise PipelineError(
            f"cannot write {path}: {reason}. Make room there, or set run.folder to a folder that "
            "you own on a disk with room."
        ) from error


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Raises:
        PipelineError: the disk is full or the folder cannot be written; the old file is intact.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` for text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_bytes_atomic` for JSON, readable and in any script."""
    write_text_atomic(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def json_line(value: Any) -> str:
    """One line of a .jsonl file."""
    return json.dumps(finite(value), ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """The same value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> Any:
    """Parse a JSON file of a run.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- manifests ---


def write_manifest(
    artifact: Path,
    *,
    stage: str,
    key: str,
    material: Mapping[str, Any],
    summary: Mapping[str, Any],
    seconds: float,
) -> None:
    """Declare an artifact complete: hash and sync files and folders, then write the manifest."""
    files = {}
    with writing(artifact):
        for path in _files(artifact):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            files[path.relative_to(artifact).as_posix()] = file_hash(path)
        for folder in (artifact, *artifact.rglob("*/")):
            _sync_folder(folder)
    manifest = Manifest(stage, key, material, summary, files, round(seconds, 3))
    write_json_atomic(artifact / MANIFEST, asdict(manifest))


def read_manifest(artifact: Path) -> Manifest | None:
    """The manifest of an artifact, or None if it is not complete."""
    path = artifact / MANIFEST
    if not path.exists():
        return None
    try:
        return Manifest(**read_json(path))
    except TypeError as error:
        raise CheckpointError(f"{path} is not a manifest of this software: {error}") from error


def verify(artifact: Path) -> Manifest:
    """The manifest of an artifact whose files are all there and unchanged.

    Raises:
        CheckpointError: incomplete, or a file is missing or differs; names the file.
    """
    manifest = read_manifest(artifact)
    if manifest is None:
        raise CheckpointError(f"{artifact} is not a finished artifact: it has no {MANIFEST}")
    for name, expected in manifest.files.items():
        path = artifact / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"the manifest of {artifact} names {name}, outside of it")
        if not path.exists():
            raise CheckpointError(f"{path} is missing from the artifact of {manifest.stage}")
        if file_hash(path) != expected:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's")
    return manifest


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    )


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder; weights, which nobody edits in place, by hard links where possible."""

    def link(src: str, dst: str) -> None:
        if src.endswith(".safetensors"):
            with suppress(OSError):  # another disk, or one without links
                os.link(src, dst)
                return
        shutil.copy2(src, dst)

    with writing(target):
        shutil.copytree(source, target, copy_function=link)
