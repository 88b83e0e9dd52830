"""Reward models on encoders against plain transformers, and the pairs of texts that they read."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel, AutoTokenizer

from pipeline.batches import TokenBatch
from pipeline.codec import BASE_PROMPTS_CUT, Codec
from pipeline.config import DataSection, LoraSection, ModelSection
from pipeline.errors import ModelError
from pipeline.inference import infer
from pipeline.models import adapters
from pipeline.models.encoders import default_pooling, positions
from pipeline.models.store import ModelStore
from pipeline.pair_codec import PairCodec, pair_template
from pipeline.records import Message, Prompt
from pipeline.rewards import Completions, ModelReward
from stages.reward.config import RewardSection
from tests.tiny_encoders import byte_level, make_encoder, save_encoder, unigram, word_piece

KINDS = ["bert", "roberta", "deberta-v2", "modernbert"]
PROMPTS = ["which colour is the ball?", "the cat", "ran away 0123"]
RESPONSES = ["it is red", "sat on the mat, 안녕", "no"]


def open_encoder(folder, kind="bert", pooling="first", limits=(40, 24), table=64):
    """A store, and the handle of a tiny encoder with a head of random weights."""
    path = save_encoder(kind, folder / kind, table)
    section = ModelSection(init="config")  # the policy's
    store = ModelStore(section, DataSection())
    handle = store.other_base(str(path), None, *limits)
    handle.trunk.add_head("reward").init_normal(torch.Generator().manual_seed(1))
    return store, handle.with_role("reward", head="reward", pooling=pooling)


def rows_of(handle, prompts=PROMPTS, responses=RESPONSES):
    found = [
        handle.codec.ranked_ids(prompt, [response])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    prompt_ids, response_ids = [ids for ids, _ in found], [ids for _, (ids,) in found]
    return TokenBatch.from_ragged(prompt_ids, response_ids, handle.codec.pad_id)


def oracle(kind, handle, prompt, response, pooling):
    """The score by plain transformers: the tokenizer's own pair of one row, without padding."""
    path = handle.trunk.origin.path
    model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    pair = tokenizer(prompt, response, return_tensors="pt", return_token_type_ids=kind == "bert")
    states = model(**pair).last_hidden_state[0]  # (T, d)
    state = states[0] if pooling == "first" else states.mean(0)
    head = handle.trunk.heads["reward"]
    return float(state @ head.weight + head.bias)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_equal_plain_transformers_whatever_the_padding(tmp_path, kind, pooling):
    _, handle = open_encoder(tmp_path, kind, pooling)
    expected = [
        oracle(kind, handle, *texts, pooling) for texts in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert max(expected) - min(expected) > 1e-3  # rows that score apart
    batch = rows_of(handle)
    together = handle(batch, ["scores"]).scores
    assert together.tolist() == pytest.approx(expected, abs=1e-5)
    for budget in (1, 60):  # rows alone, and two of three together
        found = infer(handle, batch, ["scores"], budget)["scores"].tolist()
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("make", [word_piece, byte_level, unigram])
def test_ids_are_those_of_the_tokenizers_own_pair(make):
    tokenizer = make()
    codec = PairCodec(tokenizer)
    before, between, after = pair_template(tokenizer)
    assert (len(before), len(after)) == (1, 1)
    assert len(between) == (2 if make is byte_level else 1)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        prompt_ids, (response_ids,) = codec.ranked_ids(prompt, [response])
        assert prompt_ids + response_ids == tokenizer(prompt, response)["input_ids"]


def test_special_tokens_in_texts_stay_text():
    tokenizer = word_piece()
    codec = PairCodec(tokenizer)
    sep = tokenizer.sep_token_id
    prompt_ids, (response_ids,) = codec.ranked_ids("the [SEP] cat", ["a [SEP] b"])
    assert (prompt_ids.count(sep), response_ids.count(sep)) == (1, 1)
    turns = (Message("user", "the [SEP] cat"),)
    assert codec.prompt_ids(turns).count(sep) == 1


def test_a_prompt_is_cut_from_its_front_to_the_positions_beside_the_longest_response():
    tokenizer = word_piece()
    codec = PairCodec(tokenizer, max_prompt_tokens=100, max_response_tokens=100)
    codec = codec.with_positions(20)
    words = [tokenizer.convert_tokens_to_ids(w) for w in ("the", "cat", "sat", "on", "mat")]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    # 6 + [SEP] and 1 + [SEP]: the longest has 7 of 20 positions, the prompt 13 with [CLS], [SEP].
    prompt_ids, response_ids = codec.ranked_ids(
        " ".join(["the"] * 20 + ["cat sat on mat"]), ["the cat sat on the mat", "cat"]
    )
    assert [len(ids) for ids in response_ids] == [7, 2]
    assert prompt_ids == [cls, *[words[0]] * 7, *words[1:], sep]
    assert len(prompt_ids) == 13
    assert codec.counts == {BASE_PROMPTS_CUT: 1}
    # A response never takes more than half: 9 of its words and [SEP].
    prompt_ids, (response,) = codec.ranked_ids("the cat", ["mat " * 30])
    assert (prompt_ids, response) == ([cls, *words[:2], sep], [*[words[4]] * 9, sep])
    # The limit of the settings comes before that of the positions.
    short = codec.with_limits(5, 10)
    assert short.prompt_ids("the cat sat on mat") == [cls, *words[2:], sep]
    assert short.counts == {BASE_PROMPTS_CUT: 1}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("bert", 64), ("roberta", 64), ("deberta-v2", 64), ("modernbert", 64)],
)
@torch.no_grad()
def test_the_positions_found_are_the_last_that_work(kind, expected):
    model, _ = make_encoder(kind, positions=64)
    assert positions(model) == expected
    ids = torch.full((1, expected), 7)
    assert model(input_ids=ids).last_hidden_state.isfinite().all()
    if kind in ("bert", "roberta"):  # the others' positions are relative
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, expected + 1), 7))


