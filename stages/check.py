"""`rlhf check CONFIG`: does everything that a run would read exist, and does it fit together?

Opens the data, and of models their configs and tokenizers; weights are not read, sizes are counted
on torch's meta device. Nothing is trained and nothing is written.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from pipeline.config import SourceSection, function_reference
from pipeline.data import load_corpus
from pipeline.data.corpus import KINDS
from pipeline.data.formats import Kind
from pipeline.data.screen import data_table
from pipeline.errors import ModelError, PipelineError
from pipeline.models.adapters import adapter_parameters, add_adapter, lora_config
from pipeline.models.empty import empty_model
from pipeline.models.encoders import READINGS, default_pooling, positions
from pipeline.models.loading import (
    explain_load_errors,
    is_encoder,
    quantised_loading,
    refuse_encoder,
)
from pipeline.models.store import find_artifact
from pipeline.pair_codec import pair_template
from pipeline.rewards.sources import load_function
from pipeline.runfolder import RunFolder, verify
from pipeline.stage import Stage
from stages.config import RunConfig, check_needs
from stages.memory import free_disk, predicted_files, predicted_footprint
from stages.memory_screen import disk_table, memory_table

OFFLINE = "not checked (offline)"
_ADAPTER = "check"


@dataclass(frozen=True)
class Finding:
    """What was found out about one model, function or run that the config names."""

    setting: str
    resource: str
    facts: str
    fault: str = ""


def check_run(
    config: RunConfig, stages: Sequence[Stage], *, offline: bool, console: Console
) -> None:
    """Print what a run of `stages` would read. Raises PipelineError that lists all that is wrong.

    With `offline`, Hub ids are named but not contacted.
    """
    names = [stage.name for stage in stages]
    check_needs(config, names)
    console.print(f"stages: {', '.join(names)}", highlight=False)
    remote = _remote_data(config) if offline else []
    faults = list(_check_data(config, stages, remote, console))
    findings = list(_check_models(config, names, offline))
    console.print(_models_table(findings))
    if "ppo" in names:
        console.print(_ppo_line(config), highlight=False)
    faults += [f"{f.setting}: {f.fault}" for f in findings if f.fault]
    if _are_known(findings, offline):
        faults += _print_costs(config, names, console)
    if faults:
        raise PipelineError("\n".join([f"{len(faults)} of the checks failed:", *faults]))
    skipped = [f"data.{kind}" for kind in remote]
    skipped += [f.setting for f in findings if f.facts == OFFLINE]
    console.print(
        f"[green]everything else is in order[/green]; {OFFLINE}: {', '.join(skipped)}"
        if skipped
        else "[green]everything is in order[/green]"
    )


# --- data -----------------------------------------------------------------------------------------


def _remote_data(config: RunConfig) -> list[Kind]:
    """The datasets that are not on this machine: Hub ids."""
    sources: dict[Kind, SourceSection | None] = {kind: getattr(config.data, kind) for kind in KINDS}
    return [kind for kind, source in sources.items() if source and not Path(source.path).exists()]


def _check_data(
    config: RunConfig, stages: Sequence[Stage], left_out: Sequence[Kind], console: Console
) -> Iterator[str]:
    """Print the report of all datasets but those `left_out`; yields what is wrong with the data."""
    data = config.data
    wanted = {kind for stage in stages for kind in stage.reads(config)}
    if left_out:
        for kind in left_out:
            console.print(f"data.{kind}: {getattr(data, kind).path}: {OFFLINE}", highlight=False)
        data = data.model_copy(update=dict.fromkeys(left_out))
        # Prompts without a dataset of their own come from all others, so they are left out too.
        wanted = {kind for kind in wanted if getattr(data, kind) is not None}
    if not wanted:
        return
    try:
        corpus = load_corpus(data, [kind for kind in KINDS if kind in wanted])
    except PipelineError as error:
        yield str(error)
        return
    console.print(data_table(corpus.report, examples=True))
    evaluated = "evaluation" in {stage.name for stage in stages}
    if evaluated and "prompts" in wanted and not corpus.prompts.held_out:
        yield (
            "data.prompts: no prompt is held out, so there is nothing to evaluate on: "
            "add prompts, or raise data.held_out_fraction"
        )


# --- models ---------------------------------------------------------------------------------------


def _check_models(config: RunConfig, stages: Sequence[str], offline: bool) -> Iterator[Finding]:
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
    if "ppo" in stages and config.ppo.rewards is not None:
        yield _examine("ppo.rewards", config.ppo.rewards, config, offline, stage="reward")
    if "evaluation" in stages and config.evaluation.gold is not None:
        yield _examine("evaluation.gold", config.evaluation.gold, config, offline)


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
        if setting == "ppo.rewards":
            return Finding(setting, resource, _classifier(resource, config))
        if setting == "reward.base":
            return Finding(setting, resource, _reward_base(resource, config))
        return Finding(setting, resource, _decoder(resource, config))
    except PipelineError as error:
        return Finding(setting, resource, "", str(error))


def _function(where: str, name: str) -> str:
    """A Python function exists; a file is parsed, not run. Raises PipelineError."""
    if not where.endswith(".py"):
        load_function(f"{where}:{name}")
        return f"a function of the module {where}"
    try:
        tree = ast.parse(Path(where).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ModelError(f"{where} is not a Python file that can be read: {error}") from None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
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
    return f"random weights, {_size(empty_model(config.model), config)}"


def _decoder(path: str, config: RunConfig) -> str:
    """Config, tokenizer, limits and adapter targets of a causal model. Raises PipelineError."""
    from transformers import AutoTokenizer

    section = config.model
    revision = section.revision if path == section.path else None
    accelerated = config.run.device != "cpu" and torch.cuda.is_available()
    quantised_loading(section, torch.device("cuda" if accelerated else "cpu"))
    model = empty_model(section.model_copy(update={"quantization": "none"}), path)
    shape = model.config
    refuse_encoder(shape, path)
    _check_weights(Path(path))
    with explain_load_errors(path, revision):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=section.trust_remote_code
        )
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
    template = "its chat template" if tokenizer.chat_template else "no chat template"
    return f"{shape.model_type}, {_size(model, config)}, {template}"


def _reward_base(path: str, config: RunConfig) -> str:
    """Config, tokenizer and positions of a reward model's own base. Raises PipelineError."""
    from transformers import AutoTokenizer

    revision = config.reward.base_revision
    plain = config.model.model_copy(update={"quantization": "none"})
    model = empty_model(plain, path, revision)
    _check_weights(Path(path))
    with explain_load_errors(path, revision):
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=revision or "main",
            trust_remote_code=config.model.trust_remote_code,
        )
    shape, limit = model.config, positions(model)
    kind = "decoder"
    if is_encoder(shape):
        pair_template(tokenizer)
        pooling: str = config.reward.pooling
        if pooling == "auto":
            pooling = default_pooling(path, revision, shape)
        kind = f"encoder, score reads {READINGS[pooling]}"
    reach = "no limit of positions" if limit is None else f"{limit:,} positions"
    return f"{shape.model_type}, {_size(model, config)}; {kind}; {reach}"


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


