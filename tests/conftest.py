"""Small models that every room's tests share: random weights, real architectures, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the Hub must fail at once

import pytest
import torch
from transformers.utils import logging as transformers_logging

from pipeline.config import ArchitectureSection, DataSection, ModelSection
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle

transformers_logging.disable_progress_bar()

TEXTS = ["the cat sat on the mat and ran away", "안녕하세요 고양이", "0123456789 .,!?"] * 4


def tiny_section(
    model_type: str = "llama", dtype: str = "float64", **extra: object
) -> ModelSection:
    """A two-layer model of width 32."""
    return ModelSection(
        init="config",
        dtype=dtype,
        vocabulary_size=300,
        architecture=ArchitectureSection(
            model_type=model_type,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            extra=extra,
        ),
    )


@pytest.fixture
def make_store():
    """Stores of tiny models; float64 unless told."""

    def make(model_type: str = "llama", dtype: str = "float64", **extra: object) -> ModelStore:
        return ModelStore(tiny_section(model_type, dtype, **extra), DataSection())

    return make


# What makes a small model of a family its own: windows, soft-capping, experts.
FAMILY_EXTRA: dict[str, dict[str, object]] = {
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 16},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.fixture
def make_handle(make_store):
    """A bare model whose logits are far from uniform, as a trained model's are."""

    def make(model_type: str = "llama", dtype: str = "float64", seed: int = 0, **extra) -> Handle:
        torch.manual_seed(seed)
        extra = FAMILY_EXTRA.get(model_type, {}) | extra
        handle = make_store(model_type, dtype, **extra).build(TEXTS)
        with torch.no_grad():
            for parameter in handle.trunk.model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        return handle

    return make
