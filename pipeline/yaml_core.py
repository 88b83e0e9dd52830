"""YAML as YAML 1.2's core schema reads it, strictly, with the line of every value.

PyYAML follows YAML 1.1, where `no` is false, `1e-5` is text and `010` is 8. Here only `true` and
`false` are booleans, `1e-5` is a number and `010` is 10 (https://yaml.org/spec/1.2.2/#103-core-schema).
Keys are text and unique; tags, merge keys and several documents in a file are refused.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
# Tag, pattern, and the characters a scalar of this tag can start with; the first match wins.
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 *or* 1.2 would not read as text, so that any reader agrees."""


for _name, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)


_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "str": str,
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    _TAG + "float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
}


@dataclass
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and where each value is written.

    `where` maps the path of a value, such as `("ppo", "kl_coef")`, to `file:line`.
    """

    data: Any
    where: dict[KeyPath, str] = field(default_factory=dict)

    def nearest(self, path: KeyPath) -> str:
        """Where `path`, or else the closest section round it, is written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.where:
                return self.where[path[:length]]
        raise AssertionError("the root has no place")


def read_text(path: Path) -> str:
    """The file's text; a UTF-8 byte order mark is left out. Raises ConfigError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (current folder: {Path.cwd()})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:4]:
        raise ConfigError(f"{path}: the file is UTF-16 or UTF-32: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from None


def load(text: str, name: str, numbered: bool = True) -> Document:
    """Parse `text`; `name` (with the line, if `numbered`) is what messages call its place.

    An empty text is None. Raises ConfigError for a fault of syntax, and one for all double keys.
    """
    node = _compose(text, name, numbered)
    if node is None:
        return Document(None, {(): name})
    builder = _Builder(name, numbered)
    document = Document(builder.build(node, (), ()), builder.where)
    if builder.faults:
        raise ConfigError(listed(builder.faults))
    return document


def dump(data: Any) -> str:
    """`data` as YAML that `load` reads back to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def listed(faults: list[str]) -> str:
    """One fault as it stands, several as a list."""
    if len(faults) == 1:
        return faults[0]
    return "\n".join([f"{len(faults)} faults in the configuration:", *(f"  {f}" for f in faults)])


def _compose(text: str, name: str, numbered: bool) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = ord(error.character) if isinstance(error.character, str) else error.character
        raise ConfigError(
            f"{name}:{line}: character U+{code:04X} is not allowed in YAML: remove it"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark and numbered else name
        remedy = ": indent with spaces" if "'\\t'" in str(error.problem) else ""
        problem = f"{error.context}, {error.problem}" if error.context else error.problem
        raise ConfigError(f"{place}: not valid YAML: {problem}{remedy}") from None


@dataclass
class _Builder:
    """Nodes to plain data. Aliases become copies, so that an override changes one place only."""

    name: str
    numbered: bool
    where: dict[KeyPath, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def build(self, node: yaml.Node, path: KeyPath, parents: tuple[yaml.Node, ...]) -> Any:
        self.where.setdefault(path, self._place(node))
        if any(node is parent for parent in parents):
            raise ConfigError(f"{self._place(node)}: {_dotted(path)} is an alias of itself")
        parents = (*parents, node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return {
                key: self.build(value, (*path, key), parents)
                for key, value in self._items(node, path)
            }
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(v, (*path, i), parents) for i, v in enumerate(node.value)]
        return self._scalar(node, path)

    def _items(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node]]:
        first: dict[str, yaml.Node] = {}
        for key, value in node.value:
            place = self._place(key)
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or section"
                self.faults.append(f"{place}: a key must be text, not {shown}: put it in quotes")
            elif key.value == "<<":
                self.faults.append(f"{place}: merge keys (<<) are not read: write the fields out")
            elif key.value in first:
                line = first[key.value].start_mark.line + 1
                earlier = f" (first on line {line})" if self.numbered else ""
                name = _dotted((*path, key.value))
                self.faults.append(f"{place}: {name} is given twice{earlier}: keep one")
            else:
                first[key.value] = key
                self.where[(*path, key.value)] = place
                yield key.value, value

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            try:
                return _SCALARS[node.tag](node.value)
            except (KeyError, ValueError):  # an explicit tag, as in `!!int x`
                pass
        self.faults.append(
            f"{self._place(node)}: {_dotted(path)} has the tag {node.tag.replace(_TAG, '!!')}, "
            f"which cannot be read here: remove the tag"
        )
        return None

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.numbered else self.name


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path)) or "the file"
