"""Static batches: transformers' decoding with our draws."""

import math

import pytest
import torch
from transformers import GenerationConfig

from pipeline.config import LoraSection
from pipeline.errors import TrainingError
from pipeline.generation import NativeEngine, Sampling, StaticEngine
from pipeline.models.adapters import add_adapter, lora_config

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13], [14, 15, 16, 17], [18, 19, 20]]


def with_bias(handle, token, bias):
    """Make a token likelier at every position."""

    def favour(_module, _args, out):
        out = out.clone()
        out[..., token] += bias
        return out

    handle.trunk.model.get_output_embeddings().register_forward_hook(favour)
    return handle


def next_token_logits(handle, prompt):
    with torch.no_grad():
        return handle.trunk.model(torch.tensor([prompt])).logits[0, -1].double()


# --- sampling ---


@pytest.mark.parametrize("truncation", [{}, {"top_k": 20}, {"top_p": 0.8}])
def test_samples_do_not_depend_on_batch_size_or_order(make_handle, truncation):
    handle = make_handle()
    with_bias(handle, handle.codec.end_id, 2.0)
    prompts = PROMPTS * 3
    sampling = Sampling(16, temperature=0.8, seed=7, stream=3, **truncation)
    whole = StaticEngine(64).generate(handle, prompts, range(15), sampling)
    assert 0 < sum(whole.ended) < 15
    assert len({len(response) for response in whole.response_ids}) > 3
    for max_rows in (1, 4):
        again = StaticEngine(max_rows).generate(
            handle, prompts[::-1], list(range(15))[::-1], sampling
        )
        assert again.response_ids[::-1] == whole.response_ids
        assert again.ended[::-1] == whole.ended


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_whole_distributions_give_the_native_engines_text(make_handle, temperature):
    handle = make_handle()
    with_bias(handle, handle.codec.end_id, 3.0)
    sampling = Sampling(16, temperature=temperature, seed=5, stream=2)
    prompts, indices = PROMPTS * 4, range(100, 120)
    ours = StaticEngine(6).generate(handle, prompts, indices, sampling)
    native = NativeEngine(7).generate(handle, prompts, indices, sampling)
    assert ours.response_ids == native.response_ids
    assert ours.ended == native.ended
    assert ours.logprobs is None and not ours.exact


def truncated(logits, temperature, top_k, top_p):
    """Probabilities by token of truncated sampling, one token after another."""
    probabilities = (logits / temperature).softmax(0).tolist()
    likeliest = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept = likeliest[:top_k] if top_k else likeliest
    total = sum(probabilities[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        nucleus.append(token)
        reached += probabilities[token] / total
        if reached >= top_p:
            break
    mass = sum(probabilities[token] for token in nucleus)
    return {token: probabilities[token] / mass for token in nucleus}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 5, 1.0), (1.0, 0, 0.7), (3.0, 9, 0.8), (0.5, 1, 1.0)]
)
def test_draws_follow_the_truncated_distribution(make_handle, temperature, top_k, top_p):
    handle, rows = make_handle(), 4000
    logits = next_token_logits(handle, [5, 6])
    expected = truncated(logits, temperature, top_k, top_p)
    drawn = StaticEngine(1000).generate(
        handle, [[5, 6]] * rows, range(rows),
        Sampling(1, temperature, seed=1, top_k=top_k, top_p=top_p),
    )  # fmt: skip
    counts = torch.bincount(torch.tensor(drawn.response_ids)[:, 0], minlength=len(logits))
    assert counts.sum() == rows
    assert set(counts.nonzero().squeeze(1).tolist()) <= set(expected)
    assert min(expected.values()) * rows > 5, "chi-square needs some draws of every token"
    statistic = sum((counts[t].item() - p * rows) ** 2 / (p * rows) for t, p in expected.items())
    freedom = len(expected) - 1
    if freedom == 0:
        assert statistic == 0
        return
    # Survival function of chi-square: the regularised upper incomplete gamma function.
    survival = torch.special.gammaincc(
        torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2)
    )
    assert survival > 0.001


