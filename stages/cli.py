"""The command line: `rlhf VERB CONFIG [section.field=value ...]`, one verb a stage and a few more.

This is where configuration, stages and console are put together. Whatever is heavy is imported
inside the verbs, so that every `--help` answers within a second.

    rlhf run configs/quickstart.yaml ppo.kl_coef=0.1
"""

from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from pipeline.environment import process_index
from pipeline.errors import ConfigError
from stages import STAGES, cli_policies
from stages.cli_errors import ErrorsGroup
from stages.cli_options import (
    AllowChanges,
    ConfigFile,
    Launch,
    MachineRank,
    NumMachines,
    Overrides,
    Processes,
    Rendezvous,
    SourceRuns,
)

if TYPE_CHECKING:
    from pipeline.stage import Stage
    from stages.config import RunConfig

SUMMARY_OF_VERB = {
    "sft": "Fine-tune the base model on demonstrations.",
    "reward": "Train a reward model from rankings, starting from the SFT model.",
    "ppo": "Optimise the policy with PPO against the reward model.",
    "evaluate": "Compare the SFT policy, the PPO policy and best-of-n on held-out prompts.",
    "export": "Write the run's models as folders and files that other programs load.",
}
# `run` makes these, and of the others those that they need.
RESULTS = ("evaluate", "export")


def _examples(*lines: str) -> str:
    """An epilogue that Typer prints line by line."""
    return "\n".join(["[bold]Examples[/bold]", *(escape(f"  rlhf {line}") for line in lines)])


app = typer.Typer(
    cls=ErrorsGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Align a language model: supervised fine-tuning, a reward model from rankings, and PPO.",
    epilog=_examples("run configs/quickstart.yaml", "show runs/quickstart", "ppo --help"),
)

# Overrides with dashes reach `_load`, which says how to write them.
_LENIENT = {"ignore_unknown_options": True}


def main() -> None:
    """Entry point of `rlhf` and of `python -m stages`."""
    app(prog_name="rlhf")


def _print_version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        typer.echo(f"rlhf {version('rlhf-pipeline')}")
    except PackageNotFoundError:
        typer.echo("rlhf (run from a checkout, not installed)")
    raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _chain_verb(verb: str) -> Callable[..., None]:
    def command(
        config: ConfigFile,
        overrides: Overrides = None,
        from_: SourceRuns = None,
        launch: Launch = None,
        processes: Processes = None,
        machines: NumMachines = None,
        machine_rank: MachineRank = None,
        rendezvous: Rendezvous = None,
        allow_changes: AllowChanges = False,
    ) -> None:
        resolved = _load(config, overrides)
        taken = [text for path in from_ or () for text in ("--from", str(path))]
        again = [verb, str(config), *(overrides or ()), *taken]
        if allow_changes:
            again.append("--allow-changes")
        where = {
            "processes": processes,
            "machines": machines,
            "machine_rank": machine_rank,
            "rendezvous": rendezvous,
        }
        if not _launched(launch, where, again):
            only = None if verb == "run" else verb
            _run_chain(resolved, from_, only, allow_changes=allow_changes)

    return command


def _launched(name: str | None, where: dict[str, Any], arguments: list[str]) -> bool:
    """Whether many processes were asked for; they have run `rlhf ARGUMENTS` then.

    Raises:
        typer.Exit: they failed, with their exit code.
    """
    if name is None:
        for option in (option for option, value in where.items() if value is not None):
            raise ConfigError(
                f"--{option.replace('_', '-')} is about processes that --launch NAME starts"
            )
        return False
    from pipeline.distributed.launch import Machines
    from pipeline.distributed.launch import launch as launch_processes

    code = launch_processes(name, Machines(**where), arguments)
    if code:
        raise typer.Exit(code)
    return True


app.command(
    "run",
    help="Run the whole chain; reuses finished stages whose settings are unchanged.",
    context_settings=_LENIENT,
    epilog=_examples(
        "run configs/quickstart.yaml",
        "run configs/quickstart.yaml ppo.kl_coef=0.1 run.name=gentle",
        "run configs/quickstart.yaml run.name=gentle --from runs/quickstart",
    ),
)(_chain_verb("run"))
for _verb in STAGES:
    app.command(
        _verb,
        help=f"{SUMMARY_OF_VERB[_verb]}\n\nStages before it are taken from the run folder.",
        context_settings=_LENIENT,
        epilog=_examples(
            f"{_verb} configs/quickstart.yaml",
            f"{_verb} configs/quickstart.yaml run.name=second run.seed=2",
            f"{_verb} configs/quickstart.yaml run.name=third --from runs/quickstart",
            f"{_verb} configs/quickstart.yaml --launch ddp --processes 4",
        ),
    )(_chain_verb(_verb))


