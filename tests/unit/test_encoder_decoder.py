"""Encoder-decoders: the prompt in the encoder, the response in the decoder."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.config import LoraSection
from pipeline.errors import ModelError
from pipeline.fence import fenced
from pipeline.generation import LocalEngine, Sampling
from pipeline.generation.noise import gumbel, row_keys
from pipeline.inference import infer
from pipeline.models import adapters
from pipeline.models.trunk import Handle, Role
from pipeline.records import Message
from stages.sft.trainer import DemonstrationRows
from tests.families import bart_tokenizer, t5_tokenizer

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [27]]
EVERYTHING = {"logprobs", "entropy", "values", "scores"}
# Relative positions and scaled tied logits; gated and untied; learned positions, biased logits.
FAMILIES = {
    "t5": {},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": {},
}
TEXTS = ["the cat sat on the mat", "안녕하세요 고양이", "a prompt, and its response"] * 5


@pytest.fixture(params=FAMILIES)
def handle(request, make_handle) -> Handle:
    """float32: T5's attention takes softmax in it whatever the model's type."""
    made: Handle = make_handle(request.param, "float32", **FAMILIES[request.param])
    if request.param == "mt5":  # wide from the start: its numbers would have no places left
        for parameter in made.trunk.model.parameters():
            parameter.data.mul_(0.5)
    made.trunk.add_head("h").init_normal(torch.Generator().manual_seed(1))
    return made.with_role("r", head="h")


def batch(rows=slice(None)) -> TokenBatch:
    return TokenBatch.from_ragged(PROMPTS[rows], RESPONSES[rows], pad_id=0)


def plain(model, prompt, response) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and final decoder states of one unpadded row, by transformers alone."""
    begin = model.config.decoder_start_token_id
    out = model(
        input_ids=torch.tensor([prompt]),
        decoder_input_ids=torch.tensor([[begin, *response]]),
        output_hidden_states=True,
    )
    return out.logits[0], out.decoder_hidden_states[-1][0]


@torch.no_grad()
def test_outputs_equal_plain_transformers_row_by_row(handle):
    out = handle(batch(), EVERYTHING, temperature=0.7)
    head, model = handle.trunk.heads["h"], handle.trunk.model
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits, states = plain(model, prompt, response)
        logp = (logits / 0.7).log_softmax(-1)
        for t, token in enumerate(response):  # the start token's state predicts token 0
            assert out.logprobs[row, t] == pytest.approx(logp[t, token].item(), abs=1e-4)
            entropy = -(logp[t].exp() * logp[t]).sum().item()
            assert out.entropy[row, t] == pytest.approx(entropy, abs=1e-4)
            value = (states[t] @ head.weight + head.bias).item()
            assert out.values[row, t] == pytest.approx(value, abs=1e-4)
        # A score reads the state at the last response token, which the decoder has read.
        score = (states[len(response)] @ head.weight + head.bias).item()
        assert out.scores[row] == pytest.approx(score, abs=1e-4)
        for field in (out.logprobs, out.entropy, out.values):
            assert not field[row, len(response) :].any()  # zeros on padding


@torch.no_grad()
def test_micro_batches_change_nothing(handle):
    whole = infer(handle, batch(), sorted(EVERYTHING), 10**6)
    parts = infer(handle, batch(), sorted(EVERYTHING), 1)
    for name, numbers in whole.items():
        torch.testing.assert_close(parts[name], numbers, rtol=0, atol=1e-4)


