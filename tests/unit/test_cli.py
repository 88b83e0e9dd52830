"""The command line: verbs, help, overrides, errors and exit codes. No stage runs here."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import pipeline.chain
from pipeline.distributed.launch import Machines, find_configuration
from pipeline.distributed.runtime import refuse_fallback
from pipeline.errors import ConfigError, TrainingError
from stages import STAGES, cli, cli_errors
from stages.cli import SUMMARY_OF_VERB, app, needed_stages

ROOT = Path(__file__).parents[2]
VERBS = ["run", *STAGES, "check", "show", "chat", "generate", "config"]

runner = CliRunner()


class FakeStage:
    def __init__(self, name: str, *needs: str) -> None:
        self.name, self._needs = name, needs

    def needs(self, config: Any) -> tuple[str, ...]:
        return self._needs


CHAIN = {
    "sft": FakeStage("sft"),
    "reward": FakeStage("reward", "sft"),
    "ppo": FakeStage("ppo", "sft"),  # as with a reward function
    "evaluate": FakeStage("evaluation", "ppo"),
    "export": FakeStage("export", "ppo"),
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config in the current folder, and the stages replaced by those of `CHAIN`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(cli, "load_stage", CHAIN.__getitem__)
    Path("c.yaml").write_text("model: {init: config}\ndata: {demonstrations: org/set}\n")
    return "c.yaml"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the verbs ask the chain to do."""
    made: list[Any] = []

    class FakeChain:
        def __init__(
            self,
            config: Any,
            stages: Any,
            console: Any,
            sources: Any,
            predict: Any,
            allow_changes: bool,
        ) -> None:
            assert callable(predict)
            names = [stage.name for stage in stages]
            self.call = SimpleNamespace(
                config=config, stages=names, sources=list(sources), allow_changes=allow_changes
            )
            self.folder = SimpleNamespace(root=Path("runs/made"))
            self.runtime = SimpleNamespace(leaving_together=nullcontext)

        def run(self, only: str | None = None) -> None:
            self.call.only = only
            made.append(self.call)

    monkeypatch.setattr(pipeline.chain, "Chain", FakeChain)
    return made


def plain(text: str) -> str:
    """Without colours, boxes and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


# --- help -----------------------------------------------------------------------------------------


def test_every_stage_is_a_verb_with_a_summary() -> None:
    assert list(SUMMARY_OF_VERB) == list(STAGES)
    text = plain(runner.invoke(app, ["--help"]).output)
    for verb in VERBS:
        assert f" {verb} " in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_examples(verb: str) -> None:
    result = runner.invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert re.search(rf"Examples rlhf {verb} \S", plain(result.output))


def test_help_answers_within_a_second() -> None:
    """The fastest of three, in a process of its own: other work may hold the machine up."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "stages", "ppo", "--help"], cwd=ROOT, capture_output=True
        )
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0
    assert min(seconds) < 1.0


def test_no_verb_loads_a_heavy_library_for_help_config_or_show(tmp_path: Path) -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from stages.cli import app
invoke = CliRunner().invoke
for verb in {VERBS!r}:
    assert invoke(app, [verb, "--help"]).exit_code == 0
path = {str(tmp_path / "config.yaml")!r}
open(path, "w").write("model: {{init: config}}")
assert invoke(app, ["config", path]).exit_code == 0
assert invoke(app, ["config", "--schema"]).exit_code == 0
shown = invoke(app, ["show", {str(tmp_path)!r}])
assert shown.exit_code == 0, shown.output
heavy = {{"torch", "transformers", "datasets", "trl", "peft", "accelerate"}}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.fullmatch(r"rlhf (\d+\.\d+\.\d+\S*|\(run from a checkout, not installed\))\n",
                        result.output)  # fmt: skip


# --- what the verbs do ----------------------------------------------------------------------------


