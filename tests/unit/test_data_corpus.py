"""load_corpus: splits, overlap, bad rows, the report, fingerprints, and real data."""

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config import DataSection
from pipeline.data import load_corpus
from pipeline.data.corpus import HELD_OUT_ELSEWHERE, REPEATED
from pipeline.data.readers import Location, read_rows
from pipeline.errors import DataError
from pipeline.records import first_user_turn

HH = (Path(__file__).parents[3] / "shared/data/hh-harmless/test.jsonl.gz").resolve()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(prompts):
    return [{"prompt": p, "chosen": f"{p} 네", "rejected": f"{p} 아니요"} for p in prompts]


def demos(prompts):
    return [{"prompt": p, "response": f"{p} 답"} for p in prompts]


PROMPTS = [f"질문 {i}: 강아지가 뭐예요?" for i in range(400)]


def texts(records):
    return [record.prompt for record in records]


def balanced(dataset):
    """The report's promise: each row read is kept or left out for a reason."""
    left_out = sum(entry["count"] for entry in dataset["left_out"].values())
    return dataset["rows"] == sum(dataset["kept"].values()) + left_out


def expected_held_out(prompts, fraction=0.1, salt="rlhf"):
    """By the definition in docs/data-formats.md, with another arithmetic: the digest as hex."""
    limit = f"{int(fraction * 16**16):016x}"
    return {p for p in prompts if hashlib.sha256(f"{salt}\0{p}".encode()).hexdigest()[:16] < limit}


def test_the_split_is_the_documented_hash_in_the_order_of_the_file(tmp_path):
    data = DataSection(demonstrations=write(tmp_path / "d.jsonl", demos(PROMPTS)))
    split = load_corpus(data, ["demonstrations"]).demonstrations
    held_out = expected_held_out(PROMPTS)
    assert texts(split.held_out) == [p for p in PROMPTS if p in held_out]
    assert texts(split.train) == [p for p in PROMPTS if p not in held_out]
    # 400 draws of 0.1 have mean 40 and standard deviation sqrt(400 * 0.1 * 0.9) = 6.
    assert abs(len(split.held_out) - 40) < 4 * 6
    other = load_corpus(data.model_copy(update={"split_salt": "x"}), ["demonstrations"])
    assert set(texts(other.demonstrations.held_out)) == expected_held_out(PROMPTS, salt="x")


def test_every_kind_has_a_prompt_in_the_same_part_whatever_order_and_normal_form(tmp_path):
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    decomposed = [unicodedata.normalize("NFD", p) + " \n" for p in shuffled]
    assert decomposed[0].strip() != shuffled[0]
    chats = [{"prompt": [{"role": "user", "content": p}], "note": "n"} for p in reversed(PROMPTS)]
    corpus = load_corpus(
        DataSection(
            demonstrations=write(tmp_path / "d.jsonl", demos(PROMPTS)),
            rankings=write(tmp_path / "r.jsonl", pairs(decomposed)),
            prompts=write(tmp_path / "p.jsonl", chats),
        ),
        ["demonstrations", "rankings", "prompts"],
    )
    expected = expected_held_out(PROMPTS)
    for split in (corpus.demonstrations, corpus.rankings, corpus.prompts):
        for records, want in (
            (split.held_out, expected),
            (split.train, set(PROMPTS) - expected),
        ):
            seen = [
                unicodedata.normalize("NFC", first_user_turn(r.prompt)).strip() for r in records
            ]
            assert len(seen) == len(want)
            assert set(seen) == want


def test_conversations_that_open_alike_are_in_one_part(tmp_path):
    def chat(opening, then):
        turns = [opening, "네", then, "끝"]
        roles = ("user", "assistant") * 2
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]}

    rows = [chat(p, f"{i}번째") for p in PROMPTS[:100] for i in range(3)]
    data = DataSection(demonstrations=write(tmp_path / "d.jsonl", rows), held_out_fraction=0.5)
    split = load_corpus(data, ["demonstrations"]).demonstrations
    openings = [{first_user_turn(r.prompt) for r in part} for part in (split.train, split.held_out)]
    assert not openings[0] & openings[1]
    assert len(split.held_out) == 3 * len(openings[1])


