"""What watches transformers' Trainer: the progress shown, and memory measured at the first step."""

from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from pipeline.models.footprint import Roles, measure_at_first_step
from pipeline.progress import ProgressBar


class MeasuredMemory(TrainerCallback):
    """Writes what a stage's roles cost in memory into its `memory.json`, at the first step."""

    def __init__(self, roles: Roles, memory_json: Path) -> None:
        self.roles, self.memory_json = roles, memory_json

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first step: gradients and optimiser state come with it."""
        if state.is_world_process_zero:
            measure_at_first_step(kwargs["optimizer"], self.roles, self.memory_json)


class ShownProgress(TrainerCallback):
    """Shows a training's progress; also has the last step logged."""

    def __init__(self, console: Console | None, title: str) -> None:
        self.console, self.title = console, title
        self.numbers = ""
        self.bar: ProgressBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        shown = self.console if state.is_world_process_zero else None
        self.bar = ProgressBar(shown, self.title, state.max_steps).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        assert self.bar is not None
        self.bar.step(state.global_step, self.numbers)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the newest held-out loss."""
        self.numbers = f"held-out loss {kwargs['metrics']['eval_loss']:.4f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar on the screen as it stands; also after an error before it began."""
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
