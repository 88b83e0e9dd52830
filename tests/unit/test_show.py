"""`rlhf show`: the state of every stage, read from a run's files."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline import yaml_core
from pipeline.config import key_values
from pipeline.errors import CheckpointError, PipelineError
from pipeline.runfolder import RunFolder, write_manifest
from stages.config import RunConfig
from stages.show import show_run, stage_states

CONFIG: dict[str, Any] = {
    "run": {"name": "first", "seed": 3, "mixed_precision": "no"},
    "model": {"path": "org/base", "dtype": "float32"},
    "lora": {"rank": 16},
    "sft": {"tuning": "full", "epochs": 2.0},
    "reward": {"tuning": "lora"},
    "ppo": {
        "tuning": "lora",
        "kl_coef": 0.05,
        "rollout": {"generation_rows": 64, "temperature": 1.0},
        "rewards": None,
    },
    "evaluation": {"prompts": 5},
    "export": {"merged": True},
}
METRICS: dict[str, Any] = {
    "reward_model": {"accuracy": 0.72, "ece": 0.031, "n": 600, "ceiling": 0.75},
    "policies": {
        name: {"score": score, "score_std": 1.0, "kl": kl, "length": 14.25, "eos_rate": 0.98,
               "distinct_2": 0.4, "n": 500}
        for name, score, kl in (("sft", 0.0125, 0.0), ("ppo", 1.5, 1.8))
    },
    "win_rate": {
        "ppo_vs_sft": {"rate": 0.8125, "low": 0.776, "high": 0.844, "n": 500, "judge": "gold"}
    },
    "seconds": {"sft": 60.4, "reward": 50.2, "ppo": 100.0, "evaluation": 30.0},
    "peak_rss_mb": 1234.4,
    "about": {"best_of_n": None},
}  # fmt: skip


def finish(run: RunFolder, stage: str, parents: dict[str, str], **material: Any) -> None:
    """A finished stage whose key is its name, made with `CONFIG` but for `material`."""
    artifact = run.stage(stage).artifact
    artifact.mkdir(parents=True)
    (artifact / "weights").write_bytes(b"x" * 2500)
    write_manifest(
        artifact,
        stage=stage,
        key=stage,
        material={
            stage: key_values(RunConfig.model_fields[stage].annotation, CONFIG[stage]),
            "common": {"seed": 3, "mixed_precision": "no", "model": {"dtype": "float32"}},
            "resources": {"model.path": "org/base"} if stage == "sft" else {},
            "parents": parents,
            **material,
        },
        summary={"loss": 0.123456, "steps": 12, "best": "step-3", "curve": [1, 2]},
        seconds=61.25,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.root.mkdir(parents=True)
    folder.config_yaml.write_text(yaml_core.dump(CONFIG))
    return folder


def states(run: RunFolder) -> dict[str, tuple[str, str]]:
    return {state.name: (state.state, state.note) for state in stage_states(run, CONFIG)}


def screen(run: RunFolder) -> str:
    out = io.StringIO()
    show_run(run.root, Console(file=out, width=200))
    return out.getvalue()


def test_states_of_a_run_on_its_way(run: RunFolder) -> None:
    finish(run, "sft", {})
    finish(run, "reward", {"sft": "sft"}, common={"lora": {"rank": 16}})
    ppo = run.stage("ppo")
    ppo.root.mkdir()
    ppo.metrics_jsonl.write_text('{"step": 6}\n{"step": 7, "kl": 1.0}\n{"step": 8, "k')
    assert states(run) == {
        "sft": ("finished", ""),
        "reward": ("finished", ""),
        "ppo": ("incomplete", "at step 7"),  # the line of step 8 was cut
        "evaluation": ("not started", ""),
        "export": ("not started", ""),
    }


def test_stale_by_settings_and_by_parents(run: RunFolder) -> None:
    finish(run, "sft", {}, sft={"tuning": "full", "epochs": 3.0})
    finish(run, "reward", {"sft": "another key"})
    finish(run, "ppo", {"sft": "sft"}, common={"seed": 4, "lora": {"rank": 8}})
    found = states(run)
    assert found["sft"] == ("stale", "sft.epochs: 3.0 -> 2.0")
    assert found["reward"] == ("stale", "made from another sft")
    assert found["ppo"] == ("stale", "lora.rank: 8 -> 16, run.seed: 4 -> 3")
    finish(run, "export", {"ppo": "ppo"})  # of the ppo that is there, itself out of date
    assert states(run)["export"] == ("stale", "made from another ppo")


def test_stale_by_what_is_named_but_not_by_memory(run: RunFolder) -> None:
    finish(run, "sft", {})
    finish(run, "ppo", {"sft": "sft"})
    finish(run, "evaluation", {"ppo": "ppo"}, resources={"evaluation.gold": "hash"})
    config = CONFIG | {
        "model": {"path": "org/other", "dtype": "float32"},
        "ppo": CONFIG["ppo"] | {"rollout": {"generation_rows": 8, "temperature": 1.0}},
        "evaluation": {"prompts": 5, "gold": "/moved/gold.py:score"},  # what it says, a run sees
    }

    def notes() -> dict[str, str]:
        return {state.name: state.note for state in stage_states(run, config)}

    assert notes()["sft"] == 'model.path: "org/base" -> "org/other"'
    assert notes()["ppo"] == "made from another sft"
    config["model"] = CONFIG["model"]
    assert notes()["ppo"] == notes()["evaluation"] == ""
    config["ppo"] = config["ppo"] | {"rewards": "org/judge"}
    assert notes()["ppo"] == 'ppo.rewards: null -> "org/judge"'
    del config["evaluation"]["gold"]
    assert notes()["evaluation"] == 'evaluation.gold: "hash" -> null'


def test_damaged_manifest_does_not_hide_the_others(run: RunFolder) -> None:
    finish(run, "sft", {})
    (run.stage("sft").artifact / "manifest.json").write_text('{"stage": ')
    finish(run, "reward", {"sft": "sft"})
    found = states(run)
    assert found["sft"][0] == "damaged"
    assert "manifest.json" in found["sft"][1]
    assert found["reward"] == ("finished", "")


def test_screen_has_key_numbers_places_and_sizes(run: RunFolder) -> None:
    finish(run, "sft", {})  # of whose summary `steps` is a key number
    finish(run, "export", {})  # whose summary has none of them: all single values are shown
    text = screen(run)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    sft, export = (
        lines.index(next(x for x in lines if x.startswith(n))) for n in ("sft", "export")
    )
    assert lines[sft] == "sft finished 61.2 steps=12"
    # 2,500 bytes of weights and a manifest of less than 1,499 round to 3 or 4 kB.
    assert lines[sft + 1] in ("sft/artifact/ (3 kB)", "sft/artifact/ (4 kB)")
    assert lines[export] == "export finished 61.2 loss=0.1235 steps=12 best=step-3"
    assert lines[export + 1].startswith("export/ (")
    assert "base model org/base, seed 3" in text


def test_screen_has_the_evaluation_and_the_rows_left_out(run: RunFolder) -> None:
    finish(run, "evaluation", {})
    (run.stage("evaluation").root / "metrics.json").write_text(json.dumps(METRICS))
    dataset = {
        "format": "pairs",
        "rows": 1010,
        "kept": {"train": 900, "held_out": 100},
        "left_out": {"blank text": {"count": 10, "examples": []}},
        "notes": ["held-out rows come from another file"],
    }
    run.data_json.write_text(json.dumps({"rankings": dataset}))
    text = screen(run)
    assert "PPO preferred over SFT on 81.2% of 500 prompts" in text
    assert "60 s, reward 50 s, ppo 100 s, evaluation 30 s; peak memory 1234 MiB" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("rankings "))
    assert row == ["rankings", "pairs", "1,010", "900", "100", "10", "10", "x", "blank", "text"]
    assert "rankings: held-out rows come from another file" in text


def test_folder_without_a_run_names_the_runs_beside_it(run: RunFolder) -> None:
    with pytest.raises(PipelineError) as caught:
        show_run(run.root.parent / "second", Console(file=io.StringIO()))
    assert str(caught.value) == (
        f"{run.root.parent / 'second'} is not a run: it has no config.yaml. "
        f"Runs in {run.root.parent}: first"
    )


def test_foreign_metrics_are_named(run: RunFolder) -> None:
    finish(run, "evaluation", {})
    path = run.stage("evaluation").root / "metrics.json"
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"metrics.json lacks numbers .*'policies'"):
        screen(run)
