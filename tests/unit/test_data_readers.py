"""Files, folders and Hub datasets: the rows, where they stand, and files that cannot be read."""

import datetime
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import SourceSection
from pipeline.data.readers import Location, locations, read_rows
from pipeline.errors import ConfigError, DataError

ROWS = [
    {"prompt": "수도가\n어디예요? 🙂", "response": 'a, "b"'},
    {"prompt": "둘\u2028째", "response": "42"},
]


def rows_of(path, notes=None):
    return list(read_rows(Location("data.prompts.path", str(path)), {} if notes is None else notes))


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def error(path, content=None):
    if content is not None:
        write(path, content)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    return str(caught.value)


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


CSV = 'prompt,response\n"수도가\n어디예요? 🙂","a, ""b"""\n둘\u2028째,42\n'


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", jsonl(ROWS), "1 2"),
        ("a.jsonl", "\n" + jsonl(ROWS).replace("\n", "\r\n\n"), "2 4"),
        ("a.json", json.dumps(ROWS, indent=2), "2 6"),  # { prompt response }, { ...
        ("a.json", json.dumps(ROWS, ensure_ascii=False), "1 1:54"),  # "[", 50, ", "
        ("a.json", jsonl(ROWS), "1 2"),
        ("a.csv", CSV, "2 4"),  # the first row takes lines 2 and 3
        ("a.csv", CSV.replace("response\n", "response\n\n"), "3 5"),
        ("A.CSV", CSV.replace("\n", "\r\n").replace("수도가\r\n", "수도가\n"), "2 4"),
        ("a.parquet", parquet(ROWS), "1 2"),
    ],
)
def test_the_same_rows_from_every_kind_of_file(tmp_path, monkeypatch, name, content, lines, gz):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / (name + gz), content)
    expected = [(f"{name}{gz}:{line}", row) for line, row in zip(lines.split(), ROWS, strict=True)]
    assert rows_of(tmp_path / (name + gz)) == expected


def test_csv_keeps_text_as_text(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,response\nNA,007\n,null\n")
    expected = [{"prompt": "NA", "response": "007"}, {"prompt": "", "response": "null"}]
    assert [row for _, row in rows_of(path)] == expected


def test_parquet_keeps_lists_and_nulls(tmp_path):
    rows = [{"ranking": [["b"], ["a", "c"]], "day": datetime.date(2026, 1, 2), "note": None}]
    assert rows_of(write(tmp_path / "a.parquet", parquet(rows)))[0][1] == rows[0]


def test_a_folder_is_read_by_name_and_says_what_it_leaves_aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "묶음"
    (folder / "sub").mkdir(parents=True)
    (folder / ".cache").mkdir()
    write(folder / "b.jsonl", jsonl(ROWS[:1]))
    write(folder / "a.json.gz", json.dumps(ROWS[1:]))
    write(folder / "sub" / "c.csv", CSV)
    write(folder / ".cache" / "x.jsonl", "no json")
    write(folder / "README.md", "text")
    notes: dict[str, None] = {}
    origins = [origin for origin, _ in rows_of(folder, notes)]
    assert origins == [
        f"묶음/{x}" for x in ("a.json.gz:1", "b.jsonl:1", "sub/c.csv:2", "sub/c.csv:4")
    ]
    assert list(notes) == ["files of 묶음 that are no data: README.md"]


def test_a_folder_without_data_is_refused(tmp_path):
    write(tmp_path / "README.md", "text")
    assert "holds no .jsonl, .json, .csv, .parquet file" in error(tmp_path)


def test_a_byte_order_mark_is_no_text_and_is_noted(tmp_path):
    for name, content in (("a.jsonl", jsonl(ROWS)), ("a.csv", CSV), ("a.json", json.dumps(ROWS))):
        notes: dict[str, None] = {}
        path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
        assert [row for _, row in rows_of(path, notes)] == ROWS
        assert "byte-order mark" in next(iter(notes))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_refused_with_the_command_that_converts_it(tmp_path, encoding):
    message = error(tmp_path / "a.jsonl", jsonl(ROWS).encode(encoding))
    assert "a.jsonl: line 1: the file is UTF-16" in message
    assert "iconv -f UTF-16 -t UTF-8" in message


def test_other_encodings_are_refused_with_line_and_byte(tmp_path):
    content = b'{"prompt": "a"}\n' + '{"prompt": "안녕"}\n'.encode("cp949")
    # `{"prompt": "` takes 12 bytes; 안 is 0xbe 0xc8 in CP949.
    assert "line 2: byte 13 (0xbe) is not UTF-8" in error(tmp_path / "a.jsonl", content)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 1,}\n', "a.jsonl: line 3, column "),
        ("a.jsonl", '{"a": 1}\n{"a": "cut', "a.jsonl: line 2, column 7"),
        ("a.jsonl", '[{"a": 1},\n{"a": 2}]', "one JSON list must be named .json"),
        ("a.jsonl", '{"a": "x\0y"}\n', "a.jsonl: line 1, column 9"),
        ("a.jsonl", '{"a": ' + "[" * 200_000, "a.jsonl: line 1"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json: line 2, column 7"),
        (
            "a.json",
            '[{"a": 1}\n {"a": 2}]',
            "a.json: line 2, column 2: not valid JSON (expecting ','",
        ),
        ("a.json", '[{"a": 1},\n', "the list is not closed"),
        ("a.json", '[{"a": 1}', "expecting ',' or ']'"),
        ("a.json", '[{"a": 1}]\n{"a": 2}', "a.json: line 2, column 1: not valid JSON (text after"),
        ("a.csv", 'a,b\n1,"x\ny\n', "a.csv: line 2: the row that starts here is not"),
        ("a.csv", 'a,b\n1,"x"y\n', "a.csv: line 2: the row"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv: line 1: the header names 'a' twice"),
        ("a.parquet", "PAR1 no", "a.parquet: after row 0: not readable as Parquet"),
    ],
)
def test_damaged_files_are_refused_with_the_line(tmp_path, name, content, where):
    assert where in error(tmp_path / name, content)


