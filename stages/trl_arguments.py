"""The arguments that a user gave TRL's PPO: from a YAML file, or from a command line."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import yaml_core
from pipeline.data.validate import nearest
from pipeline.errors import ConfigError
from pipeline.yaml_config import show_value
from stages.trl_fields import FIELDS, IGNORED_ARGUMENTS, Kind

PROCESSES = ("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node")


def read_arguments(path: Path) -> tuple[dict[str, Any], int | None]:
    """TRL's arguments by name, as its types, and how many processes a launcher was to start.

    Raises:
        ConfigError: neither a mapping nor a command line of a script, a name that TRL 1.12 does
            not know, or a value of another type; names the place.
    """
    text = yaml_core.read_text(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return _read_yaml(text, str(path)), None
    return _read_command(text, str(path))


def _read_yaml(text: str, name: str) -> dict[str, Any]:
    """A mapping of arguments, as TrlParser takes it."""
    document = yaml_core.load(text, name)
    if not isinstance(document.data, dict):
        raise ConfigError(f"{name}: the file holds no arguments: write `learning_rate: 3e-6`, ...")
    given = {}
    for key, value in document.data.items():
        place = document.where[(key,)]
        if key == "env":
            raise ConfigError(f"{place}: env sets environment variables: set them in the shell")
        given[key] = _typed(_known(key, place), value, place)
    return given


def _read_command(text: str, name: str) -> tuple[dict[str, Any], int | None]:
    """The arguments behind the script of a command line, and the launcher's processes."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ConfigError(f"{name}: not a command line: {error}") from None
    script = next((at for at, word in enumerate(words) if word.endswith(".py")), None)
    if script is None:
        raise ConfigError(
            f"{name}: there is no script (*.py) in it: write `python ppo.py --learning_rate 3e-6 "
            "...`, or name a YAML file of arguments .yaml"
        )
    given: dict[str, Any] = {}
    for option, values in _options(words[script + 1 :], name):
        place = f"{name}: {option}"
        key = option[2:].replace("-", "_")
        if key == "config":
            raise ConfigError(f"{place} names another file: convert that one")
        if key.startswith("no_") and key not in FIELDS and not values:
            key, values = key.removeprefix("no_"), ["false"]
        entry = FIELDS[_known(key, place)]
        if entry.kind == "list":
            given[key] = values
            continue
        if len(values) > 1:
            raise ConfigError(f"{place} takes one value, not {' '.join(values)}")
        if not values and entry.kind != "bool" and key not in IGNORED_ARGUMENTS:
            raise ConfigError(f"{place} has no value")
        given[key] = _typed(key, values[0] if values else True, place)
    return given, _processes(words[:script], name)


def _options(words: Sequence[str], name: str) -> Iterator[tuple[str, list[str]]]:
    """Each `--option` with the words that follow it; `--option=value` is split."""
    current: tuple[str, list[str]] | None = None
    for word in words:
        if word.startswith("--"):
            if current is not None:
                yield current
            option, equals, value = word.partition("=")
            current = (option, [value] if equals else [])
        elif current is None:
            raise ConfigError(f"{name}: {word!r} stands before any --option")
        else:
            current[1].append(word)
    if current is not None:
        yield current


def _processes(launcher: Sequence[str], name: str) -> int | None:
    """How many processes `accelerate launch` or `torchrun` were to start, if they say so."""
    found = None
    for option, values in _options(_from_first_option(launcher), name):
        if option in PROCESSES and values:
            found = int(_typed("world_size", values[0], f"{name}: {option}"))
    return found


def _from_first_option(words: Sequence[str]) -> Sequence[str]:
    start = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
    return words[start:]


def _known(key: str, place: str) -> str:
    if key in FIELDS:
        return key
    guess = nearest(key, FIELDS)
    hint = f": did you mean {guess}?" if guess else ""
    raise ConfigError(f"{place}: TRL 1.12's PPO has no argument {key!r}{hint}")


_TRUE, _FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
_WORDS: dict[Kind, str] = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "text": "text",
    "list": "a list",
}


def _typed(key: str, value: Any, place: str) -> Any:
    """A value as the type of TRL's field, converted as its parser would."""
    kind = FIELDS[key].kind
    if value is None or value == "None" or key in IGNORED_ARGUMENTS:
        return None if value == "None" else value
    if kind == "list":
        return value if isinstance(value, list) else [value]
    if kind == "text":
        return value if isinstance(value, dict) else str(value)
    text = str(value).strip().lower()
    try:
        if kind == "bool" and text in (*_TRUE, *_FALSE):
            return text in _TRUE
        if kind in ("int", "float") and not isinstance(value, bool):
            number = float(text)
            if kind == "float":
                return number
            if number == int(number):
                return int(number)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{place}: {key} is {show_value(value)}: must be {_WORDS[kind]}")
