"""What `rlhf chat` and `rlhf generate` are pointed at: a run with its stages, or one model."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipeline import yaml_core
from pipeline.config import DataSection, ModelSection, RunSection
from pipeline.data.readers import HUB_ID
from pipeline.data.validate import nearest
from pipeline.distributed import Runtime
from pipeline.errors import ConfigError, ModelError
from pipeline.generation import LocalEngine
from pipeline.models.store import ModelStore, find_artifact
from pipeline.models.trunk import Handle
from pipeline.rewards import Opener, RewardSource
from pipeline.runfolder import RunFolder
from pipeline.yaml_config import validated
from stages.config import RunConfig

# The policies of a run, the newest first: what PPO made, what it started from, and the bare model.
STAGES_WITH_POLICY = ("ppo", "sft", "base")
EXPORTED = ("adapter", "merged")
UNLIMITED = 1 << 30  # positions of a model that has no limit of its own
MODEL_FILES = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn, where a user does not say: as the run's evaluation draws them."""

    max_new_tokens: int = 256
    temperature: float = 1.0


class Target:
    """A run folder, an artifact, an export, a PEFT adapter, a transformers folder or a Hub id.

    Of a run, `names` are its policies, the newest first; of all else there is one, `policy`, and of
    an adapter its base. Models are opened when they are asked for.
    """

    def __init__(
        self,
        resource: str,
        device: Literal["auto", "cpu"] = "auto",
        *,
        trust_code: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        """`trust_code`: whether Python code from the model's repository may run.

        Raises:
            ModelError: there is no such folder, or nothing in it.
        """
        self.resource = resource
        folder = Path(resource).expanduser()
        _refuse_missing(folder, resource)
        self.config = _run_config(folder)
        # What lies in a run's folder is opened, and answers, as in the run.
        places = (folder, *folder.resolve().parents[:3]) if folder.exists() else ()
        found = (config for place in places if (config := _run_config(place)) is not None)
        self.around = next(found, None)
        section = self.around.model if self.around else ModelSection(path=resource)
        # A run folder may come from elsewhere: its word is not enough to run code.
        section = section.model_copy(update={"trust_remote_code": trust_code})
        data = self.config.data if self.config else DataSection()
        runtime = Runtime(RunSection(device=device, trackers=()))
        generation = self.config.generation if self.config else None
        self.store = ModelStore(section, data, runtime.device, generation=generation)
        self.engine = LocalEngine(cuda_graphs=cuda_graphs)
        self._open: dict[str, Handle] = {}
        if self.config is None:
            self._open["policy"] = self._one_model(folder)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The policies that there are to talk to.

        Raises:
            ModelError: the run has none yet.
        """
        if self.config is None:
            has_base = self._open["policy"].role.adapter is not None
            return ("policy", "base") if has_base else ("policy",)
        found = [name for name in STAGES_WITH_POLICY if self._named(name) is not None]
        if not found:
            raise ModelError(
                f"run {self.resource} has no policy yet: run `rlhf sft` or `rlhf run` with its "
                "config.yaml"
            )
        return tuple(found)

    def drawing(self, stage: str | None) -> Drawing:
        """The run's evaluation's, or ours; answers leave half of the model's positions."""
        if self.around is not None:
            section = self.around.evaluation
            return Drawing(section.max_new_tokens, section.temperature)
        half = max(1, _positions(self.policy(stage)) // 2)
        return Drawing(max_new_tokens=min(Drawing.max_new_tokens, half))

    def policy(self, name: str | None = None) -> Handle:
        """The policy called `name`, or the newest.

        Raises:
            ConfigError: there is none of this name.
        """
        name = name or self.names[0]
        if name not in self.names:
            raise ConfigError(
                f"{self.resource} has no policy {name!r}: there is {' and '.join(self.names)}"
            )
        if name not in self._open:
            self._open[name] = self._opened(name)
        return self._open[name]

    def rewards(self) -> RewardSource:
        """What the run was trained against.

        Raises:
            ModelError: the target is no run, or its reward model is not finished.
        """
        if self.config is None:
            raise ModelError(f"{self.resource} is no run, so that it has no reward to choose by")
        store = self.store
        opener = Opener(store, store.section, None, lambda: store.resolve(self.resource, "reward"))
        return opener.open(self.config.ppo.rewards)

    # --- inside ---

    def _named(self, name: str) -> str | None:
        """What `ModelStore` opens as the run's policy `name`; None if there is none."""
        assert self.config is not None
        if name == "base":
            return self.config.model.path
        if RunFolder(Path(self.resource)).stage(name).manifest() is not None:
            return self.resource
        return self.config.ppo.policy if name == "sft" else None  # what PPO starts from

    def _opened(self, name: str) -> Handle:
        if self.config is None:  # the base of an adapter
            return self._open["policy"].with_role("base", adapter=None, head=None)
        if name == "base":
            return self.store.pretrained()
        resource = self._named(name)
        assert resource is not None
        return self._checked(self.store.resolve(resource, name), resource)

    def _one_model(self, folder: Path) -> Handle:
        if (folder / "export.json").exists():  # of an export, the first form that there is
            folder = next((folder / form for form in EXPORTED if (folder / form).is_dir()), folder)
        loadable = any((folder / name).exists() for name in MODEL_FILES)
        if folder.is_dir() and not loadable and find_artifact(str(folder), "ppo") is None:
            raise ModelError(
                f"{self.resource} holds no model: name a run, an artifact, an export, a PEFT "
                "adapter or a folder of transformers"
            )
        resource = str(folder) if folder.is_dir() else self.resource
        return self._checked(self.store.resolve(resource, "ppo"), resource)

    def _checked(self, handle: Handle, resource: str) -> Handle:
        if handle.role.head is not None:
            raise ModelError(f"{resource} holds a {handle.role.name} model, which writes no text")
        return handle


def _refuse_missing(folder: Path, resource: str) -> None:
    """What is not there, and cannot be a Hub id or is nearly the name of a folder that is."""
    if folder.exists():
        return
    is_path = folder.parent not in (Path(), folder) and folder.parent.is_dir()
    beside = folder.parent.iterdir() if is_path else ()
    guess = nearest(folder.name, [path.name for path in beside if path.is_dir()])
    hint = f": did you mean {folder.parent / guess}?" if guess else ""
    if hint or not HUB_ID.fullmatch(resource):
        raise ModelError(f"{resource}: no such folder{hint}")


def fitted(handle: Handle, max_new_tokens: int) -> Handle:
    """The handle with a codec that cuts prompts to what the model's positions leave.

    Raises:
        ConfigError: they leave nothing.
    """
    positions = _positions(handle)
    if max_new_tokens >= positions:
        raise ConfigError(
            f"{max_new_tokens} new tokens leave no room for a prompt: the model has {positions} "
            f"positions. Ask for at most {positions - 1} (--max-new-tokens)"
        )
    # Each side of an encoder-decoder has all positions; the decoder's first is its start token's.
    two_sides = handle.trunk.model.config.is_encoder_decoder
    longest = positions - (1 if two_sides else max_new_tokens)
    return replace(handle, codec=handle.codec.with_limits(longest, max_new_tokens))


def _positions(handle: Handle) -> int:
    """Tokens of the longest sequence that the model reads."""
    config = handle.trunk.model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or UNLIMITED


def _run_config(folder: Path) -> RunConfig | None:
    """The configuration of a run folder, whose data need not be there any more; None for others.

    Raises:
        ConfigError: config.yaml is not one of ours.
    """
    path = RunFolder(folder).config_yaml
    if not path.is_file() or (folder / "config.json").exists():
        return None
    document = yaml_core.load(yaml_core.read_text(path), str(path))
    if not isinstance(document.data, dict):
        raise ConfigError(f"{path} is not the configuration of a run")
    return validated(document, RunConfig, folder)
