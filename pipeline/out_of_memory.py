"""Out of memory: the same work again in smaller parts."""

import ctypes
import gc
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from pipeline.errors import TrainingError

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on an accelerator or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch raises a plain RuntimeError where the processor's memory is short.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_freed_memory() -> None:
    """Give main memory that was freed back to the system (glibc keeps it for later, in pieces).

    For the seams of a run, where what comes next allocates other shapes: it costs milliseconds.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
        return found
    except (OSError, AttributeError):  # not Linux, or another C library
        return None


def halving(
    work: Callable[[int], T], size: int, smallest: int, remedy: str, *, undo: Callable[[], None]
) -> tuple[T, int]:
    """`work(size)`, tried again with half the size whenever memory runs out, and the size it had.

    `undo` takes back what a failed attempt left behind, gradients say.

    Raises:
        TrainingError: memory is short at `smallest` or below; it says the `remedy`.
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside the handler: its traceback would keep the failed attempt's tensors alive.
        undo()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size <= smallest:
            raise TrainingError(f"out of memory ({reason}): {remedy}")
        size = max(smallest, size // 2)
