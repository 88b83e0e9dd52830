"""Conversations of several turns, and system prompts: what is trained on, scored and rendered."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.config import DataSection
from pipeline.data import Split, load_corpus
from pipeline.errors import ConfigError, ModelError
from pipeline.generation_config import GenerationSection
from pipeline.models.loading import train_tokenizer
from pipeline.models.store import ModelStore
from pipeline.records import Demonstration, Message, Prompt, each_reply
from pipeline.rewards import Completions, ModelReward
from stages.reward.rankings import encode_rankings
from stages.sft.config import SftSection
from stages.sft.run import replies, tokenised
from tests.conftest import tiny_section
from tests.unit.test_codec import CHATML

TEXTS = ["hello there, how are you today?", "fine, 고마워요", "why? because."] * 5
TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "fine"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "because."},
]


@pytest.fixture
def tokenizer():
    made = train_tokenizer(TEXTS, 300)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


def corpus_of(folder: Path, **rows: list[dict]) -> DataSection:
    sources = {}
    for kind, lines in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")
        sources[kind] = {"path": str(folder / f"{kind}.jsonl")}
    return DataSection.model_validate({"held_out_fraction": 0.3, **sources})


def other(number: int) -> list[dict]:
    """A conversation like TURNS whose first user turn is its own."""
    return [TURNS[0], {"role": "user", "content": f"hello {number}"}, *TURNS[2:]]


# --- several turns ---


def test_the_last_turn_is_the_response_of_demonstrations_and_rankings(tmp_path: Path) -> None:
    """Earlier assistant turns are the prompt's, in every kind of data."""
    rude = {"role": "assistant", "content": "go away"}
    data = corpus_of(
        tmp_path,
        demonstrations=[{"messages": other(i)} for i in range(20)],
        rankings=[{"chosen": other(i), "rejected": [*other(i)[:-1], rude]} for i in range(20)],
        prompts=[{"prompt": other(i)[:-1]} for i in range(20)],
    )
    corpus = load_corpus(data, ["demonstrations", "rankings", "prompts"])
    for part in ("train", "held_out"):
        demonstrations, rankings, prompts = (
            getattr(split, part) for split in (corpus.demonstrations, corpus.rankings,
                                               corpus.prompts)
        )  # fmt: skip
        assert len(demonstrations) == len(rankings) == len(prompts) > 0
        for shown, ranked, asked in zip(demonstrations, rankings, prompts, strict=True):
            assert shown.prompt == ranked.prompt == asked.prompt  # on the same side, too
            assert [turn.role for turn in asked.prompt] == ["system", "user", "assistant", "user"]
            assert shown.response == "because."
            assert ranked.responses == ("because.", "go away")


def test_the_loss_is_on_the_last_turn_or_on_all(tokenizer, tmp_path: Path) -> None:
    """`sft.all_turns`: each assistant turn once, with exactly the turns before it."""
    codec = Codec(tokenizer)
    turns = tuple(Message(**turn) for turn in TURNS)
    row = Demonstration(turns[:-1], "because.", "f:1")
    assert replies([row], every=False) == [row] and SftSection().all_turns is False
    both = replies([row, Demonstration("plain", " text")], every=True)
    assert [(reply.prompt, reply.response) for reply in both] == [
        (turns[:2], "fine"),
        (turns[:4], "because."),
        ("plain", " text"),
    ]
    rows = tokenised(codec, each_reply(row))
    trained = [tokenizer.decode(response) for _, response in rows.pairs]
    end = tokenizer.decode([codec.end_id])
    assert trained == [f"fine{end}", f"because.{end}"]
    opening = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    asks = "<|im_start|>assistant\n"
    later = "fine<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n"
    assert [tokenizer.decode(prompt) for prompt, _ in rows.pairs] == [
        opening + asks,
        opening + asks + later + asks,
    ]


def test_all_turns_of_a_conversation_are_on_one_side(tmp_path: Path) -> None:
    data = corpus_of(tmp_path, demonstrations=[{"messages": other(i)} for i in range(30)])
    split: Split = load_corpus(data, ["demonstrations"]).demonstrations
    sides = [
        {reply.prompt[1].content for reply in replies(part, every=True)}
        for part in (split.train, split.held_out)
    ]
    assert len(replies(split.held_out, every=True)) == 2 * len(split.held_out) > 0
    assert not sides[0] & sides[1]