def test_run_makes_the_results_and_what_they_need(config: str, calls: list[Any]) -> None:
    result = runner.invoke(app, ["run", config, "ppo.kl_coef=1e-1", "run.name=x"])
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert call.stages == ["sft", "ppo", "evaluation", "export"]  # nothing needs `reward`
    assert (call.only, call.sources) == (None, [])
    assert (call.config.ppo.kl_coef, call.config.run.name) == (0.1, "x")


@pytest.mark.parametrize(
    ("verb", "stages"),
    [
        ("sft", ["sft"]),
        ("ppo", ["sft", "ppo"]),
        ("evaluate", ["sft", "ppo", "evaluation"]),
        ("export", ["sft", "ppo", "export"]),
    ],
)
def test_a_verb_runs_its_stage_alone(
    config: str, calls: list[Any], verb: str, stages: list[str]
) -> None:
    result = runner.invoke(app, [verb, config, "run.seed=2", "--from", "runs/a", "--from", "b"])
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert (call.stages, call.only) == (stages, stages[-1])
    assert call.sources == [Path("runs/a"), Path("b")]
    assert call.config.run.seed == 2


def test_needed_stages_follow_needs_in_the_chains_order(config: str) -> None:
    names = [stage.name for stage in needed_stages(SimpleNamespace(), ["export", "reward"])]  # type: ignore[arg-type]
    assert names == ["sft", "reward", "ppo", "export"]


def test_data_that_a_stage_needs_is_asked_for_before_anything_runs(
    config: str, calls: list[Any]
) -> None:
    result = runner.invoke(app, ["reward", config])
    assert result.exit_code == 2
    assert plain(result.stderr) == (
        "error: data.rankings is missing: the reward stage trains on it. Name a file or Hub "
        "dataset of ranked responses, or let something else score (ppo.rewards)"
    )
    result = runner.invoke(app, ["ppo", config, "data=null", "ppo.optim.ptx_coef=27.8"])
    assert "data is an empty section" in result.stderr
    result = runner.invoke(app, ["ppo", config, "data={}", "ppo.optim.ptx_coef=27.8"])
    text = plain(result.stderr)
    assert "data.demonstrations is missing: the sft stage trains on it." in text
    assert "data.prompts is missing: ppo would have no prompts." in text
    assert "ppo.optim.ptx_coef is 27.8, which mixes demonstrations into PPO." in text
    assert calls == []


def test_config_prints_resolved_values(config: str) -> None:
    result = runner.invoke(app, ["config", config, "run.mixed_precision=no"])
    assert result.exit_code == 0
    values = yaml.safe_load(result.stdout)
    assert values["run"]["mixed_precision"] == "no"
    assert values["data"]["demonstrations"]["path"] == "org/set"


def test_config_schema_describes_every_field() -> None:
    result = runner.invoke(app, ["config", "--schema"])
    schema = json.loads(result.stdout)
    assert list(schema["properties"])[:2] == ["run", "model"]
    fields = [
        (name, field)
        for name, section in schema["$defs"].items()
        for field, spec in section.get("properties", {}).items()
        if not spec.get("description", "").endswith(".")
    ]
    assert fields == []
    # A dataset may be written as its path alone, and editors must not mark that as wrong.
    assert {"type": "string"} in schema["$defs"]["DataSection"]["properties"]["rankings"]["anyOf"]


def test_config_needs_a_file_or_schema() -> None:
    result = runner.invoke(app, ["config"])
    assert (result.exit_code, result.stderr) == (
        2,
        "error: name a config file, or ask for --schema\n",
    )


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "error: none.yaml: no such file (current folder: "),
        (["c.yaml", "ppo.kl_coeff=1"], "error: override 'ppo.kl_coeff=1': unknown key "
         "ppo.kl_coeff: did you mean ppo.kl_coef?\n"),
        (["c.yaml", "kl_coef"], "error: 'kl_coef' is not an override: write section.field=value, "
         "as in ppo.kl_coef=0.1 (without spaces round the =)\n"),
        (["c.yaml", "--ppo.kl_coef=0.1"], "error: no such option: --ppo.kl_coef=0.1: write "
         "ppo.kl_coef=0.1\n"),
        (["c.yaml", "--frm=x"], "error: no such option: --frm=x: see --help for the options\n"),
    ],
)  # fmt: skip
def test_faults_are_one_message_and_exit_code_2(
    config: str, arguments: list[str], message: str
) -> None:
    for verb in ("run", "ppo", "check", "config"):
        result = runner.invoke(app, [verb, *arguments])
        assert result.exit_code == 2
        assert result.stderr.startswith(message)
        assert "Traceback" not in result.output
        assert result.stdout == ""