def test_a_tokenizer_that_closes_no_pair_is_refused():
    tokenizer = word_piece()
    tokenizer._tokenizer.post_processor = None
    with pytest.raises(ModelError, match="puts no token after a pair"):
        PairCodec(tokenizer)


def test_a_policy_cannot_start_from_an_encoder(tmp_path):
    path = save_encoder("bert", tmp_path / "bert")
    store = ModelStore(ModelSection(path=str(path)), DataSection())
    with pytest.raises(ModelError, match=r"is no decoder \(bert\).*reward\.base"):
        store.pretrained()


def test_weights_that_would_be_random_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_encoder("bert", tmp_path / "bert")
    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    store = ModelStore(ModelSection(init="config"), DataSection())
    with pytest.raises(ModelError, match=r"lacks 1 weights of a bert.*layer\.1\.output"):
        store.other_base(str(path), None, 40, 24)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@torch.no_grad()
def test_an_artifact_opens_to_the_same_scores(tmp_path, tuning):
    store, base = open_encoder(tmp_path, pooling="mean")
    lora = LoraSection(rank=2, alpha=4)
    handle = store.trainable_copy(base, "reward", tuning, lora)
    for parameter in handle.parameters():
        if parameter.dim() == 2:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    batch = rows_of(handle)
    expected = handle(batch, ["scores"]).scores
    assert (expected - base(batch, ["scores"]).scores).abs().max() > 1e-3
    artifact = tmp_path / "artifact"
    store.save(handle, artifact)
    opened = ModelStore(store.section, store.data).open(artifact)
    assert opened.role.pooling == "mean"
    torch.testing.assert_close(opened(rows_of(opened), ["scores"]).scores, expected)
    assert isinstance(opened.codec, PairCodec)
    assert (opened.codec.max_tokens, opened.codec.max_prompt_tokens) == (64, 40)
    if tuning == "lora":
        from peft import AutoPeftModelForFeatureExtraction

        plain = AutoPeftModelForFeatureExtraction.from_pretrained(artifact / "adapter")
        mask = torch.ones(1, len(handle.codec.prompt_ids("the cat")), dtype=torch.long)
        ids = torch.tensor([handle.codec.prompt_ids("the cat")])
        theirs = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        adapters.activate(handle.trunk.model, "reward")
        ours = handle.trunk.model(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(theirs, ours)
        assert json.loads((artifact / "adapter/adapter_config.json").read_text())["task_type"] == (
            "FEATURE_EXTRACTION"
        )


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_recomputed_activations_give_the_same_gradients(tmp_path, pooling):
    _, handle = open_encoder(tmp_path, pooling=pooling)
    batch, found = rows_of(handle), []
    for recompute in (False, True):
        handle.trunk.recompute = recompute
        for parameter in handle.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        handle(batch, ["scores"]).scores.sum().backward()
        found.append([p.grad.clone() for p in handle.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(handle.parameters()))  # none without: DDP would wait for it
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_reward_model_of_another_vocabulary_reads_the_text(tmp_path, make_handle):
    _, handle = open_encoder(tmp_path, pooling="mean")
    policy = make_handle("llama", "float32").codec
    prompt_ids = [policy.prompt_ids(prompt) for prompt in PROMPTS]
    response_ids = [policy.response_ids(response) for response in RESPONSES]
    drawn = Completions.decode(
        policy, [Prompt(text) for text in PROMPTS], prompt_ids, response_ids, [True] * 3
    )
    scores = ModelReward(handle).score(drawn)
    for score, prompt, response in zip(scores, PROMPTS, RESPONSES, strict=True):
        assert score == pytest.approx(oracle("bert", handle, prompt, response, "mean"), abs=1e-5)
    # Some of the rows, as processes share them, are still known to be the policy's ids.
    some = ModelReward(handle).score(drawn.take([2, 0]))
    assert some == pytest.approx([scores[2], scores[0]], abs=1e-5)


@torch.no_grad()
def test_a_decoder_with_its_own_tokenizer_reads_an_end_only_where_the_model_ended(
    tmp_path, make_handle, make_store
):
    other = make_store("gpt2", "float32").build(["another text for another tokenizer", "red"])
    other.trunk.add_head("reward").init_normal(torch.Generator().manual_seed(1))
    reward = other.with_role("reward", head="reward")
    policy = make_handle("llama", "float32").codec
    assert not reward.codec.same_ids(policy)
    ids = policy.response_ids("sat on the mat")
    drawn = Completions.decode(
        policy,
        [Prompt("the cat")] * 2,
        [policy.prompt_ids("the cat")] * 2,
        [ids, ids[:-1]],
        [True, False],
    )
    scores = ModelReward(reward).score(drawn)
    tokenizer, head = reward.codec.tokenizer, other.trunk.heads["reward"]
    whole = tokenizer.encode("the cat") + tokenizer.encode("sat on the mat")
    for score, row in zip(scores, ([*whole, tokenizer.eos_token_id], whole), strict=True):
        body = other.trunk.model.get_decoder()
        state = body(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        assert score == pytest.approx(float(state @ head.weight + head.bias), abs=1e-5)


def test_same_ids_need_the_same_kind_of_rows(tmp_path):
    tokenizer = byte_level()  # has an end token, so that both kinds of codec take it
    joined, pair = Codec(tokenizer), PairCodec(tokenizer)
    assert joined.same_ids(Codec(tokenizer)) and pair.same_ids(PairCodec(tokenizer))
    assert not joined.same_ids(pair)
    assert not joined.same_ids(joined.with_positions(512))


def test_how_a_base_was_pooled_is_read_beside_its_weights(tmp_path):
    path = save_encoder("bert", tmp_path / "bert")
    config = make_encoder("bert")[0].config
    assert default_pooling(str(path), None, config) == "first"
    (path / "1_Pooling").mkdir()
    said = path / "1_Pooling" / "config.json"
    said.write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert default_pooling(str(path), None, config) == "mean"
    said.write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert default_pooling(str(path), None, config) == "first"
    said.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match=r"neither .* set reward\.pooling to first or mean"):
        default_pooling(str(path), None, config)
    modern = make_encoder("modernbert")[0].config
    assert default_pooling(str(tmp_path), None, modern) == "mean"  # its classifier_pooling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "mean"}, r"reward\.pooling is mean .* reward\.base names none"),
        ({"base_revision": "main"}, r"reward\.base_revision is main"),
        ({"max_prompt_tokens": 9}, r"reward\.max_prompt_tokens is 9"),
        ({"base": "x/y", "start": "base"}, r"reward\.start is base but reward\.base is 'x/y'"),
    ],
)
def test_settings_that_need_or_refuse_another_base(settings, message):
    with pytest.raises(ValidationError, match=message):
        RewardSection(**settings)
