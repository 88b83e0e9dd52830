"""What a run costs: memory by stage and role, and disk, predicted from the config alone.

The models of each stage are built by the stage's own code, on torch's meta device, so that who
shares what is decided in one place; nothing is loaded.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pipeline.models import adapters
from pipeline.models.empty import empty_model
from pipeline.models.footprint import Footprint, Roles, expected
from pipeline.models.loading import explain_load_errors, torch_dtype
from pipeline.models.origin import BaseOrigin
from pipeline.models.store import HANDLE, ModelStore, find_artifact
from pipeline.models.trunk import Handle, Role, Trunk
from pipeline.resume import KEPT_STATES
from pipeline.reward_config import OWN, ModelEntry
from pipeline.reward_list import source_names, walk_entries
from pipeline.runfolder import read_json
from stages.config import RunConfig

STAGES_WITH_MODELS = ("sft", "reward", "ppo")


def predicted_footprint(config: RunConfig, stage: str) -> Footprint | None:
    """What the roles of a stage will cost while it trains; None of a stage that trains nothing.

    Raises:
        PipelineError: a model that the config names cannot be looked at.
    """
    if stage not in STAGES_WITH_MODELS:
        return None
    with torch.device("meta"):
        rehearsal = Rehearsal(config)
        roles, trained = getattr(rehearsal, stage)()
        return expected(roles, trained)


class Rehearsal:
    """The models of a run, stage by stage, without memory."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.store = ModelStore(config.model, config.data, "meta")
        self._bases: dict[str, Handle] = {}

    def sft(self) -> tuple[Roles, list[nn.Parameter]]:
        """Roles of the SFT stage, and what it trains."""
        handle = self.sft_handle()
        roles = {"sft": handle}
        if handle.role.adapter is not None:
            roles = {"base": handle.with_role("base", adapter=None), "sft": handle}
        return roles, handle.parameters()

    def reward(self) -> tuple[Roles, list[nn.Parameter]]:
        """Roles of the reward stage, and what it trains."""
        section = self.config.reward
        sft = self.sft_handle()
        handle = self.reward_handle(sft)
        starts_here = section.base is None and section.start == "sft"
        starts_here = starts_here or section.normalisation.mode != "none"
        roles = {"sft": sft, "reward": handle} if starts_here else {"reward": handle}
        return roles, _without_output_layer(handle, handle.parameters())

    def ppo(self) -> tuple[Roles, list[nn.Parameter]]:
        """Roles of the PPO stage, and what it trains."""
        from pipeline.rewards import ModelReward, reward_roles
        from stages.ppo.actor_critic import ActorCritic
        from stages.ppo.models import build_models

        config = self.config
        policy = config.ppo.policy
        start = self.sft_handle() if policy is None else self._opened(policy, "sft")
        start = start.with_role("policy", head=None)
        rewards = self._rewards(start)
        entries = zip(
            source_names(config.ppo.rewards), walk_entries(config.ppo.rewards), strict=True
        )
        weights = {name: entry.weight for name, entry in entries}
        counting = (model for name, model in rewards.items() if weights[name])
        ours = [model for model in counting if isinstance(model, Handle)]
        source = ModelReward(ours[0]) if len(ours) == 1 else None
        models = build_models(start, source, config, self.store)
        actor_critic = ActorCritic(models.policy, models.value)
        roles = {**models.roles(None), **reward_roles(rewards)}
        return roles, [*actor_critic.policy_parameters(), *actor_critic.value_parameters()]

    # --- handles ---

    def sft_handle(self) -> Handle:
        """The SFT stage's result."""
        config = self.config
        if config.sft.tuning == "lora":
            return self.store.trainable_copy(self._base(), "sft", "lora", config.lora)
        # Trained in full, the base is no longer the base: whoever asks for it gets another.
        return self._load("").with_role("sft")

    def reward_handle(self, sft: Handle) -> Handle:
        """The reward stage's result."""
        section = self.config.reward
        if section.base is not None:
            start = _with_own_limits(self._base(section.base, section.base_revision))
        else:
            start = sft if section.start == "sft" else self._base()
        handle = self.store.trainable_copy(start, "reward", section.tuning, self.config.lora)
        name = handle.role.adapter or "reward"
        handle.trunk.add_head(name)
        return handle.with_role("reward", head=name)

    def _rewards(self, start: Handle) -> dict[str, Handle | nn.Module]:
        """The reward models by name, of ours or of another making; functions have none."""
        rewards, found = self.config.ppo.rewards, dict[str, Handle | nn.Module]()
        own: Handle | None = None
        for name, entry in zip(source_names(rewards), walk_entries(rewards), strict=True):
            if not isinstance(entry, ModelEntry):
                continue
            if entry.model == OWN:
                if own is None:
                    sft = start if self.config.ppo.policy is None else self.sft_handle()
                    own = self.reward_handle(sft)
                found[name] = own
            elif find_artifact(entry.model, "reward") is not None:
                found[name] = self._opened(entry.model, "reward")
            else:
                found[name] = _classifier(entry.model, self.config)
        return found

    def _opened(self, resource: str, stage: str) -> Handle:
        """What `ModelStore.resolve` would open, from its JSON files alone."""
        artifact = find_artifact(resource, stage)
        if artifact is None:
            folder = Path(resource)
            if not (folder / "adapter_config.json").exists():
                return self._base(resource)
            named = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
            return self._adapted(named, [folder, folder.parent], folder, "policy")
        info = read_json(artifact / HANDLE)
        if info["base"] is None:
            handle = self._base(str(artifact / "model"))
        else:
            named = info["base"]["path"]
            handle = self._adapted(named, [artifact], artifact / "adapter", info["role"])
        if read_json(artifact / "tokenizer" / "codec.json").get("max_tokens") is not None:
            handle = _with_own_limits(handle)
        if info["head"] is None:
            return handle
        handle.trunk.add_head(info["head"])
        return handle.with_role(info["role"], head=info["head"])

    def _adapted(self, base: str, places: Sequence[Path], folder: Path, name: str) -> Handle:
        """A base by its id, or by its path from one of `places`, with the adapter of a folder."""
        from peft import LoraConfig

        beside = [(place / base).resolve() for place in places]
        handle = self._base(next((str(path) for path in beside if path.is_dir()), base))
        model = handle.trunk.model
        name = f"{name}-{len(adapters.adapter_names(model))}"
        adapters.add_adapter(model, name, LoraConfig.from_pretrained(str(folder)))
        return handle.with_role(name, adapter=name)

    def _base(self, path: str = "", revision: str | None = None) -> Handle:
        """The base of the run, or that of a folder or Hub id; the same one whoever asks."""
        key = path if path != self.config.model.path else ""
        if key not in self._bases:
            self._bases[key] = self._load(key, revision)
        return self._bases[key]

    def _load(self, path: str, revision: str | None = None) -> Handle:
        model = empty_model(self.config.model, path or None, revision)
        trunk = Trunk(model, BaseOrigin(path, path))
        trunk.freeze()
        return Handle(trunk, Role("base"), cast(Any, _Ids(trunk.vocabulary_size)))


