"""The run's data: every dataset read, checked and split, with a report of what was left out."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from pipeline.config import DataSection, SourceSection
from pipeline.data.detect import choose_format, prompt_columns, read_record, rename_columns
from pipeline.data.formats import FORMATS, Kind, Record, Row
from pipeline.data.readers import Location, locations, read_rows
from pipeline.data.split import is_held_out, split_key
from pipeline.data.tally import Tally
from pipeline.data.validate import Reason, RowFault, check_row, excerpt, normalise
from pipeline.errors import DataError
from pipeline.records import Demonstration, Document, Prompt, PromptText, Ranking

KINDS: tuple[Kind, ...] = ("demonstrations", "rankings", "prompts", "pretraining")
HELD_OUT_ELSEWHERE = "prompt is held out elsewhere"
REPEATED = "repeats an earlier prompt"

HUB_SETTINGS = ("name", "data_dir", "revision", "held_out_split")

RecordT = TypeVar("RecordT", Demonstration, Ranking, Prompt, Document)


@dataclass(frozen=True, slots=True)
class Split(Generic[RecordT]):
    """Records to train on, and records that no stage trains on; both in the order of the files."""

    train: tuple[RecordT, ...] = ()
    held_out: tuple[RecordT, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """All records of a run. `report` is the content of data.json; see docs/data-formats.md."""

    demonstrations: Split[Demonstration] = Split()
    rankings: Split[Ranking] = Split()
    prompts: Split[Prompt] = Split()
    pretraining: Split[Document] = Split()
    report: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self, kind: Kind) -> str:
        """SHA-256 (hex) of the content and split of a kind's records, wherever they were read from.

        Raises:
            KeyError: the corpus was loaded without this kind.
        """
        value: str = self.report[kind]["fingerprint"]
        return value


@dataclass(slots=True)
class _Item:
    """A record on its way into a split. `group` is what the hash goes by."""

    record: Record
    row: Row
    format: str
    key: str
    group: str
    held_out: bool


@dataclass(slots=True)
class _Dataset:
    """One kind's items and what is reported about them."""

    items: list[_Item]
    tally: Tally
    source: dict[str, Any]
    formats: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    overlap: dict[str, int] = field(default_factory=lambda: {"rows": 0, "prompts": 0})


def load_corpus(data: DataSection, kinds: Iterable[Kind]) -> Corpus:
    """Read, check and split the datasets that `kinds` need.

    Prompts without a dataset of their own (`data.prompts`) are those of the demonstrations and
    rankings, each once. Where a prompt's part does not follow from its hash alone (a source with
    held-out rows of its own, or `data.group_column`), all datasets of the section are read, so that
    a stage run alone sees the same split as the whole chain.

    Raises:
        ConfigError: a source's `format` is not known.
        DataError: a dataset is not set, cannot be read, has no known format or too many bad rows,
            or nothing is left to train on.
    """
    sources: dict[Kind, SourceSection] = {
        kind: source for kind in KINDS if (source := getattr(data, kind)) is not None
    }
    asked = set(kinds)
    datasets = {
        kind: _read(kind, sources[kind], data)
        for kind in KINDS
        if kind in _kinds_to_read(asked, sources, data)
    }
    _remove_overlap(datasets)
    if "prompts" in asked and "prompts" not in datasets:
        datasets["prompts"] = _derived_prompts(datasets, data)
    splits = {kind: _split(dataset) for kind, dataset in datasets.items()}
    report: dict[str, Any] = {
        "split": {
            "held_out_fraction": data.held_out_fraction,
            "salt": data.split_salt,
            "by": data.group_column or "first user turn",
        }
    }
    for kind, dataset in datasets.items():
        report[kind] = _report(dataset, splits[kind])
    return Corpus(**splits, report=report)


