"""Which format a dataset has, and the kind of record that a stage wants from it."""

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.data.conversations import last_reply
from pipeline.data.formats import FORMATS, Format, Kind, Record, Row, first_column
from pipeline.data.validate import check_ranking, nearest
from pipeline.errors import ConfigError, DataError
from pipeline.records import Demonstration, Document, Prompt, Ranking

# What each kind can be made from, the most fitting first: a preferred response demonstrates, and
# every row but plain text has a prompt.
MADE_FROM: dict[Kind, tuple[Kind, ...]] = {
    "demonstrations": ("demonstrations", "rankings"),
    "rankings": ("rankings",),
    "prompts": ("prompts", "demonstrations", "rankings"),
    "pretraining": ("pretraining",),
}


def formats_for(kind: Kind) -> list[str]:
    """Names of the formats that `kind` can be read from, in the order of `auto`."""
    return [name for native in MADE_FROM[kind] for name in FORMATS if FORMATS[name].kind == native]


def rename_columns(
    rows: Sequence[tuple[str, Any]], renames: dict[str, str], setting: str, label: str
) -> list[tuple[str, Any]]:
    """Rows with `renames` (our name -> the dataset's column) applied; a replaced column is lost.

    Raises:
        DataError: no row has a column that `renames` names.
    """
    have = _columns(rows)
    for ours, theirs in renames.items():
        if theirs not in have:
            guess = nearest(theirs, have)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise DataError(
                f"{label}: {setting}.columns names {theirs!r} for {ours!r}, but the columns are "
                f"{', '.join(have) or 'none'}.{hint} Correct {setting}.columns.{ours}."
            )
    if not renames:
        return list(rows)
    ours_of = {theirs: ours for ours, theirs in renames.items()}
    renamed: list[tuple[str, Any]] = []
    for origin, row in rows:
        if isinstance(row, dict):
            row = {
                ours_of.get(name, name): value
                for name, value in row.items()
                if name in ours_of or name not in renames
            }
        renamed.append((origin, row))
    return renamed


def choose_format(
    rows: Sequence[tuple[str, Any]], kind: Kind, name: str, setting: str, label: str
) -> str:
    """Name of the rows' format: the configured one, checked, or the one that the columns show.

    Args:
        rows: (origin, row) pairs; rows that are no objects are left to the row checks.
        name: the source's `format`.
        setting: the source's section, such as `data.rankings`, and `label` its file or Hub id.

    Raises:
        ConfigError: `name` is no format, or not one that `kind` can be read from.
        DataError: no format fits the columns (a column is missing), or two do (mixed schemas).
    """
    allowed = formats_for(kind)
    if name != "auto":
        if name not in allowed:
            guess = nearest(name, allowed)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise ConfigError(
                f"{setting}.format is {name!r}; {kind} are read from auto, {', '.join(allowed)}."
                f"{hint}"
            )
        if not any(_has_columns(row, FORMATS[name]) for _, row in rows):
            raise _missing_columns(rows, kind, [name], setting, label)
        return name
    found: str | None = None
    found_at = ""
    for origin, row in rows:
        if not isinstance(row, dict):
            continue
        other = next((name for name in allowed if FORMATS[name].matches(row)), None)
        if other is None or other == found:
            continue
        if found is None:
            found, found_at = other, origin
        elif not _has_columns(row, FORMATS[found]):
            raise DataError(
                f"{label} mixes row formats: {found_at} is {found!r}, {origin} is {other!r} "
                f"(columns {', '.join(row)}). Put the rows of each format into a dataset of their "
                f"own, or name the one to read in {setting}.format (the other rows are then bad)."
            )
    if found is None:
        raise _missing_columns(rows, kind, allowed, setting, label)
    return found


def _columns(rows: Iterable[tuple[str, Any]]) -> list[str]:
    """All column names, in the order of their first appearance."""
    names: dict[str, None] = {}
    for _, row in rows:
        if isinstance(row, dict):
            names.update(dict.fromkeys(name for name in row if name is not None))
    return list(names)


def _has_columns(row: Any, row_format: Format) -> bool:
    return isinstance(row, dict) and all(
        any(name in row for name in names) for names in row_format.needs
    )


def _missing_columns(
    rows: Sequence[tuple[str, Any]], kind: Kind, candidates: list[str], setting: str, label: str
) -> DataError:
    """The error for rows of no format: says what the nearest format lacks."""
    have = _columns(rows)

    def lacks(name: str) -> list[tuple[str, ...]]:
        return [names for names in FORMATS[name].needs if not set(names) & set(have)]

    def distance(name: str) -> tuple[float, int]:
        # Columns that are all there hold the wrong types, which is as far off as half of them.
        missing = len(lacks(name))
        return (missing / len(FORMATS[name].needs) if missing else 0.5, missing)

    best = min(candidates, key=distance)
    columns = ", ".join(have) or "none"
    needs = ", ".join(" or ".join(names) for names in FORMATS[best].needs)
    if not lacks(best):
        return DataError(
            f"{label}: no row has values of the types that {kind} need (columns {columns}); format "
            f"{best!r} comes nearest and needs {needs}. docs/data-formats.md shows a row of each "
            f"format; {setting}.format: {best} shows what is wrong with the rows."
        )
    message = (
        f"{label}: its columns ({columns}) fit no format for {kind}; format {best!r} comes nearest "
        f"and needs {needs}."
    )
    for names in lacks(best):
        guess = next((near for name in names if (near := nearest(name, have))), None)
        example = f"{names[0]}: {guess}" if guess else f"{names[0]}: <column>"
        hint = f" Did you mean {guess!r}?" if guess else ""
        message += (
            f" Column {' or '.join(map(repr, names))} is missing.{hint} Name the column that holds "
            f"it: {setting}.columns: {{{example}}}."
        )
    return DataError(message)


def read_record(
    row: Row, row_format: Format, kind: Kind, origin: str, notes: dict[str, None]
) -> Record:
    """The row as a record of `kind`.

    The demonstration of a ranking is its preferred response (the first of those tied for best). The
    prompt of any row keeps the row's further columns; what JSON cannot hold is left out and noted.

    Raises:
        RowFault: the row is not what its format needs.
    """
    for names in row_format.needs:
        first_column(row, names)
    record = row_format.read(row, origin)
    if isinstance(record, Document):
        return record
    if isinstance(record, Ranking):
        check_ranking(record)
    if kind == "prompts":
        return Prompt(record.prompt, prompt_columns(row, row_format, notes), origin)
    if kind == "demonstrations" and isinstance(record, Ranking):
        best = record.ranks.index(min(record.ranks))
        return Demonstration(record.prompt, record.responses[best], origin)
    if kind == "demonstrations" and isinstance(record, Prompt):
        assert not isinstance(record.prompt, str)
        return Demonstration(*last_reply(record.prompt), origin)
    return record


def prompt_columns(row: Row, row_format: Format, notes: dict[str, None]) -> dict[str, Any]:
    """All columns but the one that is the prompt, as values that JSON can hold."""
    the_prompt = next((name for name in row_format.prompt_columns if row.get(name)), None)
    columns = {}
    for name, value in row.items():
        if name == the_prompt:
            continue
        try:
            columns[name] = _jsonable(value)
        except TypeError as error:
            notes[f"column {name!r} is not kept with the prompts: JSON cannot hold {error}"] = None
    return columns


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(type(value).__name__)
