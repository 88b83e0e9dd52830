"""One frozen base in memory for every role of every stage, loaded once and never written.

The whole chain runs in this process, on a pretrained base in a folder. At each stage's start and
end, at every optimiser step, and round each rollout and update of PPO, all tensors that are alive
are counted: not those that some record names.
"""

import functools
import gc
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pipeline.config import ArchitectureSection
from pipeline.generation import NativeEngine
from pipeline.models import adapters, loading
from pipeline.models.trunk import Trunk
from stages import STAGES
from stages.cli import app
from stages.ppo.update import Updater

ROWS = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
CONFIG = """
run: {device: cpu, trackers: [], name: tiny}
model: {path: model}
data: {demonstrations: d.jsonl, rankings: r.jsonl, max_prompt_tokens: 16, max_response_tokens: 16}
lora: {rank: 3}
sft: {tuning: lora, max_steps: 2, batch_size: 8, optim: {learning_rate: 1.0e-2}}
reward: {tuning: lora, max_steps: 2, batch_size: 8, normalisation: {num_samples: 4}}
ppo:
  iterations: 2
  keep: last
  rollout: {prompts_per_iteration: 8, max_new_tokens: 8}
  optim: {ppo_epochs: 2, learning_rate: 1.0e-2}
  held_out: {num_prompts: 2, every: 1}
evaluation: {prompts: 2, max_new_tokens: 4, max_n: 2}
"""
WHOLE_CHAIN = ["sft", "reward", "ppo", "evaluation", "export"]


