"""Batches packed into one row without padding, for attention of variable length."""

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.models.joiner import PACKED_FAMILIES, DecoderJoiner, PackedJoiner, make_joiner

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [27]]
EVERYTHING = {"logprobs", "entropy", "values", "scores"}


def batch() -> TokenBatch:
    return TokenBatch.from_ragged(PROMPTS, RESPONSES, pad_id=0)


@pytest.mark.parametrize("model_type", sorted(PACKED_FAMILIES))
def test_packed_rows_give_the_numbers_and_gradients_of_padded_ones(make_handle, model_type):
    """Position resets keep the sequences apart; with `sdpa` here, whose mask transformers makes."""
    # Some compute their softmax or router in float32.
    exact = {"llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "granite", "starcoder2"}
    dtype = "float64" if model_type in exact else "float32"
    tolerance = 1e-4 if dtype == "float32" else 1e-9
    handle = make_handle(model_type, dtype)
    handle.trunk.add_head("h").init_normal(torch.Generator().manual_seed(0))
    handle = handle.with_role("r", head="h")
    handle.trunk.requires_grad_(True)

    def run() -> list[torch.Tensor]:
        handle.trunk.zero_grad()
        out = handle(batch(), EVERYTHING)
        (out.logprobs.sum() + out.values.sum() + out.scores.sum()).backward()
        grads = [p.grad.flatten() for p in handle.trunk.parameters() if p.grad is not None]
        numbers = [out.logprobs, out.entropy, out.values, out.scores]
        return [*(x.detach() for x in numbers), torch.cat(grads)]

    padded = run()
    assert not handle.trunk.packs
    handle.trunk.joiner = PackedJoiner(handle.trunk.model)
    assert handle.trunk.packs
    seen = []
    handle.trunk.model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True
    )
    packed = run()
    assert seen[0] == (1, sum(batch().lengths))  # no padding
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_models_are_packed_where_their_attention_can_keep_sequences_apart(make_handle):
    model = make_handle().trunk.model
    assert isinstance(make_joiner(model), DecoderJoiner)
    for attention in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation_internal = attention
        assert isinstance(make_joiner(model), PackedJoiner)
    gpt2 = make_handle("gpt2").trunk.model
    gpt2.config._attn_implementation_internal = "flash_attention_2"
    assert isinstance(make_joiner(gpt2), DecoderJoiner)
