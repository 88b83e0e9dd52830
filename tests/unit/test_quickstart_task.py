"""The built-in task: reproducible data, facts read back, a judge in code, noisy labelers."""

import importlib
import importlib.util
import json
import random
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "data"
QUICKSTART = DATA / "quickstart"
FILES = ("demonstrations", "rankings", "prompts")

POST = (
    "POST: Boris has another green lamp, but never mind. My friend Anna lost a red bicycle. "
    "It happened on Monday. I would rather be near Cairo now. We were in Oslo when it happened. "
    "Last year Boris sold another blue tent.\nTL;DR:"
)
FACTS = ("Anna", "lost", "red bicycle", "Oslo", "Monday")


@pytest.fixture(scope="module")
def generate() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(QUICKSTART))
        yield importlib.import_module("generate")


@pytest.fixture(scope="module")
def task(generate: Any) -> Any:
    return generate.make_task(0)


@pytest.fixture(scope="module")
def judge() -> Any:
    """gold.py loaded as one file, as `evaluation.gold: gold.py:gold` does."""
    spec = importlib.util.spec_from_file_location("quickstart_gold", QUICKSTART / "gold.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name: str) -> list[dict[str, Any]]:
    lines = (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_committed_files_are_what_seed_0_generates(generate: Any, task: Any) -> None:
    for name in FILES:
        written = (QUICKSTART / f"{name}.jsonl").read_bytes()
        assert generate.to_jsonl(task.rows[name]).encode() == written, name


def test_another_seed_gives_another_task(generate: Any, task: Any) -> None:
    rng = random.Random("quickstart 1")
    assert generate.write_post(rng).prompt not in {row["prompt"] for row in task.rows["prompts"]}


def test_every_post_is_used_once_and_carries_no_answers() -> None:
    keys = {
        "demonstrations": {"prompt", "response"},
        "rankings": {"prompt", "responses", "ranking", "annotator"},
        "prompts": {"prompt"},
    }
    prompts: list[str] = []
    for name in FILES:
        rows = committed(name)
        assert all(set(row) == keys[name] for row in rows)
        prompts += [row["prompt"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    # 15% of 4,000 prompts are 600, so a split by hash holds out 500 in any case (4.4 sigma).
    assert len(committed("prompts")) == 4000
    assert sum((QUICKSTART / f"{name}.jsonl").stat().st_size for name in FILES) < 4_000_000


def test_rankings_are_canonical_rows() -> None:
    ties = 0
    for row in committed("rankings"):
        ids = [response["id"] for response in row["responses"]]
        assert ids == ["a", "b", "c", "d"]
        assert sorted(k for level in row["ranking"] for k in level) == ids
        texts = [response["text"] for response in row["responses"]]
        assert len(set(texts)) == 4 and all(re.match(r" \S", text) for text in texts)
        ties += len(row["ranking"]) < 4
    assert 0.02 < ties / len(committed("rankings")) < 0.2


def test_facts_are_read_back_from_every_post(task: Any, judge: Any) -> None:
    for post, _ in task.ranked:
        assert judge.facts_of(post.prompt) == post.facts
    for name in FILES:
        for row in task.rows[name]:
            facts = judge.facts_of(row["prompt"])
            assert all(value in row["prompt"] for value in facts)


@pytest.mark.parametrize(
    ("post", "facts"),
    [
        (POST, FACTS),
        (
            "POST: What a story. This is how, on Friday, my cousin Hugo painted a cheap coat. "
            "Ask Lena about it before Sunday. All this took place in Busan.\nTL;DR:",
            ("Hugo", "painted", "cheap coat", "Busan", "Friday"),
        ),
        (
            "POST: I would rather be near Lima now. This is about my friend Jun, who sold a "
            "broken desk. All this took place on Sunday in Seoul.\nTL;DR:",
            ("Jun", "sold", "broken desk", "Seoul", "Sunday"),
        ),
    ],
)
def test_facts_of_hand_written_posts(judge: Any, post: str, facts: tuple[str, ...]) -> None:
    assert tuple(judge.facts_of(post)) == facts


# Shortest complete summary: 9 words. Facts right - facts wrong - 0.25 a word past 9 - 1 if no end.
SCORES = [
    (" Anna lost a red bicycle in Oslo on Monday.", 4.0),
    (" On Monday, Anna lost a red bicycle in Oslo.", 4.0),
    ("In Oslo, Anna lost a red bicycle on Monday!", 4.0),
    (" Anna lost a red bicycle in Oslo on Monday", 4 - 1),
    (" Anna lost a red bicycle on Monday.", 3.0),
    (" Someone lost something in Oslo on Monday.", 2.0),
    (" Boris lost a red bicycle in Oslo on Monday.", 3 - 1),
    (" Anna lost a green bicycle in Oslo on Monday.", 3 - 1),
    (" Anna lost a red bicycle in Cairo on Sunday.", 2 - 2),
    (" To be brief, Anna lost a red bicycle in Oslo on Monday.", 4 - 3 * 0.25),
    (" Anna and Boris lost a red bicycle in Oslo on Monday.", 3 - 1 - 2 * 0.25),
    (" Anna lost a", 1 - 1),
    (" My friend Anna lost a red bicycle. It happened on Monday.", 3 - 2 * 0.25),
    (" Boris has another green lamp, but never mind.", -2.0),
    (" Anna red bicycle lost Monday Oslo.", 0.0),  # a bag of words states nothing
    (" Yes.", 0.0),
    ("", -1.0),
    (" word" * 400, -4.0),
]


@pytest.mark.parametrize(("text", "score"), SCORES)
def test_gold_scores_computed_by_hand(judge: Any, text: str, score: float) -> None:
    assert judge.gold([POST], [text], completion_ids=[[1]], origin=["x"]) == [
        pytest.approx(score, abs=1e-12)
    ]


def test_gold_subtracts_a_point_when_the_model_never_ended(judge: Any) -> None:
    text = " Anna lost a red bicycle in Oslo on Monday."
    assert judge.gold([POST] * 2, [text] * 2, ended=[True, False]) == [4.0, 3.0]


@pytest.mark.parametrize(
    "text",
    [
        "\0\0",
        "안나가 오슬로에서 자전거를 잃어버렸다.",
        "😀" * 9,
        "\ud800",
        "(?P<",
        "a\n\n.",
        "%s {who}",
    ],
)
def test_gold_takes_any_text(judge: Any, text: str) -> None:
    (score,) = judge.gold([POST], [text])
    assert -4 <= score <= 0


def test_gold_reads_conversations_and_refuses_foreign_prompts(judge: Any) -> None:
    prompt = [{"role": "user", "content": POST}]
    answer = [{"role": "assistant", "content": " Anna lost a red bicycle in Oslo on Monday."}]
    assert judge.gold([prompt], [answer]) == [4.0]
    with pytest.raises(ValueError, match="posts of the built-in task only"):
        judge.gold(["Why is the sky blue?"], ["Because."])


def test_only_complete_and_short_summaries_are_perfect(
    generate: Any, task: Any, judge: Any
) -> None:
    rng = random.Random(5)
    for post, _ in task.ranked[:500]:
        scores = {
            quality: judge.gold([post.prompt], [write(rng, post)])[0]
            for quality, write in generate.QUALITIES.items()
        }
        assert scores.pop("complete") == 4.0
        assert max(scores.values()) < 4.0
        assert scores["omits"] in (2.0, 3.0) and scores["wrong"] in (0.0, 2.0)
        assert (4 - scores["rambling"]) % 0.25 == 0  # whole words too many


def test_fresh_labelings_agree_as_people_do(generate: Any, task: Any) -> None:
    # InstructGPT's labelers agreed with one another on 72.6 to 77.3% of pairs.
    for seed in (11, 12, 13):
        assert 0.72 <= generate.agreement(random.Random(seed), task.ranked) <= 0.78


def test_the_gold_order_is_far_better_than_chance_on_the_noisy_pairs(judge: Any) -> None:
    """Two labelers that agree with gold on a share p of pairs agree on p^2 + (1 - p)^2 = 0.75."""
    p = (1 + 0.5**0.5) / 2  # 0.854, if p were the same for every pair
    right = 0.0
    pairs = 0
    for row in committed("rankings"):
        level = {k: depth for depth, ids in enumerate(row["ranking"]) for k in ids}
        texts = {response["id"]: response["text"] for response in row["responses"]}
        scores = dict(zip(texts, judge.gold([row["prompt"]] * 4, texts.values()), strict=True))
        for i, j in combinations(texts, 2):
            if level[i] != level[j]:
                pairs += 1
                better = (scores[i] - scores[j]) * (level[j] - level[i])
                right += 1.0 if better > 0 else 0.5 if better == 0 else 0.0
    # Pairs are not alike (some are hard, some tied in gold), which lowers p for the same agreement.
    assert p - 0.06 < right / pairs < p + 0.01


def test_the_korean_sample_is_canonical() -> None:
    lines = (DATA / "samples" / "korean.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 20
    for line in lines:
        row = json.loads(line)
        assert re.search("[가-힣]", row["prompt"])
        ids = [response["id"] for response in row["responses"]]
        assert len(ids) >= 2
        assert sorted(k for level in row["ranking"] for k in level) == ids


def test_the_chat_sample_alternates_and_ends_with_the_assistant() -> None:
    lines = (
        (DATA / "samples" / "chat_demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    )
    for line in lines:
        roles = [turn["role"] for turn in json.loads(line)["messages"]]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert spoken == ["user", "assistant"] * (len(spoken) // 2) and spoken
