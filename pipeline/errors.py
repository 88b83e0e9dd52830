"""Errors a user can act on.

Each message names the file, line, field or setting at fault, its value, and the remedy. Mistakes of
our own are `assert`s and tracebacks, never these.
"""


class PipelineError(Exception):
    """Base of every error that the command line prints without a traceback (exit code 2)."""

    everywhere = False  # whether every process raises it, so that the main one alone says it


class ConfigError(PipelineError):
    """A configuration file or override is not valid."""


class DataError(PipelineError):
    """A dataset cannot be read, or its rows are not what the stage needs."""


class ModelError(PipelineError):
    """A model, tokenizer or adapter cannot be loaded, or does not fit the others."""


class CheckpointError(PipelineError):
    """An artifact or checkpoint is missing, incomplete, or not what its manifest says."""


class TrainingError(PipelineError):
    """Training met numbers it must not continue from (NaN, divergence)."""


class Interrupted(PipelineError):
    """The run was asked to stop (SIGTERM, Ctrl-C), and its state is saved."""

    everywhere = True  # processes agree on the step to stop after

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code  # 128 + the signal, as shells report it
