"""Which of a model's layers and parameters its first adapter goes to; others take the same.

`all-linear` is every linear layer but the output layer. The experts of a mixture are no layers in
transformers 5 but parameters (experts, out, in): peft adapts those by name (`target_parameters`).
"""

import copy
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.config import ALL_LINEAR
from pipeline.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig

# Their fused kernels take the weight of `out_proj` past the layer; peft refuses to adapt it.
_FUSED_FAMILIES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
# Subclasses of `nn.Linear` that return something else than a product.
_OTHERS = re.compile("Router|Grouped")
# Where a config of transformers says how many experts a layer has.
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def resolve_targets(config: "LoraConfig", model: nn.Module) -> None:
    """Write out what `config` leaves open: the names of `all-linear`, and with it, where
    `target_parameters` is None, those of all experts.

    Raises:
        ModelError: a name fits nothing in the model, or experts are to be adapted with DoRA or
            dropout, which peft has for layers only.
    """
    if config.target_modules == ALL_LINEAR:
        if config.target_parameters is None:
            config.target_parameters = expert_parameters(model) or None
        config.target_modules = linear_layers(model)
        config.target_modules = _without_old_experts(config, model)
    if config.target_parameters:
        config.target_parameters = sorted(config.target_parameters)
        _refuse_unusual(config, model)
    _refuse_strangers(config, model)


def expert_parameters(model: Any) -> list[str]:
    """The ends of the names of experts' parameters, long enough to be theirs alone."""
    shape = model.config.get_text_config() if hasattr(model, "config") else None
    counts = {getattr(shape, name, None) for name in _COUNTS} - {None, 1}
    named = dict(model.named_parameters())
    found = [name for name, p in named.items() if p.dim() == 3 and p.shape[0] in counts]
    others = named.keys() - set(found)
    return sorted({_own_end(name, others) for name in found})


def linear_layers(model: Any) -> list[str]:
    """Names of all linear layers but the output layer, of a model without adapters.

    Left out is what an adapter cannot stand on: routers, and what fused kernels pass by.
    """
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    family = getattr(getattr(model, "config", None), "model_type", None)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not output
        and not _OTHERS.search(type(module).__name__)
        and not (family in _FUSED_FAMILIES and _ends(name, "out_proj"))
        and not _ends(name, "dt_proj")  # Mamba's too is read past its layer: merging would count it
    ]


def known_layers(model: nn.Module) -> str:
    """The linear layers by their last names, for error messages."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear_layers(model)}))


def _own_end(name: str, others: Iterable[str]) -> str:
    """The shortest end of a dotted name, of two parts at least, that no other name has."""
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(2, len(parts)))
    return next((end for end in ends if not any(_ends(other, end) for other in others)), name)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _without_old_experts(config: "LoraConfig", model: nn.Module) -> list[str]:
    """The named modules, without those that peft takes for experts of a mixture's old checkpoints.

    Where it meets their names (`w1`, `gate_proj`), it adapts fused experts, with a rank and a
    router of its own choice, and passes over linear layers of these names (shared experts, dense
    layers). Whoever loads the adapter in plain PEFT would have that, too.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    probe = copy.deepcopy(config)
    convert_peft_config_for_transformers(probe, model, None)
    assert probe.target_modules is not None
    return sorted(probe.target_modules)


def _refuse_unusual(config: "LoraConfig", model: nn.Module) -> None:
    names = ", ".join(config.target_parameters or ())
    found = {"dropout": config.lora_dropout, "use_dora": config.use_dora}
    for setting, value in found.items():
        if value:
            raise ModelError(
                f"lora.{setting} is {str(value).lower()}, but {names} of {type(model).__name__} "
                "get adapters as parameters, for which PEFT has no such thing: set "
                f"lora.{setting} to {str(type(value)()).lower()}, or lora.target_parameters to [] "
                "to leave them without"
            )


def _refuse_strangers(config: "LoraConfig", model: nn.Module) -> None:
    """peft adapts what it finds, and is silent about names that fit nothing."""
    parameters = [name for name, _ in model.named_parameters()]
    for end in config.target_parameters or ():
        if not any(_ends(name, end) for name in parameters):
            known = ", ".join(expert_parameters(model)) or "it is no mixture of experts"
            raise ModelError(
                f"lora.target_parameters has {end!r}, but {type(model).__name__} has no such "
                f"parameter (experts: {known})"
            )
    if config.target_modules is None or isinstance(config.target_modules, str):
        return  # a pattern that fits nothing is refused by peft
    layers = [name for name, m in model.named_modules() if _has_matrix(m)]
    for end in _without_old_experts(config, model):
        if not any(_ends(name, end) for name in layers):
            near = get_close_matches(end, {name.rpartition(".")[2] for name in layers}, 1)
            raise ModelError(
                f"lora.target_modules has {end!r}, but {type(model).__name__} has no such layer"
                f"{f' (did you mean {near[0]!r}?)' if near else ''}. Its linear layers are: "
                f"{known_layers(model)}"
            )


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1
