"""Metrics: `metrics.jsonl` always, and accelerate's trackers when asked.

A tracker that fails (no network, no account) is dropped with one message; training goes on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from pipeline.runfolder import finite, json_line, writing


class Tracker:
    """Writes each step's metrics; only the main process holds an active one."""

    def __init__(
        self,
        folder: Path,
        run_name: str,
        trackers: Sequence[str],
        console: Console,
        active: bool = True,
    ) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.run_name = run_name
        self.active = active
        self._names = trackers
        self._console = console
        self._file: TextIO | None = None
        self._trackers: list[Any] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step; numbers that are not finite become null.

        Raises:
            PipelineError: metrics.jsonl cannot be written.
        """
        if not self.active:
            return
        with writing(self.path):
            file = self._file or self._open()
            file.write(json_line({"step": step, **metrics}))
            file.flush()
        numbers = {key: value for key, value in finite(metrics).items() if value is not None}
        for tracker in list(self._trackers):
            if not self._attempt(
                tracker.name, lambda tracker=tracker: tracker.log(numbers, step=step)
            ):
                self._trackers.remove(tracker)

    def close(self) -> None:
        """Finish the trackers and the file."""
        for tracker in self._trackers:
            self._attempt(tracker.name, tracker.finish)
        if self._file is not None:
            with writing(self.path):
                self._file.close()
        self.active = False

    def _open(self) -> TextIO:
        # With the first row: a stage without metrics leaves no empty files behind.
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        for name in self._names:
            self._attempt(name, lambda name=name: self._start(name))
        return self._file

    def _start(self, name: str) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = (
            kind(self.run_name, logging_dir=str(self.folder))
            if kind.requires_logging_directory
            else kind(self.run_name)
        )
        if hasattr(tracker, "start"):
            tracker.start()
        self._trackers.append(tracker)

    def _attempt(self, name: str, action: Any) -> bool:
        try:
            action()
        except Exception as error:  # whatever a third-party tracker raises must not stop training
            self._console.print(
                f"[yellow]tracker {name} is off: {error}[/] (metrics.jsonl goes on)"
            )
            return False
        return True
