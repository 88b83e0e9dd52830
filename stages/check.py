"""`rlhf check CONFIG`: does everything that a run would read exist, and does it fit together?

Opens the data, and of models their configs and tokenizers; weights are not read, sizes are counted
on torch's meta device. Nothing is trained and nothing is written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config import SourceSection, function_reference
from pipeline.data import load_corpus
from pipeline.data.corpus import KINDS
from pipeline.data.formats import Kind
from pipeline.data.screen import data_table
from pipeline.errors import PipelineError
from pipeline.stage import Stage
from stages.check_models import OFFLINE, Finding, check_models
from stages.config import RunConfig, check_needs
from stages.memory import free_disk, predicted_files, predicted_footprint
from stages.memory_screen import disk_table, memory_table


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
    findings = list(check_models(config, names, offline))
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
    return not offline or all(
        function_reference(f.resource) or f.resource.startswith("http") for f in named
    )


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
