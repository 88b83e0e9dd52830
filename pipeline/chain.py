"""The chain: which stages run, which are reused, and what passes from one to the next.

Work whose key (`keys.py`) is unchanged is never done twice, in this run or taken over from another
(`--from`).
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.environment import environment
from pipeline.errors import CheckpointError, Interrupted, PipelineError
from pipeline.keys import difference, stage_material
from pipeline.resume import States, newest_manifest, remove_states
from pipeline.runfolder import (
    MANIFEST,
    Manifest,
    RunFolder,
    StageFolder,
    json_hash,
    link_tree,
    verify,
    write_json_atomic,
    write_manifest,
    write_text_atomic,
)
from pipeline.stage import Context, Stage

if TYPE_CHECKING:
    from pipeline.models.footprint import Footprint


@dataclass(frozen=True)
class Planned:
    """A stage with its key and what the key is made of."""

    stage: Stage
    key: str
    material: dict[str, Any]


class Chain:
    """Runs stages in order, each with the artifacts of those it needs.

    `predict` says what a stage's models will cost in memory, from the config; None where nobody
    asks or where the stage trains nothing. `allow_changes`: an interrupted stage goes on even if
    its configuration is another one now.
    """

    def __init__(
        self,
        config: Any,
        stages: Sequence[Stage],
        console: Console,
        sources: Sequence[Path] = (),
        predict: Callable[[Any, str], "Footprint | None"] | None = None,
        *,
        allow_changes: bool = False,
    ) -> None:
        self.config = config
        self.allow_changes = allow_changes
        self.predict = predict
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
        from_main = self.runtime.from_main  # of many processes one reads and writes the folder
        with ExitStack() as open_things:
            from_main(lambda: self._open(open_things))
            plans = self.plan()
            summaries: dict[str, Mapping[str, Any]] = {}
            for name, planned in plans.items():
                if only is None or only == name:
                    reused = from_main(partial(self._reuse, planned))
                    summaries[name] = self._execute(planned, plans) if reused is None else reused
                elif name in self._ancestors(plans, only):
                    from_main(partial(self._require, planned, only))
        return summaries

    def _open(self, open_things: ExitStack) -> None:
        for source in self.sources:
            if not source.config_yaml.exists():
                raise CheckpointError(f"--from {source.root}: no run lies there (no config.yaml)")
        self.folder.create()
        open_things.enter_context(self.folder.lock())
        self._describe()

    def plan(self) -> dict[str, Planned]:
        """Every stage's key, parents before children."""
        plans: dict[str, Planned] = {}
        for stage in self.stages:
            parents = {n: plans[n].key for n in stage.needs(self.config) if n in plans}
            material = stage_material(stage, self.config, self.corpus.fingerprint, parents)
            plans[stage.name] = Planned(stage, json_hash(material), material)
        return plans

    # --- finished work ---

    def _reuse(self, planned: Planned) -> Mapping[str, Any] | None:
        """The summary of finished work with the same key, here or in another run."""
        name = planned.stage.name
        own = self.folder.stage(name)
        manifest = self._finished(own, planned)
        if manifest is not None:
            remove_states(own.checkpoints)  # of a run that was killed when it had finished
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

    def _make_room(self, own: StageFolder, planned: Planned) -> None:
        if self._goes_on(own, planned):
            shutil.rmtree(own.artifact, ignore_errors=True)  # what was written of it
        else:
            self._set_aside(own)
        own.artifact.mkdir(parents=True, exist_ok=True)

    def _goes_on(self, own: StageFolder, planned: Planned) -> bool:
        """Whether an interrupted attempt has left a state of this configuration.

        Raises:
            CheckpointError: it is of another configuration; says which values differ.
        """
        state = newest_manifest(own.checkpoints)
        if state is None or (own.artifact / MANIFEST).exists():
            return False
        if state.key != planned.key:
            changed = difference(state.material, planned.material)
            if not self.allow_changes:
                raise CheckpointError(
                    f"{own.root} holds an unfinished {own.root.name} of another configuration: "
                    f"{changed}. Set these back to go on from it, go on with the new values "
                    "(--allow-changes), or choose another run.name"
                )
            self.console.print(f"[yellow]  going on with another configuration: {changed}[/]")
        self.console.print(f"  going on after step {state.summary['step']}", highlight=False)
        return True

    def _set_aside(self, own: StageFolder) -> None:
        """Keep what was finished, and the checkpoints of an attempt that was not."""
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
        from pipeline.models import footprint
        from pipeline.tracking import Tracker

        stage = planned.stage
        own = self.folder.stage(stage.name)
        self.console.rule(f"[bold]{stage.title}", align="left")
        self.runtime.from_main(partial(self._make_room, own, planned))
        if self.runtime.world_size > 1:
            self.console.print(f"  {self.runtime.strategy}", highlight=False)
        run = self.config.run
        tracker = Tracker(own.root, run.name, run.trackers, self.console, self.runtime.is_main)
        states = States(own, planned.key, planned.material, self.runtime)
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
            states=states,
        )
        if self.runtime.is_main and self.predict is not None:
            predicted = self.predict(self.config, stage.name)
            if predicted is not None:
                processes = self.runtime.world_size
                predicted = footprint.divided(predicted, processes, self.runtime.asked.divides)
                number = {"number": processes}
                footprint.record(own.memory_json, predicted=predicted, processes=number)
        started = time.perf_counter()
        try:
            summary = stage.run(context)
            states.settle()
        except Interrupted:  # it says that its state is saved
            states.settle()
            raise
        except PipelineError:
            with suppress(PipelineError):  # the first one is the one to tell
                states.settle(together=False)
            raise
        finally:
            tracker.close()
            if self.runtime.shards:
                self.store.forget_sharded()
        self.runtime.forget_sharded()
        seconds = time.perf_counter() - started
        if self.runtime.is_main and own.memory_json.exists():
            footprint.record(own.memory_json, peak=footprint.peaks())
        if self.runtime.is_main:
            write_manifest(
                own.artifact,
                stage=stage.name,
                key=planned.key,
                material=planned.material,
                summary=summary,
                seconds=seconds,
            )
            remove_states(own.checkpoints)
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
        if self.runtime.is_main:
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

        self.runtime.asked.refuse(self.config.model)
        return ModelStore(
            self.config.model,
            self.config.data,
            self.runtime.device,
            shards=self.runtime.shards,
            generation=self.config.generation,
        )

    def _describe(self) -> None:
        from pipeline.yaml_config import dump_config

        write_text_atomic(self.folder.config_yaml, dump_config(self.config))
        write_json_atomic(self.folder.environment_json, environment())


def _is_whole(artifact: Path) -> bool:
    try:
        verify(artifact)
    except CheckpointError:
        return False
    return True