def _kinds_to_read(
    asked: set[Kind], sources: Mapping[Kind, SourceSection], data: DataSection
) -> set[Kind]:
    for kind in sorted(asked - set(sources) - {"prompts"}):
        raise DataError(f"data.{kind} is not set, but this stage needs {kind}: give it a path.")
    # Plain text has no prompts and decides no prompt's part: it is read where a stage asks for it.
    with_prompts = {kind: source for kind, source in sources.items() if kind != "pretraining"}
    if "prompts" in asked and not with_prompts:
        raise DataError(
            "no prompts: set data.prompts, or data.demonstrations or data.rankings to take theirs."
        )
    coupled = data.group_column is not None or any(
        locations(source, f"data.{kind}")[1] for kind, source in with_prompts.items()
    )
    derived = "prompts" in asked and "prompts" not in sources
    if not (coupled or derived):
        return asked
    return {kind for kind in sources if kind != "pretraining" or kind in asked}


def _read(kind: Kind, source: SourceSection, data: DataSection) -> _Dataset:
    """All good rows of one kind's dataset, each with its part of the split."""
    setting = f"data.{kind}"
    rows, held_out = locations(source, setting)
    tally = Tally(f"{setting} ({source.path})", data)
    dataset = _Dataset([], tally, source.model_dump(exclude_defaults=True))
    unused = [name for name in HUB_SETTINGS if getattr(source, name) is not None]
    if rows.is_local and unused:
        dataset.notes[f"{', '.join(unused)}: for Hub datasets only, not used for a local path"] = (
            None
        )
    _read_place(rows, False if held_out else None, kind, source, data, dataset)
    if held_out:
        _read_place(held_out, True, kind, source, data, dataset)
    tally.check()
    return dataset


def _read_place(
    place: Location,
    held_out: bool | None,
    kind: Kind,
    source: SourceSection,
    data: DataSection,
    dataset: _Dataset,
) -> None:
    """Add one file's rows; `held_out` is their part, None to split them by hash."""
    setting, tally = f"data.{kind}", dataset.tally
    rows = list(islice(read_rows(place, dataset.notes), source.limit))
    if not rows:
        raise DataError(f"{place.setting}: {place.path} is empty: it has no rows.")
    rows = rename_columns(rows, source.columns, setting, place.path)
    name = choose_format(rows, kind, source.format, setting, place.path)
    dataset.formats[name] = None
    if kind != "pretraining":
        _check_group_column(rows, data.group_column, setting, place.path)
    seen: dict[tuple[Any, Any], str] = {}
    parts: dict[str, bool] = {}
    for origin, row in rows:
        tally.rows += 1
        try:
            check_row(row)
            record = read_record(row, FORMATS[name], kind, origin, dataset.notes)
            key = split_key(_opening(record))
            column = None if kind == "pretraining" else data.group_column
            group = key if column is None else _group(row, column)
            _check_row_id(row, origin, seen)
        except RowFault as fault:
            tally.bad(origin, row, fault)
            continue
        if group not in parts:
            by_hash = is_held_out(group, data.split_salt, data.held_out_fraction)
            parts[group] = by_hash if held_out is None else held_out
        dataset.items.append(_Item(record, row, name, key, group, parts[group]))


def _check_group_column(
    rows: list[tuple[str, Any]], column: str | None, setting: str, label: str
) -> None:
    if column is None or any(isinstance(row, dict) and column in row for _, row in rows):
        return
    raise DataError(
        f"{label}: data.group_column is {column!r}, which is none of its columns. Every dataset "
        f"needs it: add it, name it with {setting}.columns: {{{column}: <column>}}, or leave "
        "data.group_column out to split by the first user turn."
    )