def test_errors_of_a_stage_keep_their_brackets(
    config: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, only: str | None = None) -> None:
        raise TrainingError("loss is NaN [red]at step 3[/red]")

    monkeypatch.setattr(pipeline.chain.Chain, "run", fail)
    result = runner.invoke(app, ["run", config])
    assert result.exit_code == 2
    assert result.stderr == "error: loss is NaN [red]at step 3[/red]\n"


def test_interrupt_is_130(config: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any, only: str | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.chain.Chain, "run", interrupt)
    result = runner.invoke(app, ["run", config])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_mistakes_of_our_own_keep_their_traceback(
    config: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, only: str | None = None) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(pipeline.chain.Chain, "run", fail)
    assert isinstance(runner.invoke(app, ["run", config]).exception, AssertionError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        # Every process reads the same config, so the main one's message is enough.
        (ConfigError("x"), ""),
        (TrainingError("x"), "error (rank 3): x\n"),
    ],
)
def test_other_ranks_are_silent_but_for_errors_of_their_own(
    config: str,
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: str,
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli_errors, "OTHERS_SPEAK_FIRST", 0.01)

    def fail(self: Any, only: str | None = None) -> None:
        cli._console().print("progress")
        raise error

    monkeypatch.setattr(pipeline.chain.Chain, "run", fail)
    result = runner.invoke(app, ["run", config])
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", expected)


def test_module_entry_point_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages", "config", "none.yaml"],
        cwd=ROOT,
        env={**os.environ, "RANK": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: none.yaml: no such file (current folder: {ROOT})\n"


def test_another_launch_than_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fallback("DistributedType.MULTI_CPU", 2)
    with pytest.raises(ConfigError, match="asks for MEGATRON_LM, which no stage trains with"):
        refuse_fallback("DistributedType.MEGATRON_LM", 2)
    monkeypatch.setenv("RLHF_ASKED_PROCESSES", "4")
    with pytest.raises(ConfigError, match="asks for 4 processes, but accelerate runs 1"):
        refuse_fallback("DistributedType.NO", 1)


def test_where_the_machines_are_is_said_to_accelerate() -> None:
    from accelerate.commands.launch import launch_command_parser

    path = find_configuration("ddp-multi-node")
    processes, words = Machines(8, 4, 0, "node1:29511").settings(path)
    assert processes == 8
    found = launch_command_parser().parse_args([*words, "-m", "stages"])
    told = (found.num_processes, found.num_machines, found.machine_rank)
    assert told == (8, 4, 0)
    assert (found.main_process_ip, found.main_process_port) == ("node1", 29511)
    processes, words = Machines().settings(path)  # the file's own
    assert processes == 16 and words == ["--config_file", str(path), "--num_processes", "16"]
    _, words = Machines().settings(find_configuration("cpu2"))  # two runs on one machine
    assert words[-2:] == ["--main_process_port", "0"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--launch", "ddq"], "no such configuration. There are cpu2, ddp"),
        (["--processes", "2"], "--processes is about processes that --launch NAME starts"),
        (["--machine-rank", "0"], "--machine-rank is about processes that --launch NAME starts"),
        (["--launch", "ddp", "--rendezvous", "node1"], "--rendezvous node1: write HOST:PORT"),
    ],
)
def test_a_launch_that_cannot_be(config: str, arguments: list[str], expected: str) -> None:
    result = runner.invoke(app, ["run", config, *arguments])
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.split())
