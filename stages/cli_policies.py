"""The verbs that use a policy: `rlhf chat` and `rlhf generate`."""

import io
import sys
from typing import Annotated, Literal

import typer
from rich.console import Console

TargetName = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A run folder, an artifact, an export, a PEFT adapter, a transformers folder or a Hub "
        "id.",
    ),
]
StageName = Annotated[
    str | None,
    typer.Option(
        "--stage",
        metavar="STAGE",
        help="Of a run: its policy ppo, sft or base; the newest by default.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0,
        help="Of sampling; 0 is greedy. Default: the run's evaluation's, else 1.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        help="Longest answer. Default: the run's evaluation's, else 256.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed draws the same answers.")]


Device = Annotated[
    Literal["auto", "cpu"],
    typer.Option("--device", help="auto takes the accelerator if there is one; cpu never does."),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let Python code from the model's repository run: read it first.",
    ),
]


def chat(
    target: TargetName,
    stage: StageName = None,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 1,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", help="A system message before the conversation.", show_default=False
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Complete each line as it stands: no chat template."),
    ] = False,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
) -> None:
    """Talk to a policy; /sft, /ppo and /both compare a run's stages. A pipe works, too."""
    from stages.chat import Settings, talk
    from stages.targets import Target

    _speak_utf8()
    # A graph would be captured for each answer.
    opened = Target(target, device, trust_code=trust_remote_code, cuda_graphs=False)
    drawing = opened.drawing(stage)
    settings = Settings(
        temperature=drawing.temperature if temperature is None else temperature,
        max_new_tokens=max_new_tokens or drawing.max_new_tokens,
        seed=seed,
        system=system,
        plain=plain,
    )
    talk(opened, settings, stage, sys.stdin)


def generate(
    target: TargetName,
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS",
            help="File of prompts (.jsonl, .json, .csv, .parquet; .txt with one a line), a Hub "
            "dataset, or - for stdin.",
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="JSON lines; - is stdout.")
    ] = "-",
    stage: StageName = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Of the likeliest tokens with this probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Of the k likeliest tokens; 0 takes all.")
    ] = 0,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of a beam search.")] = 1,
    n: Annotated[int, typer.Option("--n", min=1, help="Responses to each prompt.")] = 1,
    best_of: Annotated[
        int | None,
        typer.Option(
            "--best-of",
            min=1,
            metavar="N",
            help="The best of N responses by the run's reward, with its score.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 1,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="The first prompts only.", show_default=False),
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
) -> None:
    """Write a policy's responses to the prompts of a file, as JSON lines."""
    from pipeline.errors import ConfigError
    from pipeline.generation import Sampling
    from stages.generate import Request, generate_file
    from stages.targets import Target

    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p is {top_p:g}: it is a probability above 0, at most 1")
    _speak_utf8()
    request = Request(prompts, out, responses=n, best_of=best_of, limit=limit)
    opened = Target(target, device, trust_code=trust_remote_code)
    drawing = opened.drawing(stage)
    sampling = Sampling(
        max_new_tokens or drawing.max_new_tokens,
        temperature=drawing.temperature if temperature is None else temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        num_beams=beams,
    )
    generate_file(opened, stage, request, sampling, Console(stderr=True))


def _speak_utf8() -> None:
    """Standard input and output in UTF-8, whatever the locale is."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
