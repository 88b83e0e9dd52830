"""A run of tiny untrained models, as the stages before evaluation would have left it.

The weights are random, so numbers mean nothing; that they are the same through every door does.
"""

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pipeline.config import (
    ArchitectureSection,
    DataSection,
    LoraSection,
    ModelSection,
    RunSection,
    Tuning,
)
from pipeline.data import Corpus, Split
from pipeline.distributed import Runtime
from pipeline.models import adapters
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from pipeline.records import Message, Prompt, Ranking
from pipeline.runfolder import RunFolder, write_json_atomic, write_manifest
from pipeline.stage import Context
from pipeline.tracking import Tracker
from stages.config import RunConfig
from stages.evaluation.config import EvaluationSection
from stages.export.config import ExportSection
from stages.ppo.config import PpoSection

POSTS = [f"POST: {name} lost {thing}.\nTL;DR:" for name in ("Anna", "Jun", "수진", "Omar")
         for thing in ("a red lamp", "two keys", "노란 우산")]  # fmt: skip
SUMMARIES = [" A lamp is gone.", " Keys lost.", " 우산을 잃어버렸다.", " Nothing."]


def config(root: Path, tuning: Tuning = "lora", **evaluation: Any) -> RunConfig:
    """A configuration whose models have a few thousand weights."""
    architecture = ArchitectureSection(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=256,
    )  # fmt: skip
    return RunConfig(
        run=RunSection(name="tiny", folder=str(root), device="cpu", trackers=()),
        model=ModelSection(init="config", architecture=architecture, vocabulary_size=300),
        lora=LoraSection(rank=4, alpha=8),
        data=DataSection(max_prompt_tokens=64, max_response_tokens=32),
        ppo=PpoSection(tuning=tuning),
        evaluation=EvaluationSection(
            **{"prompts": 8, "max_new_tokens": 12, "max_n": 4, "generation_rows": 5, **evaluation}
        ),
        export=ExportSection(merged=True),
    )


class TinyRun:
    """SFT, reward and PPO artifacts of random weights, and contexts for the stages after them."""

    def __init__(self, settings: RunConfig, *, conversations: bool = False) -> None:
        """`conversations`: its models were trained on turns, rendered plainly."""
        torch.manual_seed(7)
        self.config = settings
        self.run = RunFolder(Path(settings.run.folder) / settings.run.name)
        self.run.create()
        self.store = self.fresh_store()
        self.screen = io.StringIO()
        if settings.model.init == "config":
            sft = self.store.build(POSTS + SUMMARIES).with_role("sft")
        else:
            sft = self._tuned(self.store.pretrained(), "sft", settings.sft.tuning)
        if conversations:
            sft.codec.prompt_ids((Message("user", POSTS[0]),))
        self._finish("sft", sft)
        reward = self._tuned(self.sft, "reward", "lora")
        head = reward.trunk.add_head("reward")
        head.init_normal(torch.Generator().manual_seed(0))
        self._finish("reward", reward.with_role("reward", head="reward"))
        held_out = {"held_out": {"pairs": 40, "accuracy": 0.7, "ece": 0.05}}
        write_json_atomic(self.run.stage("reward").artifact / "report.json", held_out)
        self._finish("ppo", self._tuned(self.sft, "policy", settings.ppo.tuning))
        rankings = (
            Ranking(POSTS[0], (" A lamp is gone.", " Nothing.", " A lamp."), (0, 2, 1)),
            Ranking(POSTS[1], (" Nothing.", " Keys lost."), (0, 1)),
        )
        prompts = tuple(
            Prompt(post, {"reference": SUMMARIES[0]}, f"prompts.jsonl:{line}")
            for line, post in enumerate(POSTS, 1)
        )
        report = {
            kind: {"source": {"path": path}, "kept": {"train": 3, "held_out": 12}}
            for kind, path in (("demonstrations", "someone/posts"), ("rankings", "/data/r.jsonl"))
        }
        report["prompts"] = {"source": {}, "kept": {"train": 24, "held_out": 12}}
        self.corpus = Corpus(
            rankings=Split(rankings, rankings), prompts=Split(prompts, prompts), report=report
        )
        write_json_atomic(self.run.data_json, report)

    def fresh_store(self) -> ModelStore:
        """A store that has nothing in memory, as a new process would."""
        return ModelStore(self.config.model, self.config.data)

    @property
    def sft(self) -> Handle:
        """The SFT policy, live."""
        return self.store.open(self.run.stage("sft").artifact)

    @property
    def policy(self) -> Handle:
        """The PPO policy, live."""
        return self.store.open(self.run.stage("ppo").artifact)

    def context(self, stage: str, needs: tuple[str, ...]) -> Context:
        """What the chain would hand to `stage`."""
        folder = self.run.stage(stage)
        folder.artifact.mkdir(parents=True, exist_ok=True)
        console = Console(file=self.screen, width=160)
        return Context(
            config=self.config,
            runtime=Runtime(self.config.run),
            corpus=self.corpus,
            store=self.store,
            run=self.run,
            folder=folder,
            parents={name: self.run.stage(name).artifact for name in needs},
            tracker=Tracker(folder.root, "tiny", (), console, active=False),
            console=console,
        )

    def _tuned(self, source: Handle, name: str, tuning: Tuning) -> Handle:
        """A copy of `source` whose weights moved as far as training would move them."""
        handle = self.store.trainable_copy(source, name, tuning, self.config.lora)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        if tuning == "lora":
            assert handle.role.adapter in adapters.adapter_names(handle.trunk.model)
        return handle

    def _finish(self, stage: str, handle: Handle) -> None:
        folder = self.run.stage(stage).artifact
        self.store.save(handle, folder)
        write_manifest(folder, stage=stage, key=stage, material={}, summary={}, seconds=1.5)
