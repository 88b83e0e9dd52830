"""The chain's bookkeeping with stages that only count how often they run."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from pydantic import Field
from rich.console import Console

import pipeline.chain
import pipeline.environment
from pipeline.chain import Chain
from pipeline.config import (
    NOT_IN_KEY,
    DataSection,
    LoraSection,
    ModelSection,
    Resource,
    RunSection,
    Section,
)
from pipeline.errors import CheckpointError, Interrupted, PipelineError, TrainingError
from pipeline.keys import difference, resource_fingerprint, stage_material
from pipeline.resume import States
from pipeline.runfolder import RunFolder
from stages.config import RunConfig
from stages.evaluation.run import EvaluationStage
from stages.export.run import ExportStage
from stages.ppo.run import PpoStage
from stages.reward.run import RewardStage
from stages.sft.run import SftStage


class MemorySection(Section):
    rows: int = Field(8, json_schema_extra=NOT_IN_KEY)
    share: float = 0.5


class StepSection(Section):
    rate: float = 1.0
    tuning: str = "full"
    memory: MemorySection = MemorySection()
    judge: Resource | None = None


class Config(Section):
    run: RunSection
    model: ModelSection = ModelSection(path="m")
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    first: StepSection = StepSection()
    second: StepSection = StepSection()
    evaluation: StepSection = StepSection()


@dataclass
class Step:
    name: str
    parents: tuple[str, ...] = ()
    title: str = "Step"
    samples: bool = False
    ran: list[str] = field(default_factory=list)
    fails: bool = False
    checkpoint: bool = False

    def needs(self, config):
        return self.parents

    def reads(self, config):
        return ("prompts",)

    def resources(self, config):
        judge = getattr(config, self.name).judge
        return {f"{self.name}.judge": judge} if judge else {}

    def run(self, context):
        self.ran.append(context.config.run.name)
        if self.checkpoint:
            (context.folder.checkpoints / "step-3").mkdir(parents=True)
            (context.folder.checkpoints / "step-3/manifest.json").write_text("{}")
        if self.fails:
            raise TrainingError("loss is not finite")
        texts = [(path / "out.txt").read_text() for path in context.parents.values()]
        rate = getattr(context.config, self.name).rate
        (context.folder.artifact / "out.txt").write_text("".join(texts) + f"{self.name}={rate};")
        return {"rate": rate} if rate else {}


@pytest.fixture(autouse=True)
def world(monkeypatch):
    """No models and no data: the chain's own work is under test."""
    runtime = SimpleNamespace(
        is_main=True,
        world_size=1,
        device="cpu",
        barrier=lambda: None,
        shards=False,
        forget_sharded=lambda: None,
        from_main=lambda work: work(),
    )
    corpus = SimpleNamespace(fingerprint=lambda kind: "data-1", report={})
    monkeypatch.setattr(Chain, "runtime", runtime)
    monkeypatch.setattr(Chain, "corpus", corpus)
    monkeypatch.setattr(Chain, "store", None)
    monkeypatch.setattr(pipeline.chain, "environment", dict)
    return corpus


@pytest.fixture
def run(tmp_path):
    steps = [Step("first"), Step("second", ("first",))]

    def go(name="a", only=None, sources=(), **sections):
        config = Config(
            run=RunSection(name=name, folder=str(tmp_path), trackers=()),
            **{key: StepSection(**value) for key, value in sections.items()},
        )
        for step in steps:
            step.ran.clear()
        sources = [tmp_path / source for source in sources]
        Chain(config, steps, Console(quiet=True), sources).run(only)
        return [step.name for step in steps if step.ran]

    go.steps, go.folder = steps, tmp_path
    return go


def test_unchanged_stages_are_reused(run):
    assert run() == ["first", "second"]
    assert run() == []


def test_states_that_a_kill_after_the_end_left_go(run):
    run()
    checkpoints = RunFolder(run.folder / "a").stage("first").checkpoints
    for name in ("state-3/run.json", "state-4/run.safetensors", "step-2/manifest.json"):
        (checkpoints / name).parent.mkdir(parents=True)
        (checkpoints / name).write_text("{}")
    assert run() == []
    assert [path.name for path in checkpoints.iterdir()] == ["step-2"]


