"""What a stage is, and what the chain gives it to work with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from pipeline.runfolder import RunFolder, StageFolder

if TYPE_CHECKING:
    from pipeline.codec import Codec
    from pipeline.data import Corpus
    from pipeline.distributed import Runtime
    from pipeline.models.store import ModelStore
    from pipeline.models.trunk import Handle
    from pipeline.resume import States
    from pipeline.tracking import Tracker

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """What the chain hands to a stage."""

    config: Any  # the whole frozen RunConfig; a stage reads its section and the common ones
    runtime: "Runtime"
    corpus: "Corpus"
    store: "ModelStore"
    run: RunFolder
    folder: StageFolder
    parents: Mapping[str, Path]  # artifact folder of each finished stage that this one needs
    tracker: "Tracker"
    console: Console
    states: "States | None" = None  # to go on from; None where nobody asks (tests)

    def save(self, handle: "Handle") -> None:
        """Leave a handle as the stage's artifact, for which it stands in every process.

        Models that wrappers for many processes take apart alike must be alike in all of them. For a
        sharded one the files stand: the next stage opens them.
        """
        self.write(handle, self.folder.artifact)
        if handle.trunk.shards is None:
            self.store.adopt(handle, self.folder.artifact)

    def write(self, handle: "Handle", folder: Path) -> None:
        """Write a handle, by the main process, from what all processes have of its weights."""
        from pipeline.models.trained import trained_state

        state = trained_state(handle, keep=self.runtime.is_main)
        self.runtime.from_main(lambda: self.store.write(handle, state, folder))

    def report_cuts(self, codec: "Codec") -> dict[str, int]:
        """Say how many texts were cut to the run's limits; returns that for the summary."""
        counts = dict(sorted(codec.counts.items()))
        for what, count in counts.items():
            self.console.print(f"[yellow]{count:,} {what}[/]", highlight=False)
        return counts


class Stage(Protocol):
    """One link of the chain. Stages meet through artifacts and handles only."""

    name: str  # its section of the config and its folder in the run
    title: str  # what people read when it starts
    samples: bool  # whether it samples responses, by the section `generation`

    def needs(self, config: Any) -> tuple[str, ...]:
        """Names of the stages whose artifacts it reads."""
        ...

    def reads(self, config: Any) -> tuple[str, ...]:
        """Kinds of data it reads: demonstrations, rankings, prompts, pretraining."""
        ...

    def resources(self, config: Any) -> Mapping[str, str]:
        """Files and folders beyond data and parents that its result depends on, by field name."""
        ...

    def run(self, context: Context) -> Summary:
        """Do the work, leave the artifact in `context.folder.artifact`, return key numbers."""
        ...