def test_recomputed_activations_give_the_same_gradients(handle):
    model = handle.trunk.model
    for name in ("policy", "value"):
        adapters.add_adapter(model, name, adapters.lora_config(LoraSection(rank=2)))
        for parameter in adapters.adapter_parameters(model, name):
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.requires_grad_(True)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        policy = handle.with_role("policy", adapter="policy")(batch(), {"logprobs"})
        value = handle.with_role("value", adapter="value")(batch(), {"values"})
        (policy.logprobs.sum() + value.values.sum()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    kept = gradients()
    handle.trunk.recompute = True
    again = gradients()
    assert kept.keys() == again.keys() and len(kept) > 20
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


# --- generation ---


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_is_drawn_from_the_models_own_distribution(handle, temperature):
    sampling = Sampling(6, temperature=temperature, seed=3, stream=2)
    drawn = LocalEngine(2).generate(handle, PROMPTS, [4, 5, 6], sampling)
    for row, prompt in enumerate(PROMPTS):
        key = row_keys(3, 2, torch.tensor([4 + row]))
        written: list[int] = []
        while len(written) < 6 and not set(written) & handle.codec.stop_ids:
            logits = plain(handle.trunk.model, prompt, written)[0][-1]
            if temperature:
                place = torch.tensor([len(written)])
                logits = logits / temperature + gumbel(key, place, len(logits), logits.dtype)[0]
            written.append(int(logits.argmax()))
        assert drawn.response_ids[row] == written
        assert drawn.ended[row] == (written[-1] in handle.codec.stop_ids)


def test_beams_are_those_of_generate(handle):
    handle.trunk.model.generation_config.no_repeat_ngram_size = 1  # BART's summarisers have one
    found = LocalEngine(6).generate(handle, [PROMPTS[0]], [0], Sampling(5, num_beams=3))
    config = GenerationConfig(
        max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=sorted(handle.codec.stop_ids),
        pad_token_id=0, decoder_start_token_id=handle.trunk.model.config.decoder_start_token_id,
    )  # fmt: skip
    model = copy.deepcopy(handle.trunk.model)
    model.generation_config = GenerationConfig()
    theirs = model.generate(torch.tensor([PROMPTS[0]]), generation_config=config)[0, 1:].tolist()
    assert found.response_ids[0] == theirs[: len(found.response_ids[0])]


# --- text ---


@pytest.mark.parametrize("make", [t5_tokenizer, bart_tokenizer])
def test_prompts_are_whole_texts_and_responses_labels_as_transformers_has_them(make):
    tokenizer = make()
    codec = Codec(tokenizer, encoder_decoder=True)
    prompt, response = "say good 3", "kind 7."  # of letters that both vocabularies have
    assert codec.prompt_ids(prompt) == tokenizer(prompt).input_ids
    # `tokenizer(text_target=...)` is what Seq2SeqTrainer's labels are made by.
    assert codec.response_ids(response) == tokenizer(text_target=response).input_ids
    assert codec.text(codec.response_ids(response)) == response
    decoder = Codec(tokenizer)
    assert decoder.prompt_ids(prompt)[-1] != tokenizer.eos_token_id  # a decoder's stays open


@pytest.mark.parametrize("make", [t5_tokenizer, bart_tokenizer])
def test_a_cut_prompt_keeps_its_end_and_is_still_whole(make, tmp_path):
    tokenizer = make()
    whole = Codec(tokenizer, encoder_decoder=True).prompt_ids("the cat sat on the mat")
    codec = Codec(tokenizer, encoder_decoder=True, max_prompt_tokens=4)
    opening = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    assert codec.prompt_ids("the cat sat on the mat") == opening + whole[-4 + len(opening) :]
    codec.save(tmp_path)
    assert (
        Codec.load(tmp_path).prompt_ids("the cat sat on the mat")
        == opening + (whole[-4 + len(opening) :])
    )


@pytest.mark.parametrize("make", [t5_tokenizer, bart_tokenizer])
def test_conversations_are_closed_once_and_typed_special_tokens_are_text(make):
    tokenizer = make()
    codec = Codec(tokenizer, encoder_decoder=True)
    for said in ("the cat", "the </s> cat"):
        ids = codec.prompt_ids((Message("user", said),))
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)


