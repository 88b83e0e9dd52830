"""The native engine: right tokens, right log-probs, noise that does not depend on the batch."""

import math

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.errors import TrainingError
from pipeline.generation import NativeEngine, Sampling
from pipeline.generation.noise import gumbel, row_keys

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13], [14, 15, 16, 17], [18, 19, 20]] * 3


def with_frequent_ends(handle, bias=3.0):
    """Make responses end at ragged lengths: a bias on the stop token's logit."""
    layer = handle.trunk.model.get_output_embeddings()
    end = handle.codec.end_id

    def favour(_module, _args, out):
        out = out.clone()
        out[..., end] += bias
        return out

    layer.register_forward_hook(favour)
    return handle


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "qwen3"])
def test_greedy_text_equals_generate(make_handle, model_type):
    extra = {
        "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
        "bloom": {"n_layer": 2, "n_head": 2},
    }.get(model_type, {})
    dtype = "float32" if model_type == "bloom" else "float64"  # its softmax is float32
    handle = make_handle(model_type, dtype, **extra)
    made = NativeEngine(max_rows=4).generate(
        handle, PROMPTS[:5], range(5), Sampling(max_new_tokens=12, temperature=0)
    )
    for prompt, response in zip(PROMPTS[:5], made.response_ids, strict=True):
        plain = handle.trunk.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert response == plain[0, len(prompt) :].tolist()


def test_samples_do_not_depend_on_batch_size_or_order(make_handle):
    handle = with_frequent_ends(make_handle())
    sampling = Sampling(max_new_tokens=16, temperature=0.8, seed=7, stream=3)
    whole = NativeEngine(max_rows=64).generate(handle, PROMPTS, range(15), sampling)
    assert 0 < sum(whole.ended) < 15  # both ways of ending occur
    assert len({len(response) for response in whole.response_ids}) > 3
    for max_rows in (1, 4):
        again = NativeEngine(max_rows).generate(
            handle, PROMPTS[::-1], list(range(15))[::-1], sampling
        )
        assert again.response_ids[::-1] == whole.response_ids
        assert again.ended[::-1] == whole.ended


def test_other_streams_and_indices_give_other_samples(make_handle):
    handle = make_handle()
    engine = NativeEngine()
    base = engine.generate(handle, [[5]] * 4, range(4), Sampling(8, seed=1)).response_ids
    assert len({tuple(response) for response in base}) == 4  # one prompt, four indices
    for sampling in (Sampling(8, seed=2), Sampling(8, seed=1, stream=1)):
        assert engine.generate(handle, [[5]] * 4, range(4), sampling).response_ids != base


def test_logprobs_are_those_of_a_full_forward_at_the_same_temperature(make_handle):
    handle = with_frequent_ends(make_handle())
    made = NativeEngine(max_rows=4).generate(handle, PROMPTS, range(15), Sampling(16, 0.7, seed=1))
    batch = TokenBatch.from_ragged(PROMPTS, made.response_ids, pad_id=0)
    with torch.no_grad():
        full = handle(batch, {"logprobs"}, temperature=0.7).logprobs
    for row, logprobs in enumerate(made.logprobs):
        assert full[row, : len(logprobs)].tolist() == pytest.approx(logprobs, abs=1e-9)


def test_ended_tells_stop_tokens_from_the_length_limit(make_handle):
    handle = with_frequent_ends(make_handle())
    made = NativeEngine().generate(handle, PROMPTS, range(15), Sampling(5, seed=1))
    for response, ended in zip(made.response_ids, made.ended, strict=True):
        assert ended == (response[-1] in handle.codec.stop_ids)
        assert ended or len(response) == 5
        assert not set(response[:-1]) & handle.codec.stop_ids  # nothing after an end


def test_diverged_weights_are_an_error_not_a_text(make_handle):
    handle = make_handle()
    with torch.no_grad():
        handle.trunk.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite at response token 0"):
        NativeEngine().generate(handle, [[5, 6]], [0], Sampling(4))


def test_noise_is_gumbel_distributed_and_samples_the_softmax():
    rows, vocabulary = 20_000, 5
    keys = row_keys(3, 1, torch.arange(rows))
    noise = gumbel(keys, torch.zeros(rows), vocabulary, torch.float64)
    # Standard Gumbel: mean 0.5772 (Euler), variance pi^2/6; 100,000 draws: errors 0.004 and 0.017
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.016)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.06)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    counts = torch.bincount((logits + noise).argmax(1), minlength=vocabulary)
    expected = logits.softmax(0) * rows
    # chi-square with 4 degrees of freedom: 18.5 is its 99.9% quantile
    assert ((counts - expected) ** 2 / expected).sum().item() < 18.5


def test_noise_differs_by_position_and_row_and_not_by_vocabulary_size():
    keys = row_keys(3, 1, torch.arange(4))
    first = gumbel(keys, torch.zeros(4), 100, torch.float64)
    assert first.unique().numel() == 400
    assert not torch.equal(first, gumbel(keys, torch.ones(4), 100, torch.float64))
    assert torch.equal(first[:, :60], gumbel(keys, torch.zeros(4), 60, torch.float64))
    # Neighbouring rows are unrelated: correlation of 100 draws has deviation 0.1.
    assert torch.corrcoef(first).fill_diagonal_(0).abs().max() < 0.4


def test_the_cache_is_gone_when_the_text_is_there(make_handle):
    """Cache and layers refer to one another: their buffers must not wait for a collection."""
    import gc

    handle = make_handle()
    gc.collect()
    gc.disable()
    try:
        before = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
        NativeEngine().generate(handle, PROMPTS, range(15), Sampling(5, seed=1))
        left = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        left = [x for x in left if id(x) not in before]
        assert not [x.shape for x in left if x.dim() == 4]  # (rows, heads, columns, width)
    finally:
        gc.enable()