def test_the_reward_is_at_the_end_of_the_last_turn(make_store, tmp_path: Path) -> None:
    """The score is the head's at the last token of the last reply, the history before it."""
    store = make_store()
    handle = store.build(TEXTS).with_role("reward", head="r")
    handle.trunk.add_head("r").init_normal(torch.Generator().manual_seed(0))
    turns = tuple(Message(**turn) for turn in TURNS)
    data = corpus_of(
        tmp_path,
        rankings=[{"chosen": other(i), "rejected": [*other(i)[:-1], {"role": "assistant",
                   "content": "go"}]} for i in range(9)],
    )  # fmt: skip
    ranking = load_corpus(data, ["rankings"]).rankings.train[0]
    (row,) = encode_rankings(handle.codec, [ranking])
    prompt, response = handle.codec.pair_ids(turns[:-1], "because.")
    completions = Completions.decode(
        handle.codec, [Prompt(turns[:-1])], [prompt], [response], [True]
    )
    assert completions.texts == ["because."]
    (score,) = ModelReward(handle).score(completions)
    with torch.no_grad():  # transformers' own states of the whole conversation, the head by hand
        states = handle.trunk.model.model(torch.tensor([prompt + response])).last_hidden_state
        expected = float(handle.trunk.heads["r"](states[:, -1]))
    assert score == pytest.approx(expected, abs=1e-10) and score != 0
    assert len(row.prompt_ids) > len(handle.codec.prompt_ids(turns[:2]))


# --- system prompts ---


def test_a_system_turn_stands_before_conversations_that_have_none(tokenizer) -> None:
    plain, codec = Codec(tokenizer), Codec(tokenizer).with_system_prompt("Speak 한국어.")
    system = Message("system", "Speak 한국어.")
    user = Message("user", "hello")
    assert codec.prompt_ids((user,)) == plain.prompt_ids((system, user))
    assert codec.prompt_ids("hello") == plain.prompt_ids((system, user))  # rendered as a turn
    own = (Message("system", "be kind"), user)
    assert codec.prompt_ids(own) == plain.prompt_ids(own)
    assert codec.prompt_text("hello") == plain.prompt_text((system, user))
    assert plain.prompt_ids("hello") != codec.prompt_ids("hello")
    # Responses are as they were.
    assert codec.pair_ids("hello", "x")[1] == plain.pair_ids("hello", "x")[1]


def test_plain_text_without_a_template_is_refused_a_system_prompt() -> None:
    codec = Codec(train_tokenizer(TEXTS, 300)).with_system_prompt("be kind")
    with pytest.raises(ConfigError, match=r"data.system_prompt is set, but a prompt is plain text"):
        codec.prompt_ids("hello")
    # The plain template of conversations has system turns.
    assert codec.prompt_text((Message("user", "hello"),)) == (
        "\n\nSystem: be kind\n\nHuman: hello\n\nAssistant:"
    )


def test_what_only_reads_takes_the_system_turn_where_it_has_one(tokenizer) -> None:
    """A reward model on a base of its own scores the text, whatever its template has."""
    generation = GenerationSection(forbidden_tokens=("no token of this vocabulary",))
    reader = Codec(train_tokenizer(TEXTS, 300)).with_positions(64).of_run("be kind", generation)
    assert reader.prompt_ids("hello") == Codec(train_tokenizer(TEXTS, 300)).prompt_ids("hello")
    assert "System: be kind" in reader.prompt_text((Message("user", "hello"),))
    tokenizer.chat_template = (
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    )
    reader = Codec(tokenizer).with_positions(64).of_run("be kind", None)
    assert "be kind" not in reader.prompt_text((Message("user", "hello"),))


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        # As Gemma's template: the system role is refused; another one passes it over.
        (
            "{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}",
            r"refuses a system turn \(System role not supported\)",
        ),
        (
            "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
            "leaves system turns out",
        ),
    ],
)
def test_a_template_without_system_turns_is_refused(tokenizer, start: str, reason: str) -> None:
    tokenizer.chat_template = start + CHATML
    with pytest.raises(ModelError, match=rf"{reason}.*into the first user turn"):
        Codec(tokenizer).with_system_prompt("be kind")


def test_the_system_prompt_goes_with_the_model(tmp_path: Path) -> None:
    """A run gives it to its base; an artifact has it, unless another run says otherwise."""
    section = tiny_section()
    store = ModelStore(section, DataSection(system_prompt="be kind"))
    handle = store.build(TEXTS).with_role("sft")
    asked = (Message("user", "hello"),)
    assert "System: be kind" in handle.codec.prompt_text(asked)
    store.save(handle, tmp_path)
    for data, expected in ((DataSection(), "be kind"), (DataSection(system_prompt="no"), "no")):
        codec = ModelStore(section, data).open(tmp_path).codec
        assert codec.system_prompt == expected
        assert f"System: {expected}\n" in codec.prompt_text(asked)


def test_scores_see_the_system_prompt(make_handle) -> None:
    """The same conversation has other log-probs with a system turn before it."""
    handle = make_handle()
    found = []
    for codec in (handle.codec, handle.codec.with_system_prompt("be kind")):
        pair = codec.pair_ids((Message("user", "cat"),), "mat")
        batch = TokenBatch.from_ragged([pair[0]], [pair[1]], codec.pad_id)
        found.append(handle(batch, ["logprobs"]).logprobs)
    assert not torch.allclose(*found, atol=1e-3)
