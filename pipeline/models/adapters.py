"""Named LoRA adapters on one frozen base.

peft layers are injected into the model in place, without peft's wrapper: parameter names stay those
of the model, and a role is switched by naming it in the layers. peft's own `set_adapter` also
flips `requires_grad`, which after a DDP wrap leaves gradients unsynchronised without a word, so it
is never called here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.config import LoraSection
from pipeline.distributed.sharding import local, rows_like, shape, whole
from pipeline.errors import ModelError
from pipeline.models.lora_targets import known_layers, resolve_targets
from pipeline.runfolder import writing

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LAYERS = "_rlhf_tuner_layers"  # where a model remembers its peft layers
_SAVED_PREFIX = "base_model.model."  # the prefix that PeftModel.from_pretrained expects


def lora_config(lora: LoraSection) -> "LoraConfig":
    """peft's configuration of one adapter."""
    from peft import LoraConfig

    modules, parameters = lora.target_modules, lora.target_parameters
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft computes with floats as well
        lora_dropout=lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        target_parameters=None if isinstance(parameters, str) else list(parameters),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
    )


def add_adapter(model: Any, name: str, config: "LoraConfig") -> None:
    """Inject adapter `name`; B starts at zero, so the model's outputs do not change.

    All adapters of a model take the targets of the first one: `all-linear` resolved again on a
    model that has adapters would find their own matrices.

    Raises:
        ModelError: the targets do not fit the model.
    """
    from peft import inject_adapter_in_model

    from pipeline.models.lean_lora import slim

    existing: dict[str, LoraConfig] = dict(getattr(model, "peft_config", {}))
    assert name not in existing, f"adapter {name} exists already"
    if existing:
        first = next(iter(existing.values()))
        config.target_modules = first.target_modules
        config.target_parameters = first.target_parameters
        del model.peft_config  # peft warns of several adapters, which are what we want
    try:
        if not existing:
            unwrap(model)  # of adapters that were removed, empty layers are left
            resolve_targets(config, model)
        inject_adapter_in_model(config, model, adapter_name=name)
    except ValueError as error:
        raise ModelError(
            f"lora.target_modules do not fit {type(model).__name__}: {error}. Its linear layers "
            f"are: {known_layers(model)}"
        ) from error
    config.task_type = _task_type(model)
    model.peft_config = {**existing, name: config}
    slim(model)
    model.__dict__.pop(_LAYERS, None)
    for key, parameter in model.named_parameters():
        if is_of(key, name):
            # A frozen bf16 base keeps fp32 adapters: Adam's small steps vanish in bf16.
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(False)
    activate(model, None)


def _task_type(model: Any) -> str:
    """What class plain PEFT loads an adapter of this model into."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    is_encoder = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is None
    return "FEATURE_EXTRACTION" if is_encoder else "CAUSAL_LM"


def copy_adapter(model: Any, source: str, target: str) -> None:
    """Add adapter `target` as an exact copy of `source`."""
    import copy

    add_adapter(model, target, copy.deepcopy(model.peft_config[source]))
    load_adapter_state(model, target, adapter_state(model, source))


def remove_adapter(model: Any, name: str) -> None:
    """Delete adapter `name` from every layer."""
    activate(model, None)
    for layer in tuner_layers(model):
        layer._active_adapter = [other for other in adapter_names(model) if other != name][:1]
        layer.delete_adapter(name)
    del model.peft_config[name]
    activate(model, None)


def bake(model: Any, name: str) -> None:
    """Write adapter `name` into the model's own weights and take every adapter off.

    For copies that get weights of their own: merging rounds, so a shared base is never baked.
    """
    for layer in tuner_layers(model):
        layer.merge(adapter_names=[name])
    unwrap(model)


def unwrap(model: Any) -> None:
    """Take peft's layers off, so that the model is one without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in list(model.named_modules()):
        # Of layers within one another (an expert's parameters) the outermost has the place.
        if isinstance(layer, BaseTunerLayer) and not path.endswith(".base_layer"):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.__dict__.pop("peft_config", None)
    model.__dict__.pop(_LAYERS, None)


def adapter_names(model: Any) -> set[str]:
    """Names of the model's adapters."""
    return set(getattr(model, "peft_config", {}))


