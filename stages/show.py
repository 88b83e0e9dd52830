"""`rlhf show runs/NAME`: a run at a glance, read from its JSON and YAML files alone."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import yaml_core
from pipeline.config import Section, function_reference, key_values, resource_fields
from pipeline.data.screen import data_table
from pipeline.errors import CheckpointError, PipelineError
from pipeline.keys import difference
from pipeline.runfolder import Manifest, RunFolder, StageFolder, read_json
from stages import STAGES
from stages.config import RunConfig
from stages.evaluation.report import print_report
from stages.memory_screen import memory_table

STYLE_OF_STATE = {
    "finished": "green",
    "stale": "yellow",
    "incomplete": "yellow",
    "damaged": "red",
    "not started": "dim",
}
# Of a stage's summary, what says most; all of it is in the artifact's manifest.json.
KEY_NUMBERS = {
    "sft": ("eval_loss", "perplexity", "steps", "kept_step"),
    "reward": ("accuracy", "ece", "eval_loss", "steps", "kept_step"),
    "ppo": ("held_out_score", "held_out_kl", "held_out_eos_rate", "iterations", "kept_iteration"),
    "evaluation": ("ppo_vs_sft", "best_of_n_vs_sft"),
    "export": ("folders", "megabytes"),
}


@dataclass(frozen=True)
class StageState:
    """How far one stage of a run has come; `note` says why, where that is not plain."""

    name: str
    folder: StageFolder
    state: str
    note: str = ""
    manifest: Manifest | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)


def show_run(root: Path, console: Console) -> None:
    """Print the run in folder `root`. Raises PipelineError if no run lies there."""
    run = RunFolder(root)
    if not run.config_yaml.is_file():
        raise PipelineError(f"{root} is not a run: it has no config.yaml{_other_runs(root)}")
    config = yaml_core.load(yaml_core.read_text(run.config_yaml), str(run.config_yaml)).data or {}
    console.print(_heading(root, config), highlight=False)
    console.print(_stages_table(root, stage_states(run, config)))
    if (costs := memory_table(_costs(run))) is not None:
        console.print(costs)
    if run.data_json.is_file():
        console.print(data_table(read_json(run.data_json)))
    metrics = run.stage("evaluation").root / "metrics.json"
    if metrics.is_file():
        _show_evaluation(metrics, console)


def stage_states(run: RunFolder, config: Mapping[str, Any]) -> Iterator[StageState]:
    """The state of every stage, in the order of the chain; `config` is the run's config.yaml.

    A finished stage is *stale* when its settings, or a stage that it was made from, are no longer
    those of the run.
    """
    keys: dict[str, str] = {}
    stale: set[str] = set()
    for target in STAGES.values():
        name = target.split(".")[1]  # "stages.evaluation.run:EvaluationStage" -> "evaluation"
        folder = run.stage(name)
        try:
            manifest = folder.manifest()
        except CheckpointError as error:
            yield StageState(name, folder, "damaged", str(error))
            continue
        if manifest is None:
            started = folder.root.is_dir() and any(folder.root.iterdir())
            note = _last_step(folder.metrics_jsonl) if started else ""
            yield StageState(name, folder, "incomplete" if started else "not started", note)
            continue
        keys[name] = manifest.key
        parents: Mapping[str, str] = manifest.material.get("parents", {})
        outdated = [p for p, key in parents.items() if p in stale or keys.get(p, key) != key]
        note = f"made from another {', '.join(outdated)}" if outdated else ""
        note = _changed_settings(manifest, config) or note
        state = "stale" if note else "finished"
        if note:
            stale.add(name)
        yield StageState(name, folder, state, note, manifest, manifest.summary)


def _changed_settings(manifest: Manifest, config: Mapping[str, Any]) -> str:
    """Settings of the stage that the run's config.yaml gives otherwise, as `old -> new`."""
    common: Mapping[str, Any] = manifest.material.get("common", {})
    recorded: dict[str, Mapping[str, Any]] = {
        manifest.stage: manifest.material.get(manifest.stage, {}),
        "model": common.get("model", {}),
        "lora": common.get("lora", {}),
        "run": {key: common[key] for key in ("seed", "mixed_precision") if key in common},
    }
    now = {}
    for section, values in recorded.items():
        current = key_values(_section(section), config.get(section) or {})
        now[section] = {key: current.get(key) for key in values}
    resources: Mapping[str, str] = manifest.material.get("resources", {})
    # What had a name of its own then may be a list of them now.
    own = (
        f"{manifest.stage}.{name}"
        for name in resource_fields(_section(manifest.stage))
        if name not in recorded[manifest.stage]
    )
    named = {field: _named(field, config, resources) for field in (*resources, *own)}
    changed = difference(resources, {field: value for field, value in named.items() if value})
    return ", ".join(filter(None, (difference(recorded, now), changed)))