@pytest.mark.parametrize("make", [t5_tokenizer, bart_tokenizer])
def test_plain_text_is_cut_for_the_decoder_behind_one_token_of_the_encoder(make):
    tokenizer = make()
    codec = Codec(tokenizer, encoder_decoder=True, max_prompt_tokens=9, max_response_tokens=5)
    text = "the cat sat on the mat and the cat"
    bare = tokenizer.encode(text, add_special_tokens=False)
    pairs = codec.chunks(text)
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for number, (prompt, response) in enumerate(pairs):
        assert prompt == [*opening, bare[5 * number], tokenizer.eos_token_id]
        assert response == bare[5 * number + 1 : 5 * number + 6]
    # Every token but the first is predicted once.
    assert [id_ for _, response in pairs for id_ in response] == bare[1:]


# --- training and files ---


def test_the_loss_of_sft_is_that_of_seq2seqtrainer(make_handle, tmp_path):
    """Its labels, its decoder inputs and its mean over label tokens, on rows of several lengths."""
    handle = make_handle("bart", "float32")
    handle.codec.tokenizer.padding_side = "right"
    model = handle.trunk.model
    responses = [[*ids, handle.codec.end_id] for ids in RESPONSES]
    rows = DemonstrationRows(list(zip(PROMPTS, responses, strict=True)), handle.codec.pad_id)
    table = [{"input_ids": p, "labels": r} for p, r in zip(PROMPTS, responses, strict=True)]
    with fenced(model):
        trainer = Seq2SeqTrainer(
            model,
            Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            processing_class=handle.codec.tokenizer,
            data_collator=DataCollatorForSeq2Seq(handle.codec.tokenizer, model),
        )
        batch = trainer.data_collator(table)
        tokens = torch.tensor(sum(rows.units))
        theirs = trainer.compute_loss(model, batch, num_items_in_batch=tokens)
    ours = -handle.trunk(rows.collate(range(3)), Role("sft"), ("logprobs",)).logprobs.sum()
    assert ours.item() / int(tokens) == pytest.approx(theirs.item(), abs=1e-5)


def test_an_adapter_loads_in_plain_peft_and_a_model_in_plain_transformers(
    handle, make_store, tmp_path: Path
):
    from peft import PeftModel

    model = handle.trunk.model
    model.save_pretrained(tmp_path / "base")
    adapters.add_adapter(model, "a", adapters.lora_config(LoraSection(rank=2)))
    for parameter in adapters.adapter_parameters(model, "a"):
        torch.nn.init.normal_(parameter, std=0.1)
    adapters.save_adapter(model, "a", tmp_path / "adapter", str(tmp_path / "base"))
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
    adapted = infer(handle.with_role("a", adapter="a"), batch(), ["logprobs"], None)["logprobs"]
    bare = infer(handle, batch(), ["logprobs"], None)["logprobs"]
    assert (adapted - bare).abs().max() > 0.01
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            logp = plain(theirs, prompt, response)[0].log_softmax(-1)
        for t, token in enumerate(response):
            assert adapted[row, t] == pytest.approx(logp[t, token].item(), abs=1e-4)


def test_a_decoder_without_a_beginning_is_refused(make_store):
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        make_store("bart", "float32", decoder_start_token_id=None).build(TEXTS)


def test_each_side_has_all_positions():
    from types import SimpleNamespace

    from stages.config import RunConfig

    def check(prompt: int, response: int) -> None:
        given = {
            "model": {"path": "org/bart"},
            "data": {"max_prompt_tokens": prompt, "max_response_tokens": response},
            "ppo": {"rollout": {"max_new_tokens": response}},
            "evaluation": {"max_new_tokens": response},
        }
        architecture = SimpleNamespace(is_encoder_decoder=True, max_position_embeddings=100)
        architecture.get_text_config = lambda: architecture
        RunConfig.model_validate(given).check_positions("org/bart", architecture)

    check(99, 99)  # together they would not fit a decoder
    with pytest.raises(ModelError, match=r"100 positions on each side.*max_prompt_tokens is 100"):
        check(100, 99)
    with pytest.raises(ModelError, match=r"max_new_tokens is 120|max_response_tokens is 120"):
        check(50, 120)