def test_a_group_is_split_as_one_and_never_shares_a_prompt(tmp_path):
    rows = [dict(row, doc=f"문서 {i // 4}") for i, row in enumerate(demos(PROMPTS))]
    # The same prompt in many groups: once in a held-out group, it must not be trained on.
    rows += [{"prompt": "요약해 줘", "response": "네", "doc": f"문서 {i}"} for i in range(100)]
    data = DataSection(
        demonstrations=write(tmp_path / "d.jsonl", rows), group_column="doc", held_out_fraction=0.3
    )
    corpus = load_corpus(data, ["demonstrations"])
    held_out = expected_held_out({f"문서 {i}" for i in range(100)}, 0.3)
    shared = [r for r in corpus.demonstrations.held_out if r.prompt == "요약해 줘"]
    assert len(shared) == len(held_out)
    assert len(corpus.demonstrations.held_out) == 5 * len(held_out)
    assert "요약해 줘" not in texts(corpus.demonstrations.train)
    report = corpus.report["demonstrations"]
    assert report["overlap"] == {"rows": 100 - len(held_out), "prompts": 1}
    assert balanced(report)
    missing = data.model_copy(update={"group_column": "docs"})
    with pytest.raises(DataError, match="group_column is 'docs', which is none of its columns"):
        load_corpus(missing, ["demonstrations"])


@pytest.fixture
def with_held_out_file(tmp_path):
    """Rankings with a held-out file of 20 prompts; 5 of them are also in the training file."""
    return DataSection(
        demonstrations=write(tmp_path / "d.jsonl", demos(PROMPTS[:60])),
        rankings={
            "path": write(tmp_path / "r.jsonl", pairs(PROMPTS[:200])),
            "held_out_path": write(tmp_path / "h.jsonl", pairs(PROMPTS[195:215])),
        },
        prompts=write(tmp_path / "p.jsonl", [{"prompt": p} for p in PROMPTS]),
    )


def test_held_out_files_win_in_every_kind_and_the_overlap_is_reported(with_held_out_file):
    corpus = load_corpus(with_held_out_file, ["demonstrations", "rankings", "prompts"])
    assert texts(corpus.rankings.held_out) == PROMPTS[195:215]
    by_hash = expected_held_out(PROMPTS)
    held_out = by_hash | set(PROMPTS[195:215])
    for split in (corpus.demonstrations, corpus.rankings, corpus.prompts):
        assert not set(texts(split.train)) & held_out
    # All 400 prompts are in data.prompts, which is split by hash, so rows of the other kinds that
    # hash to the held-out part have to go as well.
    gone = [p for p in PROMPTS[:200] if p in held_out]
    overlap = corpus.report["rankings"]["overlap"]
    assert overlap == {"rows": len(gone), "prompts": len(gone)}
    entry = corpus.report["rankings"]["left_out"][HELD_OUT_ELSEWHERE]
    assert entry["count"] == len(gone)
    assert gone[0] in entry["examples"][0]["detail"]
    gone = [p for p in PROMPTS if p in set(PROMPTS[195:215]) - by_hash]
    assert corpus.report["prompts"]["overlap"] == {"rows": len(gone), "prompts": len(gone)}
    assert all(balanced(corpus.report[k]) for k in ("demonstrations", "rankings", "prompts"))


@pytest.mark.parametrize("kind", ["demonstrations", "rankings", "prompts"])
def test_a_stage_alone_sees_the_split_of_the_whole_chain(with_held_out_file, kind):
    whole = load_corpus(with_held_out_file, ["demonstrations", "rankings", "prompts"])
    alone = load_corpus(with_held_out_file, [kind])
    assert getattr(alone, kind) == getattr(whole, kind)
    assert alone.fingerprint(kind) == whole.fingerprint(kind)