@app.command(
    context_settings=_LENIENT,
    epilog=_examples(
        "check configs/quickstart.yaml", "check configs/llama-3.1-8b-lora.yaml --offline"
    ),
)
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not contact the Hub; its ids are not checked.")
    ] = False,
) -> None:
    """Validate config, data and models' fit. Trains nothing; exit code 0 if all is well, else 2."""
    resolved = _load(config, overrides)
    from stages.check import check_run

    check_run(resolved, needed_stages(resolved, RESULTS), offline=offline, console=_console())


@app.command(epilog=_examples("show runs/quickstart"))
def show(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/quickstart.")
    ],
) -> None:
    """Show a run: its stages, their state and key numbers, and where things lie."""
    from stages.show import show_run

    show_run(run_folder, _console())


app.command(
    "chat",
    epilog=_examples(
        "chat runs/quickstart",
        "chat runs/quickstart/export/merged --temperature 0.7",
        "chat runs/quickstart --stage sft < prompts.txt",
    ),
)(cli_policies.chat)
app.command(
    "generate",
    epilog=_examples(
        "generate runs/quickstart prompts.jsonl --out responses.jsonl",
        "generate runs/quickstart prompts.txt --best-of 8",
        "generate runs/quickstart - < prompts.txt",
    ),
)(cli_policies.generate)


@app.command(
    "config",
    context_settings=_LENIENT,
    epilog=_examples(
        "config configs/quickstart.yaml ppo.kl_coef=0.1",
        "config --schema > rlhf.schema.json",
        "config --from-trl ppo.sh > ppo.yaml",
    ),
)
def config_(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="YAML file of the run.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema, which editors complete from.")
    ] = False,
    from_trl: Annotated[
        Path | None,
        typer.Option(
            "--from-trl",
            metavar="FILE",
            help="Convert a TRL PPO YAML, or a command line of its ppo.py script.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the resolved values of a config as YAML, the JSON Schema, or TRL settings as ours."""
    if from_trl is not None:
        if config is not None or schema:
            raise ConfigError("--from-trl FILE stands alone: it converts that file")
        from stages.from_trl import convert_trl

        typer.echo(convert_trl(from_trl), nl=False)
    elif schema:
        import json

        from stages.config import RunConfig

        typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
    elif config is None:
        raise ConfigError("name a config file, or ask for --schema")
    else:
        from pipeline.yaml_config import dump_config

        typer.echo(dump_config(_load(config, overrides)), nl=False)


def _load(path: Path, overrides: list[str] | None) -> "RunConfig":
    for text in overrides or ():
        if text.startswith("-"):
            dotted = "." in text and "=" in text
            hint = f"write {text.lstrip('-')}" if dotted else "see --help for the options"
            raise ConfigError(f"no such option: {text}: {hint}")
        if "=" not in text:
            raise ConfigError(
                f"{text!r} is not an override: write section.field=value, as in ppo.kl_coef=0.1 "
                "(without spaces round the =)"
            )
    from pipeline.yaml_config import read_config
    from stages.config import RunConfig

    return read_config(path, overrides or [], RunConfig)


def _run_chain(
    config: "RunConfig", sources: list[Path] | None, only: str | None, *, allow_changes: bool
) -> None:
    """Run the stage of the verb `only`, or the chain to its results."""
    from pipeline.chain import Chain
    from stages.config import check_needs
    from stages.memory import predicted_footprint

    stages = needed_stages(config, RESULTS if only is None else (only,))
    check_needs(config, [stage.name for stage in stages])
    console = _console()
    chain = Chain(
        config, stages, console, sources or (), predicted_footprint, allow_changes=allow_changes
    )
    with chain.runtime.leaving_together():
        chain.run(only=None if only is None else stages[-1].name)
        if config.export.push_to_hub is not None and stages[-1].name == "export":
            from stages.export.hub import push

            chain.runtime.from_main(lambda: push(chain.folder, config.export, console))
    console.print(f"Look at the run with: rlhf show {chain.folder.root}", highlight=False)


def needed_stages(config: "RunConfig", verbs: Collection[str]) -> list["Stage"]:
    """The stages of `verbs` and those that they need, directly or not, in the chain's order."""
    stages = [load_stage(verb) for verb in STAGES]
    wanted = {stage.name for verb, stage in zip(STAGES, stages, strict=True) if verb in verbs}
    for stage in reversed(stages):  # a stage needs earlier ones only
        if stage.name in wanted:
            wanted.update(stage.needs(config))
    return [stage for stage in stages if stage.name in wanted]


def load_stage(verb: str) -> "Stage":
    """The stage behind `verb`; imports its module."""
    module, _, name = STAGES[verb].partition(":")
    stage: Stage = getattr(import_module(module), name)()
    return stage


def _console() -> Console:
    """The screen of the main process; the others are silent."""
    return Console(quiet=process_index() != 0)
