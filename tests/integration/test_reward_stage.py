"""The reward stage on a tiny model: artifact, report, normalisation, the untouched base."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from pipeline.batches import TokenBatch
from pipeline.distributed.runtime import Runtime
from pipeline.errors import DataError
from pipeline.generation import NativeEngine, Sampling
from pipeline.models.adapters import adapter_state, add_adapter, lora_config
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from pipeline.records import Ranking
from pipeline.runfolder import RunFolder
from pipeline.stage import Context
from pipeline.tracking import Tracker
from stages.config import RunConfig
from stages.reward.config import RewardSection
from stages.reward.run import RewardStage

COLOURS = ["red", "green", "blue", "black", "white", "brown", "grey", "pink"]


def make_rankings(count: int, seed: int) -> list[Ranking]:
    """Better responses name the prompt's colour; annotators `ann` and `bob`, two tied responses."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        colour, other, third = rng.sample(COLOURS, 3)
        rows.append(
            Ranking(
                prompt=f"The ball is {colour}. What colour is it? ",
                responses=(f"It is {other}.", f"It is {colour}.", f"It is {third}, I think."),
                ranks=(1, 0, 1),
                annotator=("ann", "bob")[index % 2],
            )
        )
    return rows


def make_config(**reward: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"device": "cpu", "seed": 5, "trackers": []},
            "model": {
                "init": "config",
                "vocabulary_size": 300,
                "architecture": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_attention_heads": 2,
                    "max_position_embeddings": 256,
                },
            },
            "lora": {"rank": 4, "alpha": 8},
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 16},
            "reward": {
                "batch_size": 8,
                "optim": {"learning_rate": 3e-3},
                "normalisation": {"num_samples": 1000, "temperature": 0, "max_new_tokens": 6},
            }
            | reward,
            "ppo": {"rollout": {"max_new_tokens": 16}},
            "evaluation": {"max_new_tokens": 16},
        }
    )


def make_store(config: RunConfig) -> ModelStore:
    return ModelStore(config.model, config.data)


def sft_artifact(folder: Path, config: RunConfig, adapter: bool) -> tuple[ModelStore, Handle]:
    """A random model saved as the SFT stage would: its own weights, or an adapter on a base."""
    store = make_store(config)
    torch.manual_seed(11)
    texts = [text for row in make_rankings(30, 0) for text in (row.prompt, *row.responses)]
    handle = store.build(texts).with_role("sft")
    store.save(handle, folder / "base")
    if not adapter:
        return store, handle
    add_adapter(handle.trunk.model, "sft", lora_config(config.lora))
    handle = handle.with_role("sft", adapter="sft")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(0, 0.1)
    store.save(handle, folder / "sft")
    return store, handle


def run_stage(
    root: Path, config: RunConfig, store: ModelStore, sft: Path, train=32, held_out=12
) -> tuple[dict[str, float], Context]:
    run = RunFolder(root)
    folder = run.stage("reward")
    folder.remove()
    folder.artifact.mkdir(parents=True)
    console = Console(quiet=True)
    rows = make_rankings(train + held_out, 1)
    split = SimpleNamespace(train=tuple(rows[:train]), held_out=tuple(rows[train:]))
    context = Context(
        config=config,
        runtime=Runtime(config.run),
        corpus=SimpleNamespace(rankings=split),
        store=store,
        run=run,
        folder=folder,
        parents={"sft": sft},
        tracker=Tracker(folder.root, "test", (), console),
        console=console,
    )
    try:
        return dict(RewardStage().run(context)), context
    finally:
        context.tracker.close()


def score_one(handle: Handle, prompt: list[int], response: list[int]) -> float:
    batch = TokenBatch.from_ragged([prompt], [response], handle.codec.pad_id)
    with torch.no_grad():
        return handle(batch, {"scores"}).scores.item()


CASES = [("lora", False), ("lora", True), ("full", False), ("full", True)]


@pytest.mark.parametrize(("tuning", "sft_is_lora"), CASES)
def test_stage_leaves_a_normalised_model_and_the_base_as_it_was(
    tuning: str, sft_is_lora: bool, tmp_path: Path
) -> None:
    config = make_config(
        tuning=tuning,
        normalisation={
            "mode": "shift_and_scale", "num_samples": 1000, "temperature": 0, "max_new_tokens": 6
        },
    )  # fmt: skip
    store, sft = sft_artifact(tmp_path, config, sft_is_lora)
    base_before = sft.trunk.base_hash()
    prompt = sft.codec.prompt_ids("The ball is red. ")
    batch = TokenBatch.from_ragged([prompt], [[40, 41, 42]], sft.codec.pad_id)
    with torch.no_grad():
        logprobs_before = sft(batch, {"logprobs"}).logprobs
    folder = tmp_path / ("sft" if sft_is_lora else "base")
    numbers, context = run_stage(tmp_path / "run", config, store, folder)

    assert sft.trunk.base_hash() == base_before
    assert not any(p.requires_grad for p in sft.trunk.parameters())
    with torch.no_grad():
        assert torch.equal(sft(batch, {"logprobs"}).logprobs, logprobs_before)

    # The artifact, opened by a process that knows nothing, scores the SFT policy's own greedy
    # responses to all training prompts with mean 0 and deviation 1.
    live = store.open(context.folder.artifact)
    reward = make_store(config).open(context.folder.artifact)
    assert (live.trunk is sft.trunk) is (tuning == "lora")
    prompts = sorted({tuple(sft.codec.prompt_ids(r.prompt)) for r in make_rankings(44, 1)[:32]})
    drawn = NativeEngine().generate(
        sft, prompts, range(len(prompts)), Sampling(max_new_tokens=6, temperature=0)
    )
    scores = torch.tensor(
        [
            score_one(reward, list(ids), response)
            for ids, response in zip(prompts, drawn.response_ids, strict=True)
        ]
    )
    assert scores.mean().abs() < 1e-4
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert numbers["scale"] > 0