def test_without_prompts_they_are_those_of_the_other_kinds_each_once(tmp_path):
    chat = {
        "messages": [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "a"}]
    }
    write(tmp_path / "d.jsonl", [chat])
    both = write(tmp_path / "r.jsonl", [dict(row, topic="개") for row in pairs(PROMPTS[:50])])
    data = DataSection(rankings=both, demonstrations=both)
    corpus = load_corpus(data, ["prompts"])
    assert texts(corpus.prompts.train) == texts(corpus.rankings.train)
    assert texts(corpus.prompts.held_out) == texts(corpus.rankings.held_out)
    assert corpus.prompts.train[0].columns["topic"] == "개"
    report = corpus.report["prompts"]
    assert report["rows"] == 100
    assert report["left_out"][REPEATED]["count"] == 50
    assert balanced(report)
    # A text and a conversation of that one turn are the same prompt.
    mixed = DataSection(
        rankings=both, demonstrations=str(tmp_path / "d.jsonl"), held_out_fraction=0.01
    )
    assert load_corpus(mixed, ["prompts"]).report["prompts"]["left_out"][REPEATED]["count"] == 1


def test_plain_text_is_split_by_itself_and_gives_no_prompts(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": p} for p in PROMPTS])
    ranked = write(tmp_path / "r.jsonl", [dict(row, doc=1) for row in pairs(PROMPTS[:9])])
    data = DataSection(rankings=ranked, pretraining=path, on_bad_row="refuse")
    corpus = load_corpus(data, ["prompts", "pretraining"])
    held_out = expected_held_out(PROMPTS)
    kept = corpus.pretraining
    assert [d.text for d in kept.held_out] == [p for p in PROMPTS if p in held_out]
    assert [d.text for d in kept.train] == [p for p in PROMPTS if p not in held_out]
    assert len(corpus.prompts.train + corpus.prompts.held_out) == 9
    assert balanced(corpus.report["pretraining"])
    # It is read where it is asked for, needs no group, and holds nothing else out.
    alone = load_corpus(data, ["prompts"])
    assert "pretraining" not in alone.report and alone.prompts == corpus.prompts
    own = {"path": path, "held_out_path": write(tmp_path / "h.jsonl", [{"text": PROMPTS[0]}])}
    data = DataSection(rankings=ranked, pretraining=own, group_column="doc", held_out_fraction=1e-9)
    corpus = load_corpus(data, ["rankings", "pretraining"])
    assert PROMPTS[0] in texts(corpus.rankings.train)
    with pytest.raises(DataError, match="no prompts: set"):
        load_corpus(DataSection(pretraining=path), ["prompts"])


def test_kinds_that_are_not_set(tmp_path):
    data = DataSection(rankings=write(tmp_path / "r.jsonl", pairs(PROMPTS)))
    with pytest.raises(DataError, match=r"data\.demonstrations is not set"):
        load_corpus(data, ["demonstrations"])
    with pytest.raises(DataError, match=r"no prompts: set data\.prompts"):
        load_corpus(DataSection(), ["prompts"])


def bad_rows(tmp_path, **settings):
    rows = demos(PROMPTS[:100])
    rows[9] = {"prompt": "하나"}
    rows[19]["response"] = "  "
    rows[29]["response"] = None
    return DataSection(demonstrations=write(tmp_path / "d.jsonl", rows), **settings)


def test_bad_rows_are_counted_by_reason_with_their_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = load_corpus(bad_rows(tmp_path, max_bad_fraction=0.03), ["demonstrations"])
    report = corpus.report["demonstrations"]
    assert {reason: entry["count"] for reason, entry in report["left_out"].items()} == {
        "column is missing": 1,
        "text is null or blank": 2,
    }
    assert report["left_out"]["text is null or blank"]["examples"] == [
        {
            "origin": "d.jsonl:20",
            "detail": '`response` is blank: "  "',
            "row": f'{{"prompt": "{PROMPTS[19]}", "response": "  "}}',
        },
        {
            "origin": "d.jsonl:30",
            "detail": "`response` is null",
            "row": f'{{"prompt": "{PROMPTS[29]}", "response": null}}',
        },
    ]
    assert sum(report["kept"].values()) == 97
    assert balanced(report)
    json.dumps(corpus.report)


def test_too_many_bad_rows_are_refused_with_counts_and_remedies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_corpus(bad_rows(tmp_path, max_bad_fraction=0.029), ["demonstrations"])
    message = str(caught.value)
    assert "3 of 100 rows are bad (3.0%), more than data.max_bad_fraction 0.029 allows" in message
    assert "2 x text is null or blank. First at d.jsonl:20: `response` is blank" in message
    assert "1 x column is missing. First at d.jsonl:10" in message


def test_refuse_stops_at_the_first_bad_row_with_line_field_and_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_corpus(bad_rows(tmp_path, on_bad_row="refuse"), ["demonstrations"])
    assert str(caught.value) == (
        "d.jsonl:10: column is missing: `response` or `completion` is not among its columns: "
        "prompt. Add the column, or name it with the source's `columns`. "
        "(data.on_bad_row: skip leaves such rows out and counts them.)"
    )


def test_a_row_id_names_one_row_of_an_annotator(tmp_path):
    rows = [dict(row, id=i, annotator="김") for i, row in enumerate(pairs(PROMPTS[:30]))]
    rows.append(dict(rows[4], annotator="박"))
    rows.append(dict(rows[4], prompt="다른 질문"))
    corpus = load_corpus(DataSection(rankings=write(tmp_path / "r.jsonl", rows)), ["rankings"])
    entry = corpus.report["rankings"]["left_out"]["row id is used twice"]
    assert entry["count"] == 1
    assert entry["examples"][0]["detail"].endswith("r.jsonl:5")
    assert entry["examples"][0]["origin"].endswith("r.jsonl:32")


def test_renames_come_first_and_may_swap(tmp_path):
    rows = [{"q": p, "chosen": "나쁜 답", "rejected": "좋은 답", "prompt": 0} for p in PROMPTS[:20]]
    source = {"path": write(tmp_path / "r.jsonl", rows)}
    renames = {"prompt": "q", "chosen": "rejected", "rejected": "chosen"}
    corpus = load_corpus(DataSection(rankings={**source, "columns": renames}), ["rankings"])
    assert {record.responses for record in corpus.rankings.train} == {("좋은 답", "나쁜 답")}
    assert corpus.rankings.train[0].prompt in PROMPTS
    with pytest.raises(DataError, match=r"names 'reject'.*Did you mean 'rejected'"):
        load_corpus(
            DataSection(rankings={**source, "columns": {"rejected": "reject"}}), ["rankings"]
        )


def test_limit_takes_the_first_rows(tmp_path):
    source = {"path": write(tmp_path / "d.jsonl", demos(PROMPTS)), "limit": 50}
    corpus = load_corpus(DataSection(demonstrations=source), ["demonstrations"])
    split = corpus.demonstrations
    assert sorted(texts(split.train + split.held_out)) == sorted(PROMPTS[:50])


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("b.jsonl", " \n\n"), ("c.csv", "prompt\n"), ("d.json", "[]")],
)
def test_empty_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} is empty"):
        load_corpus(DataSection(prompts=str(tmp_path / name)), ["prompts"])