@dataclass(frozen=True)
class _Ids:
    """What stands for a codec where there is no text: equal sizes count as equal vocabularies."""

    vocabulary_size: int
    has_own_limits: bool = False

    def same_ids(self, other: "_Ids") -> bool:
        """See `Codec.same_ids`."""
        return self == other


def _with_own_limits(handle: Handle) -> Handle:
    """A handle as `ModelStore.other_base` gives it: a reward model on it reads text."""
    ids = _Ids(handle.trunk.vocabulary_size, has_own_limits=True)
    return replace(handle, codec=cast(Any, ids))


def _classifier(path: str, config: RunConfig) -> nn.Module:
    """A reward model of another making, as `SequenceClassificationReward` loads it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    code = config.model.trust_remote_code
    with explain_load_errors(path, None):
        shape = AutoConfig.from_pretrained(path, trust_remote_code=code)
        model: nn.Module = AutoModelForSequenceClassification.from_config(
            shape, dtype=torch_dtype(config.model.dtype), trust_remote_code=code
        )
    return model.requires_grad_(False)


def _without_output_layer(handle: Handle, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """What has a gradient where hidden states alone are read: not an output layer of its own."""
    model = handle.trunk.model
    layer, tied = model.get_output_embeddings(), model.get_input_embeddings().weight
    output = {id(p) for p in layer.parameters() if p is not tied} if layer is not None else set()
    return [parameter for parameter in parameters if id(parameter) not in output]


# --- disk -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Weight files that a stage leaves, or holds at most while it runs."""

    stage: str
    what: str
    size: int  # bytes


def predicted_files(config: RunConfig, stages: Sequence[str]) -> list[Files]:
    """The weight files of a run; tokenizers, metrics and samples are not counted.

    Raises:
        PipelineError: a model that the config names cannot be looked at.
    """
    with torch.device("meta"):
        return list(_files(config, stages))