def make_base(width: int, folder: Path, model_type: str, **extra: object) -> None:
    """A base with an output layer of its own; nothing else in the process has its widths."""
    torch.manual_seed(0)
    tokenizer = loading.train_tokenizer(["good bad say"], 301)
    shape = ArchitectureSection(
        model_type=model_type, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * width + 6, max_position_embeddings=64, tie_word_embeddings=False,
        extra=extra,
    )  # fmt: skip
    loading.build_from_config(shape, tokenizer, torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's weights as transformers has them in memory, where experts are one tensor."""
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def digest(named: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the base's weights by name."""
    found = hashlib.sha256()
    for name in sorted(named):
        found.update(name.encode() + named[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


class Census:
    """Counts what is alive of a base's size, wherever it hangs."""

    def __init__(self, folder: Path) -> None:
        weights = read(folder)
        self.hash = digest(weights)
        # By size, so that a flattened or transposed copy counts too. A vector may be a head's.
        matrices = [weight for weight in weights.values() if weight.dim() > 1]
        self.sizes = Counter(weight.numel() for weight in matrices)
        self.embedding = weights["model.embed_tokens.weight"].numel()  # the output's, too
        self.seen: list[tuple[str, Counter[int]]] = []
        self.hashes: list[tuple[str, str]] = []
        self.trunks: set[int] = set()

    def take(self, moment: str) -> None:
        """Note which storages of the base's sizes there are now, and what the base holds."""
        storages: dict[int, set[int]] = {size: set() for size in self.sizes}
        alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        # A gradient that nobody asked for has no object of Python's.
        alive += [x.grad for x in alive if x.is_leaf and x.grad is not None]
        for tensor in alive:
            size, is_real = tensor.numel(), tensor.device.type != "meta"
            if size in storages and is_real and tensor.is_floating_point():
                storages[size].add(tensor.untyped_storage().data_ptr())
        self.seen.append((moment, Counter({size: len(x) for size, x in storages.items() if x})))
        for trunk in self.live_trunks():
            self.trunks.add(id(trunk))
            self.hashes.append((moment, digest(dict(trunk.base_parameters()))))

    def live_trunks(self) -> list[Trunk]:
        """Every trunk of the base that has memory."""
        return [
            thing
            for thing in gc.get_objects()
            if type(thing) is Trunk
            and thing.device.type != "meta"
            and thing.vocabulary_size * thing.hidden_size == self.embedding
        ]

    def sets(self, moment: str) -> list[Counter[int]]:
        """The counts of all moments of this name."""
        return [found for name, found in self.seen if name == moment]

    def times(self, count: int) -> Counter[int]:
        """The sizes of `count` sets of base weights."""
        return Counter({size: count * number for size, number in self.sizes.items()})


@dataclass(frozen=True)
class Run:
    """A chain that has run, and all that was seen of it."""

    census: Census
    loaded: list[str]  # folders of bases and adapters, one entry a load
    folder: Path


def run_chain(folder: Path, width: int, *overrides: str, **shape: Any) -> Run:
    """`rlhf run` in this process, on a base of this width in `folder`."""
    gc.collect()
    gc.freeze()  # What there is already cannot be of a base that is yet to be made.
    make_base(width, folder / "model", **{"model_type": "llama", **shape})
    census = Census(folder / "model")
    loaded: list[str] = []
    load, load_adapter = loading.load_pretrained, adapters.load_adapter
    prompts = [{"prompt": row["prompt"], "response": "good"} for row in ROWS]
    for name, rows in (("r.jsonl", ROWS), ("d.jsonl", prompts)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.yaml").write_text(CONFIG)

    def counted(section: Any, path: str, *rest: Any) -> Any:
        loaded.append(Path(path).name)
        return load(section, path, *rest)

    def counted_adapter(model: Any, name: str, place: Path) -> None:
        loaded.append(place.name)
        load_adapter(model, name, place)

    hook = register_optimizer_step_pre_hook(lambda *_: census.take("step"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(loading, "load_pretrained", counted)
            patch.setattr(adapters, "load_adapter", counted_adapter)
            for place in STAGES.values():
                module, name = place.split(":")
                stage = getattr(import_module(module), name)
                watch(patch, stage, "run", census, stage.name)
            watch(patch, Updater, "update", census, "update")
            watch(patch, NativeEngine, "generate", census, "generate")
            result = CliRunner().invoke(app, ["run", "c.yaml", *overrides])
        assert result.exit_code == 0, result.output + repr(result.exception)
    finally:
        hook.remove()
        gc.unfreeze()
    return Run(census, loaded, folder)


def watch(patch: pytest.MonkeyPatch, owner: type, method: str, census: Census, name: str) -> None:
    """Count before and after each call."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        census.take(f"{name} starts")
        result = original(*args, **kwargs)
        census.take(f"{name} ends")
        return result

    patch.setattr(owner, method, watched)


MIXTURE = {
    "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2,
    "intermediate_size": 132,
}  # fmt: skip
LORA_RUNS = {
    "separate": ("separate", 28, {}),
    "shared": ("shared", 36, {}),
    "mixture": ("separate", 60, MIXTURE),
}


@pytest.fixture(scope="module", params=LORA_RUNS)
def lora_run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Adapters in every stage, with a value adapter of its own or a head on the policy.

    Adapters of a mixture's experts put products in the place of parameters while a pass lasts.
    """
    value, width, shape = LORA_RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return run_chain(folder, width, f"ppo.value={value}", "export.merged=true", **shape)


def test_a_lora_run_has_one_base_in_every_stage(lora_run: Run) -> None:
    census = lora_run.census
    moments = Counter(moment for moment, _ in census.seen)
    assert [name for name in WHOLE_CHAIN if moments[f"{name} starts"] == 1] == WHOLE_CHAIN
    # 2 steps of SFT, 2 of the reward model, 2 epochs of 2 iterations of PPO.
    assert moments["step"] == 2 + 2 + 2 * 2
    # For the reward's zero; held out 0, 1 and 2; two rollouts; SFT's and PPO's evaluation.
    assert moments["update ends"] == 2 and moments["generate ends"] >= 1 + 3 + 2 + 2
    first, *others = census.seen
    assert first == ("sft starts", Counter())  # nothing is loaded before it is wanted
    assert {moment for moment, found in others if found != census.times(1)} == set()


def test_a_lora_run_loads_its_base_once_and_no_adapter(lora_run: Run) -> None:
    """Stages hand on live handles: nothing is read again that was just written."""
    assert lora_run.loaded == ["model"]
    assert len(lora_run.census.trunks) == 1


def test_a_lora_run_never_writes_the_base(lora_run: Run) -> None:
    """From the file through training, generation and merging, in memory and on disk."""
    census, folder = lora_run.census, lora_run.folder
    assert {f"{name} ends" for name in WHOLE_CHAIN} <= {moment for moment, _ in census.hashes}
    assert {moment for moment, found in census.hashes if found != census.hash} == set()
    assert digest(read(folder / "model")) == census.hash
    # The run did train: the merged policy is another model.
    merged = read(folder / "runs/tiny/export/merged")
    assert len(merged) > 10 and digest(merged) != census.hash


@pytest.mark.parametrize(("value", "width", "trained"), [("separate", 44, 2), ("shared", 52, 1)])
def test_full_fine_tuning_adds_a_set_a_trained_role(
    tmp_path: Path, value: str, width: int, trained: int
) -> None:
    """The base of reference and reward, and each trained role's own: the census sees them.

    Values need no output layer: a value model of its own has none.
    """
    run = run_chain(tmp_path, width, "ppo.tuning=full", f"ppo.value={value}")
    census = run.census
    assert run.loaded == ["model"]
    each = census.times(trained)
    each.subtract({census.embedding: trained - 1})
    assert census.sets("update starts")[0] == census.times(1) + each
    # PPO's first step comes after 2 of SFT and 2 of the reward model: each trained weight has its
    # gradient, and at the second its two moments.
    for step, extra in ((4, 1), (5, 3)):
        found = census.times(1)
        for _ in range(1 + extra):
            found.update(each)
        assert census.sets("step")[step] == found
