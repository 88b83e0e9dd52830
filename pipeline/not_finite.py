"""Numbers that are NaN or infinite: which, where, and the rows they came from, left in a file."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import PipelineError, TrainingError
from pipeline.records import PromptText
from pipeline.runfolder import write_json_atomic

if TYPE_CHECKING:
    from pipeline.distributed import Runtime

T = TypeVar("T")
Row = Mapping[str, Any]
NOT_FINITE = "not_finite.json"


class NotFinite(TrainingError):
    """A tensor is NaN or infinite; no optimiser step was taken with it.

    `rows` are this process's rows that it came from, with what is known of each.
    """

    def __init__(self, what: str, message: str, rows: Sequence[Row] = (), place: str = "") -> None:
        super().__init__(message)
        self.what, self.rows, self.place = what, list(rows), place


def together(work: Callable[[], T], runtime: "Runtime") -> T:
    """What `work` returns in this process, if it raised in none.

    Raises:
        TrainingError: it raised one here or elsewhere: nobody is left waiting in a collective. All
            raise the same kind, NotFinite only where nothing else went wrong: what follows it
            (`leave`, a roll-back) they do together.
    """
    found = caught(work)
    own = found if isinstance(found, TrainingError) else None
    # What a process cannot unpickle would be another fault: texts travel, not errors.
    told = None
    if own is not None:
        told = (str(own), own.what, own.place) if isinstance(own, NotFinite) else (str(own), "", "")
    faults = [fault for fault in runtime.gather_objects([told]) if fault is not None]
    if not faults:
        return raised(found)
    message, what, place = next((fault for fault in faults if not fault[1]), faults[0])
    if own is None or (isinstance(own, NotFinite) and not what):
        own = NotFinite(what, message, place=place) if what else TrainingError(message)
    own.everywhere = True
    raise own


def caught(work: Callable[[], T]) -> T | TrainingError:
    """What `work` returns, or the error that it raises."""
    try:
        return work()
    except TrainingError as error:
        return error


def raised(found: T | TrainingError) -> T:
    """What `caught` gave: returned, or raised again."""
    if isinstance(found, TrainingError):
        raise found
    return found


def leave(error: NotFinite, folder: Path, runtime: "Runtime") -> NotFinite:
    """Write the rows of all processes into `folder`; returns the error that names the file.

    To be called by every process, each with its own rows.
    """
    rows = runtime.gather_objects(error.rows)
    path, where = folder / NOT_FINITE, ""
    if rows:
        where = f" Rows that it came from ({len(rows)}): {path}"
        if runtime.is_main:
            found = {"what": error.what, "place": error.place, "rows": rows}
            try:
                write_json_atomic(path, _spelt(found))
            except PipelineError as failure:
                # What is written down about a fault must not hide it.
                where = f" Its rows could not be written down: {failure}"
    message = f"{str(error).rstrip('.')}.{where}"
    left = NotFinite(error.what, message, error.rows, error.place)
    left.everywhere = True
    return left


def prompt_json(prompt: PromptText) -> Any:
    """A prompt as JSON: a text, or a list of messages."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


def _spelt(value: Any) -> Any:
    """The same with `nan` and `inf` as texts: in JSON they would all be null."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _spelt(item) for key, item in value.items()}
    return [_spelt(item) for item in value] if isinstance(value, list | tuple) else value