def test_report_counts_held_out_pairs_as_a_loop_does(tmp_path: Path) -> None:
    config = make_config(tuning="lora")
    store, _ = sft_artifact(tmp_path, config, adapter=False)
    numbers, context = run_stage(tmp_path / "run", config, store, tmp_path / "base")
    report = json.loads((context.folder.artifact / "report.json").read_text())
    handle = store.open(context.folder.artifact)
    right = {"ann": 0.0, "bob": 0.0}
    for row in context.corpus.rankings.held_out:
        prompt = handle.codec.prompt_ids(row.prompt)
        scores = [score_one(handle, prompt, handle.codec.response_ids(r)) for r in row.responses]
        # Ranks (1, 0, 1): the second response beats both others, which are tied.
        right[row.annotator] += (scores[1] > scores[0]) + (scores[1] > scores[2])
    held_out = report["held_out"]
    assert held_out["pairs"] == 12 * 2 == numbers["held_out_pairs"]
    assert held_out["accuracy"] == sum(right.values()) / 24 == numbers["accuracy"]
    assert held_out["accuracy_by_annotator"] == {
        name: {"accuracy": count / 12, "pairs": 12} for name, count in right.items()
    }
    assert list(held_out["accuracy_by_rank_distance"]) == ["1"]
    assert report["training"]["pairs"] == 32 * 2
    assert report["normalisation"]["shift"] == pytest.approx(report["normalisation"]["mean"])


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    config = make_config(tuning="lora", normalisation={"mode": "none"}, epochs=2)
    states = []
    for attempt in ("a", "b"):
        store, _ = sft_artifact(tmp_path / attempt, config, adapter=True)
        _, context = run_stage(
            tmp_path / attempt / "run", config, store, tmp_path / attempt / "sft"
        )
        states.append(store.open(context.folder.artifact).parameters())
    assert all(torch.equal(first, second) for first, second in zip(*states, strict=True))


def test_without_held_out_rows_nothing_is_reported_of_them(tmp_path: Path) -> None:
    config = make_config(tuning="lora", normalisation={"mode": "none"})
    store, _ = sft_artifact(tmp_path, config, adapter=False)
    numbers, context = run_stage(
        tmp_path / "run", config, store, tmp_path / "base", train=8, held_out=0
    )
    assert "accuracy" not in numbers and "shift" not in numbers
    report = json.loads((context.folder.artifact / "report.json").read_text())
    assert report["held_out"] is None and report["normalisation"] is None


def test_no_rankings_is_refused(tmp_path: Path) -> None:
    config = make_config()
    store, _ = sft_artifact(tmp_path, config, adapter=False)
    with pytest.raises(DataError, match=r"data\.rankings has no row left"):
        run_stage(tmp_path / "run", config, store, tmp_path / "base", train=0, held_out=3)


def test_a_random_base_is_no_start() -> None:
    with pytest.raises(ValidationError, match=r"reward\.start is base but"):
        make_config(start="base")


def test_a_pretrained_base_is_a_start_of_its_own(tmp_path: Path) -> None:
    # The SFT model here is a base with an adapter; the reward model starts on the bare base.
    store, sft = sft_artifact(tmp_path, make_config(), adapter=True)
    fields = make_config(tuning="lora").model_dump()
    fields["model"] = {"path": str(tmp_path / "base" / "model")}
    fields["reward"]["start"] = "base"
    config = RunConfig.model_validate(fields)
    store = ModelStore(config.model, config.data)
    _, context = run_stage(tmp_path / "run", config, store, tmp_path / "sft", train=8, held_out=2)
    reward, sft = store.open(context.folder.artifact), store.open(tmp_path / "sft")
    assert reward.trunk is sft.trunk  # one base in memory
    # Adapters start with B = 0 and 1 step moves B by the learning rate; sft's B is N(0, 0.1).
    states = [adapter_state(h.trunk.model, h.role.adapter) for h in (reward, sft)]
    largest = [max(v.abs().max() for k, v in s.items() if "lora_B" in k) for s in states]
    assert largest[0] < 0.01 < largest[1]


def test_what_the_stage_needs_follows_the_config() -> None:
    stage = RewardStage()

    def needs(**reward: Any) -> tuple[str, ...]:
        return stage.needs(SimpleNamespace(reward=RewardSection.model_validate(reward)))

    assert needs() == ("sft",)
    assert needs(start="base") == ("sft",)  # whose responses set the score's zero
    assert needs(start="base", normalisation={"mode": "none"}) == ()