def _files(config: RunConfig, stages: Sequence[str]) -> Iterator[Files]:
    rehearsal = Rehearsal(config)
    if "sft" in stages:
        roles, trained = rehearsal.sft()
        yield Files("sft", "artifact", _saved(roles["sft"]))
        yield _states("sft", trained, keeps_best=config.sft.keep == "best")
    if "reward" in stages:
        roles, trained = rehearsal.reward()
        yield Files("reward", "artifact", _saved(roles["reward"]))
        yield _states("reward", trained, keeps_best=config.reward.keep == "best")
    if not {"ppo", "export"} & set(stages):
        return
    roles, trained = rehearsal.ppo()
    size = _saved(roles["policy"])
    if "ppo" in stages:
        yield Files("ppo", "artifact", size)
        yield Files("ppo", "checkpoints: the best policy and the last", 2 * size)
        if config.ppo.checkpoint_every <= config.ppo.iterations:
            yield _states("ppo", trained, keeps_best=False)
    if "export" in stages:
        yield from _exported(config, size, tuned_in_full=config.ppo.tuning == "full")


def _states(stage: str, trained: Sequence[nn.Parameter], *, keeps_best: bool) -> Files:
    """States to go on from: weights, AdamW's two moments, and the best weights so far.

    While one is written there is one more than are kept.
    """
    size = sum(p.numel() * p.element_size() for p in trained)
    size *= 4 if keeps_best else 3
    return Files(stage, "checkpoints: states to go on from", (KEPT_STATES + 1) * size)


def _exported(config: RunConfig, policy: int, *, tuned_in_full: bool) -> Iterator[Files]:
    """The forms of the export; a GGUF file as if its type were that of `merged/`."""
    export = config.export
    plain = config.model.model_copy(update={"quantization": "none"})
    rehearsal = Rehearsal(config.model_copy(update={"model": plain}))
    kept = torch_dtype(plain.dtype)
    width = torch_dtype(export.dtype or plain.dtype).itemsize / kept.itemsize
    whole = policy
    if not tuned_in_full:
        whole = _base_size(rehearsal.ppo()[0]["policy"])
        forms = {"adapter/": "policy" in export.adapters, "vllm/": export.vllm}
        for form in (form for form, wanted in forms.items() if wanted):
            yield Files("export", form, policy)
        if any(forms.values()) and _run_made_the_base(config):
            yield Files("export", "base/", whole)
    if "sft" in export.adapters:
        yield Files("export", "sft_adapter/", _saved(rehearsal.sft()[0]["sft"]))
    if export.reward or "reward" in export.adapters:
        reward = rehearsal.reward()[0]["reward"]
        if "reward" in export.adapters:
            yield Files("export", "reward_adapter/", _saved(reward))
        if export.reward:
            yield Files("export", "reward/", int(width * _base_size(reward)))
    if export.merged or tuned_in_full:
        yield Files("export", "merged/", int(width * whole))
    if export.gguf is not None:
        yield Files("export", "gguf/", int(width * whole))


def _base_size(handle: Handle | nn.Module) -> int:
    """Bytes of the base that a handle stands on, or of its own weights."""
    assert isinstance(handle, Handle)
    return _saved(handle.with_role("base", adapter=None, head=None))


def _run_made_the_base(config: RunConfig) -> bool:
    """Whether the policy's adapter stands on weights that a run of ours trained."""
    if config.ppo.policy is None:
        return config.sft.tuning == "full"
    artifact = find_artifact(config.ppo.policy, "sft")
    return artifact is not None and read_json(artifact / HANDLE)["base"] is None


def _saved(handle: Handle | nn.Module) -> int:
    """Bytes of the tensors that `ModelStore.save` writes for a handle."""
    assert isinstance(handle, Handle)
    trunk, role = handle.trunk, handle.role
    if role.adapter is None:
        state = [tensor for _, tensor in trunk.base_state()]
    else:
        state = list(adapters.adapter_parameters(trunk.model, role.adapter))
    if role.head is not None:
        state += trunk.heads[role.head].state_dict().values()
    # Tied weights are written once.
    sizes = {t.untyped_storage()._cdata: t.numel() * t.element_size() for t in state}
    return sum(sizes.values())


def free_disk(folder: Path) -> int:
    """Free bytes of the disk that a run's folder lies on, or would lie on."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
