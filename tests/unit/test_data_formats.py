"""Row formats: what each becomes, how it is recognised, and what is wrong with bad rows."""

import json
import re
from pathlib import Path

import pytest

from pipeline.data.detect import choose_format, formats_for, read_record
from pipeline.data.formats import FORMATS
from pipeline.data.validate import RowFault, check_row, dense_ranks
from pipeline.errors import ConfigError, DataError
from pipeline.records import Demonstration, Document, Message, Prompt, Ranking

DOCS = Path(__file__).parents[2] / "docs" / "data-formats.md"
USER, REPLY = {"role": "user", "content": "안녕?"}, {"role": "assistant", "content": "반가워요 🙂"}
OTHER = {"role": "assistant", "content": "저리 가"}
SYSTEM = {"role": "system", "content": "Be kind."}
HH = "\n\nHuman: 안녕?\n\nAssistant: "


def read(row, kind, name="auto"):
    """One row on the whole way: row checks, format, record."""
    chosen = choose_format([("f:1", row)], kind, name, f"data.{kind}", "f")
    return read_record(check_row(row), FORMATS[chosen], kind, "f:1", {})


TURN = Message("user", "안녕?")


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "안녕?", "response": " 네\n"}, "안녕?", " 네\n"),
        ({"prompt": "안녕?", "completion": "네"}, "안녕?", "네"),
        ({"prompt": [USER], "completion": [REPLY]}, (TURN,), "반가워요 🙂"),
        ({"prompt": HH, "response": "네"}, (TURN,), "네"),
        ({"messages": [USER, REPLY]}, (TURN,), "반가워요 🙂"),
        (
            {"messages": [SYSTEM, USER, REPLY, USER, OTHER]},
            (Message("system", "Be kind."), TURN, Message("assistant", "반가워요 🙂"), TURN),
            "저리 가",
        ),
        ({"messages": [{"role": "system", "content": ""}, USER, REPLY]}, (TURN,), "반가워요 🙂"),
        # A ranking demonstrates its preferred response; of those tied for best, the first.
        (
            {"prompt": "안녕?", "responses": ["나", "가", "다"], "ranking": [[2, 1], [0]]},
            "안녕?",
            "가",
        ),
        ({"chosen": HH + "네", "rejected": HH + "뭐"}, (TURN,), "네"),
    ],
)
def test_demonstrations(row, prompt, response):
    assert read(row, "demonstrations") == Demonstration(prompt, response, "f:1")


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        (
            "rankings",
            {
                "prompt": "p",
                "responses": [
                    {"id": "a", "text": "A"},
                    {"id": "b", "text": "B"},
                    {"id": "c", "text": "C"},
                ],
                "ranking": [["b"], ["a", "c"]],
                "annotator": 7,
            },
            Ranking("p", ("A", "B", "C"), (1, 0, 1), None, "7", "f:1"),
        ),
        (
            "rankings",  # bare ids, indices as ids, a system turn, one score a response
            {
                "prompt": [SYSTEM, USER],
                "responses": [{"text": "A", "score": 1}, {"text": "B", "score": 2.5}],
                "ranking": ["1", 0],
            },
            Ranking(
                (Message("system", "Be kind."), TURN), ("A", "B"), (1, 0), (1.0, 2.5), None, "f:1"
            ),
        ),
        (
            "scored",
            {
                "instruction": "p",
                "completions": [
                    {"response": "A", "overall_score": 3},
                    {"response": "B", "overall_score": 9.5},
                    {"response": "C", "overall_score": 3},
                ],
            },
            Ranking("p", ("A", "B", "C"), (1, 0, 1), (3.0, 9.5, 3.0), None, "f:1"),
        ),
        (
            "scored",  # one completion lacks the first score, so the next that all have counts
            {
                "prompt": "p",
                "completions": [
                    {"text": "A", "overall_score": None, "fine-grained_score": 4.0},
                    {"text": "B", "overall_score": 9, "fine-grained_score": 2.0},
                ],
            },
            Ranking("p", ("A", "B"), (0, 1), (4.0, 2.0), None, "f:1"),
        ),
        (
            "nectar",
            {
                "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ",
                "answers": [
                    {"answer": x, "rank": r} for x, r in (("A", 5.0), ("B", 1.0), ("C", 5.0))
                ],
            },
            Ranking(
                (Message("user", "a"), Message("assistant", "b"), Message("user", "c")),
                ("A", "B", "C"),
                (1, 0, 1),
                None,
                None,
                "f:1",
            ),
        ),
        (
            "conversational",
            {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER], "annotator": "kim"},
            Ranking((TURN,), ("반가워요 🙂", "저리 가"), (0, 1), None, "kim", "f:1"),
        ),
        (
            "conversational",  # the prompt is the opening that both share
            {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
            Ranking((TURN,), ("반가워요 🙂", "저리 가"), (0, 1), None, None, "f:1"),
        ),
        (
            "conversational",  # UltraFeedback-binarized
            {
                "prompt": "안녕?",
                "chosen": [USER, REPLY],
                "rejected": [USER, OTHER],
                "messages": [USER, REPLY],
                "score_chosen": 8.0,
                "score_rejected": 8.0,
            },
            Ranking((TURN,), ("반가워요 🙂", "저리 가"), (0, 1), (8.0, 8.0), None, "f:1"),
        ),
        (
            "hh",
            {"chosen": HH + "네  ", "rejected": HH + "뭐"},
            Ranking((TURN,), ("네", "뭐"), (0, 1), None, None, "f:1"),
        ),
        (
            "pairs",
            {"prompt": "p", "chosen": "A", "rejected": "B"},
            Ranking("p", ("A", "B"), (0, 1), None, None, "f:1"),
        ),
    ],
)
def test_rankings(name, row, expected):
    assert choose_format([("f:1", row)], "rankings", "auto", "data.rankings", "f") == name
    assert read(row, "rankings") == expected


