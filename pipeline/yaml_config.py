"""A YAML file and dotted overrides to a frozen pydantic model, with errors that say what to do.

Values are validated as JSON in pydantic's strict mode: a section may hold what JSON can say, and
nothing is converted silently (text to a number, `yes` to true, 1.0 to 1).
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline import yaml_core
from pipeline.config import Place, is_resource, resource_path, sections_in
from pipeline.errors import ConfigError
from pipeline.yaml_core import Document, KeyPath

Model = TypeVar("Model", bound=BaseModel)

# A `Resource` that starts or ends like this is a local path, never a Hub id.
_LOCAL_STARTS = ("./", "../", "/", "~")
_LOCAL_SUFFIXES = (
    ".jsonl",
    ".json",
    ".csv",
    ".parquet",
    ".gz",
    ".safetensors",
    ".bin",
    ".py",
    ".pem",
)


def read_config(path: str | Path, overrides: Sequence[str], model: type[Model]) -> Model:
    """Read the YAML file `path`, apply `overrides` ("a.b.c=value", in order) and validate.

    Local paths in the file are looked up beside it, then in the current folder. Raises ConfigError
    that lists every fault with its file and line (or override), dotted name, value and remedy.
    """
    path = Path(path)
    document = yaml_core.load(yaml_core.read_text(path), str(path))
    if document.data is None:
        raise ConfigError(f"{path}: the file is empty: {_expected(model)}")
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, list) else "one value"
        raise ConfigError(
            f"{document.where[()]}: the file holds {kind}, not sections: {_expected(model)}"
        )
    for override in overrides:
        apply_override(document, override)
    config = validated(document, model, path.parent)
    missing = list(_missing_files(config, document, path.parent))
    if missing:
        raise ConfigError(yaml_core.listed(missing))
    return config


def validated(document: Document, model: type[Model], base: Path) -> Model:
    """The document as a `model`, its local paths looked up in `base`; they need not exist.

    Raises:
        ConfigError: lists every fault with its place, dotted name, value and remedy.
    """
    try:
        return model.model_validate_json(
            json.dumps(document.data), strict=True, context={"base_dir": str(base)}
        )
    except ValidationError as error:
        raise ConfigError(yaml_core.listed(_faults(error, document, model))) from None


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML; `read_config` reads an equal object from it."""
    return yaml_core.dump(config.model_dump(mode="json"))


def apply_override(document: Document, override: str) -> None:
    """Set one value of `document.data`, as `a.b.c=value` with the value in YAML; in place."""
    place = f"override {override!r}"
    name, equals, text = override.partition("=")
    parts = tuple(part.strip() for part in name.split("."))
    if not equals or not all(parts):
        raise ConfigError(f"{place}: write section.field=value, as in ppo.kl_coef=0.1")
    if not text.strip():
        raise ConfigError(f"{place}: no value: write null for none, or '' in quotes for empty text")
    value = yaml_core.load(text, place, numbered=False)
    section: dict[str, Any] = document.data
    for depth, part in enumerate(parts[:-1], start=1):
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
            document.where[parts[:depth]] = place
        if not isinstance(inner, dict):
            outer = ".".join(parts[:depth])
            raise ConfigError(
                f"{place}: {outer} is {show_value(inner)} ({document.nearest(parts[:depth])}), "
                f"which has no fields: override all of {outer}, or write it as a section"
            )
        section = inner
    section[parts[-1]] = value.data
    for path in [path for path in document.where if path[: len(parts)] == parts]:
        del document.where[path]
    document.where |= {(*parts, *path): place for path in value.where}


# --- the fields of a model ------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldEntry:
    """One field of a model: its dotted path, what pydantic knows of it, and its sub-section."""

    path: tuple[str, ...]
    info: FieldInfo
    section: type[BaseModel] | None


def walk_fields(model: type[BaseModel], parents: tuple[str, ...] = ()) -> Iterator[FieldEntry]:
    """Every field of `model` and of its sections, depth first, in the order of definition."""
    for name, info in model.model_fields.items():
        sections = list(sections_in(info.annotation))
        yield FieldEntry((*parents, name), info, next(iter(sections), None))
        for section in sections:
            yield from walk_fields(section, (*parents, name))


def _missing_files(
    config: BaseModel, document: Document, base: Path, parents: Place = ()
) -> Iterator[str]:
    for name, info in type(config).model_fields.items():
        value, place = getattr(config, name), (*parents, name)
        values = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for number, item in values:
            at = place if number is None else (*place, number)
            if isinstance(item, BaseModel):
                yield from _missing_files(item, document, base, at)
            elif isinstance(item, str) and is_resource(info):
                yield from _missing_file(item, document, base, at)


def _missing_file(text: str, document: Document, base: Path, place: Place) -> Iterator[str]:
    path = resource_path(text)
    local = text.startswith(_LOCAL_STARTS) or path.name.endswith(_LOCAL_SUFFIXES)
    if local and not path.exists():
        tried = dict.fromkeys((folder / path).resolve() for folder in (base, Path()))
        yield (
            f"{document.nearest(place)}: {'.'.join(map(str, place))} is {text!r}, which does not "
            f"exist: looked for {' and '.join(map(str, tried))}"
        )


# --- the wording of faults ------------------------------------------------------------------------


