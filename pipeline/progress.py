"""Progress of long work: a bar on a terminal, a line every tenth of the way in a log."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """`with ProgressBar(...) as bar: bar.step(n, "loss 0.1")`; silent without a console."""

    def __init__(self, console: Console | None, title: str, total: int) -> None:
        self.console = console
        self.title = title
        self.total = total
        self._tenths = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=console is None or not console.is_terminal,
        )

    def __enter__(self) -> "ProgressBar":
        self._started = time.perf_counter()
        self._task = self._bar.add_task(self.title, total=self.total, numbers="")
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, completed: int, numbers: str = "") -> None:
        """`completed` of the total are done; `numbers` are what one watches."""
        self._bar.update(self._task, completed=completed, numbers=numbers)
        tenths = 10 * completed // max(self.total, 1)
        if self.console is None or self.console.is_terminal or tenths <= self._tenths:
            return
        self._tenths = tenths
        seconds = time.perf_counter() - self._started
        self.console.print(
            f"  {self.title} {completed}/{self.total}  {seconds:.0f} s  {numbers}", highlight=False
        )