# --- beams ---


def test_beams_are_those_of_generate(make_handle):
    handle, sampling = make_handle(), Sampling(10, num_beams=3)
    with_bias(handle, handle.codec.end_id, 2.0)
    handle.codec.stop_ids |= {2, 3}
    found = StaticEngine(6).generate(handle, PROMPTS, range(5), sampling)
    assert [len(found.response_ids[row]) for row in (0, 3)] == [10, 1], "a batch of both kinds"
    for prompt, response, ended in zip(PROMPTS, found.response_ids, found.ended, strict=True):
        plain = handle.trunk.model.generate(
            torch.tensor([prompt]), max_new_tokens=10, num_beams=3, do_sample=False,
            eos_token_id=sorted(handle.codec.stop_ids), pad_token_id=handle.codec.pad_id,
        )  # fmt: skip
        assert response == plain[0, len(prompt) :].tolist()
        assert ended == (response[-1] in handle.codec.stop_ids)


def test_beams_find_likelier_text_than_greedy_choice(make_handle):
    handle = make_handle()
    with_bias(handle, handle.codec.end_id, -100.0)  # all of one length: the sums compare

    def logprob(prompt, response):
        with torch.no_grad():
            logits = handle.trunk.model(torch.tensor([prompt + response])).logits[0].double()
        steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return steps[range(len(response)), response].sum().item()

    def total(sampling):
        made = StaticEngine(20).generate(handle, PROMPTS, range(5), sampling).response_ids
        return [logprob(prompt, text) for prompt, text in zip(PROMPTS, made, strict=True)]

    greedy, beams = total(Sampling(6, temperature=0)), total(Sampling(6, num_beams=8))
    assert all(beam >= choice - 1e-6 for beam, choice in zip(beams, greedy, strict=True))
    assert sum(beams) > sum(greedy) + 0.1


def test_beams_count_as_rows(make_handle, monkeypatch):
    handle, sizes = make_handle(), []
    generate = handle.trunk.model.generate

    def spy(ids, **options):
        sizes.append(len(ids) * options["generation_config"].num_beams)
        return generate(ids, **options)

    monkeypatch.setattr(handle.trunk.model, "generate", spy)
    StaticEngine(6).generate(handle, PROMPTS, range(5), Sampling(2, num_beams=3))
    assert sizes == [6, 6, 3]
    StaticEngine(2).generate(handle, PROMPTS[:2], range(2), Sampling(2, num_beams=3))
    assert sizes[3:] == [3, 3]  # a search needs its beams


# --- ends, faults, neighbours ---


def test_a_pad_id_is_never_taken_for_an_end(make_handle):
    handle = make_handle()
    pad, end = handle.codec.pad_id, handle.codec.end_id
    assert pad != end
    with_bias(handle, pad, 3.0)
    with_bias(handle, end, 2.0)
    prompts, sampling = PROMPTS * 3, Sampling(12, seed=2)
    apart = StaticEngine(5).generate(handle, prompts, range(15), sampling)
    assert any(pad in response[:-1] for response in apart.response_ids)
    assert any(response[-1] == pad for response in apart.response_ids)
    assert 0 < sum(apart.ended) < 15
    assert apart.response_ids == NativeEngine(5).generate(
        handle, prompts, range(15), sampling
    ).response_ids  # fmt: skip
    handle.codec.pad_id = end
    assert StaticEngine(5).generate(handle, prompts, range(15), sampling) == apart