def test_nothing_to_train_on_is_refused_and_nothing_held_out_is_noted(tmp_path):
    path = write(tmp_path / "d.jsonl", demos(PROMPTS[:2]))
    prompt = PROMPTS[0]
    share = int.from_bytes(hashlib.sha256(f"rlhf\0{prompt}".encode()).digest()[:8], "big") / 2**64
    one = write(tmp_path / "one.jsonl", demos([prompt]))
    with pytest.raises(DataError, match="none of its 1 rows is left to train on"):
        load_corpus(
            DataSection(demonstrations=one, held_out_fraction=share + 1e-9), ["demonstrations"]
        )
    corpus = load_corpus(
        DataSection(demonstrations=path, held_out_fraction=1e-9), ["demonstrations"]
    )
    assert corpus.report["demonstrations"]["kept"] == {"train": 2, "held_out": 0}
    assert "no row is held out" in corpus.report["demonstrations"]["notes"][0]


def test_a_fingerprint_is_of_the_content_and_the_split(tmp_path):
    rows = [dict(row, topic="개") for row in demos(PROMPTS)]

    def fingerprint(name, rows, **settings):
        data = DataSection(prompts=write(tmp_path / name, rows), **settings)
        return load_corpus(data, ["prompts"]).fingerprint("prompts")

    first = fingerprint("a.jsonl", rows)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert fingerprint("b.jsonl", [{}, *rows]) == first  # neither the path nor a bad row counts
    changed = [
        fingerprint("c.jsonl", [*rows[:-1], dict(rows[-1], topic="개 ")]),
        fingerprint("d.jsonl", rows[::-1]),
        fingerprint("e.jsonl", rows[:-1]),
        fingerprint("a.jsonl", rows, held_out_fraction=0.2),
        fingerprint("a.jsonl", rows, split_salt="x"),
    ]
    assert len({first, *changed}) == 6


