"""Decoding steps of fixed shape: the same text and numbers as steps that fit the rows."""

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.generation import NativeEngine, Sampling
from pipeline.inference import infer
from tests.unit.test_generation import PROMPTS, with_frequent_ends

EXTRA = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mistral": {"sliding_window": 4},
}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "mistral"])
@pytest.mark.parametrize("max_rows", [3, 64])
def test_fixed_shapes_change_nothing(make_handle, monkeypatch, model_type, max_rows):
    monkeypatch.setattr("pipeline.generation.graphs.COLUMNS", 8)  # several widths
    dtype = "float32" if model_type == "bloom" else "float64"
    tolerance = 1e-4 if dtype == "float32" else 1e-9
    handle = with_frequent_ends(make_handle(model_type, dtype, **EXTRA.get(model_type, {})))
    handle.trunk.add_head("h").init_normal(torch.Generator().manual_seed(0))
    handle = handle.with_role("r", head="h")
    sampling = Sampling(max_new_tokens=16, temperature=0.8, seed=7)
    plain = NativeEngine(max_rows).generate(handle, PROMPTS, range(15), sampling)
    assert len({len(response) for response in plain.response_ids}) > 3
    fixed = NativeEngine(max_rows, fixed_shapes=True).generate(handle, PROMPTS, range(15), sampling)
    assert fixed.response_ids == plain.response_ids
    assert fixed.ended == plain.ended
    for name in ("logprobs", "entropy", "values"):
        for one, other in zip(getattr(fixed, name), getattr(plain, name), strict=True):
            assert one == pytest.approx(other, abs=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_on_cuda_give_the_text_of_plain_steps(make_handle, dtype):
    handle = with_frequent_ends(make_handle("llama", dtype))
    handle.trunk.to("cuda")
    sampling = Sampling(max_new_tokens=16, temperature=0.8, seed=7)
    plain = NativeEngine(4, cuda_graphs=False).generate(handle, PROMPTS, range(15), sampling)
    graphs = NativeEngine(4).generate(handle, PROMPTS, range(15), sampling)
    if dtype == "float32":
        assert graphs.response_ids == plain.response_ids
    # What the graphs wrote is what a whole pass makes of it, but for half precision's rounding.
    batch = TokenBatch.from_ragged(PROMPTS, graphs.response_ids, pad_id=0)
    whole = infer(handle, batch, ["logprobs"], None, 0.8)["logprobs"].tolist()
    for found, wanted in zip(graphs.logprobs, whole, strict=True):
        assert found == pytest.approx(wanted[: len(found)], abs=1e-3 if graphs.exact else 0.3)
