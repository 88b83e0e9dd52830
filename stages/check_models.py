"""What `rlhf check` says of the models, functions and addresses that a config names.

They are looked at on torch's meta device, by their configs and tokenizers; no weight is loaded.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.codec import Codec
from pipeline.config import Tuning, function_reference
from pipeline.errors import ModelError, PipelineError
from pipeline.generation.vllm_adapters import adapter_refusals
from pipeline.models.adapters import adapter_parameters, add_adapter, lora_config
from pipeline.models.empty import empty_model
from pipeline.models.encoders import READINGS, default_pooling, positions
from pipeline.models.loading import (
    explain_load_errors,
    is_encoder,
    load_config,
    quantised_loading,
    refuse_encoder,
)
from pipeline.models.store import find_artifact
from pipeline.pair_codec import pair_template
from pipeline.reward_config import OWN, FunctionEntry, HttpEntry, ModelEntry, RougeEntry
from pipeline.reward_list import single_entries
from pipeline.rewards.function import load_function
from pipeline.rewards.http import auth_secret
from pipeline.rouge import require_rouge
from pipeline.runfolder import RunFolder, verify
from stages.config import RunConfig
from stages.export.classifier import pad_id, refuse_family
from stages.export.gguf import check_converter
from stages.export.weights import refuse_vllm

OFFLINE = "not checked (offline)"
_ADAPTER = "check"


@dataclass(frozen=True)
class Finding:
    """What was found out about one model, function or run that the config names."""

    setting: str
    resource: str
    facts: str
    fault: str = ""


def check_models(config: RunConfig, stages: Sequence[str], offline: bool) -> Iterator[Finding]:
    reward = config.reward
    uses_base = "sft" in stages or ("reward" in stages and reward.start == "base")
    if uses_base and config.model.init == "config":
        yield _examine("model.architecture", config.model.architecture.model_type, config, offline)
    elif uses_base and config.model.path is not None:
        yield _examine("model.path", config.model.path, config, offline)
    if "reward" in stages and reward.base is not None:
        yield _examine("reward.base", reward.base, config, offline)
    if "ppo" in stages and config.ppo.policy is not None:
        yield _examine("ppo.policy", config.ppo.policy, config, offline, stage="sft")
    if "ppo" in stages:
        yield from check_rewards(config, offline)
        if config.ppo.rollout.engine == "vllm":
            yield from _check_served("ppo.rollout.engine", config, offline)
    if "evaluation" in stages and config.evaluation.gold is not None:
        yield _examine("evaluation.gold", config.evaluation.gold, config, offline)
    if "export" in stages:
        yield from _check_exports(config, offline)


def check_rewards(config: RunConfig, offline: bool) -> Iterator[Finding]:
    """What is known of each source of `ppo.rewards`; a scorer behind an address is not asked."""
    for place, entry in single_entries(config.ppo.rewards).items():
        setting = f"ppo.rewards{place}"
        if isinstance(entry, ModelEntry) and entry.model != OWN:
            yield _examine(setting, entry.model, config, offline, stage="reward")
        elif isinstance(entry, FunctionEntry):
            yield _examine(setting, entry.function, config, offline)
        elif isinstance(entry, HttpEntry):
            try:
                auth_secret(entry)
                yield Finding(setting, entry.http, "an address; it is not asked here")
            except PipelineError as error:
                yield Finding(setting, entry.http, "", str(error))
        elif isinstance(entry, RougeEntry):
            try:
                require_rouge("ppo.rewards")
            except PipelineError as error:
                yield Finding(setting, entry.builtin, "", str(error))


def _examine(
    setting: str, resource: str, config: RunConfig, offline: bool, stage: str = "sft"
) -> Finding:
    try:
        if setting == "model.architecture":
            return Finding(setting, resource, _built(config))
        if resource.endswith(".py"):
            raise ModelError(f"{resource} names no function: write {resource}:NAME")
        if (reference := function_reference(resource)) is not None:
            return Finding(setting, resource, _function(*reference))
        folder = Path(resource)
        if not folder.exists() and offline:
            return Finding(setting, resource, OFFLINE)
        if find_artifact(resource, stage) or (folder / "config.yaml").exists():
            return Finding(setting, resource, _artifact(folder, stage))
        if (folder / "adapter_config.json").exists():
            return Finding(setting, resource, "a PEFT adapter; its base is opened when it is used")
        if stage == "reward":
            return Finding(setting, resource, _classifier(resource, config))
        if setting == "reward.base":
            return Finding(setting, resource, _reward_base(resource, config))
        return Finding(setting, resource, _decoder(resource, config))
    except PipelineError as error:
        return Finding(setting, resource, "", str(error))


def _check_exports(config: RunConfig, offline: bool) -> Iterator[Finding]:
    """Would llama.cpp's converter, vLLM and plain classifiers take what will be there?"""
    export = config.export
    if export.vllm:
        yield from _check_served("export.vllm", config, offline)
    looks: list[tuple[str, str, Callable[[], str]]] = []
    if export.gguf is not None:
        named = export.gguf
        looks.append(("export.gguf", named, lambda: f"a converter: {check_converter(named).name}"))
    base = config.reward.base or config.model.path
    if export.asks_for_reward and base is not None:
        looks.append(("export.reward", base, lambda: _scored(base, config)))
    for setting, resource, look in looks:
        try:
            away = setting != "export.gguf" and offline and not Path(resource).exists()
            yield Finding(setting, resource, OFFLINE if away else look())
        except PipelineError as error:
            yield Finding(setting, resource, "", str(error))