def test_settings_for_hub_datasets_are_noted_on_a_local_copy(tmp_path):
    source = {
        "path": write(tmp_path / "r.jsonl", pairs(PROMPTS)),
        "data_dir": "x",
        "held_out_split": "test",
    }
    corpus = load_corpus(DataSection(rankings=source), ["rankings"])
    assert corpus.report["rankings"]["notes"] == [
        "data_dir, held_out_split: for Hub datasets only, not used for a local path"
    ]
    assert set(texts(corpus.rankings.held_out)) == expected_held_out(PROMPTS)


@pytest.mark.skipif(not HH.exists(), reason="the shared HH data is not here")
def test_real_human_comparisons():
    corpus = load_corpus(DataSection(rankings=str(HH)), ["rankings", "prompts"])
    report = corpus.report["rankings"]
    assert report["format"] == "hh"
    # 13 sides have two same roles in a row: both sides of the 4 rows counted here, and one side of
    # each of the 5 pairs whose prompts differ for that reason: 2 * 4 + 5 = 13.
    assert {reason: entry["count"] for reason, entry in report["left_out"].items()} == {
        "last reply is empty": 4,
        "the prompts of chosen and rejected differ": 5,
        "two turns of the same role in a row": 4,
    }
    assert report["rows"] == 2312
    assert sum(report["kept"].values()) == 2312 - 13
    # An oracle without turns: the reply is what follows the last "Assistant:".
    raw = dict(read_rows(Location("x", str(HH)), {}))
    records = corpus.rankings.train + corpus.rankings.held_out
    for record in records:
        row = raw[record.origin]
        sides = [row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
        assert record.responses == tuple(side[2].strip() for side in sides)
        opening = sides[0][0]
        assert len(record.prompt) == len(re.findall(r"\n\n(?:Human|Assistant):", opening))
        assert record.prompt[0].content == re.split(r"\n\n\w+:", opening)[1].strip()
    openings = [
        Counter(first_user_turn(record.prompt) for record in part)
        for part in (corpus.rankings.train, corpus.rankings.held_out)
    ]
    assert not openings[0].keys() & openings[1].keys()
    assert max(openings[0].values()) > 1  # prompts that open alike are really there