def _group(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None or value == "":
        raise RowFault(Reason.BLANK, f"`{column}` (data.group_column) is {excerpt(value)}")
    return normalise(value if isinstance(value, str) else json.dumps(value, default=str))


def _check_row_id(row: Row, origin: str, seen: dict[tuple[Any, Any], str]) -> None:
    """An `id` names one row, or one row an annotator."""
    name, annotator = row.get("id"), row.get("annotator")
    if not isinstance(name, str | int) or not isinstance(annotator, str | int | None):
        return
    if (name, annotator) in seen:
        first = seen[name, annotator]
        raise RowFault(Reason.ROW_ID, f"`id` {excerpt(name)} is also that of {first}")
    seen[name, annotator] = origin


def _remove_overlap(datasets: Mapping[Kind, _Dataset]) -> None:
    """Take out of every train set the prompts and groups that any kind holds out."""
    prompted = [dataset for kind, dataset in datasets.items() if kind != "pretraining"]
    held_out = [item for dataset in prompted for item in dataset.items if item.held_out]
    keys = {item.key for item in held_out}
    groups = {item.group for item in held_out}
    for dataset in datasets.values():
        kept, prompts = [], set()
        for item in dataset.items:
            if item.held_out or not (item.key in keys or item.group in groups):
                kept.append(item)
                continue
            prompts.add(item.key)
            dataset.tally.leave_out(
                HELD_OUT_ELSEWHERE, item.record.origin, f"prompt {excerpt(item.key)}", item.row
            )
        dataset.overlap = {"rows": len(dataset.items) - len(kept), "prompts": len(prompts)}
        dataset.items = kept


def _opening(record: Record) -> PromptText:
    """What a record's part of the split goes by: its prompt, or all of a plain text."""
    return record.text if isinstance(record, Document) else record.prompt


def _derived_prompts(datasets: Mapping[Kind, _Dataset], data: DataSection) -> _Dataset:
    """The prompts of the other kinds' kept rows, each once, in the part where its row is."""
    datasets = {kind: dataset for kind, dataset in datasets.items() if kind != "pretraining"}
    origin = " and ".join(f"data.{kind}" for kind in datasets)
    derived = _Dataset([], Tally("data.prompts", data), {"prompts of": origin})
    seen: dict[Any, str] = {}
    for dataset in datasets.values():
        for item in dataset.items:
            derived.tally.rows += 1
            derived.formats[item.format] = None
            record = item.record
            assert not isinstance(record, Document)
            identity = _identity(record.prompt)
            if identity in seen:
                first = seen[identity]
                derived.tally.leave_out(REPEATED, record.origin, f"that of {first}", item.row)
                continue
            seen[identity] = record.origin
            columns = prompt_columns(item.row, FORMATS[item.format], derived.notes)
            prompt = Prompt(record.prompt, columns, record.origin)
            derived.items.append(dataclasses.replace(item, record=prompt))
    return derived


def _identity(prompt: PromptText) -> Any:
    """What makes two prompts the same: their normalised text; a single user turn is its text."""
    if isinstance(prompt, str):
        return normalise(prompt)
    if len(prompt) == 1:
        return normalise(prompt[0].content)
    return tuple((turn.role, normalise(turn.content)) for turn in prompt)


def _split(dataset: _Dataset) -> Split[Any]:
    train = tuple(item.record for item in dataset.items if not item.held_out)
    held_out = tuple(item.record for item in dataset.items if item.held_out)
    if not train:
        raise DataError(
            f"{dataset.tally.label}: none of its {dataset.tally.rows} rows is left to train on "
            f"({len(held_out)} are held out). Add rows, or lower data.held_out_fraction, or change "
            "data.split_salt."
        )
    if not held_out:
        dataset.notes["no row is held out: too few prompts for data.held_out_fraction"] = None
    return Split(train, held_out)


def _report(dataset: _Dataset, split: Split[Any]) -> dict[str, Any]:
    """rows = kept in train + kept in held-out + those left out, by reason."""
    return {
        "source": dataset.source,
        "format": ", ".join(dataset.formats),
        "rows": dataset.tally.rows,
        "kept": {"train": len(split.train), "held_out": len(split.held_out)},
        "left_out": dataset.tally.left_out,
        "overlap": dataset.overlap,
        "notes": list(dataset.notes),
        "fingerprint": _fingerprint(split),
    }


def _fingerprint(split: Split[Any]) -> str:
    digest = hashlib.sha256()
    for part, records in (("train", split.train), ("held_out", split.held_out)):
        for record in records:
            digest.update(json.dumps([part, _content(record)], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _content(record: Record) -> list[Any]:
    """A record's values without its origin, as JSON."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    del values["origin"]
    if not isinstance(record, Document) and not isinstance(record.prompt, str):
        values["prompt"] = [[turn.role, turn.content] for turn in record.prompt]
    return list(values.items())
