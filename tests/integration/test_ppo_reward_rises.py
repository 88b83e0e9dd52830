"""The PPO stage on a hand-made reward: it rises clearly, and leaves what the docs promise."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from pipeline.codec import PROMPTS_CUT, Codec
from pipeline.data import Corpus, Split
from pipeline.distributed import Runtime
from pipeline.errors import ModelError, TrainingError
from pipeline.models.adapters import adapter_names
from pipeline.models.store import ModelStore
from pipeline.records import Prompt
from pipeline.runfolder import RunFolder, verify, write_manifest
from pipeline.stage import Context
from pipeline.tracking import Tracker
from stages.config import RunConfig
from stages.ppo.run import PpoStage

REWARD = '''
def share_of_e(prompts, completions, completion_ids, **columns):
    """Share of a response's characters that are the letter e."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def broken(prompts, completions, completion_ids, **columns):
    return [float("nan")] * len(prompts)


calls = []


def breaks(prompts, completions, completion_ids, **columns):
    """Good for the first evaluation, and no more."""
    calls.append(prompts)
    return [1.0 if len(calls) == 1 else float("nan")] * len(prompts)
'''
TEXTS = [f"{animal} number {number} sees the {place}." for animal in ("Bee", "Eel", "Ewe", "Emu")
         for number in range(8) for place in ("sea", "tree", "street", "밭")]  # fmt: skip


def make_context(
    root: Path, ppo: dict[str, Any], function: str = "share_of_e", max_prompt_tokens: int = 32
) -> Context:
    """A run of a random model with these prompts, up to the PPO stage."""
    (root / "reward.py").write_text(REWARD, encoding="utf-8")
    config = RunConfig.model_validate(
        {
            "run": {"name": "tiny", "folder": str(root), "device": "cpu", "trackers": []},
            "model": {
                "init": "config",
                "vocabulary_size": 300,
                "architecture": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_attention_heads": 2,
                    "max_position_embeddings": 256,
                },
            },
            "lora": {"rank": 8, "alpha": 16},
            "data": {"max_prompt_tokens": max_prompt_tokens, "max_response_tokens": 16},
            "ppo": {
                "rewards": f"{root / 'reward.py'}:{function}",
                "kl_coef": 0.001,
                "iterations": 20,
                # A random model never learned to end: cut responses keep their score.
                "rollout": {
                    "prompts_per_iteration": 64,
                    "max_new_tokens": 12,
                    "missing_eos": "keep",
                },
                "held_out": {"every": 10, "num_prompts": 16, "num_texts": 2},
                "samples": {"rows_per_file": 500},
                **ppo,
            },
        }
    )
    prompts = [Prompt(text, {"letter": "e"}, f"tiny:{i}") for i, text in enumerate(TEXTS)]
    run = RunFolder(root / "tiny")
    run.create()
    store = ModelStore(config.model, config.data)
    torch.manual_seed(1)
    start = store.build(TEXTS).with_role("sft")
    # A trained model's logits span several units; random ones span 0.6, which no adapter can widen.
    start.trunk.model.get_input_embeddings().weight.data.mul_(10)
    store.save(start, run.stage("sft").artifact)
    folder = run.stage("ppo")
    console = Console(file=io.StringIO())
    return Context(
        config=config,
        runtime=Runtime(config.run),
        corpus=Corpus(prompts=Split(tuple(prompts[16:]), tuple(prompts[:16]))),
        store=store,
        run=run,
        folder=folder,
        parents={"sft": run.stage("sft").artifact},
        tracker=Tracker(folder.root, "tiny", (), console),
        console=console,
    )


@pytest.mark.parametrize(
    ("tuning", "value", "rate"),
    [
        ("lora", "separate", 2e-2),
        ("full", "separate", 5e-3),
        pytest.param("lora", "shared", 2e-2, marks=pytest.mark.slow),
    ],
)
def test_reward_rises(tuning: str, value: str, rate: float, tmp_path: Path) -> None:
    optim = {
        "learning_rate": rate,
        "minibatches": 2,
        "value_coef": 0.5,
        "value_warmup_iterations": 1,
    }
    context = make_context(tmp_path, {"tuning": tuning, "value": value, "optim": optim})
    start = context.store.open(context.parents["sft"])
    base = start.trunk.base_hash()
    summary = PpoStage().run(context)
    context.tracker.close()
    assert start.trunk.base_hash() == base

    lines = context.folder.metrics_jsonl.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(21))
    first, last = rows[1]["score"], rows[20]["score"]
    # About 4% of a random model's letters are e; 20 iterations must bring at least 20 points more.
    assert first < 0.1 and last > first + 0.2, (first, last)
    assert summary["held_out_reward_best"] > summary["held_out_reward_start"] + 0.2
    # The value model warmed up before the policy moved.
    assert [rows[step]["kl"] for step in (1, 2)] == pytest.approx([0, 0], abs=1e-4)
    assert "grad_norm_policy" not in rows[1] and rows[20]["grad_norm_policy"] > 0
    assert rows[20]["kl"] > 1

    # Every rollout is on disk, and the texts of the fixed prompts at every evaluation.
    files = sorted((context.folder.root / "samples").glob("*.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in files) == 20 * 64
    texts = (context.folder.root / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["iteration"] for line in texts] == [0, 0, 10, 10, 20, 20]

    # Best and last are checkpoints; the artifact opened in a new process is the kept policy.
    steps = {summary["best_iteration"], 20}
    names = {path.name for path in context.folder.checkpoints.iterdir()}
    assert names == {f"step-{step}" for step in steps}
    for name in names:
        verify(context.folder.checkpoints / name)
    live = context.store.open(context.folder.artifact)
    again = ModelStore(context.config.model, context.config.data).open(context.folder.artifact)
    assert live.trunk.heads.keys() == set()
    prompt = live.codec.prompt_ids("Bee number")
    batch = _batch(live.codec, prompt)
    torch.testing.assert_close(
        again(batch, ["logprobs"]).logprobs, live(batch, ["logprobs"]).logprobs, rtol=0, atol=1e-6
    )


def test_best_policy_is_kept_when_the_run_diverges(tmp_path: Path) -> None:
    # No KL rule could hold at 1e-6 nats: it is broken in every iteration after the first step.
    ppo = {
        "tuning": "lora",
        "iterations": 8,
        "keep": "last",
        "optim": {"learning_rate": 1e-2},
        "stop": {"max_kl": 1e-6, "patience": 2},
    }
    context = make_context(tmp_path, ppo)
    summary = PpoStage().run(context)
    assert "ppo.stop.max_kl" in summary["stopped"]
    assert summary["iterations"] < 8
    assert summary["kept_iteration"] == summary["best_iteration"]
    assert "ppo.stop.max_kl" in context.console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_runs_own_reward_model_scores_and_starts_the_value(tuning: str, tmp_path: Path) -> None:
    ppo = {"rewards": None, "iterations": 2, "tuning": tuning, "keep": "last"}
    context = make_context(tmp_path, ppo)
    start, artifact = context.store.open(context.parents["sft"]), tmp_path / "tiny/reward/artifact"
    reward = context.store.trainable_copy(start, "reward", "lora", context.config.lora)
    reward.trunk.add_head("reward").init_normal(torch.Generator().manual_seed(0))
    reward = reward.with_role("reward", head="reward")
    context.store.save(reward, artifact)
    context.parents["reward"] = artifact  # type: ignore[index]
    assert PpoStage().needs(context.config) == ("sft", "reward")
    summary = PpoStage().run(context)
    context.tracker.close()
    assert summary["kept_iteration"] == 2
    rows = [json.loads(line) for line in context.folder.metrics_jsonl.read_text().splitlines()]
    assert rows[1]["grad_norm_policy"] > 0
    assert rows[1]["explained_variance"] != 0
    # The trunk that lives on has what evaluation needs, and no value model.
    policy = context.store.open(context.folder.artifact)
    own = {"policy"} if tuning == "lora" else set()
    assert adapter_names(start.trunk.model) == {"reward"} | own
    assert set(start.trunk.heads) == {"reward"}
    assert (policy.trunk is start.trunk) == (tuning == "lora")


def test_nan_reward_stops_the_stage(tmp_path: Path) -> None:
    context = make_context(tmp_path, {}, function="broken")
    with pytest.raises(TrainingError, match="reward broken returned nan"):
        PpoStage().run(context)


def test_the_error_of_a_nan_names_the_best_policy_so_far(tmp_path: Path) -> None:
    context = make_context(tmp_path, {}, function="breaks")
    with pytest.raises(TrainingError, match=r"returned nan.*The best policy so far") as caught:
        PpoStage().run(context)
    best = context.folder.checkpoints / "step-0"
    assert f"(iteration 0, held-out reward 1.000) is in {best}: " in str(caught.value)
    assert context.store.resolve(str(best), "sft").role.name == "policy"


def test_each_prompt_is_tokenised_once_and_cuts_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = {"prompts_per_iteration": 8, "responses_per_prompt": 2, "max_new_tokens": 4}
    held_out = {"every": 1, "num_prompts": 8}
    ppo = {"iterations": 3, "rollout": rollout, "held_out": held_out}
    context = make_context(tmp_path, ppo, max_prompt_tokens=8)
    prompts = [Prompt(text + " And?" * (i % 3)) for i, text in enumerate(TEXTS)]
    corpus = Corpus(prompts=Split(tuple(prompts[16:]), tuple(prompts[:16])))
    context = replace(context, corpus=corpus)
    seen: list[Any] = []
    encode = Codec.prompt_ids

    def spy(codec: Codec, prompt: Any) -> list[int]:
        seen.append(prompt)
        return encode(codec, prompt)

    monkeypatch.setattr(Codec, "prompt_ids", spy)
    summary = PpoStage().run(context)
    assert len(seen) == len(set(seen)) == 3 * 8 + 8
    tokenizer = context.store.open(context.parents["sft"]).codec.tokenizer
    cut = sum(len(tokenizer.encode(text)) > 8 for text in seen)
    assert 0 < cut < len(seen)
    assert summary[PROMPTS_CUT] == cut
    assert f"{cut} {PROMPTS_CUT}" in context.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_start_with_too_few_positions_is_refused(tmp_path: Path) -> None:
    context = make_context(tmp_path, {})
    start = str(context.parents["sft"])
    data = context.config.data.model_copy(update={"max_prompt_tokens": 200})
    ppo = context.config.ppo.model_copy(update={"policy": start})
    # A loaded model: its positions are its own.
    config = context.config.model_copy(update={"data": data, "ppo": ppo})
    write_manifest(Path(start), stage="sft", key="", material={}, summary={}, seconds=0)
    with pytest.raises(ModelError, match=rf"ppo.policy {start} has 256 positions but .* = 328 tok"):
        PpoStage().run(replace(context, config=config))


def _batch(codec: Any, prompt: list[int]) -> Any:
    from pipeline.batches import TokenBatch

    return TokenBatch.from_ragged([prompt], [codec.response_ids("eels see")], codec.pad_id)