def _check_served(setting: str, config: RunConfig, offline: bool) -> Iterator[Finding]:
    """Would vLLM take the run's adapter on its base?"""
    path = config.ppo.policy or config.model.path
    if path is None or find_artifact(path, "sft"):
        return
    if offline and not Path(path).exists():
        yield Finding(setting, path, OFFLINE)
    elif (Path(path) / "adapter_config.json").exists():
        yield Finding(setting, path, "a PEFT adapter; looked at when it is opened")
    else:
        try:
            yield Finding(setting, path, _served(setting, path, config))
        except PipelineError as error:
            yield Finding(setting, path, "", str(error))


def _served(setting: str, path: str, config: RunConfig) -> str:
    """vLLM would take the run's adapter on this base. Raises PipelineError."""
    model = empty_model(config.model.model_copy(update={"quantization": "none"}), path)
    with torch.device("meta"):
        add_adapter(model, _ADAPTER, lora_config(config.lora))
    if setting == "export.vllm":
        refuse_vllm(model, _ADAPTER)
    elif faults := adapter_refusals(model, _ADAPTER):
        raise ModelError(
            f"vLLM cannot load the policy's adapters: {'; '.join(faults)}, or set "
            "ppo.rollout.engine to native"
        )
    return f"vLLM takes adapters on {model.config.model_type}"


def _scored(path: str, config: RunConfig) -> str:
    """A plain classifier would give the reward model's scores. Raises PipelineError."""
    shape, tokenizer = _shape_and_tokenizer(path, config)
    refuse_family(shape)
    codec = Codec(tokenizer, chat_template=config.model.chat_template)
    id_ = pad_id(codec, shape.get_text_config().vocab_size)
    return f"a plain classifier scores it, padded with {tokenizer.convert_ids_to_tokens(id_)}"


def _shape_and_tokenizer(path: str, config: RunConfig) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    section, reward = config.model, config.reward
    revisions = {reward.base: reward.base_revision, section.path: section.revision}
    revision = revisions.get(path)
    shape = load_config(section, path, revision)
    with explain_load_errors(path, revision):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=section.trust_remote_code
        )
    return shape, tokenizer


def _function(where: str, name: str) -> str:
    """A Python function exists; a file is parsed, not run. Raises PipelineError."""
    if not where.endswith(".py"):
        load_function(f"{where}:{name}")
        return f"a function of the module {where}"
    try:
        tree = ast.parse(Path(where).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ModelError(f"{where} is not a Python file that can be read: {error}") from None
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [node.name for node in tree.body if isinstance(node, kinds)]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.asname or node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}
    if name not in functions and name not in names:  # `score = make(...)`, `from x import score`
        raise ModelError(
            f"{where} has no function {name!r}; it has {', '.join(functions) or 'none'}"
        )
    return "a Python function"


def _artifact(folder: Path, stage: str) -> str:
    """A run or an artifact of ours is finished and whole. Raises PipelineError."""
    artifact = find_artifact(str(folder), stage)
    if artifact is not None:
        manifest = verify(artifact)
        return f"finished {manifest.stage} stage, key {manifest.key[:12]}"
    finished = [path.parent.name for path in RunFolder(folder).root.glob("*/artifact")]
    raise ModelError(
        f"{folder} is a run without a finished {stage} stage "
        f"(it has {', '.join(sorted(finished)) or 'none'}): run `rlhf {stage}` there first"
    )


