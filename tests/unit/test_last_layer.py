"""The last layer at the positions that are read, against the whole pass."""

from collections.abc import Callable

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.models import trunk
from pipeline.models.joiner import TELLING_FAMILIES, DecoderJoiner, Joined
from pipeline.models.last_layer import FAMILIES, Places, Reads, choose_places, selective_layer
from pipeline.models.sequence_attention import Span
from pipeline.models.trunk import Handle

# Longer than the windows of 4 tokens that some families have (`conftest.FAMILY_EXTRA`).
PROMPTS = [[5, 6, 7, 8, 9, 10, 14], [11, 12, 15, 16, 17], [13]]
RESPONSES = [[20, 21], [22, 23, 24], [27]]
EVERYTHING = {"logprobs", "entropy", "values", "scores"}
# Some compute norms, a softmax or a router in float32 whatever the type of the weights.
EXACT = {"llama", "mistral", "phi", "phi3", "qwen2", "granite", "starcoder2", "gpt_neox", "opt"}


@pytest.fixture(autouse=True)
def _packs_narrow_models_too(monkeypatch):
    monkeypatch.setattr("pipeline.models.sequence_attention.WORTH_IT_FROM", 0)


def everywhere(reads, joined, hidden_size) -> None:
    return None


def padded(reads, joined, hidden_size) -> Places:
    rows = torch.arange(len(reads.columns)).unsqueeze(1).expand_as(reads.columns)
    return Places(rows, reads.columns, is_flat=False)


def flat(reads, joined, hidden_size) -> Places:
    rows, columns = reads.order // reads.columns.shape[1], reads.columns.flatten()[reads.order]
    return Places(rows.unsqueeze(0), columns.unsqueeze(0), is_flat=True)


def numbers_and_gradients(
    handle: Handle, choose: Callable[..., Places | None], monkeypatch, want=EVERYTHING
) -> list[torch.Tensor]:
    monkeypatch.setattr(trunk, "choose_places", choose)
    handle.trunk.requires_grad_(True)
    handle.trunk.zero_grad()
    out = handle(TokenBatch.from_ragged(PROMPTS, RESPONSES, pad_id=0), want)
    found = [getattr(out, name) for name in sorted(want)]
    # Each number pulls with a weight of its own, so that no two errors cancel.
    weights = torch.linspace(-1, 2, sum(x.numel() for x in found), dtype=found[0].dtype)
    (torch.cat([x.flatten() for x in found]) * weights).sum().backward()
    gradients = [p.grad.flatten() for p in handle.trunk.parameters() if p.grad is not None]
    return [*(x.detach() for x in found), torch.cat(gradients)]


def in_sequences(reads, joined, hidden_size) -> Places:
    assert joined.lengths is not None  # the batch is packed
    chosen = choose_places(reads, joined, hidden_size=0)  # the layer's weights cost nothing
    assert chosen is not None and chosen.sequences is not None
    return chosen


def with_head(handle: Handle, attention: str | None = "sdpa") -> Handle:
    """With rows padded, unless None leaves attention as it is."""
    handle.trunk.add_head("h").init_normal(torch.Generator().manual_seed(0))
    if attention is not None:
        handle.trunk.model.set_attn_implementation(attention)
        handle.trunk.joiner = DecoderJoiner(handle.trunk.model)
    return handle.with_role("r", head="h")