def _size(model: nn.Module, config: RunConfig) -> str:
    """Parameters and bytes of a model without memory, and those of an adapter on it.

    Raises ModelError if `lora.target_modules` do not fit, where a stage trains an adapter.
    """
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    text = f"{_short(count)} parameters, {size / 1e9:.2f} GB in {config.model.dtype}"
    if "lora" not in (config.sft.tuning, config.reward.tuning, config.ppo.tuning):
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


# --- screen ---------------------------------------------------------------------------------------


def _models_table(findings: Sequence[Finding]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("models", no_wrap=True)
    table.add_column("", overflow="fold")
    table.add_column("found")
    for finding in findings:
        found = "[red]see below[/red]" if finding.fault else escape(finding.facts)
        table.add_row(finding.setting, escape(finding.resource), found)
    return table


def _are_known(findings: Sequence[Finding], offline: bool) -> bool:
    """Whether the models of a run can be looked at; the base of an adapter may be on the Hub."""
    if any(f.fault or f.facts == OFFLINE for f in findings):
        return False
    named = [f for f in findings if f.setting.startswith("ppo.")]
    return not offline or all(function_reference(f.resource) for f in named)


def _print_costs(config: RunConfig, stages: Sequence[str], console: Console) -> Iterator[str]:
    """Memory by stage and role, and the disk that weight files take; yields what is wrong."""
    try:
        footprints = {stage: predicted_footprint(config, stage) for stage in stages}
        files = [astuple(file) for file in predicted_files(config, stages)]
    except PipelineError as error:
        yield f"memory and disk cannot be predicted: {error}"
        return
    entries = {
        stage: {"predicted": {role: asdict(cost) for role, cost in footprint.items()}}
        for stage, footprint in footprints.items()
        if footprint
    }
    if (table := memory_table(entries)) is not None:
        console.print(table)
    if files:
        folder = Path(config.run.folder)
        console.print(disk_table(files, free_disk(folder), str(folder)))


def _ppo_line(config: RunConfig) -> str:
    rollout, optim = config.ppo.rollout, config.ppo.optim
    steps = optim.ppo_epochs * optim.minibatches
    return (
        f"PPO: {config.ppo.iterations} iterations x {rollout.prompts_per_iteration} prompts x "
        f"{rollout.responses_per_prompt} responses = "
        f"{config.ppo.iterations * rollout.num_rollouts:,} rollouts; {steps} optimiser steps each"
    )
