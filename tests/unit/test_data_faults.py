"""Bad rows: each fault is named by its reason, field and value."""

import re
from pathlib import Path

import pytest

from pipeline.config import DataSection
from pipeline.data.detect import read_record
from pipeline.data.formats import FORMATS
from pipeline.data.tally import Tally
from pipeline.data.validate import REMEDIES, Reason, RowFault, check_row

DOCS = Path(__file__).parents[2] / "docs" / "data-formats.md"
USER, REPLY = {"role": "user", "content": "안녕?"}, {"role": "assistant", "content": "반가워요 🙂"}
OTHER = {"role": "assistant", "content": "저리 가"}
SYSTEM = {"role": "system", "content": "Be kind."}
EMPTY = {"role": "assistant", "content": ""}
HH = "\n\nHuman: 안녕?\n\nAssistant: "


def ranking(responses, order, **more):
    return {"prompt": "p", "responses": responses, "ranking": order, **more}


def chat(*turns):
    return {"messages": list(turns)}


def scored(*scores):
    texts = zip("ABCD", scores, strict=False)
    return {"prompt": "p", "completions": [{"text": t, "score": s} for t, s in texts]}


# (kind, format): rows with the reason and what the detail must say.
FAULTS = {
    ("prompts", "prompts"): [
        ([1], Reason.NOT_AN_OBJECT, "a list: [1]"),
        ({None: ["x"], "prompt": "p"}, Reason.FIELD_COUNT, '["x"]'),
        ({"prompt": "가" * 333_334}, Reason.TOO_LARGE, "1,000,008 bytes"),
        ({"prompt": "a\0b"}, Reason.NUL, "`prompt` at character 2"),
        (
            {"prompt": "p", "meta": {"x": ["", "안\ud83d"]}},
            Reason.SURROGATE,
            "`meta.x[1]` at character 2 (\\ud83d)",
        ),
    ],
    ("demonstrations", "demonstrations"): [
        ({"response": "r"}, Reason.MISSING_COLUMN, "`prompt` is not"),
        (
            {"prompt": "p", "reply": "r"},
            Reason.MISSING_COLUMN,
            "`response` or `completion` is not among its columns: prompt, reply",
        ),
        ({"prompt": 3, "response": "r"}, Reason.WRONG_TYPE, "a number (3)"),
        ({"prompt": "p", "response": {}}, Reason.WRONG_TYPE, "`response` is an object"),
        ({"prompt": "p", "response": None}, Reason.BLANK, "`response` is null"),
        ({"prompt": "\u3000\n", "response": "r"}, Reason.BLANK, "`prompt` is blank"),
        ({"prompt": [], "response": "r"}, Reason.BLANK, "`prompt` holds no turns"),
        ({"prompt": [USER, REPLY], "response": "r"}, Reason.PROMPT_END, "is assistant"),
    ],
    ("demonstrations", "messages"): [
        (chat({"role": "bot", "content": "x"}), Reason.UNKNOWN_ROLE, '`messages[0].role` is "bot"'),
        (chat(USER, SYSTEM, REPLY), Reason.UNKNOWN_ROLE, "turn 2 of `messages` is a system turn"),
        (chat("안녕"), Reason.WRONG_TYPE, "`messages[0]` is text"),
        (chat(USER, USER, REPLY), Reason.SAME_ROLE, "turns 1 and 2 of `messages` are both user"),
        (chat(REPLY), Reason.FIRST_TURN, "starts with assistant"),
        (chat(SYSTEM), Reason.FIRST_TURN, "starts with system"),
        (chat(USER), Reason.NO_ASSISTANT, "the turns of `messages` are user"),
        (chat(USER, REPLY, USER), Reason.LAST_TURN, "is user"),
        (chat(USER, {"role": "assistant", "content": " "}), Reason.EMPTY_REPLY, "messages[1]"),
        (chat(USER, EMPTY, USER, REPLY), Reason.BLANK, "messages[1]"),
    ],
    ("rankings", "hh"): [
        ({"chosen": HH + "a", "rejected": HH}, Reason.EMPTY_REPLY, "turn 2 of `rejected`"),
        ({"chosen": "안녕", "rejected": HH + "a"}, Reason.TRANSCRIPT, "안녕"),
        (
            {"chosen": HH + "a", "rejected": "\n\nHuman: 음?\n\nAssistant: b"},
            Reason.PROMPTS_DIFFER,
            "from turn 1",
        ),
        (
            {"chosen": HH + "a", "rejected": HH + "a\n\nHuman: c\n\nAssistant: d"},
            Reason.PROMPTS_DIFFER,
            "from turn 2 on (chosen replies at turn 2, rejected at turn 4)",
        ),
        (
            {"chosen": HH + "a\n\nHuman: x", "rejected": HH + "a\n\nHuman: y"},
            Reason.LAST_TURN,
            "user",
        ),
        (
            {"chosen": HH + "a\n\nAssistant: b", "rejected": HH + "a\n\nAssistant: c"},
            Reason.SAME_ROLE,
            "2 and 3",
        ),
    ],
    ("rankings", "conversational"): [
        (
            {"prompt": "음?", "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
            Reason.PROMPTS_DIFFER,
            "`prompt` is not the opening of `chosen`",
        ),
        ({"chosen": [REPLY], "rejected": [OTHER]}, Reason.FIRST_TURN, "`chosen`"),
    ],
    ("rankings", "pairs"): [
        ({"prompt": "p", "chosen": "A", "rejected": " A\n"}, Reason.CHOSEN_IS_REJECTED, '"A"'),
        ({"prompt": "p", "chosen": "", "rejected": "A"}, Reason.BLANK, "`chosen` is blank"),
    ],
    ("rankings", "rankings"): [
        (ranking([], []), Reason.FEW_RESPONSES, "has 0"),
        (ranking(["A"], [[0]]), Reason.FEW_RESPONSES, "has 1"),
        (
            ranking([{"id": 1, "text": "A"}, {"id": "1", "text": "B"}], [[1]]),
            Reason.RESPONSE_ID,
            "`responses[1].id` is '1' again",
        ),
        (
            ranking(["A", "B"], [[0], [2]]),
            Reason.UNKNOWN_ID,
            "`ranking[1]` names '2'; the ids are 0, 1",
        ),
        (ranking(["A", "B"], [[0]]), Reason.NOT_A_PERMUTATION, "leaves out 1"),
        (ranking(["A", "B"], [[0, 1], [0]]), Reason.NOT_A_PERMUTATION, "names '0' twice"),
        (ranking(["A", "B"], [[0, 0], [1]]), Reason.NOT_A_PERMUTATION, "names '0' twice"),
        (ranking(["A", "B"], "AB"), Reason.WRONG_TYPE, "`ranking` is text"),
        (ranking(["A", "B"], [True, 0]), Reason.WRONG_TYPE, "`ranking[0]` is a boolean"),
        (ranking(["A", None], [0, 1]), Reason.BLANK, "`responses[1]` is null"),
        (ranking(["A", "B"], [[0, 1]]), Reason.ALL_TIED, "2 responses"),
        (ranking(["A", "B", "A "], [[0, 1], [2]]), Reason.IDENTICAL, "responses 1 and 3"),
        (
            ranking([{"text": "A", "score": 1}, {"text": "B"}], [0, 1]),
            Reason.BLANK,
            "1 of 2 scores",
        ),
        (
            ranking([{"text": "A", "score": 1}, {"text": "B", "score": 2}], [0, 1]),
            Reason.SCORE_ORDER,
            "response 1 (score 1) is ranked above",
        ),
        (ranking(["A", "B"], [0, 1], annotator=[1]), Reason.WRONG_TYPE, "`annotator` is a list"),
    ],
    ("rankings", "scored"): [
        (scored(1, float("nan")), Reason.WRONG_TYPE, "`completions[1].score`"),
        (scored(1, None), Reason.BLANK, "no one of overall_score, score"),
        (scored(1, 1), Reason.ALL_TIED, "2"),
    ],
    ("rankings", "nectar"): [
        (
            {"prompt": "p", "answers": [{"answer": "A", "rank": 1}, {"answer": "B"}]},
            Reason.WRONG_TYPE,
            "`answers[1].rank` is null",
        ),
    ],
}


@pytest.mark.parametrize(
    ("kind", "name", "row", "reason", "detail"),
    [(*key, *case) for key, cases in FAULTS.items() for case in cases],
)
def test_bad_rows(kind, name, row, reason, detail):
    with pytest.raises(RowFault) as caught:
        read_record(check_row(row), FORMATS[name], kind, "f:1", {})
    assert caught.value.reason is reason
    assert detail in caught.value.detail
    caught.value.detail.encode()  # a message must be printable whatever the row holds


def test_every_reason_is_tested_explained_and_has_a_remedy():
    tested = {reason for cases in FAULTS.values() for _, reason, _ in cases}
    tested.add(Reason.ROW_ID)  # test_data_corpus.py
    assert tested == set(Reason) == set(REMEDIES)
    documented = re.findall(r"^\| ([^|]+?) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(Reason) <= set(documented)


def test_examples_of_bad_rows_can_always_be_written():
    tally = Tally("f", DataSection())
    row = {"prompt": "안녕 \ud83d \0"}
    tally.bad("f:1", row, RowFault(Reason.SURROGATE, "`prompt`"))
    example = tally.left_out[Reason.SURROGATE]["examples"][0]["row"]
    assert example.encode() == '{"prompt": "안녕 \\ud83d \\u0000"}'.encode()
