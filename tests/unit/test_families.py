"""Each family's log-probs against plain `transformers`: padded, packed, and as they were sampled.

The plain pass reads one row alone, without padding, mask or cache.
"""

from typing import Any

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.config import DataSection, ModelSection
from pipeline.generation import NativeEngine, Sampling
from pipeline.generation.local import serving
from pipeline.models.joiner import PACKED_FAMILIES, DecoderJoiner, PackedJoiner
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from tests.families import DECODERS, FAMILIES, plain_logprobs, plain_model, write_model

TOLERANCE = 1e-4  # in float32
TEMPERATURE = 0.7
RESPONSES = [[20, 21, 22], [30, 31, 32, 33, 34, 35, 36], [40]]
PACKED = [name for name, f in DECODERS.items() if f.model_type in PACKED_FAMILIES]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> tuple[Handle, Any]:
    """Our handle, and the same folder in plain transformers."""
    folder = write_model(request.param, tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        # On a processor attention is called once a sequence, in wide models.
        patch.setattr("pipeline.models.sequence_attention.WORTH_IT_FROM", 0)
        handle = ModelStore(ModelSection(path=str(folder)), DataSection()).pretrained()
    return handle, plain_model(folder)


def prompts(handle: Handle) -> list[list[int]]:
    """Longer than the windows; with the ids of pad and end in them, which mean nothing there."""
    pad, end = handle.codec.pad_id, handle.codec.end_id
    return [[5, 6, 7, pad, 8, 9, 10, end, 11, 12], [pad, 13, 14], [15]]


def assert_plain(handle: Handle, plain: Any, monkeypatch, joiner: Any = None) -> None:
    """The numbers of a batch, joined by `joiner` or as the trunk does, are each row's alone."""
    rows = prompts(handle)
    batch = TokenBatch.from_ragged(rows, RESPONSES, pad_id=handle.codec.pad_id)
    if joiner is not None:
        monkeypatch.setattr(handle.trunk, "joiner", joiner)
    with torch.no_grad():
        found = handle(batch, {"logprobs"}, TEMPERATURE).logprobs
    for row, (prompt, response) in enumerate(zip(rows, RESPONSES, strict=True)):
        wanted = plain_logprobs(plain, prompt, response, TEMPERATURE)
        assert found[row, : len(response)].tolist() == pytest.approx(wanted, abs=TOLERANCE)


def test_logits_are_far_from_uniform(family):
    """Otherwise what follows would show little."""
    handle, _ = family
    batch = TokenBatch.from_ragged(prompts(handle), RESPONSES, pad_id=0)
    with torch.no_grad():
        logprobs = handle(batch, {"logprobs"}).logprobs[batch.response_mask]
    assert logprobs.std() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS, indirect=True)
def test_padded(family, side, monkeypatch):
    handle, plain = family
    assert_plain(handle, plain, monkeypatch, DecoderJoiner(handle.trunk.model, side))


@pytest.mark.parametrize("family", PACKED, indirect=True)
def test_packed_by_positions(family, monkeypatch):
    """As kernels on GPUs are told; here transformers makes the mask from them."""
    handle, plain = family
    assert_plain(handle, plain, monkeypatch, PackedJoiner(handle.trunk.model))


# Gemma 2 is eager only: it caps the products.
@pytest.mark.parametrize("family", sorted(set(PACKED) - {"gemma2"}), indirect=True)
def test_packed_by_lengths(family, monkeypatch):
    handle, plain = family
    assert handle.trunk.packs and handle.trunk.joiner.tells_lengths
    assert_plain(handle, plain, monkeypatch)


def test_sampled(family):
    """The log-probs that the native engine returns with its tokens."""
    handle, plain = family
    sampling = Sampling(12, TEMPERATURE, seed=3)
    assert serving(handle, sampling) is NativeEngine
    rows = prompts(handle) * 2
    made = NativeEngine(max_rows=4).generate(handle, rows, range(len(rows)), sampling)
    assert sum(map(len, made.response_ids)) > 12
    for prompt, response, told in zip(rows, made.response_ids, made.logprobs, strict=True):
        wanted = plain_logprobs(plain, prompt, response, TEMPERATURE)
        assert told == pytest.approx(wanted, abs=TOLERANCE)