def test_damaged_gzip_files_are_refused(tmp_path):
    whole = gzip.compress(jsonl(ROWS * 100).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut.jsonl.gz is not a whole gzip file" in error(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    assert "plain.jsonl.gz is not a whole gzip file" in error(tmp_path / "plain.jsonl.gz")


def test_names_that_are_no_data_or_do_not_exist(tmp_path, monkeypatch):
    assert "its name must end in .jsonl, .json, .csv, .parquet" in error(tmp_path / "a.txt", "x")
    write(tmp_path / "rankings.jsonl", "{}")
    message = error(tmp_path / "ranking.jsonl")
    assert "ranking.jsonl' does not exist. Did you mean" in message
    assert "rankings.jsonl'?" in message


def test_hub_datasets(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, **settings):
        asked.update(settings, path=path)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = SourceSection(
        path="org/data",
        name="sub",
        data_dir="harmless-base",
        split="train[:50%]",
        held_out_split="test",
        revision="abc",
    )
    rows, held_out = locations(source, "data.rankings")
    assert [origin for origin, _ in read_rows(rows, {})] == [
        "org/data[train[:50%]]:1",
        "org/data[train[:50%]]:2",
    ]
    assert [row for _, row in read_rows(held_out, {})] == ROWS
    assert asked == {
        "path": "org/data",
        "name": "sub",
        "data_dir": "harmless-base",
        "split": "test",
        "revision": "abc",
    }


def test_held_out_rows_have_their_own_place(tmp_path):
    path = str(write(tmp_path / "a.jsonl", jsonl(ROWS)))
    section = "data.rankings"
    _, other = locations(SourceSection(path="org/a", name="x", held_out_path="org/b"), section)
    assert other == Location("data.rankings.held_out_path", "org/b", split="train")
    # A split is part of a Hub dataset: a local copy of it is split by hash.
    assert locations(SourceSection(path=path, held_out_split="test"), section)[1] is None
    for same in (
        SourceSection(path=path, held_out_path=path),
        SourceSection(path="org/a", held_out_split="train"),
    ):
        with pytest.raises(ConfigError, match="are those to train on"):
            locations(same, section)


def test_hub_errors_say_what_to_do(monkeypatch):
    import datasets

    def message(failure):
        def fail(*_, **__):
            raise failure

        monkeypatch.setattr(datasets, "load_dataset", fail)
        return error(Path("org/data"))

    missing = datasets.exceptions.DatasetNotFoundError
    assert "hf auth login" in message(missing("Dataset 'x' doesn't exist on the Hub."))
    assert "accept its terms" in message(missing("Dataset 'x' is a gated dataset on the Hub."))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reached = message(ConnectionError("Couldn't reach 'x' on the Hub"))
    assert "(HF_HUB_OFFLINE is set)" in reached
    assert "data.prompts.path 'org/data'" in reached
    split = message(ValueError("Unknown split \"dev\". Should be one of ['train']."))
    assert "Should be one of ['train']" in split
    assert "Correct `name`, `data_dir`, `split`" in split


def test_an_unreachable_hub_is_an_error_for_the_user():
    # tests/conftest.py sets HF_HUB_OFFLINE, so nothing is looked up.
    assert "the Hub cannot be reached" in error(Path("no-such-org/no-such-data"))
