"""What is heard and read of a response while it is written."""

import random

import pytest

from pipeline.codec import Codec
from pipeline.generation import LocalEngine, NativeEngine, Sampling, StaticEngine, TextStream
from pipeline.generation_config import GenerationSection
from pipeline.models.loading import train_tokenizer
from pipeline.records import Message

TEXT = "안녕하세요 😀👩‍👩‍👧 naïve — 고양이"


@pytest.fixture(scope="module")
def codec() -> Codec:
    """Of bytes and little else: a Korean letter is three tokens, an emoji four."""
    return Codec(train_tokenizer(["the cat"], 262))


def pieces(codec: Codec, ids: list[int], conversation: bool = False) -> list[str]:
    stream = TextStream(codec, conversation)
    return [*(stream.put(token) for token in ids), stream.end()]


def test_letters_of_several_tokens_come_whole(codec: Codec) -> None:
    ids = codec.response_ids(TEXT)
    assert len(ids) == len(TEXT.encode()) + 1  # a token a byte, and the end
    found = pieces(codec, ids)
    assert "".join(found) == TEXT
    assert all("\ufffd" not in piece for piece in found)
    # The first letter is there with its third byte, and not before.
    assert found[:3] == ["", "", "안"]
    assert [piece for piece in found if piece] != [TEXT]


def test_the_pieces_are_the_codecs_text_whatever_the_tokens(codec: Codec) -> None:
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(len(codec.tokenizer)) for _ in range(draw.randrange(30))]
        assert "".join(pieces(codec, ids)) == codec.text(ids)


def test_a_broken_letter_is_told_when_others_follow(codec: Codec) -> None:
    ids = codec.tokenizer.encode("안", add_special_tokens=False)[:2]
    ids += codec.tokenizer.encode("go", add_special_tokens=False)
    assert pieces(codec, ids) == ["", "", "\ufffdg", "o", ""]


def test_the_templates_lead_is_no_text() -> None:
    tokenizer = train_tokenizer(["the cat"], 262)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}>>{% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    codec = Codec(tokenizer)
    ids = codec.response_ids("go")
    assert codec.tokenizer.decode(ids[:-1]) == ">>go"
    assert pieces(codec, ids) == ["", "", "g", "o", "", ""]


def test_whether_a_model_answers_turns(codec: Codec) -> None:
    plain = Codec(codec.tokenizer)
    assert not plain.answers_turns
    plain.prompt_ids((Message("user", "?"),))
    assert plain.answers_turns


@pytest.mark.parametrize("engine", [NativeEngine(3), StaticEngine(3), LocalEngine(3)])
def test_a_listener_hears_each_rows_tokens(make_handle, engine) -> None:
    handle = make_handle()
    # Ids that end about one response in three, so that rows come and go.
    handle.codec.stop_ids = frozenset({*handle.codec.stop_ids, *range(40, 60)})
    prompts = [handle.codec.prompt_ids(text) for text in ("the cat", "ran", "고양이", "0123", "a")]
    sampling = Sampling(max_new_tokens=12, seed=3)
    heard: dict[int, list[int]] = {}

    def listener(row: int, token: int) -> None:
        heard.setdefault(row, []).append(token)

    written = engine.generate(handle, prompts, list(range(5)), sampling, listener)
    assert [heard[row] for row in range(5)] == written.response_ids
    assert any(written.ended) and len({len(ids) for ids in written.response_ids}) > 1
    silent = engine.generate(handle, prompts, list(range(5)), sampling)
    assert silent.response_ids == written.response_ids


def test_a_beam_search_is_not_heard(make_handle) -> None:
    handle = make_handle()
    heard: list[int] = []
    prompt = handle.codec.prompt_ids("the cat")
    sampling = Sampling(max_new_tokens=4, num_beams=2)
    written = StaticEngine().generate(
        handle, [prompt], [0], sampling, lambda _row, token: heard.append(token)
    )
    assert written.response_ids[0] and heard == []


def test_what_may_begin_a_stop_string_is_held_back(codec: Codec) -> None:
    stopping = codec.sampling_by(GenerationSection(stop_strings=("\nEnd", "ENDE")))
    ids = [*codec.tokenizer.encode("go E\nEN\nEnd", add_special_tokens=False)]
    assert stopping.ends(ids) and stopping.text(ids) == "go E\nEN"
    found = pieces(stopping, ids)
    # Each piece as soon as no stop string can begin with it: `E` and a line's end may.
    assert found == ["g", "o", "", "", " E", "", "\n", "EN", "", "", "", ""]
    draw = random.Random(1)
    letters = codec.tokenizer.encode("\nENDd", add_special_tokens=False)
    for _ in range(200):
        drawn = stopping.until_end([draw.choice(letters) for _ in range(30)])
        assert "".join(pieces(stopping, drawn)) == stopping.text(drawn)