def tuner_layers(model: Any) -> list[Any]:
    """The model's peft layers, found once: every decoding step asks for them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if _LAYERS not in model.__dict__:
        found = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        model.__dict__[_LAYERS] = found  # not a submodule a second time
    layers: list[Any] = model.__dict__[_LAYERS]
    return layers


def activate(model: Any, name: str | None) -> None:
    """Make the next forward use adapter `name`, or the bare base; `requires_grad` stays.

    Writes two private fields of peft 0.21 layers, the only way that leaves `requires_grad` alone;
    a test holds peft to it.
    """
    is_off = name is None
    for layer in tuner_layers(model):
        if layer._disable_adapters != is_off:
            layer._disable_adapters = is_off
        if name is not None and layer._active_adapter != [name]:
            layer._active_adapter = [name]


def adapter_parameters(model: Any, name: str) -> list[nn.Parameter]:
    """The weights of adapter `name`."""
    return [parameter for key, parameter in model.named_parameters() if is_of(key, name)]


def is_of(key: str, name: str) -> bool:
    """Whether a state's key is of adapter `name`, not of a base's module of that name (`value`)."""
    return re.search(rf"\.lora_\w+\.{re.escape(name)}(\.|$)", key) is not None


def base_name(key: str) -> str:
    """A state's key as a model without adapters has it."""
    return re.sub(r"\.base_layer(?=\.)", "", key)


def adapter_state(model: Any, name: str) -> dict[str, torch.Tensor]:
    """State of adapter `name` under peft's published keys; of a sharded one all ask together."""
    found = _adapter_weights(model, name).items()
    return {key: whole(value).detach().clone().contiguous() for key, value in found}


def _adapter_weights(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The weights of adapter `name` themselves, under peft's published keys."""
    from peft import get_peft_model_state_dict

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model,
        state_dict=model.state_dict(keep_vars=True),  # detached, ZeRO-3's would not be known
        adapter_name=name,
        save_embedding_layers=False,
    )
    return found


@torch.no_grad()
def load_adapter_state(model: Any, name: str, state: dict[str, torch.Tensor]) -> None:
    """Set adapter `name` from a state of `adapter_state`.

    Raises:
        ModelError: the state has other keys or shapes than the adapter.
    """
    own = _adapter_weights(model, name)
    wrong = sorted(
        key
        for key in own.keys() | state.keys()
        if key not in own or key not in state or shape(own[key]) != state[key].shape
    )
    if wrong:
        raise ModelError(
            f"adapter {name!r} does not fit the base: {len(wrong)} of its weights differ in name "
            f"or shape, the first is {wrong[0]}. Was it trained on another base, or with another "
            "lora.rank or lora.target_modules?"
        )
    for key, weight in own.items():
        local(weight).copy_(rows_like(state[key], weight))


def save_adapter(
    model: Any,
    name: str,
    folder: Path,
    base_name: str,
    revision: str | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter `name` as a plain PEFT folder (`adapter_config.json`, safetensors).

    `state` is its `adapter_state`, where other processes had to be asked for it.
    """
    import copy

    from safetensors.torch import save_file

    state = adapter_state(model, name) if state is None else state
    state = {_SAVED_PREFIX + key: value.cpu() for key, value in state.items()}
    config = copy.deepcopy(model.peft_config[name])
    config.base_model_name_or_path = base_name
    config.revision = revision
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set's order is not repeatable
    if config.target_parameters is not None:
        config.target_parameters = sorted(config.target_parameters)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))


def load_adapter(model: Any, name: str, folder: Path) -> None:
    """Add adapter `name` from a plain PEFT folder."""
    from peft import LoraConfig

    if not (folder / ADAPTER_WEIGHTS).exists():
        raise ModelError(f"{folder} holds no {ADAPTER_WEIGHTS}: not a PEFT adapter in safetensors")
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    add_adapter(model, name, config)
    load_adapter_state(model, name, read_adapter(folder))


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a plain PEFT folder, as `adapter_state` has them."""
    from safetensors.torch import load_file

    state = load_file(folder / ADAPTER_WEIGHTS)
    return {key.removeprefix(_SAVED_PREFIX): value for key, value in state.items()}
