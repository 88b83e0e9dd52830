"""Which models the native engine's cache of slots can hold, and which need static batches.

The native engine keeps keys and values by row and lets rows come and go. That asks of every layer
that its state is one key and one value a token (or a window of them). Recurrent states, cached
convolutions, indexers and layers that read the keys of another layer are transformers' own business
and pass through `StaticEngine`, which leaves the cache to `model.generate`.
"""

from inspect import signature
from typing import Any

_NATIVE_LAYERS = {"full_attention", "sliding_attention"}

# Families with unusual caches that read the attention mask of left-padded prompts. RWKV and
# RecurrentGemma run their recurrence through the padding; a family is listed once tests hold it to
# the text of a batch of one.
PADDED_FAMILIES = frozenset(
    {
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "lfm2",
        "llama4_text",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5_text",
        "qwen3_next",
        "zamba2",
    }
)


def needs_static_batches(config: Any) -> str | None:
    """Why a model with this transformers config needs static batches; None if it does not.

    It asks what `DynamicCache` would build for the config, and the model class, where transformers
    has one, whether it carries state of its own: RWKV and xLSTM, for instance, name no layer types.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    name = config.model_type
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder: its decoder attends to the encoder's states, too"
    try:
        layers = set(get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0])
    except (AttributeError, ValueError) as error:
        return f"{name} does not describe its cache ({error})"
    unusual = sorted(layers - _NATIVE_LAYERS)
    if unusual:
        return f"{name} has layers with a cache of their own kind: {', '.join(unusual)}"
    model_class = _model_class(config)
    if model_class is not None and model_class._is_stateful:
        return f"{name} is recurrent: its state is not keys and values by token"
    if model_class is not None and not model_class._supports_default_dynamic_cache():
        return f"{name} keeps a cache of its own, not transformers' DynamicCache"
    if (
        model_class is not None
        and "past_key_values" not in signature(model_class.forward).parameters
    ):
        return f"{name} keeps no cache"
    return None


def takes_padding(config: Any) -> bool:
    """Whether prompts of different lengths can share a padded batch."""
    if config.is_encoder_decoder:  # encoders take a mask
        return True
    family = config.get_text_config(decoder=True).model_type
    return family in PADDED_FAMILIES or needs_static_batches(config) is None


def _model_class(config: Any) -> Any:
    """The causal language model of a config; None for code from outside transformers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
