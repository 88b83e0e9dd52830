"""What the command line does with errors: one message and an exit code, for every verb."""

import time
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from pipeline.environment import num_processes, process_index
from pipeline.errors import ConfigError, Interrupted, PipelineError, TrainingError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
OTHERS_SPEAK_FIRST = 5.0  # seconds before a process prints what another one may say, too


class ErrorsGroup(TyperGroup):
    """Turns errors that a user can act on into one message and an exit code, for every verb."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as error:
            if process_index() == 0:
                Console(stderr=True, highlight=False).print(str(error))
            raise typer.Exit(error.code) from None
        except PipelineError as error:
            _print_error(error)
            raise typer.Exit(EXIT_ERROR) from None
        except RuntimeError as error:
            if num_processes() == 1 or not _lost_another(error):
                raise
            time.sleep(
                OTHERS_SPEAK_FIRST
            )  # it has said why, or the launcher will, and end this one
            _print_error(TrainingError("another process has ended, and this one needs it"))
            raise typer.Exit(EXIT_ERROR) from None
        except KeyboardInterrupt:
            if process_index() == 0:
                Console(stderr=True).print("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _lost_another(error: RuntimeError) -> bool:
    """Whether a collective failed because a process is gone, as gloo and NCCL say it."""
    kinds = ("DistBackendError", "DistNetworkError")
    return type(error).__name__ in kinds or "by peer" in str(error)


def _print_error(error: PipelineError) -> None:
    rank = process_index()
    if rank:
        if isinstance(error, ConfigError) or error.everywhere:
            return  # every process reads the same config: the main one says it
        # What all processes meet, or the main one, is said once, by the main one: the launcher ends
        # the others when it goes. An error of this process alone is said here.
        time.sleep(OTHERS_SPEAK_FIRST)
    where = f" (rank {rank})" if rank else ""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error{where}:[/bold red] {escape(str(error))}")