def test_a_changed_stage_runs_again_with_those_that_follow_it(run):
    run()
    assert run(second={"rate": 2}) == ["second"]
    assert run(first={"rate": 3}, second={"rate": 2}) == ["first", "second"]
    out = RunFolder(run.folder / "a").stage("second").artifact / "out.txt"
    assert out.read_text() == "first=3.0;second=2.0;"


def test_going_back_to_an_earlier_configuration_finds_its_work_again(run):
    run()
    run(second={"rate": 2})
    assert run() == []
    out = RunFolder(run.folder / "a").stage("second").artifact / "out.txt"
    assert out.read_text() == "first=1.0;second=1.0;"


def test_changed_data_runs_everything_again(run, world):
    run()
    world.fingerprint = lambda kind: "data-2"
    assert run() == ["first", "second"]


def test_finished_stages_are_taken_over_from_another_run(run):
    run("a")
    assert run("b", sources=["a"], second={"rate": 2}) == ["second"]
    manifest = json.loads((run.folder / "b/first/artifact/manifest.json").read_text())
    assert manifest["summary"] == {"rate": 1.0}
    assert (run.folder / "a/first/artifact/out.txt").exists()


def test_results_that_lie_directly_under_the_run_are_taken_over_too(run):
    # evaluation and export have no artifact/ folder in between
    run.steps.append(Step("evaluation", ("second",)))
    assert run("a") == ["first", "second", "evaluation"]
    assert run("b", sources=["a"]) == []
    assert (run.folder / "b/evaluation/out.txt").exists()
    assert run("b", evaluation={"rate": 2}) == ["evaluation"]
    assert run("b") == []  # back from previous/


def test_a_stage_without_key_numbers_is_reused(run):
    run(first={"rate": 0})
    assert run(first={"rate": 0}) == []


def test_a_source_that_is_no_run_is_refused(run):
    with pytest.raises(CheckpointError, match="no run lies there"):
        run(sources=["nowhere"])


def test_one_stage_alone_uses_what_those_before_it_left(run):
    assert run(only="first") == ["first"]
    assert run(only="second") == ["second"]


def test_one_stage_alone_says_what_is_missing(run):
    with pytest.raises(CheckpointError, match="second needs first, which has not finished"):
        run(only="second")


def test_one_stage_alone_shows_the_difference_to_what_is_there(run):
    run()
    with pytest.raises(CheckpointError, match=r"first\.rate: 1\.0 -> 5\.0"):
        run(only="second", first={"rate": 5})


def test_a_damaged_artifact_is_made_again(run):
    run()
    (run.folder / "a/first/artifact/out.txt").write_text("bits")
    # first's key has not changed, so second's work still stands
    assert run() == ["first"]


def test_a_damaged_artifact_does_not_stand_in_for_the_one_made_again(run):
    run()
    (run.folder / "a/first/artifact/out.txt").write_text("bits")
    run()
    run(first={"rate": 3})
    assert run() == []


def test_one_stage_alone_says_that_what_it_needs_is_damaged(run):
    run()
    (run.folder / "a/first/artifact/out.txt").write_text("bits")
    with pytest.raises(CheckpointError, match="is damaged: run `rlhf first` again"):
        run(only="second", second={"rate": 2})


def test_checkpoints_of_an_unfinished_attempt_are_kept(run):
    run.steps[1].fails = run.steps[1].checkpoint = True
    with pytest.raises(TrainingError):
        run()
    run.steps[1].fails = run.steps[1].checkpoint = False
    run()
    kept = RunFolder(run.folder / "a").previous("second", "unfinished")
    assert (kept / "checkpoints/step-3/manifest.json").exists()
    assert not (run.folder / "a/second/checkpoints").exists()


def test_a_run_that_was_asked_to_stop_says_that_its_state_was_not_written(run, monkeypatch):
    def stopped(self, context):
        raise Interrupted("stopped after step 3, as asked", 143)

    def settle(self, *, together=True):
        raise PipelineError("no room for the state")

    monkeypatch.setattr(Step, "run", stopped)
    monkeypatch.setattr(States, "settle", settle)
    with pytest.raises(PipelineError, match="no room for the state"):
        run()