def _section(name: str) -> type[Section]:
    section = RunConfig.model_fields[name].annotation
    assert isinstance(section, type) and issubclass(section, Section)
    return section


def _named(field: str, config: Mapping[str, Any], recorded: Mapping[str, str]) -> Any:
    """What config.yaml names for a resource, in the terms of the manifest.

    Whether the content of local files has changed, only a run finds out: it hashes them.
    """
    resource: Any = config
    for part in field.split("."):
        if isinstance(resource, list):
            resource = dict(enumerate(resource)).get(int(part))
        else:
            resource = resource.get(part) if isinstance(resource, Mapping) else None
    if not isinstance(resource, str):
        return resource
    is_local = function_reference(resource) or Path(resource).is_absolute()
    return recorded.get(field, resource) if is_local else resource


def _other_runs(root: Path) -> str:
    for folder in (root, root.parent):
        runs = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
        if runs:
            return f". Runs in {folder}: {', '.join(runs[:8])}"
    return ""


def _last_step(metrics_jsonl: Path) -> str:
    """The step of the last whole line of metrics; a line may be cut where a process died."""
    if not metrics_jsonl.is_file():
        return ""
    for line in reversed(metrics_jsonl.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            return f"at step {json.loads(line)['step']}"
        except (ValueError, KeyError, TypeError):
            continue
    return ""


def _heading(root: Path, config: Mapping[str, Any]) -> str:
    model = config.get("model") or {}
    random = f"random {(model.get('architecture') or {}).get('model_type', 'model')}"
    seed = (config.get("run") or {}).get("seed", "?")
    base = escape(str(model.get("path") or random))
    return f"\n[bold]{escape(str(root))}[/bold]  base model {base}, seed {seed}"


def _stages_table(root: Path, states: Iterator[StageState]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("key numbers, and where it lies", overflow="fold")
    for state in states:
        style = STYLE_OF_STATE[state.state]
        note = f"[{style}]{escape(state.note)}[/{style}]" if state.note else ""
        table.add_row(
            state.name,
            f"[{style}]{state.state}[/{style}]",
            f"{state.manifest.seconds:.1f}" if state.manifest else "",
            "\n".join(filter(None, (note, _numbers(state), _place(root, state)))),
        )
    return table


def _numbers(state: StageState) -> str:
    """The key numbers of the summary, or all its single values if it has none of them."""
    names = [name for name in KEY_NUMBERS.get(state.name, ()) if name in state.summary]
    values = ((name, state.summary[name]) for name in names or state.summary)
    shown = (
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values
        if isinstance(value, int | float | str)
    )
    return escape("  ".join(shown))


def _place(root: Path, state: StageState) -> str:
    """The stage's folder inside the run, with its size; nothing before it has started."""
    if state.state == "not started":
        return ""
    folder = state.folder.artifact if state.manifest else state.folder.root
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"[dim]{escape(folder.relative_to(root).as_posix())}/ ({_bytes(size)})[/dim]"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _costs(run: RunFolder) -> dict[str, Any]:
    """The `memory.json` of every stage that has one."""
    names = [target.split(".")[1] for target in STAGES.values()]
    paths = {name: run.stage(name).memory_json for name in names}
    return {name: read_json(path) for name, path in paths.items() if path.is_file()}


def _show_evaluation(path: Path, console: Console) -> None:
    metrics = read_json(path)
    try:
        print_report(metrics, console)
        seconds: Mapping[str, float] = metrics["seconds"]
        cost = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        console.print(f"[dim]{cost}; peak memory {metrics['peak_rss_mb']:.0f} MiB[/dim]")
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} lacks numbers that `rlhf evaluate` writes: {error}"
        ) from error
