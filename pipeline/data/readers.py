"""Files and Hub datasets -> raw rows with their origin (`file:line`).

Text files are read with the standard library, because `datasets` cannot say on which line a row
stands and turns blanks and numbers of a CSV into other types; Parquet with pyarrow, which spares a
copy in the cache of `datasets`; Hub datasets with `datasets`.
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.config import SourceSection
from pipeline.data.validate import nearest
from pipeline.errors import ConfigError, DataError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

RawRow = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class Location:
    """One place to read rows from; `setting` names it in messages, such as `data.rankings.path`."""

    setting: str
    path: str
    name: str | None = None
    data_dir: str | None = None
    split: str = "train"
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.path).exists()


def locations(source: SourceSection, setting: str) -> tuple[Location, Location | None]:
    """Where the rows of a source are, and its own held-out rows if it names any.

    `name`, `data_dir`, `split`, `held_out_split` and `revision` select inside a Hub dataset and do
    nothing for local files; of another Hub dataset for the held-out rows, only a split is selected.

    Raises:
        ConfigError: the held-out rows are the rows to train on.
    """
    hub = {"name": source.name, "data_dir": source.data_dir, "revision": source.revision}
    rows = Location(f"{setting}.path", source.path, split=source.split, **hub)
    path, split = source.held_out_path, source.held_out_split
    if path is not None and path != source.path:
        return rows, Location(f"{setting}.held_out_path", path, split=split or source.split)
    if split is not None and split != source.split and not rows.is_local:
        return rows, Location(f"{setting}.held_out_split", source.path, split=split, **hub)
    if path is not None or split == source.split:
        raise ConfigError(
            f"{setting}: the held-out rows ({source.path}, split {split or source.split!r}) are "
            "those to train on. Name others, or leave held_out_path and held_out_split out to "
            "split by hash."
        )
    return rows, None


def read_prompt_rows(location: Location, notes: dict[str, None]) -> Iterator[RawRow]:
    """`read_rows`, and text files (.txt) with one prompt a line."""
    if location.is_local and location.path.lower().removesuffix(".gz").endswith(".txt"):
        file = Path(location.path)
        with _whole(file):
            for number, line in _lines(file, _shown(file), notes):
                if line.strip():
                    yield f"{_shown(file)}:{number}", {"prompt": line.rstrip("\r\n")}
    else:
        yield from read_rows(location, notes)


def read_rows(location: Location, notes: dict[str, None]) -> Iterator[RawRow]:
    """Yield (origin, row) from a file, a folder of files or a Hub dataset.

    What the reader put right or left aside (a byte-order mark, files that are no data) goes into
    `notes`, a dictionary used as an ordered set.

    Raises:
        DataError: the place does not exist or cannot be reached, or a file is not readable as what
            its name says; the message has the line.
    """
    if not location.is_local:
        yield from _read_hub(location)
        return
    path = Path(location.path)
    for file in _files_of(path, location.setting, notes) if path.is_dir() else [path]:
        name = _shown(file)
        suffix = Path(file.name.lower().removesuffix(".gz")).suffix
        if suffix not in READERS:
            raise DataError(
                f"{location.setting}: {name} is no data file: its name must end in "
                f"{', '.join(READERS)}, or these with .gz. Rename or convert it."
            )
        with _whole(file):
            yield from READERS[suffix](file, name, notes)


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Turn what fails while a file is read into a `DataError` that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{_shown(file)} is not a whole gzip file ({error}). Copy or compress it again."
        ) from error
    except OSError as error:
        raise DataError(f"{_shown(file)} cannot be read ({error.strerror or error}).") from error


def _shown(path: Path) -> str:
    """The path as a reader would type it: relative to the current folder if it lies below."""
    absolute = Path(os.path.abspath(path))
    return (
        str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)
    )


def _files_of(folder: Path, setting: str, notes: dict[str, None]) -> list[Path]:
    """All data files below a folder, by name; hidden ones and other files are left aside."""
    below = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    seen = [
        path
        for path in below
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    files = [
        path for path in seen if path.name.lower().removesuffix(".gz").endswith(tuple(READERS))
    ]
    if not files:
        raise DataError(
            f"{setting}: the folder {_shown(folder)} holds no {', '.join(READERS)} file (or .gz)."
        )
    others = [path.relative_to(folder).as_posix() for path in seen if path not in set(files)]
    if others:
        notes[f"files of {_shown(folder)} that are no data: {', '.join(others[:5])}"] = None
    return files


def _open(file: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")


def _lines(file: Path, name: str, notes: dict[str, None]) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, with their ends; a UTF-8 byte-order mark is taken off."""
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                if b"\0" in line[:4] or line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(
                        f"{name}: line 1: the file is UTF-16 or UTF-32, not UTF-8. Convert it: "
                        f"iconv -f UTF-16 -t UTF-8 {name}"
                    )
                if line.startswith(b"\xef\xbb\xbf"):
                    notes[f"{name}: the byte-order mark at its start is not read as text"] = None
                    line = line[3:]
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}: line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is "
                    f"not UTF-8. Convert the file from its own encoding, for example: "
                    f"iconv -f CP949 -t UTF-8 {name}"
                ) from None


def _read_jsonl(file: Path, name: str, notes: dict[str, None]) -> Iterator[RawRow]:
    for number, line in _lines(file, name, notes):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = ""
            if number == 1 and line.strip()[0] == "[":
                hint = " A file that is one JSON list must be named .json."
            raise _bad_json(name, number, error, hint) from None
        yield f"{name}:{number}", row