def test_several_stop_ids_end_a_response(make_handle):
    handle = make_handle()
    free = StaticEngine().generate(handle, PROMPTS, range(5), Sampling(12, seed=4))
    stops = frozenset({free.response_ids[0][3], free.response_ids[1][5]}) | handle.codec.stop_ids
    handle.codec.stop_ids = stops
    made = StaticEngine().generate(handle, PROMPTS, range(5), Sampling(12, seed=4))
    for whole, response, ended in zip(
        free.response_ids, made.response_ids, made.ended, strict=True
    ):
        ends = [place for place, token in enumerate(whole) if token in stops]
        assert ended == bool(ends)
        assert response == whole[: ends[0] + 1 if ends else None]
    assert made.ended[0] and made.ended[1]


def test_a_checkpoints_own_defaults_do_not_leak_in(make_handle):
    handle = make_handle()
    engine, sampling = StaticEngine(), Sampling(12, seed=1, top_k=50)
    before = [
        engine.generate(handle, PROMPTS, range(5), s)
        for s in (sampling, Sampling(12, 0), Sampling(12, num_beams=2))
    ]
    theirs = GenerationConfig(
        temperature=0.1, top_p=0.2, repetition_penalty=9.0, no_repeat_ngram_size=1, do_sample=True,
        num_return_sequences=2, length_penalty=-3.0, min_new_tokens=11, eos_token_id=7,
        suppress_tokens=list(range(40, 300)), use_cache=False,
    )  # fmt: skip
    handle.trunk.model.generation_config = theirs
    after = [
        engine.generate(handle, PROMPTS, range(5), s)
        for s in (sampling, Sampling(12, 0), Sampling(12, num_beams=2))
    ]
    assert after == before
    assert handle.trunk.model.generation_config is theirs


@pytest.mark.parametrize("num_beams", [1, 3])
def test_diverged_weights_are_an_error_not_a_text(make_handle, num_beams):
    handle = make_handle()
    theirs = handle.trunk.model.generation_config
    with torch.no_grad():
        handle.trunk.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite at response token 0 of row"):
        StaticEngine().generate(handle, PROMPTS, range(5), Sampling(4, num_beams=num_beams))
    assert handle.trunk.model.generation_config is theirs


def test_a_row_that_has_ended_may_meet_what_it_likes(make_handle):
    """Logits behind a stop token are of filler: not finite is no fault of the weights there."""
    handle = make_handle()
    model, stops = handle.trunk.model, []
    sampling = Sampling(6, temperature=0)
    whole = StaticEngine().generate(handle, PROMPTS[:2], range(2), sampling)
    stops.append(whole.response_ids[0][1])
    assert stops[0] not in whole.response_ids[1]
    handle.codec.stop_ids = frozenset(stops)
    calls = []

    def spoil(_module, _args, out):
        calls.append(out.shape[1])
        out = out.clone()
        if len(calls) > 3:
            out[0] = math.nan
        return out

    model.get_output_embeddings().register_forward_hook(spoil)
    made = StaticEngine().generate(handle, PROMPTS[:2], range(2), sampling)
    assert len(calls) == 6
    ends = whole.response_ids[0].index(stops[0]) + 1
    assert made.response_ids == [whole.response_ids[0][:ends], whole.response_ids[1]]


def test_the_roles_adapter_speaks_and_the_base_stays(make_handle):
    handle = make_handle()
    add_adapter(handle.trunk.model, "policy", lora_config(LoraSection(rank=4)))
    policy = handle.with_role("policy", adapter="policy")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(std=0.3)
    before = handle.trunk.base_hash()
    engine, sampling = StaticEngine(), Sampling(10, seed=1)
    bare = engine.generate(handle, PROMPTS, range(5), sampling)
    tuned = engine.generate(policy, PROMPTS, range(5), sampling)
    assert tuned.response_ids != bare.response_ids
    native = NativeEngine().generate(policy, PROMPTS, range(5), sampling)
    assert tuned.response_ids == native.response_ids
    assert engine.generate(handle, PROMPTS, range(5), sampling) == bare
    assert handle.trunk.base_hash() == before


def test_nothing_asked_is_nothing_generated(make_handle):
    made = StaticEngine().generate(make_handle(), [], [], Sampling(4))
    assert made.response_ids == [] and made.ended == []
