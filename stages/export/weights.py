"""Weights of an export's own: adapters are merged into copies, in the type that was asked for."""

from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ModelError
from pipeline.generation.vllm_adapters import adapter_refusals
from pipeline.models import adapters
from pipeline.models.loading import is_quantised, torch_dtype, without_bars
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from pipeline.runfolder import writing
from pipeline.stage import Context


def plain(context: Context, artifact: Path) -> Handle:
    """The role of an artifact without adapter, in `export.dtype`; its own weights stay untouched.

    An adapter that was trained on a quantised base is merged into the base as it is on disk. Sums
    are made in the wider of the two types, so that weights are rounded once.
    """
    handle = context.store.open(artifact)
    adapter, model = handle.role.adapter, handle.trunk.model
    asked = context.config.export.dtype
    dtype = None if asked is None else torch_dtype(asked)
    if adapter is None and dtype in (None, model.dtype):
        return handle
    if is_quantised(model):
        section = context.config.model.model_copy(update={"quantization": "none"})
        handle = ModelStore(section, context.config.data).open(artifact)
        adapter = handle.role.adapter
    copied = context.store.fork(handle, "merged")
    model = copied.trunk.model
    if dtype is not None:
        model.to(torch.promote_types(dtype, model.dtype))
    if adapter is not None:
        adapters.bake(model, adapter)
    if dtype is not None:
        model.to(dtype)
    return copied.with_role(handle.role.name, adapter=None)


def write_merged(context: Context, folder: Path) -> None:
    """Write the policy as one plain transformers model."""
    merged = plain(context, context.parents["ppo"])
    with without_bars(), writing(folder):
        merged.trunk.model.save_pretrained(
            str(folder),
            state_dict=dict(merged.trunk.base_state()),
            max_shard_size=context.config.export.max_shard_size,
        )


def refuse_vllm(model: Any, adapter: str | None) -> None:
    """Raise ModelError, with the remedy, if vLLM would not load adapter `adapter` of the policy."""
    if adapter is None:
        raise ModelError(
            "the policy was tuned in full, so there is no adapter for vLLM (export.vllm), which "
            "serves `merged/`"
        )
    faults = adapter_refusals(model, adapter)
    if _adapts_embeddings(model):
        faults.append(
            "it takes adapters on input or output embeddings in few families: take them out of "
            "lora.target_modules"
        )
    if faults:
        raise ModelError(
            f"vLLM cannot load the policy's adapter: {'; '.join(faults)}, or set export.vllm to "
            "false and export.merged to true, which vLLM serves as it is"
        )


def _adapts_embeddings(model: Any) -> bool:
    """Whether the model's adapters reach its input or output embeddings."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tuned = {id(layer) for layer in adapters.tuner_layers(model)}
    return any(id(layer) in tuned for layer in ends)


def refuse_untying(model: Any) -> None:
    """Raise ModelError if merging an adapter would untie embeddings that the architecture ties."""
    if model.config.tie_word_embeddings and _adapts_embeddings(model):
        raise ModelError(
            "this policy cannot be merged: lora.target_modules has the input or output embeddings, "
            "which this architecture ties, and merging would make them differ. Set export.merged "
            "to false, unset export.gguf, and use the adapter."
        )