def _bad_json(name: str, number: int, error: Exception, hint: str = "") -> DataError:
    what, column = str(error), ""
    if isinstance(error, json.JSONDecodeError):
        what, column = error.msg, f", column {error.colno}"
    return DataError(
        f"{name}: line {number}{column}: not valid JSON ({what}). Correct or remove the line; "
        f"a file that was cut short must be copied again.{hint}"
    )


def _read_json(file: Path, name: str, notes: dict[str, None]) -> Iterator[RawRow]:
    """One list of objects, or objects one after another."""
    text = "".join(line for _, line in _lines(file, name, notes))
    decode = json.JSONDecoder().raw_decode
    position = _skip_blank(text, 0)
    is_list = text.startswith("[", position)
    if is_list:
        position = _skip_blank(text, position + 1)
    number, counted, reported = 1, 0, 0
    while position < len(text) and not (is_list and text[position] == "]"):
        number += text.count("\n", counted, position)
        counted = position
        try:
            row, end = decode(text, position)
            after = _skip_blank(text, end)
            if is_list and text.startswith(",", after):
                after = _skip_blank(text, after + 1)
            elif is_list and not text.startswith("]", after):
                raise json.JSONDecodeError("expecting ',' or ']'", text, after)
        except json.JSONDecodeError as error:
            raise _bad_json(name, error.lineno, error) from None
        except (ValueError, RecursionError) as error:
            raise _bad_json(name, number, error) from None
        # Rows on one line are told apart by their column.
        column = f":{position - text.rfind(chr(10), 0, position)}" if number == reported else ""
        yield f"{name}:{number}{column}", row
        position, reported = after, number
    end = _skip_blank(text, position + 1)
    if is_list and end < len(text):
        fault = json.JSONDecodeError("text after the list", text, end)
        raise _bad_json(name, fault.lineno, fault)
    if is_list and position >= len(text):
        fault = json.JSONDecodeError("the list is not closed", text, len(text))
        raise _bad_json(name, fault.lineno, fault)


def _skip_blank(text: str, position: int) -> int:
    """The next position that is not white space; `len(text)` or more at the end."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_csv(file: Path, name: str, notes: dict[str, None]) -> Iterator[RawRow]:
    """Rows by the header's names, at their first line; fields beyond the header go to None."""
    # For the whole process; the default, 128 KB, is below the limit that the row check reports.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _lines(file, name, notes)), strict=True)
    line = 0
    try:
        header = next(reader, [])
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise DataError(
                f"{name}: line 1: the header names {', '.join(map(repr, twice))} twice. "
                "Give each column its own name."
            )
        line = reader.line_num
        for fields in reader:
            row: dict[str | None, Any] = dict(zip(header, fields, strict=False))
            if len(fields) > len(header):
                row[None] = fields[len(header) :]
            if fields:
                yield f"{name}:{line + 1}", row
            line = reader.line_num
    except csv.Error as error:
        raise DataError(
            f"{name}: line {line + 1}: the row that starts here is not valid CSV ({error}). "
            "Separate fields with commas, put fields with commas, quotes or line breaks into "
            "double quotes, and double the quotes inside them."
        ) from None


def _read_parquet(file: Path, name: str, notes: dict[str, None]) -> Iterator[RawRow]:
    """Rows have no lines: their origin is the number of the row."""
    import pyarrow
    import pyarrow.parquet

    with _open(file) as stream:
        content = io.BytesIO(stream.read()) if file.name.lower().endswith(".gz") else stream
        number = 0
        try:
            for batch in pyarrow.parquet.ParquetFile(content).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", row
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"{name}: after row {number}: not readable as Parquet ({error}). Write or copy the "
                "file again."
            ) from error


Reader = Callable[[Path, str, dict[str, None]], Iterator[RawRow]]
READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(location: Location) -> Iterator[RawRow]:
    path, what = location.path, f"{location.setting} {location.path!r}"
    if not HUB_ID.fullmatch(path) or path.lower().removesuffix(".gz").endswith(tuple(READERS)):
        folder = Path(path).expanduser().parent
        guess = nearest(Path(path).name, os.listdir(folder)) if folder.is_dir() else None
        hint = f" Did you mean {str(folder / guess)!r}?" if guess else ""
        raise DataError(
            f"{what} does not exist.{hint} Paths are looked up beside the config file, then in the "
            "current folder."
        )
    import datasets

    try:
        rows = datasets.load_dataset(
            path,
            name=location.name,
            data_dir=location.data_dir,
            split=location.split,
            revision=location.revision,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _hub_error(what, error) from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}[{location.split}]:{number}", row


def _hub_error(what: str, error: Exception) -> DataError:
    """What went wrong with a Hub dataset, and what to do about it."""
    if "gated" in str(error):
        return DataError(
            f"{what} is a gated dataset: accept its terms on its page on the Hub, then log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, ConnectionError):
        offline = [
            name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)
        ]
        cause = f" ({', '.join(offline)} is set)" if offline else ""
        return DataError(
            f"{what} is no local path, and the Hub cannot be reached{cause}: {error}. Correct the "
            "path, or download the dataset once with a connection (it is then read from the "
            "cache), or give a local file."
        )
    if isinstance(error, FileNotFoundError):
        return DataError(
            f"{what} is neither a local path nor a dataset that the Hub shows to you: {error} "
            "Correct the id or the revision; for a private dataset log in with `hf auth login` or "
            "set HF_TOKEN."
        )
    return DataError(
        f"{what} cannot be read: {error} Correct `name`, `data_dir`, `split` or `revision`, or "
        "convert the dataset to a local .jsonl or .parquet file."
    )