@pytest.mark.parametrize(
    ("model_type", "attention"),
    # Gemma 2 is eager only: it caps the products.
    [(m, a) for m in sorted(FAMILIES) for a in ("sdpa", "eager") if (m, a) != ("gemma2", "sdpa")],
)
def test_numbers_and_gradients_are_those_of_the_whole_pass(
    make_handle, model_type, attention, monkeypatch
):
    dtype = "float64" if model_type in EXACT else "float32"
    handle = with_head(make_handle(model_type, dtype), attention)
    assert selective_layer(handle.trunk.model) is handle.trunk.model.get_decoder().layers[-1]
    whole = numbers_and_gradients(handle, everywhere, monkeypatch)
    # Gemma 3 scales rotary frequencies in float32; eager attention takes a softmax in float32.
    tolerance = 1e-9 if dtype == "float64" and attention == "sdpa" else 2e-4
    for choose in (padded, flat):
        seen = watch_last_layer(handle)
        chosen = numbers_and_gradients(handle, choose, monkeypatch)
        places = 3 * 4 if choose is padded else 6 + 3  # (2, 3, 1) responses, and three ends
        assert seen() == places
        for one, other in zip(chosen, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def watch_last_layer(handle: Handle) -> Callable[[], int]:
    """How many positions went through the last layer's feed-forward part; call it to end."""
    layer = handle.trunk.model.get_decoder().layers[-1]
    name = next(n for n in ("mlp", "fc1", "block_sparse_moe") if hasattr(layer, n))
    counts: list[int] = []
    hook = getattr(layer, name).register_forward_hook(
        lambda _module, args, _out: counts.append(args[0][..., 0].numel())
    )

    def end() -> int:
        hook.remove()
        (count,) = counts
        return count

    return end


@pytest.mark.parametrize(("want", "places"), [({"scores"}, 3), ({"values", "logprobs"}, 6)])
@pytest.mark.parametrize("model_type", sorted(TELLING_FAMILIES - {"gemma2"}))
def test_packed_rows(make_handle, model_type, want, places, monkeypatch):
    dtype = "float64" if model_type in EXACT else "float32"
    handle = with_head(make_handle(model_type, dtype), None)
    whole = numbers_and_gradients(handle, everywhere, monkeypatch, want)
    seen = watch_last_layer(handle)
    chosen = numbers_and_gradients(handle, in_sequences, monkeypatch, want)
    assert seen() == places
    tolerance = 1e-9 if dtype == "float64" else 2e-4
    for one, other in zip(chosen, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_packed_rows_of_tokens_and_ends_go_through_the_whole_layer(make_handle, monkeypatch):
    """A sequence's queries do not lie together then."""
    found = []

    def choose(reads, joined, hidden_size) -> None:
        found.append(choose_places(reads, joined, hidden_size))

    numbers_and_gradients(with_head(make_handle(), None), choose, monkeypatch)
    assert found == [None]


@pytest.mark.parametrize("want", [{"scores"}, {"values"}, {"logprobs"}])
@pytest.mark.parametrize("choose", [padded, flat])
def test_each_number_alone(make_handle, want, choose, monkeypatch):
    handle = with_head(make_handle())
    whole = numbers_and_gradients(handle, everywhere, monkeypatch, want)
    chosen = numbers_and_gradients(handle, choose, monkeypatch, want)
    for one, other in zip(chosen, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("choose", [padded, flat])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "opt"])
def test_left_padding_and_its_mask(make_handle, model_type, choose, monkeypatch):
    handle = with_head(make_handle(model_type))
    handle.trunk.joiner = DecoderJoiner(handle.trunk.model, "left")
    whole = numbers_and_gradients(handle, everywhere, monkeypatch)
    chosen = numbers_and_gradients(handle, choose, monkeypatch)
    for one, other in zip(chosen, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("choose", [padded, flat, in_sequences])
@pytest.mark.parametrize("training", [False, True])
def test_recomputation_changes_nothing(make_handle, choose, training, monkeypatch):
    handle = with_head(make_handle(), None if choose is in_sequences else "sdpa")
    want = {"logprobs", "values"}
    handle.trunk.train(training)
    kept = numbers_and_gradients(handle, choose, monkeypatch, want)
    handle.trunk.recompute = True
    calls = []
    for layer in handle.trunk.model.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda *_args: calls.append(1))
    again = numbers_and_gradients(handle, choose, monkeypatch, want)
    assert len(calls) == 2 * len(handle.trunk.model.get_decoder().layers)
    for one, other in zip(again, kept, strict=True):
        assert torch.equal(one, other)
    assert "forward" not in vars(handle.trunk.model.get_decoder().layers[-1])


def test_others_go_through_all_positions(make_handle):
    assert selective_layer(make_handle("gpt2").trunk.model) is None  # reshapes to its input
    assert selective_layer(make_handle("bloom").trunk.model) is None  # ALiBi
    llama = make_handle().trunk.model
    assert selective_layer(llama) is not None
    llama.config._attn_implementation_internal = "flash_attention_2"
    assert selective_layer(llama) is None


def test_the_cheapest_way_is_chosen():
    """Products a query: 6 x hidden size, and one a key; here 60, and 10 columns a row."""

    def choose(lengths: list[int], width: int = 10, hidden_size: int = 10) -> Places | None:
        columns = torch.arange(max(lengths)).expand(len(lengths), -1)
        mask = columns < torch.tensor(lengths).unsqueeze(1)
        order = mask.flatten().nonzero().squeeze(-1)
        none = torch.empty(0)
        joined = Joined({"input_ids": torch.empty(len(lengths), width)}, none, none, none)
        return choose_places(Reads(columns, order), joined, hidden_size)

    # Even rows: 2 x 5 x (60 + 10) = 700 padded, 10 x (60 + 20) = 800 flat, 1,400 in all.
    even = choose([5, 5])
    assert even is not None and not even.is_flat and even.columns.shape == (2, 5)
    # Ragged: 2 x 6 x 70 = 840 padded, 7 x 80 = 560 flat.
    ragged = choose([6, 1])
    assert ragged is not None and ragged.is_flat
    assert ragged.rows.tolist() == [[0] * 6 + [1]]
    assert ragged.columns.tolist() == [[0, 1, 2, 3, 4, 5, 0]]
    # Nearly all: 2 x 8 x 70 = 1,120 is more than three quarters of 1,400.
    assert choose([8, 8]) is None
    # A wide model: 14 x 6,010 = 84,140 padded, 8 x 6,020 = 48,160 flat, 120,200 in all.
    wide = choose([7, 1], hidden_size=1000)
    assert wide is not None and wide.is_flat


def test_what_a_packed_row_costs_is_counted():
    """Sequences of 10 and 4 tokens, of which 2 and 3 are read, up to the last but one."""
    columns = torch.tensor([[7, 8, 9], [10, 11, 12]])
    reads = Reads(columns, torch.tensor([0, 1, 3, 4, 5]))
    none = torch.empty(0)
    joined = Joined({"input_ids": torch.empty(1, 14)}, none, none, none, lengths=[10, 4])
    # 2 x (60 + 9) + 3 x (60 + 3) = 327 of 10 x (60 + 10) + 4 x (60 + 4) = 956 products.
    chosen = choose_places(reads, joined, hidden_size=10)
    assert chosen is not None and chosen.is_flat
    assert chosen.sequences == (Span(2, 9, 1), Span(3, 3, 1))
    assert chosen.columns.tolist() == [[7, 8, 10, 11, 12]]
    # 9 + 3 of 14 tokens, with 9 x 69 + 3 x 63 = 810 products, are more than three quarters.
    many = Reads(torch.tensor([[*range(9), 10, 11, 12]]), torch.arange(12))
    assert choose_places(many, joined, hidden_size=10) is None
