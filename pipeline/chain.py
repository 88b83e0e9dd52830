"""The chain: which stages run, which are reused, and what passes from one to the next.

A stage's *key* is the hash of everything its result depends on: its own section, the common fields
it reads, the content of its data, the files it names and its parents' keys. Work whose key is
unchanged is never done twice, in this run or taken over from another (`--from`).
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import (
    Section,
    function_reference,
    key_values,
    resource_fields,
    resource_path,
)
from pipeline.errors import CheckpointError
from pipeline.runfolder import (
    MANIFEST,
    Manifest,
    RunFolder,
    StageFolder,
    file_hash,
    json_hash,
    link_tree,
    verify,
    write_json_atomic,
    write_manifest,
    write_text_atomic,
)
from pipeline.stage import Context, Stage

KEY_FORMAT = 1  # raise it when a stage computes something else from the same inputs


@dataclass(frozen=True)
class Planned:
    """A stage with its key and what the key is made of."""

    stage: Stage
    key: str
    material: dict[str, Any]


class Chain:
    """Runs stages in order, each with the artifacts of those it needs."""

    def __init__(
        self,
        config: Any,
        stages: Sequence[Stage],
        console: Console,
        sources: Sequence[Path] = (),
    ) -> None:
        self.config = config
        self.stages = stages
        self.console = console
        self.sources = [RunFolder(path) for path in sources]
        self.folder = RunFolder(Path(config.run.folder) / config.run.name)

    def run(self, only: str | None = None) -> dict[str, Mapping[str, Any]]:
        """Run the chain, or only the stage called `only` from what the stages before it left.

        Returns each stage's summary.

        Raises:
            PipelineError: see the stages; and if the run folder is in use, or `only` needs a stage
                that has not finished.
        """
        for source in self.sources:
            if not source.config_yaml.exists():
                raise CheckpointError(f"--from {source.root}: no run lies there (no config.yaml)")
        self.folder.create()
        with self.folder.lock():
            self._describe()
            plans = self.plan()
            summaries: dict[str, Mapping[str, Any]] = {}
            for name, planned in plans.items():
                if only is None or only == name:
                    reused = self._reuse(planned)
                    summaries[name] = self._execute(planned, plans) if reused is None else reused
                elif name in self._ancestors(plans, only):
                    self._require(planned, only)
        return summaries

    def plan(self) -> dict[str, Planned]:
        """Every stage's key, parents before children."""
        plans: dict[str, Planned] = {}
        for stage in self.stages:
            material = self._material(stage, plans)
            plans[stage.name] = Planned(stage, json_hash(material), material)
        return plans

    # --- keys ---

    def _material(self, stage: Stage, plans: Mapping[str, Planned]) -> dict[str, Any]:
        section = getattr(self.config, stage.name)
        resources = stage.resources(self.config)
        for name in resource_fields(type(section)):
            named = getattr(section, name) is not None
            assert named == (f"{stage.name}.{name}" in resources), f"{stage.name}.{name}"
        common: dict[str, Any] = {
            "seed": self.config.run.seed,
            "mixed_precision": self.config.run.mixed_precision,
            "model": _key_values(self.config.model),
            "max_prompt_tokens": self.config.data.max_prompt_tokens,
            "max_response_tokens": self.config.data.max_response_tokens,
        }
        if getattr(section, "tuning", None) == "lora":
            common["lora"] = _key_values(self.config.lora)
        return {
            "format": KEY_FORMAT,
            "stage": stage.name,
            stage.name: _key_values(section),
            "common": common,
            "data": {kind: self.corpus.fingerprint(kind) for kind in stage.reads(self.config)},
            "resources": {
                field: resource_fingerprint(resource) for field, resource in resources.items()
            },
            "parents": {
                name: plans[name].key for name in stage.needs(self.config) if name in plans
            },
        }

    # --- finished work ---

    def _reuse(self, planned: Planned) -> Mapping[str, Any] | None:
        """The summary of finished work with the same key, here or in another run."""
        name = planned.stage.name
        own = self.folder.stage(name)
        manifest = self._finished(own, planned)
        if manifest is not None:
            self.console.print(f"[green]✓[/] {name}: finished, reused from {own.root}")
            return manifest.summary
        places = [source.stage(name) for source in self.sources]
        replaced = self.folder.previous(name, planned.key)
        places.append(StageFolder(replaced, replaced / own.artifact.relative_to(own.root)))
        for place in places:
            manifest = self._finished(place, planned)
            if manifest is not None:
                self._set_aside(own)
                link_tree(place.root, own.root)
                self.console.print(f"[green]✓[/] {name}: finished, taken over from {place.root}")
                return manifest.summary
        return None

    def _finished(self, place: StageFolder, planned: Planned) -> Manifest | None:
        try:
            manifest = place.manifest()
            if manifest is None or manifest.key != planned.key:
                return None
            return verify(place.artifact)
        except CheckpointError as error:
            self.console.print(f"[yellow]{planned.stage.name}: not reused: {error}[/]")
            return None

    def _set_aside(self, own: StageFolder) -> None:
        """Make room: keep what was finished, and the checkpoints of an attempt that was not."""
        try:
            manifest = own.manifest()
        except CheckpointError:
            manifest = None
        if manifest is not None:
            kept = self.folder.previous(manifest.stage, manifest.key)
            if kept.exists() and not _is_whole(kept / own.artifact.relative_to(own.root)):
                shutil.rmtree(kept)
            if not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                own.root.rename(kept)
                self.console.print(f"  the {manifest.stage} that was there is in {kept}")
        elif any(own.checkpoints.glob(f"step-[1-9]*/{MANIFEST}")):  # step-0 is where it started
            kept = self.folder.previous(own.root.name, "unfinished")
            if kept.exists():
                shutil.rmtree(kept)
            kept.parent.mkdir(exist_ok=True)
            own.root.rename(kept)
            self.console.print(f"  an unfinished {own.root.name} was there: it is in {kept}")
        own.remove()

    def _require(self, planned: Planned, child: str) -> None:
        name = planned.stage.name
        if self._reuse(planned) is not None:
            return
        manifest = self.folder.stage(name).manifest()
        if manifest is None:
            raise CheckpointError(
                f"{child} needs {name}, which has not finished in {self.folder.root}: "
                f"run `rlhf {name}` with the same config first, or `rlhf run` for the whole chain"
            )
        if manifest.key == planned.key:
            raise CheckpointError(
                f"{child} needs {name}, but the one in {self.folder.root} is damaged: "
                f"run `rlhf {name}` again"
            )
        changed = difference(manifest.material, planned.material)
        raise CheckpointError(
            f"{child} needs {name}, but the one in {self.folder.root} was made with another "
            f"configuration: {changed}. Run `rlhf {name}` again, or set these back."
        )

    def _ancestors(self, plans: Mapping[str, Planned], name: str) -> set[str]:
        found: set[str] = set()
        for parent in plans[name].stage.needs(self.config):
            found |= {parent, *self._ancestors(plans, parent)}
        return found

    # --- work ---

    def _execute(self, planned: Planned, plans: Mapping[str, Planned]) -> Mapping[str, Any]:
        from pipeline.tracking import Tracker

        stage = planned.stage
        own = self.folder.stage(stage.name)
        self._set_aside(own)
        own.artifact.mkdir(parents=True, exist_ok=True)
        self.console.rule(f"[bold]{stage.title}", align="left")
        run = self.config.run
        tracker = Tracker(own.root, run.name, run.trackers, self.console, self.runtime.is_main)
        context = Context(
            config=self.config,
            runtime=self.runtime,
            corpus=self.corpus,
            store=self.store,
            run=self.folder,
            folder=own,
            parents={name: self.folder.stage(name).artifact for name in stage.needs(self.config)},
            tracker=tracker,
            console=self.console,
        )
        started = time.perf_counter()
        try:
            summary = stage.run(context)
        finally:
            tracker.close()
        seconds = time.perf_counter() - started
        if self.runtime.is_main:
            write_manifest(
                own.artifact,
                stage=stage.name,
                key=planned.key,
                material=planned.material,
                summary=summary,
                seconds=seconds,
            )
        self.runtime.barrier()
        self.console.print(f"[green]✓[/] {stage.name}: {seconds:.1f} s, {own.artifact}")
        return summary

    @cached_property
    def corpus(self) -> Any:
        """The run's records, read once."""
        from pipeline.data import KINDS, load_corpus
        from pipeline.data.screen import data_table

        read = {kind for stage in self.stages for kind in stage.reads(self.config)}
        corpus = load_corpus(self.config.data, [kind for kind in KINDS if kind in read])
        write_json_atomic(self.folder.data_json, corpus.report)
        self.console.print(data_table(corpus.report, examples=True))
        return corpus

    @cached_property
    def runtime(self) -> Any:
        """Processes and devices."""
        from pipeline.distributed import Runtime

        return Runtime(self.config.run)

    @cached_property
    def store(self) -> Any:
        """The models in memory."""
        from pipeline.models.store import ModelStore

        return ModelStore(self.config.model, self.config.data, self.runtime.device)

    def _describe(self) -> None:
        from pipeline.yaml_config import dump_config

        write_text_atomic(self.folder.config_yaml, dump_config(self.config))
        write_json_atomic(self.folder.environment_json, environment())


