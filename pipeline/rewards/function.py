"""A Python function as a reward source."""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.config import function_reference
from pipeline.errors import ConfigError, TrainingError
from pipeline.rewards.source import Completions, as_messages, checked


class FunctionReward:
    """A Python function in TRL's convention: `file.py:function`, or `module:function`.

    TRL's own work as they are, for instance `trl.rewards:think_format_reward`.

    `f(prompts, completions, completion_ids, **columns) -> list[float]`; plain prompts and their
    completions come as strings, conversations as lists of messages. The prompts' further columns
    come as lists, and `ended` tells which completions a stop token ended.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference
        self.function = load_function(reference)
        self.name = reference.rpartition(":")[2]

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        names = {name for prompt in completions.prompts for name in prompt.columns}
        names -= {"prompts", "completions", "completion_ids"}  # the sampled ones, not the data's
        columns: dict[str, list[Any]] = {
            name: [prompt.columns.get(name) for prompt in completions.prompts]
            for name in sorted(names)
        }
        columns["ended"] = list(completions.ended)
        texts: list[Any] = [
            text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(completions.prompts, completions.texts, strict=True)
        ]
        prompts = [
            prompt.prompt if isinstance(prompt.prompt, str) else as_messages(prompt)
            for prompt in completions.prompts
        ]
        try:
            scores = self.function(
                prompts=prompts,
                completions=texts,
                completion_ids=[list(ids) for ids in completions.completion_ids],
                **columns,
            )
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            line = traceback.extract_tb(error.__traceback__)[-1]
            raise TrainingError(
                f"reward {self.reference} raised {type(error).__name__}: {error} "
                f"({Path(line.filename).name}, line {line.lineno})"
            ) from error
        return checked(self.name, scores, completions)


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
