"""Asked to stop (SIGTERM, Ctrl-C): the step in hand is finished and its state saved first."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from rich.console import Console

from pipeline.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal and a launcher may both pass on one Ctrl-C.
SAME_REQUEST = 1.0  # seconds


class Interruption:
    """Within it, the first signal is noted, and a second one ends the process at once.

    `any_of` says whether a flag is set in any process: all have to stop after the same step.
    """

    def __init__(self, console: Console | None, any_of: Callable[[bool], bool]) -> None:
        self.console, self.any_of = console, any_of
        self.signal: int | None = None
        self.noted_at = 0.0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.before = {kind: signal.signal(kind, self._note) for kind in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def asked(self) -> bool:
        """Whether this or another process was asked to stop."""
        return self.any_of(self.signal is not None)

    def stop(self, what: str, step: int) -> Interrupted:
        """The error to raise once the state of `step` is saved."""
        code = 128 + (self.signal or signal.SIGTERM)
        return Interrupted(
            f"{what}: stopped after step {step}, as asked; the same command goes on there", code
        )

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.noted_at = number, now
            if self.console is not None:
                self.console.print("stopping after this step; once more to stop at once")
        elif now - self.noted_at > SAME_REQUEST:
            raise KeyboardInterrupt