def test_a_stage_that_failed_leaves_no_artifact_and_starts_again(run):
    run.steps[1].fails = True
    with pytest.raises(TrainingError):
        run()
    assert RunFolder(run.folder / "a").stage("second").manifest() is None
    run.steps[1].fails = False
    assert run() == ["second"]


def test_lora_settings_change_only_the_stages_that_train_adapters(run, tmp_path):
    def keys(lora):
        config = Config(
            run=RunSection(name="k", folder=str(tmp_path)),
            lora=lora,
            second=StepSection(tuning="lora"),
        )
        plans = Chain(config, run.steps, Console(quiet=True)).plan()
        return plans["first"].key, plans["second"].key

    (first_a, second_a), (first_b, second_b) = keys(LoraSection(rank=4)), keys(LoraSection(rank=8))
    assert first_a == first_b
    assert second_a != second_b


def test_what_sets_memory_only_repeats_no_work(run):
    run()
    assert run(second={"memory": {"rows": 16}}) == []
    assert run(second={"memory": {"rows": 16, "share": 0.25}}) == ["second"]


def test_a_file_counts_by_its_content_and_function_wherever_it_lies(run):
    first, second = run.folder / "1.py", run.folder / "2.py"
    first.write_text("def a(): ...\ndef b(): ...\n")
    run()
    assert run(second={"judge": f"{first}:a"}) == ["second"]
    first.rename(second)
    assert run(second={"judge": f"{second}:a"}) == []
    assert run(second={"judge": f"{second}:b"}) == ["second"]
    second.write_text("def b(): return 1\n")
    assert run(second={"judge": f"{second}:b"}) == ["second"]
    assert run() == []  # without one: the first of all


def test_a_resource_that_a_stage_does_not_declare_is_our_mistake(run, monkeypatch):
    monkeypatch.setattr(Step, "resources", lambda self, config: {})
    with pytest.raises(AssertionError, match=r"second\.judge"):
        run(second={"judge": "org/judge"})


def test_difference_names_the_changed_leaves():
    old = {"sft": {"optim": {"lr": 1e-3, "eps": 1e-8}}, "data": {"p": "x"}}
    new = {"sft": {"optim": {"lr": 2e-3, "eps": 1e-8}}, "data": {"p": "y"}}
    assert difference(old, new) == 'data.p: "x" -> "y", sft.optim.lr: 0.001 -> 0.002'


def test_a_module_is_known_by_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rewards_of_a_test.py").write_text("def score(**rest): return [1.0]\n")
    first = resource_fingerprint("my_rewards_of_a_test:score")
    (tmp_path / "my_rewards_of_a_test.py").write_text("def score(**rest): return [2.0]\n")
    assert resource_fingerprint("my_rewards_of_a_test:score") != first
    assert resource_fingerprint("no_such_module_of_a_test:score")
    assert resource_fingerprint("trl.rewards:a") != resource_fingerprint("trl.rewards:b")


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert pipeline.environment._commit() is None


def test_what_is_sampled_is_in_the_keys_of_stages_that_sample():
    """Another stop string makes no SFT model anew; another system prompt does."""
    plain = {"model": {"path": "m"}}
    stops = {**plain, "generation": {"stop_strings": ["END"]}}
    spoken = {**plain, "data": {"system_prompt": "be kind"}}
    classes = (SftStage, RewardStage, PpoStage, EvaluationStage, ExportStage)

    def changed(one, other):
        found = set()
        for stage in (make() for make in classes):
            materials = [
                stage_material(stage, RunConfig.model_validate(c), lambda kind: "", {})
                for c in (one, other)
            ]
            if materials[0] != materials[1]:
                found.add(stage.name)
        return found

    assert changed(plain, stops) == {"reward", "ppo", "evaluation"}
    assert changed(plain, spoken) == {"sft", "reward", "ppo", "evaluation", "export"}
    assert changed(plain, dict(plain)) == set()
