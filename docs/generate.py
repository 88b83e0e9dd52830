"""Writes docs/config-reference.md and the tables of docs/from-trl.md (`make docs`).

The configuration models are the only place where a field, its default, its limits and its sentence
are written, and `stages/trl_fields.py` the only one for TRL's; tests refuse committed pages that
differ from what this makes.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parent / "config-reference.md"
FROM_TRL = Path(__file__).parent / "from-trl.md"
HEADER = """# Config reference

Generated from the configuration models by `make docs`: do not edit.

A run is one YAML file with the sections below; every field can be overridden on the command line
by its dotted name (`rlhf run configs/quickstart.yaml ppo.kl_coef=0.1`). Unknown names are refused.
`rlhf config CONFIG` prints all values of a file with defaults filled in; `rlhf config --schema`
prints the JSON Schema that editors complete from."""
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}

Schema = dict[str, Any]


def render(schema: Schema) -> str:
    """The reference as Markdown: one table for each section of a model's JSON Schema."""
    definitions = schema.get("$defs", {})
    paths: dict[str, list[str]] = defaultdict(list)  # definition -> dotted names, in file order
    for path, name in _sections(schema, definitions, ""):
        paths[name].append(path)
    parts = [HEADER]
    for name, dotted in paths.items():
        definition = definitions[name]
        required = definition.get("required", [])
        fields = sorted(
            definition["properties"].items(), key=lambda field: field[0] not in required
        )
        kind = f": `{_word(*fields[0])}`" if dotted[0].endswith("[]") else ""
        parts.append("\n## " + ", ".join(f"`{path}`" for path in dotted) + kind + "\n")
        parts.append(_sentence(definition.get("description", "")) + "\n")
        parts.append("| field | type | default | meaning |\n| --- | --- | --- | --- |")
        for field, spec in fields:
            default = "required" if field in required else _default(spec)
            meaning = _sentence(spec.get("description", ""))
            if spec.get("in_key") is False:
                meaning += " Not in the stage's key."
            kind = " or ".join(dict.fromkeys(_kind(spec).split(" or ")))
            if (section := _reference(spec)) and definitions[section].get("properties"):
                kind, default = "section", "see below" if field not in required else "required"
            parts.append(
                "| " + " | ".join(map(_cell, (f"`{field}`", kind, default, meaning))) + " |"
            )
    return "\n".join(parts) + "\n"


def _sections(schema: Schema, definitions: Schema, prefix: str) -> Iterator[tuple[str, str]]:
    """Every nested section below `schema`, outer before inner: (dotted name, definition)."""
    for field, spec in schema["properties"].items():
        name = _reference(spec)
        if name and "properties" in definitions[name]:
            yield prefix + field, name
            yield from _sections(definitions[name], definitions, f"{prefix}{field}.")
        for item in _items(spec):
            if name := _reference(item):
                yield f"{prefix}{field}[]", name
                yield from _sections(definitions[name], definitions, f"{prefix}{field}[].")


def _items(spec: Schema) -> Iterator[Schema]:
    """What the items of a field may be, where it is a list or may be one."""
    for option in [spec, *spec.get("anyOf", [])]:
        items = option.get("items", {})
        yield from items.get("anyOf", [items] if items else [])


def _word(field: str, spec: Schema) -> str:
    """What tells one kind of a list's sections from the others: its first field."""
    return f"{field}: {spec['const']}" if "const" in spec else field


def _reference(spec: Schema) -> str | None:
    """The definition that a field refers to, directly or as one alternative beside null."""
    for option in [spec, *spec.get("anyOf", []), *spec.get("allOf", [])]:
        if "$ref" in option:
            return str(option["$ref"]).rsplit("/", 1)[-1]
    return None


def _kind(spec: Schema) -> str:
    """A field's type and limits in a few words."""
    if "$ref" in spec:
        return "section"
    if "anyOf" in spec:
        return " or ".join(_kind(option) for option in spec["anyOf"])
    if "enum" in spec:
        return " or ".join(f"`{value}`" for value in spec["enum"])
    if "const" in spec:
        return f"`{spec['const']}`"
    if spec.get("type") == "array":
        return f"list of {_kind(spec.get('items', {}))}"
    kind = str(spec.get("type", "any"))
    limits = [f"{sign} {spec[key]:g}" for key, sign in LIMITS.items() if key in spec]
    return f"{kind} {', '.join(limits)}".strip()


def _default(spec: Schema) -> str:
    if "default" not in spec:  # made anew each time: an empty mapping
        return "`{}`" if spec.get("type") == "object" else ""
    return f"`{json.dumps(spec['default'])}`"


def _sentence(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def with_trl_tables(page: str) -> str:
    """The page with the table of each TRL class between its marks."""
    from stages.trl_fields import TABLES, render_table

    for name, fields in TABLES.items():
        marks = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.S)
        table = render_table(fields)
        page, found = marks.subn(lambda mark, table=table: mark[1] + table + mark[2], page)
        assert found == 1, name
    return page


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from stages.config import RunConfig

    REFERENCE.write_text(render(RunConfig.model_json_schema()), encoding="utf-8")
    FROM_TRL.write_text(with_trl_tables(FROM_TRL.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {REFERENCE.name} and {FROM_TRL.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
