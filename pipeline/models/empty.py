"""Models without memory: on torch's meta device, where shapes and types count and no number does.

`rlhf check` looks at what fits and what it will cost before anything is loaded.
"""

import math
from typing import Any

import torch
from torch import nn

from pipeline.config import ModelSection
from pipeline.models.loading import (
    auto_class,
    build_from_config,
    explain_load_errors,
    load_config,
    torch_dtype,
)

# bitsandbytes 0.50: NF4 with quantised scales, and LLM.int8().
_BLOCK, _SCALE_BLOCK = 64, 256  # weights a scale, scales a scale of scales
_CODES = 4 * 16 + 4 * 256 + 4  # bytes of the two tables and the offset that every layer keeps


class Vocabulary:
    """As much of a tokenizer as building a model from a config needs."""

    eos_token_id, pad_token_id = 1, 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def empty_model(section: ModelSection, path: str | None = None, revision: str | None = None) -> Any:
    """The model of `model:`, or the one that lies at `path` (a Hub id or a folder), quantised.

    With `model.init: config` it has `model.vocabulary_size` tokens; a tokenizer that finds fewer in
    the training text makes the real one a little smaller.

    Raises:
        ModelError: its config cannot be read.
        ConfigError: `model.architecture` cannot be built.
    """
    dtype = torch_dtype(section.dtype)
    path = path or section.path
    if path is None:
        vocabulary = Vocabulary(section.vocabulary_size)
        with torch.device("meta"):
            return build_from_config(section.architecture, vocabulary, dtype)
    if revision is None and path == section.path:
        revision = section.revision
    shape = load_config(section, path, revision)
    kind, arguments = auto_class(shape)
    with explain_load_errors(path, revision), torch.device("meta"):
        model = kind.from_config(
            shape, dtype=dtype, trust_remote_code=section.trust_remote_code, **arguments
        )
    if section.quantization != "none":
        quantise(model, section.quantization)
    return model


def quantise(model: Any, bits: str) -> None:
    """Give the linear layers of an empty model the storages that bitsandbytes would give them."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(model)  # the output layer, and what shares its weights
    for name, module in list(model.named_modules()):
        if any(name == other or name.endswith(f".{other}") for other in kept):
            continue
        if isinstance(module, Conv1D):  # GPT-2's transposed layer becomes a linear one
            width, out = module.weight.shape
            linear = nn.Linear(width, out, device="meta", dtype=module.bias.dtype)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
            module = linear
        if isinstance(module, nn.Linear):
            _quantise_layer(module, bits)


def _quantise_layer(layer: nn.Linear, bits: str) -> None:
    count = layer.weight.numel()
    if bits == "8bit":
        stored = torch.empty_like(layer.weight, dtype=torch.int8)
        beside = 4 * layer.out_features
    else:
        stored = torch.empty((math.ceil(count / 2), 1), dtype=torch.uint8, device="meta")
        scales = math.ceil(count / _BLOCK)
        beside = scales + 4 * math.ceil(scales / _SCALE_BLOCK) + _CODES
    layer.weight = nn.Parameter(stored, requires_grad=False)
    scale = torch.empty(beside, dtype=torch.uint8, device="meta")
    layer.register_buffer("quantisation_scales", scale, persistent=False)
