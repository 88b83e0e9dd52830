"""Batches packed into one row without padding."""

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.models.joiner import (
    PACKED_FAMILIES,
    TELLING_FAMILIES,
    DecoderJoiner,
    PackedJoiner,
    make_joiner,
)
from pipeline.models.sequence_attention import Span, attend

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [27]]
EVERYTHING = {"logprobs", "entropy", "values", "scores"}


@pytest.fixture(autouse=True)
def _packs_narrow_models_too(monkeypatch):
    monkeypatch.setattr("pipeline.models.sequence_attention.WORTH_IT_FROM", 0)


def batch() -> TokenBatch:
    return TokenBatch.from_ragged(PROMPTS, RESPONSES, pad_id=0)


@pytest.mark.parametrize("model_type", sorted(PACKED_FAMILIES))
def test_packed_rows_give_the_numbers_and_gradients_of_padded_ones(make_handle, model_type):
    """Position resets keep the sequences apart, or their lengths do.

    The first stands for kernels that run on GPUs only: with `sdpa`, whose mask transformers makes.
    """
    # Some compute their softmax or router in float32.
    exact = {"llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "granite", "starcoder2"}
    dtype = "float64" if model_type in exact else "float32"
    tolerance = 1e-4 if dtype == "float32" else 1e-9
    handle = make_handle(model_type, dtype)
    handle.trunk.add_head("h").init_normal(torch.Generator().manual_seed(0))
    handle = handle.with_role("r", head="h")
    handle.trunk.requires_grad_(True)

    def run(shape: tuple[int, int]) -> list[torch.Tensor]:
        handle.trunk.zero_grad()
        seen.clear()
        out = handle(batch(), EVERYTHING)
        assert seen[0] == shape  # the output layer's pass calls the hook, too
        (out.logprobs.sum() + out.values.sum() + out.scores.sum()).backward()
        grads = [p.grad.flatten() for p in handle.trunk.parameters() if p.grad is not None]
        numbers = [out.logprobs, out.entropy, out.values, out.scores]
        return [*(x.detach() for x in numbers), torch.cat(grads)]

    seen = []
    packed = (1, sum(batch().lengths))  # no padding
    trunk = handle.trunk
    trunk.model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True
    )
    ways = {"by lengths": run(packed)} if trunk.packs else {}
    # Gemma 2 is eager only: it caps the products.
    assert bool(ways) == (model_type in TELLING_FAMILIES - {"gemma2"})
    if ways:
        trunk.model.set_attn_implementation("sdpa")
    trunk.joiner = PackedJoiner(trunk.model)
    assert trunk.packs
    ways["by positions"] = run(packed)
    trunk.joiner = DecoderJoiner(trunk.model)
    assert not trunk.packs
    padded = run((3, max(batch().lengths)))
    for found in ways.values():
        for one, other in zip(found, padded, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_by_sequence_is_attention_behind_a_mask(groups, window):
    """Queries are the last ones before the keys that nobody reads; neighbours may be equal."""
    spans = [Span(5, 5), Span(2, 4, 1), Span(2, 4, 1), Span(1, 6, 3), Span(3, 3, 2)]
    queries, keys = sum(s.queries for s in spans), sum(s.keys + s.skipped for s in spans)
    allowed = torch.zeros(queries, keys, dtype=torch.bool)
    first_query = first_key = 0
    for span in spans:
        for i in range(span.queries):
            last = span.keys - span.queries + i
            first = 0 if window is None else max(0, last - window + 1)
            allowed[first_query + i, first_key + first : first_key + last + 1] = True
        first_query, first_key = first_query + span.queries, first_key + span.keys + span.skipped
    draw = torch.Generator().manual_seed(0)
    heads, size = 4, 8

    def random(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, length, heads, size, generator=draw, dtype=torch.float64)

    given = [random(heads, queries), random(heads // groups, keys), random(heads // groups, keys)]
    pull = random(heads, queries)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True

    def run(mask: torch.Tensor | None, **sequences) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        heads_first = [x.transpose(1, 2) for x in leaves]
        out, _ = attend(module, *heads_first, mask, scaling=0.3, **sequences)
        (out * pull).sum().backward()
        return [out.detach(), *(x.grad for x in leaves)]

    expected = run(allowed[None, None])
    for one, other in zip(run(None, sequences=spans, sliding_window=window), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_models_are_packed_where_their_attention_can_keep_sequences_apart(make_handle):
    trunk = make_handle().trunk
    model = trunk.model
    assert isinstance(trunk.joiner, PackedJoiner) and trunk.joiner.tells_lengths  # on a processor
    trunk.place(torch.device("meta"))  # no processor
    assert isinstance(trunk.joiner, DecoderJoiner) and model.config._attn_implementation == "sdpa"
    for attention in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation_internal = attention
        joiner = make_joiner(model)
        assert isinstance(joiner, PackedJoiner) and not joiner.tells_lengths
    model.config._attn_implementation_internal = "eager"
    assert isinstance(make_joiner(model), DecoderJoiner)
    gpt2 = make_handle("gpt2").trunk.model
    gpt2.config._attn_implementation_internal = "flash_attention_2"
    assert isinstance(make_joiner(gpt2), DecoderJoiner)


def test_narrow_models_are_padded_on_a_processor(make_handle, monkeypatch):
    width = make_handle().trunk.hidden_size
    for least, joiner in ((width, PackedJoiner), (width + 1, DecoderJoiner)):
        monkeypatch.setattr("pipeline.models.sequence_attention.WORTH_IT_FROM", least)
        assert type(make_handle().trunk.joiner) is joiner
