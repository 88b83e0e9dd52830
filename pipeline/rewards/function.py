"""A Python function as a reward source."""

import asyncio
import atexit
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pipeline.config import function_reference
from pipeline.errors import ConfigError, TrainingError
from pipeline.rewards.source import Completions, as_messages, checked, columns_of, rows_text

T = TypeVar("T")


class FunctionReward:
    """A Python function in TRL's convention: `file.py:function`, or `module:function`.

    TRL's own work as they are, for instance `trl.rewards:think_format_reward`.

    `f(prompts, completions, completion_ids, **columns) -> list[float]`; plain prompts and their
    completions come as strings, conversations as lists of messages. The prompts' further columns
    come as lists, and `ended` tells which completions a stop token ended. It may be `async`.

    With `timeout_seconds` a call that takes longer is given up; what is not async then runs in a
    thread of its own, which cannot be stopped and is left behind. With `may_abstain`, None for a
    row says that the function does not apply to it.
    """

    def __init__(
        self, reference: str, timeout_seconds: float | None = None, *, may_abstain: bool = False
    ) -> None:
        self.reference = reference
        self.function = load_function(reference)
        self.name = reference.rpartition(":")[2]
        self.timeout_seconds = timeout_seconds
        self.may_abstain = may_abstain
        self.is_async = any(
            inspect.iscoroutinefunction(f) for f in (self.function, type(self.function).__call__)
        )

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        if self.is_async:
            return run_async(self.score_async(completions))
        call = self._call(completions)
        with self._faults(completions):
            found = call() if self.timeout_seconds is None else _within(self.timeout_seconds, call)
        return checked(self.name, found, completions, may_abstain=self.may_abstain)

    async def score_async(self, completions: Completions) -> list[float]:
        """The same of an async function, in an event loop that others may use meanwhile."""
        call = self._call(completions)
        with self._faults(completions):
            try:
                async with asyncio.timeout(self.timeout_seconds) as limit:
                    found = await call()
            except TimeoutError:
                if limit.expired():
                    raise _TimedOut from None
                raise
        return checked(self.name, found, completions, may_abstain=self.may_abstain)

    def _call(self, completions: Completions) -> Callable[[], Any]:
        columns = columns_of(completions.prompts)
        for name in ("prompts", "completions", "completion_ids"):  # the sampled ones count
            columns.pop(name, None)
        columns["ended"] = list(completions.ended)
        texts: list[Any] = [
            text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(completions.prompts, completions.texts, strict=True)
        ]
        prompts = [
            prompt.prompt if isinstance(prompt.prompt, str) else as_messages(prompt)
            for prompt in completions.prompts
        ]
        ids = [list(ids) for ids in completions.completion_ids]
        return lambda: self.function(
            prompts=prompts, completions=texts, completion_ids=ids, **columns
        )

    @contextmanager
    def _faults(self, completions: Completions) -> Iterator[None]:
        try:
            yield
        except _TimedOut:
            raise TrainingError(
                f"reward {self.reference} did not return within {self.timeout_seconds:g} seconds "
                f"(timeout_seconds; {rows_text(completions)})"
            ) from None
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            line = traceback.extract_tb(error.__traceback__)[-1]
            raise TrainingError(
                f"reward {self.reference} raised {type(error).__name__}: {error} "
                f"({Path(line.filename).name}, line {line.lineno}); {rows_text(completions)}"
            ) from error


class _TimedOut(Exception):
    """A call took longer than it may; a `TimeoutError` of the function's own is another matter."""


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns: run in one event loop for all calls, as clients that keep one want."""
    return _runner().run(work)


@cache
def _runner() -> asyncio.Runner:
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises, in a thread that is given up after `seconds`."""
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # it is raised again below, in the thread that waits
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise _TimedOut
    found, error = outcome[0]
    if error is not None:
        raise error
    return found  # type: ignore[return-value]


def load_function(reference: str) -> Callable[..., Any]:
    """The function of a `file.py:function` or `module:function` reference.

    Raises:
        ConfigError: no such file, module or function, or it fails on import.
    """
    parts = function_reference(reference)
    assert parts is not None, reference
    where, name = parts
    if where.endswith(".py") and not Path(where).is_file():
        raise ConfigError(f"{reference}: there is no file {where} (looked up beside the config)")
    try:
        module = _run_file(where) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ConfigError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{where} has no function {name!r}")
    result: Callable[..., Any] = function
    return result


def _run_file(path: str) -> ModuleType:
    # A name that no other module has; known to `sys.modules`, where dataclasses look theirs up.
    name = f"rlhf_file_{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