def test_prompts_keep_every_further_column():
    row = {"prompt": "안녕?", "reference": "네", "meta": {"a": [1, None, 2.5]}, "id": 3}
    columns = {"reference": "네", "meta": {"a": [1, None, 2.5]}, "id": 3}
    assert read(row, "prompts") == Prompt("안녕?", columns, "f:1")
    # A conversation that ends with the user asks; one that ends with a reply is asked again.
    assert read({"messages": [USER]}, "prompts").prompt == (TURN,)
    assert read({"messages": [USER, REPLY]}, "prompts").prompt == (TURN,)
    scored = {
        "instruction": "p",
        "source": "x",
        "completions": [{"text": t, "score": ord(t)} for t in "AB"],
    }
    assert set(read(scored, "prompts").columns) == {"source", "completions"}
    assert read(scored, "prompts").prompt == "p"


def test_what_json_cannot_hold_is_noted_not_lost_in_silence():
    notes: dict[str, None] = {}
    record = read_record(
        {"prompt": "p", "image": b"\x89PNG"}, FORMATS["prompts"], "prompts", "f:1", notes
    )
    assert record.columns == {}
    assert list(notes) == ["column 'image' is not kept with the prompts: JSON cannot hold bytes"]


def test_the_examples_of_the_documentation_are_what_they_say():
    text = DOCS.read_text(encoding="utf-8")
    shown = re.findall(r"^### (\w+)\n.*?```json\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in shown] == list(FORMATS)
    for name, rows in shown:
        for line in rows.splitlines():
            row, kind = json.loads(line), FORMATS[name].kind
            assert choose_format([("f:1", row)], kind, "auto", "data", "f") == name
            record = read(row, kind)
            assert record.text if isinstance(record, Document) else record.prompt


def test_auto_order_is_the_documented_one():
    lines = re.findall(r"^\| `(\w+)` \| (`.+)\|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    for kind, names in lines[:4]:
        listed = re.findall(r"`(\w+)`", names)
        assert formats_for(kind)[: len(listed)] == listed


def test_plain_text_is_read_as_it_stands_and_has_no_prompt():
    row = {"text": "  안녕 cat\n", "url": "x"}
    assert read(row, "pretraining") == Document("  안녕 cat\n", "f:1")
    for bad, fault in (({"text": " \n"}, "`text` is blank"), ({"text": None}, "`text` is null")):
        with pytest.raises(RowFault, match=fault):
            read_record(bad, FORMATS["text"], "pretraining", "f:1", {})
    with pytest.raises(RowFault, match=r"`text` is a list .*, text is needed"):
        read_record({"text": ["a"]}, FORMATS["text"], "pretraining", "f:1", {})
    for kind in ("prompts", "demonstrations"):
        with pytest.raises(DataError, match=f"fit no format for {kind}"):
            read(row, kind)


def test_a_file_without_the_columns_names_those_it_has_and_the_nearest():
    with pytest.raises(DataError) as caught:
        read({"promt": "p", "chosen": "A", "rejected": "B"}, "rankings")
    message = str(caught.value)
    assert "columns (promt, chosen, rejected)" in message
    assert "'prompt' is missing. Did you mean 'promt'?" in message
    assert "data.rankings.columns: {prompt: promt}" in message


def test_columns_of_the_wrong_type_are_no_missing_columns():
    with pytest.raises(DataError, match=r"types that demonstrations need.*'demonstrations'"):
        read({"prompt": "p", "response": 3}, "demonstrations")


def test_an_explicit_format_must_exist_and_fit():
    with pytest.raises(ConfigError, match="Did you mean 'pairs'"):
        read({"prompt": "p"}, "rankings", "pair")
    with pytest.raises(ConfigError, match=r"data\.rankings\.format is 'messages'"):
        read({"messages": []}, "rankings", "messages")
    with pytest.raises(DataError, match="'rejected' is missing"):
        read({"prompt": "p", "chosen": "A"}, "rankings", "pairs")


def test_rows_of_two_formats_are_refused_with_both_lines():
    rows = [
        ("f:1", {"junk": 1}),
        ("f:2", {"prompt": "p", "chosen": "A", "rejected": "B"}),
        ("f:3", {"prompt": None, "chosen": HH + "a", "rejected": HH + "b"}),  # a bad row, no schema
        ("f:9", {"prompt": "p", "responses": ["A", "B"], "ranking": [0, 1]}),
    ]
    assert choose_format(rows[:3], "rankings", "auto", "data.rankings", "f") == "pairs"
    with pytest.raises(DataError, match="f:2 is 'pairs', f:9 is 'rankings'"):
        choose_format(rows, "rankings", "auto", "data.rankings", "f")
    assert choose_format(rows, "rankings", "pairs", "data.rankings", "f") == "pairs"


def test_dense_ranks_are_the_positions_among_distinct_values():
    assert dense_ranks([3.0, 1.0, 3.0, 2.0]) == (2, 0, 2, 1)
