"""A tiny run folder with all that `rlhf chat` and `rlhf generate` open, and the verbs in a call."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from pipeline.runfolder import write_text_atomic
from pipeline.yaml_config import dump_config
from stages.cli import app
from stages.export.run import ExportStage
from tests.unit.tiny_run import TinyRun, config


def make_run(root: Path, *, conversations: bool = False) -> Path:
    """`root/tiny`: SFT, reward and PPO artifacts, and the exports."""
    run = TinyRun(config(root), conversations=conversations)
    write_text_atomic(run.run.config_yaml, dump_config(run.config))
    context = run.context("export", ("ppo", "evaluation"))
    folder = context.parents["evaluation"]
    folder.mkdir()
    (folder / "report.md").write_text("# Evaluation\n", encoding="utf-8")
    (folder / "metrics.json").write_text('{"about": {"versions": {}}}', encoding="utf-8")
    ExportStage().run(context)
    return run.run.root


def rlhf(*arguments: object, stdin: str | None = None, code: int = 0) -> Result:
    """`rlhf ARGUMENTS`; it must end with exit code `code`."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def generated(*arguments: object, stdin: str | None = None) -> list[dict[str, object]]:
    """The rows that `rlhf generate ARGUMENTS` prints."""
    return [
        json.loads(line) for line in rlhf("generate", *arguments, stdin=stdin).stdout.splitlines()
    ]