def _faults(error: ValidationError, document: Document, model: type[BaseModel]) -> list[str]:
    """One message a faulty value, in the order of the file's fields."""
    fields = {entry.path: entry for entry in walk_fields(model)}
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_data_path(detail, document.data), []).append(detail)
    faults = []
    for path, details in grouped.items():
        raised = details[0]["type"] == "value_error"
        deeper = any(other[: len(path)] == path and other != path for other in grouped)
        if deeper and not raised:
            continue  # of a union ("text or list") the branch that got furthest is the one meant
        # A check across fields begins with the name of the field to look at first.
        named = tuple(_raised(details[0]).partition(" ")[0].split(".")) if raised else path
        place = document.nearest(named if named in fields else path)
        faults.append(f"{place}: {_describe(path, details, fields)}")
    return faults


def _raised(detail: ErrorDetails) -> str:
    return str(detail["ctx"]["error"])


def _data_path(detail: ErrorDetails, data: Any) -> KeyPath:
    """Pydantic's `loc` without the names that it gives to branches of a union."""
    path: list[str | int] = []
    for part in detail["loc"]:
        keys = range(len(data)) if isinstance(data, list) else data
        if isinstance(keys, dict | range) and part in keys:
            data = data[part]
        elif detail["type"] == "missing" and part == detail["loc"][-1]:
            data = None
        else:
            continue
        path.append(part)
    return tuple(path)


def _describe(
    path: KeyPath,
    details: list[ErrorDetails],
    fields: dict[tuple[str, ...], FieldEntry],
) -> str:
    name = ".".join(map(str, path))
    plain = tuple(str(part) for part in path if not isinstance(part, int))
    kinds = [detail["type"] for detail in details]
    entry = fields.get(plain)
    about = (entry.info.description or "") if entry else ""
    if "extra_forbidden" in kinds:
        return f"unknown key {name}: {_suggestion(plain, list(fields))}"
    if "missing" in kinds:
        return f"{name} is missing. {about}".rstrip()
    if "value_error" in kinds:
        text, value = _raised(details[0]), details[0]["input"]
        if any(isinstance(part, int) for part in path):  # of a list's item, a check names no place
            said = isinstance(value, dict) or entry is None or entry.section is not None
            return f"{name}: {text}" if said else f"{name} is {show_value(value)}: {text}"
        unnamed = entry is not None and entry.section is None and not text.startswith(name)
        return f"{name} is {show_value(value)}: {text}" if unnamed else text
    value = details[0]["input"]
    if value is None and entry is not None and entry.section is not None:
        return f"{name} is an empty section: give it fields, write {name}: {{}}, or remove the line"
    allowed = " or ".join(dict.fromkeys(_allowed(detail) for detail in details))
    remedy = _remedy(kinds, value)
    return f"{name} is {show_value(value)}: must be {allowed}{remedy}. {about}".rstrip()


_ALLOWED = {
    "literal_error": "{expected}",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of keys and values",
    "model_type": "a section",
    "none_required": "null",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "too_short": "a list of at least {min_length}",
    "string_too_short": "text of at least {min_length} characters",
    "finite_number": "a finite number",
}


def _allowed(detail: ErrorDetails) -> str:
    known = _ALLOWED.get(detail["type"])
    if known is None:
        return f"valid ({detail['msg']})"
    bounds = {
        key: f"{value:g}" if isinstance(value, float) else value
        for key, value in detail.get("ctx", {}).items()
    }
    return known.format(**bounds)


def _remedy(kinds: list[str], value: Any) -> str:
    """How to write what was probably meant; empty where that is not known."""
    if "bool_type" in kinds and isinstance(value, str):
        word = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower())
        return f": write {word}" if word else ""
    if "literal_error" in kinds and isinstance(value, bool):
        return ": in quotes if the word is meant"
    if "string_type" in kinds and isinstance(value, bool | int | float):
        return ": put it in quotes if text is meant"
    if ("int_type" in kinds or "float_type" in kinds) and isinstance(value, str):
        number = _number(value.replace("_", ""))
        return f": write {number}" if number is not None else ""
    if "int_type" in kinds and isinstance(value, float) and value.is_integer():
        return f": write {int(value)}"
    if ("tuple_type" in kinds or "list_type" in kinds) and not isinstance(value, dict | type(None)):
        return f": write [{value}]"
    return ""


def _number(text: str) -> str | None:
    """`text` if YAML reads it as a number."""
    try:
        value = yaml_core.load(text, "").data
    except ConfigError:
        return None
    return text if isinstance(value, int | float) and not isinstance(value, bool) else None


def show_value(value: Any) -> str:
    """A value as the user would write it, at most 60 characters."""
    if isinstance(value, dict | list):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:57] + "..."
    return repr(value) if isinstance(value, str) else json.dumps(value)


def _suggestion(path: tuple[str, ...], fields: list[tuple[str, ...]]) -> str:
    """The nearest right name: first inside the same top section, then in the others."""
    *parent, name = path
    siblings = [f for f in fields if list(f[:-1]) == parent]
    inside = [f for f in fields if f[0] == path[0]]
    for candidates, cutoff in (
        (inside, 1.0),
        (siblings, 0.6),
        (inside, 0.7),
        (fields, 1.0),
        (fields, 0.7),
    ):
        close = difflib.get_close_matches(name, {f[-1] for f in candidates}, n=1, cutoff=cutoff)
        if close:
            # Of several places with this name, the one that shares the longest start.
            best = max((f for f in candidates if f[-1] == close[0]), key=lambda f: _shared(f, path))
            return f"did you mean {'.'.join(best)}?"
    place = ".".join(parent) or "the top level"
    return f"{place} has {', '.join(f[-1] for f in siblings)}"


def _shared(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def _expected(model: type[BaseModel]) -> str:
    return f"write sections such as {', '.join(model.model_fields)}"