def _built(config: RunConfig) -> str:
    """The small model of `model.architecture`, built without memory. Raises ConfigError."""
    return f"random weights, {_size(empty_model(config.model), config, _tunings(config))}"


def _decoder(path: str, config: RunConfig) -> str:
    """Config, tokenizer, limits and adapter targets of a causal model. Raises PipelineError."""
    section = config.model
    accelerated = config.run.device != "cpu" and torch.cuda.is_available()
    quantised_loading(section, torch.device("cuda" if accelerated else "cpu"))
    model = empty_model(section.model_copy(update={"quantization": "none"}), path)
    shape = model.config
    refuse_encoder(shape, path)
    _check_weights(Path(path))
    _, tokenizer = _shape_and_tokenizer(path, config)
    text = shape.get_text_config()
    config.check_positions(path, shape)
    if len(tokenizer) > text.vocab_size:
        raise ModelError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens but its embedding only "
            f"{text.vocab_size} rows: take the tokenizer that belongs to the model"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{path}: its tokenizer has no end token, so no response could end: "
            "set eos_token in its tokenizer_config.json"
        )
    codec = Codec(tokenizer, chat_template=section.chat_template)
    codec.of_run(config.data.system_prompt, config.generation)
    template = "its chat template" if tokenizer.chat_template else "no chat template"
    return f"{shape.model_type}, {_size(model, config, _tunings(config))}, {template}"


def _reward_base(path: str, config: RunConfig) -> str:
    """Config, tokenizer and positions of a reward model's own base. Raises PipelineError."""
    revision = config.reward.base_revision
    plain = config.model.model_copy(update={"quantization": "none"})
    model = empty_model(plain, path, revision)
    _check_weights(Path(path))
    _, tokenizer = _shape_and_tokenizer(path, config)
    shape, limit = model.config, positions(model)
    kind = "decoder"
    if is_encoder(shape):
        pair_template(tokenizer)
        pooling: str = config.reward.pooling
        if pooling == "auto":
            pooling = default_pooling(path, revision, shape)
        kind = f"encoder, score reads {READINGS[pooling]}"
    reach = "no limit of positions" if limit is None else f"{limit:,} positions"
    return f"{shape.model_type}, {_size(model, config, [config.reward.tuning])}; {kind}; {reach}"


def _classifier(path: str, config: RunConfig) -> str:
    """A reward model of another making: one label, a pad token. Raises ModelError."""
    from transformers import AutoConfig, AutoTokenizer

    code = config.model.trust_remote_code
    with explain_load_errors(path, None):
        shape = AutoConfig.from_pretrained(path, trust_remote_code=code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=code)
    if shape.num_labels != 1:
        raise ModelError(f"{path} has {shape.num_labels} labels; a reward model has one")
    if tokenizer.pad_token is None:
        raise ModelError(
            f"{path}: its tokenizer has no pad token: set pad_token in its tokenizer_config.json"
        )
    return f"sequence classification, {shape.model_type}"


def _check_weights(folder: Path) -> None:
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no .safetensors weights; pickled ones are refused, since they can run "
            "code: convert them once with transformers' save_pretrained"
        )


def _tunings(config: RunConfig) -> list[Tuning]:
    """Of the stages whose models stand on the policy's base."""
    reward = [] if config.reward.base is not None else [config.reward.tuning]
    return [config.sft.tuning, config.ppo.tuning, *reward]


def _size(model: nn.Module, config: RunConfig, tunings: Sequence[Tuning]) -> str:
    """Parameters and bytes of a model without memory, and those of an adapter on it.

    `tunings` are of the stages that train it. Raises ModelError if `lora.target_modules` do not
    fit, where one of them trains an adapter.
    """
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    text = f"{_short(count)} parameters, {size / 1e9:.2f} GB in {config.model.dtype}"
    if "lora" not in tunings:
        return text
    with torch.device("meta"):
        add_adapter(model, _ADAPTER, lora_config(config.lora))
    adapter = sum(p.numel() for p in adapter_parameters(model, _ADAPTER))
    return f"{text}; an adapter has {_short(adapter)} ({adapter / count:.2%})"


def _short(count: float) -> str:
    for unit in ("", " thousand", " million"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} billion"