def _key_values(section: Section) -> dict[str, Any]:
    return key_values(type(section), section.model_dump(mode="json"))


def resource_fingerprint(resource: str) -> str:
    """What identifies a function, a file, a folder or a Hub id that a stage reads.

    Wherever they lie, files and folders are their content; a function's name is part of it.
    """
    if (reference := function_reference(resource)) is not None:
        file = _module_file(resource) or resource_path(resource)
        # A file may move; a module's name says which of its package's files count too.
        name = reference[1] if reference[0].endswith(".py") else resource
        return f"{file_hash(file)}:{name}" if file.is_file() else resource
    path = resource_path(resource)
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        manifests = sorted(path.rglob("manifest.json"))
        names = manifests or sorted(p for p in path.rglob("*") if p.is_file())
        return json_hash({p.relative_to(path).as_posix(): file_hash(p) for p in names})
    return resource


def _module_file(resource: str) -> Path | None:
    """The file of the module in `module:function`; None of anything else, or where it has none."""
    reference = function_reference(resource)
    if reference is None or reference[0].endswith(".py"):
        return None
    try:
        spec = importlib.util.find_spec(reference[0])
    except (ImportError, ValueError):
        return None  # whoever opens it says so
    return Path(spec.origin) if spec is not None and spec.origin else None


def _is_whole(artifact: Path) -> bool:
    try:
        verify(artifact)
    except CheckpointError:
        return False
    return True


def difference(old: Any, new: Any, prefix: str = "") -> str:
    """The leaves in which two nested mappings differ, as `path: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        parts = [
            difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        return ", ".join(parts)
    return f"{prefix}: {json.dumps(old)} -> {json.dumps(new)}"


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, for `environment.json`."""
    from importlib.metadata import PackageNotFoundError, version

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
