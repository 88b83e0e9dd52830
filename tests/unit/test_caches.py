"""Which engine serves which architecture, and static batches of models with unusual caches."""

import pytest
import torch

from pipeline.generation import (
    NativeEngine,
    Sampling,
    StaticEngine,
    needs_static_batches,
    serving,
)
from pipeline.generation.caches import PADDED_FAMILIES, takes_padding

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13], [14, 15, 16, 17], [18, 19, 20]]
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}

NATIVE = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_heads": 2},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "deepseek_v3": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 12, "first_k_dense_replace": 2,
    },
}  # fmt: skip
STATIC = {
    "bamba": {**MAMBA_2, "attn_layer_indices": [1]},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8,
        "mamba_chunk_size": 4,
    },
    "falcon_mamba": {"state_size": 4},
    "granitemoehybrid": {
        **MAMBA_2, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
        "shared_intermediate_size": 32,
    },
    "jamba": {
        "mamba_d_state": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "llama4_text": {"attention_chunk_size": 4},
    "mamba": {"state_size": 4, "expand": 2},
    "mamba2": {
        "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4,
    },
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2,
        "num_experts_per_tok": 1, "block_size": 4,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4,
    },
    "olmo_hybrid": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": {
        **LINEAR, **EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "recurrent_gemma": {
        "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "zamba2": {
        "num_hidden_layers": 3, "hybrid_layer_ids": [1], "mamba_d_state": 8, "n_mamba_heads": 2,
        "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_ngroups": 1, "chunk_size": 4,
        "num_mem_blocks": 1, "adapter_rank": 4, "use_mem_rope": True,
    },
}  # fmt: skip


# --- which engine ---


@pytest.mark.parametrize("model_type", NATIVE)
def test_layers_of_plain_attention_are_the_native_engines(make_store, model_type):
    model = make_store(model_type, "float32", **NATIVE[model_type]).build(["a"]).trunk.model
    assert needs_static_batches(model.config) is None
    assert takes_padding(model.config)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "linear_attention"),
        ("jamba", "linear_attention"),
        ("qwen3_next", "linear_attention"),
        ("lfm2", "conv"),
        ("falcon_h1", "hybrid"),
        ("llama4_text", "chunked_attention"),
        ("rwkv", "recurrent"),
        ("minimax", "linear_attention"),
    ],
)
def test_other_layers_need_static_batches_and_the_reason_is_told(make_store, model_type, reason):
    model = make_store(model_type, "float32", **STATIC[model_type]).build(["a"]).trunk.model
    found = needs_static_batches(model.config)
    assert found is not None and reason in found and model_type in found


def test_layers_that_read_anothers_keys_need_static_batches():
    from transformers import Gemma3nTextConfig

    found = needs_static_batches(Gemma3nTextConfig())
    assert found is not None and "dummy" in found


def test_the_choice_is_by_cache_and_by_kind_of_decoding(make_handle):
    llama, lfm2 = make_handle(), make_handle("lfm2", "float32", **STATIC["lfm2"])
    assert serving(llama, Sampling(4)) is NativeEngine
    assert serving(llama, Sampling(4, temperature=0)) is NativeEngine
    for sampling in (Sampling(4, top_k=3), Sampling(4, top_p=0.9), Sampling(4, num_beams=2)):
        assert serving(llama, sampling) is StaticEngine
    assert serving(lfm2, Sampling(4)) is StaticEngine


# --- static batches of unusual caches ---


def plain(handle, tokens):
    """Greedy text of plain `generate`, one prompt at a time."""
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    texts = [handle.trunk.model.generate(torch.tensor([ids]), **options)[0] for ids in PROMPTS]
    return [text[len(ids) :].tolist() for ids, text in zip(PROMPTS, texts, strict=True)]


def test_padded_batches_are_for_the_families_tested_here():
    assert set(STATIC) - PADDED_FAMILIES == {"recurrent_gemma", "rwkv"}
    assert set(STATIC) > PADDED_FAMILIES


@pytest.mark.parametrize("model_type", STATIC)
def test_greedy_text_in_static_batches_equals_generate(make_handle, model_type):
    handle = make_handle(model_type, "float32", **STATIC[model_type])
    engine, sampling = StaticEngine(max_rows=5), Sampling(6, temperature=0)
    assert engine.generate(handle, PROMPTS, range(5), sampling).response_ids == plain(handle, 6)


@pytest.mark.parametrize("model_type", NATIVE)
def test_greedy_text_in_slots_equals_generate(make_handle, model_type):
    handle = make_handle(model_type, "float32", **NATIVE[model_type])
    engine, sampling = NativeEngine(max_rows=2), Sampling(9, temperature=0)
    assert engine.generate(handle, PROMPTS, range(5), sampling).response_ids == plain(handle, 9)
