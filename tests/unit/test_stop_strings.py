"""Stop strings: where responses end, in every engine and batch, and what is read of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from pipeline.codec import Codec
from pipeline.generation import NativeEngine, Sampling, StaticEngine
from pipeline.generation_config import GenerationSection
from pipeline.models.loading import train_tokenizer
from pipeline.models.trunk import Handle
from pipeline.records import Message, Prompt
from pipeline.rewards import Completions, ModelReward
from pipeline.stop_strings import StopStrings
from tests.tiny_vllm import GREEDY, PROMPTS, engine_of, make_policy
from tests.vllm_stand_in import StandIn

# Bytes alone: 258 tokens leave no room for merges, so a Hangul syllable takes three tokens.
BYTES = train_tokenizer(["a"], 258)
MERGED = train_tokenizer(
    ["the cat sat on the mat. 안녕하세요 고양이", "STOP it, STOP here"] * 4, 320
)


def first_end(codec: Codec, ids: list[int]) -> int | None:
    """Oracle: the shortest prefix whose whole text holds a stop string."""
    for length in range(1, len(ids) + 1):
        text = codec.tokenizer.decode(ids[:length], skip_special_tokens=True)
        if any(stop in text for stop in codec.stop_strings.strings):
            return length
    return None


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
@pytest.mark.parametrize(
    "strings",
    [("STOP",), ("\n\n", "고양"), ("t",), (" on the",), ("양이",), ("P i", "녕하세"), ("never",)],
)
def test_the_first_token_that_completes_a_string_is_found(
    tokenizer, strings: tuple[str, ...]
) -> None:
    codec = Codec(tokenizer).sampling_by(GenerationSection(stop_strings=strings))
    texts = ["the cat sat on the mat STOP it", "안녕하세요 고양이\n\nSTOP", "ST OP", "", "\n\n\n"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected = first_end(codec, ids)
        found = next((n for n in range(1, len(ids) + 1) if codec.ends(ids[:n])), None)
        assert found == expected
        assert codec.until_end(ids) == ids[: expected or len(ids)]


def test_random_tokens_end_where_the_oracle_says() -> None:
    """Special tokens and parts of characters among them; most of 300 rows end somewhere."""
    codec = Codec(MERGED).sampling_by(GenerationSection(stop_strings=("e", "ST", "\ub155", " c")))
    random = torch.Generator().manual_seed(0)
    ended = 0
    for _ in range(300):
        ids = torch.randint(0, len(MERGED), (12,), generator=random).tolist()
        ids = [id_ for id_ in ids if id_ not in codec.stop_ids]
        expected = first_end(codec, ids)
        ended += expected is not None
        assert codec.until_end(ids) == ids[: expected or len(ids)]
    assert 100 < ended < 300


def test_special_tokens_are_no_part_of_the_text() -> None:
    """However many of them, named or not, stand between two parts of the string."""
    tokenizer = train_tokenizer(["STOP it, STOP here"] * 4, 300)
    tokenizer.add_tokens([AddedToken("<|reserved|>", special=True)])
    codec = Codec(tokenizer).sampling_by(GenerationSection(stop_strings=("STOP",)))
    (reserved,) = tokenizer.encode("<|reserved|>", add_special_tokens=False)
    first = tokenizer.encode("ST", add_special_tokens=False)
    rest = tokenizer.encode("OP", add_special_tokens=False)
    ids = [*first, *[reserved] * 40, *rest]
    assert first_end(codec, ids) == len(ids)
    assert codec.ends(ids) and codec.until_end(ids) == ids
    assert codec.text(ids) == ""


def test_a_token_that_cannot_complete_a_string_costs_no_decoding(monkeypatch) -> None:
    stops, calls = StopStrings(MERGED, ("STOP",)), []
    decode = MERGED.decode
    monkeypatch.setattr(MERGED, "decode", lambda ids, **kw: calls.append(ids) or decode(ids, **kw))
    ids = MERGED.encode("the cat sat on the mat. " * 10, add_special_tokens=False)
    for length in range(1, len(ids) + 1):
        assert not stops.completed(ids[:length])
    assert len(calls) == len(set(ids))  # each token once, and no text


def stopping(handle: Handle, *strings: str) -> Handle:
    section = GenerationSection(stop_strings=strings)
    return replace(handle, codec=handle.codec.sampling_by(section))


def test_sampled_responses_end_at_the_string_in_every_batch_and_engine(make_handle) -> None:
    """What is sampled is what would have been sampled, up to the string."""
    handle = make_handle()
    sampling = Sampling(max_new_tokens=24, seed=3)
    prompts = [[5 + i, 9, 11 + i][: 1 + i % 3] for i in range(40)]
    free = NativeEngine().generate(handle, prompts, range(40), sampling)
    # Letters that a random model writes now and then, alone and in pairs.
    stopped = stopping(handle, "a", "e", "00", "안")
    expected = [stopped.codec.until_end(ids) for ids in free.response_ids]
    early = [len(a) < len(b) for a, b in zip(expected, free.response_ids, strict=True)]
    assert 10 < sum(early) < 40
    engines = [NativeEngine(), NativeEngine(7), NativeEngine(fixed_shapes=True), StaticEngine(),
               StaticEngine(9)]  # fmt: skip
    for engine in engines:
        made = engine.generate(stopped, prompts, range(40), sampling)
        assert made.response_ids == expected
        pairs = zip(expected, early, strict=True)
        assert made.ended == [is_early or stopped.codec.ends(ids) for ids, is_early in pairs]


def test_beams_end_at_the_string(make_handle) -> None:
    """Where nothing but letters can be written and every pair of letters is a stop string."""
    handle = make_handle()
    letters = "abcdef"
    ids = [handle.codec.tokenizer.encode(x, add_special_tokens=False)[0] for x in letters]
    others = set(range(len(handle.codec.tokenizer))) - {*ids, *handle.codec.stop_ids}
    pairs = tuple(one + other for one in letters for other in letters)
    section = GenerationSection(stop_strings=pairs, forbidden_tokens=tuple(sorted(others)))
    codec = handle.codec.sampling_by(section)
    sampling = Sampling(max_new_tokens=10, num_beams=3)
    made = StaticEngine().generate(replace(handle, codec=codec), [[5, 6, 7], [8]], [0, 1], sampling)
    assert [len(row) for row in made.response_ids] == [2, 2] and made.ended == [True, True]
    assert {id_ for row in made.response_ids for id_ in row} <= set(ids)


def test_vllm_ends_at_the_string(tmp_path: Path) -> None:
    policy = make_policy(tmp_path)
    free = NativeEngine().generate(policy, PROMPTS, range(5), GREEDY)
    text = policy.codec.text(free.response_ids[0])
    policy = stopping(policy, text[2:4])
    expected = NativeEngine().generate(policy, PROMPTS, range(5), GREEDY)
    assert expected.ended[0] and len(expected.response_ids[0]) < 8
    with StandIn(Path(policy.trunk.origin.path)) as server:
        made = engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)
    assert made.response_ids == expected.response_ids
    assert made.ended == expected.ended
    assert [len(row) for row in made.logprobs] == [len(row) for row in expected.response_ids]


# --- what is read of such a response ---


def test_rewards_read_the_text_before_the_string() -> None:
    codec = Codec(MERGED).sampling_by(GenerationSection(stop_strings=("STOP", "mat.")))
    conversation = (Message("user", "?"),)
    lead = codec.response_ids("x", True)  # the plain template puts a blank before an answer
    assert codec.tokenizer.decode(lead[:-1]) == " x"
    encode = codec.tokenizer.encode
    rows = [
        encode(" the catSTOP", add_special_tokens=False),
        encode(" the cat sat on the mat.", add_special_tokens=False),
        [*encode(" the cat", add_special_tokens=False), codec.end_id],
        encode(" the c", add_special_tokens=False),  # cut
    ]
    ended = [codec.ends(ids) for ids in rows]
    assert ended == [True, True, True, False]
    prompts = [Prompt(conversation)] * 4
    made = Completions.decode(codec, prompts, [[1]] * 4, rows, ended)
    assert made.texts == ["the cat", "the cat sat on the ", "the cat", "the c"]
    # A model of ours reads what training would have made of the text: closed, without the string.
    assert made.read_ids[0] == rows[2]
    assert codec.tokenizer.decode(made.read_ids[1]) == (
        " the cat sat on the " + codec.tokenizer.decode([codec.end_id])
    )
    assert list(made.read_ids[2:]) == rows[2:]
    assert made.take([1, 3]).read_ids == [made.read_ids[1], rows[3]]


def test_a_reward_model_scores_the_closed_text(make_handle) -> None:
    handle = stopping(make_handle(), "STOP")
    handle.trunk.add_head("r").init_normal(torch.Generator().manual_seed(0))
    reward = ModelReward(handle.with_role("r", head="r"))
    encode = handle.codec.tokenizer.encode
    said, bare = encode("cat STOP"), encode("cat ")
    prompts = [Prompt("a")] * 3
    rows = [said, [*bare, handle.codec.end_id], bare]
    made = Completions.decode(handle.codec, prompts, [[5]] * 3, rows, [True, True, False])
    stopped, closed, open_ = reward.score(made)
    assert stopped == closed != open_


def test_a_policy_takes_its_stop_strings_along(make_store, tmp_path: Path) -> None:
    store = make_store()
    handle = stopping(store.build(["the cat"] * 4).with_role("sft"), "END", "안")
    store.save(handle, tmp_path)
    store._live.clear()
    assert store.open(tmp_path).codec.stop_strings.strings == ("END", "안")
    # A run samples by its own settings.
    store._live.clear()
    store.generation = GenerationSection(stop_strings=("\n",))
    assert store.open(tmp_path).codec.stop_strings.strings == ("\n",)
