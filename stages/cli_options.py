"""Arguments and options of the command line that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.FIELD=VALUE...",
        help="Values that replace those of the file, in YAML; the last one counts.",
        show_default=False,
    ),
]
SourceRuns = Annotated[
    list[Path] | None,
    typer.Option(
        "--from",
        metavar="RUN",
        help="Reuse the finished stages of this run folder, where their settings are the same.",
        show_default=False,
    ),
]
Launch = Annotated[
    str | None,
    typer.Option(
        "--launch",
        metavar="NAME",
        help="Start many processes through accelerate: a file of configs/accelerate (ddp, fsdp2, "
        "...) or a path.",
        show_default=False,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes", min=1, help="With --launch: how many, over all machines.", show_default=False
    ),
]
NumMachines = Annotated[
    int | None,
    typer.Option(
        "--machines",
        min=1,
        help="With --launch: how many machines; start the same command on each.",
        show_default=False,
    ),
]
MachineRank = Annotated[
    int | None,
    typer.Option(
        "--machine-rank", min=0, help="With --launch: which machine this is.", show_default=False
    ),
]
Rendezvous = Annotated[
    str | None,
    typer.Option(
        "--rendezvous",
        metavar="HOST:PORT",
        help="With --launch: where the machines meet, on the first of them.",
        show_default=False,
    ),
]
AllowChanges = Annotated[
    bool,
    typer.Option(
        "--allow-changes",
        help="Go on from an interrupted stage even if its configuration is another one now.",
    ),
]
