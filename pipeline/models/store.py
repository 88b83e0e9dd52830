"""The models of a process: one base in memory, artifacts written and opened as handles.

Stages never load weights themselves. `open` answers with the live handle while the process that
made an artifact still runs, and rebuilds it from the files otherwise, to the same numbers.

An artifact folder holds `handle.json`, `tokenizer/`, and: `adapter/` (plain PEFT) on a base that
`handle.json` names, or `model/` (plain transformers) where the role has weights of its own; with
`head.safetensors` where the role has a head.
"""

import copy
import os
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.codec import Codec
from pipeline.config import DataSection, LoraSection, ModelSection, Tuning
from pipeline.distributed.sharding import local, rows_like
from pipeline.errors import ModelError
from pipeline.generation_config import GenerationSection
from pipeline.models import adapters, loading
from pipeline.models.encoders import positions
from pipeline.models.origin import BaseOrigin
from pipeline.models.trained import TrainedState, load_head, save_head, trained_state
from pipeline.models.trunk import Handle, Role, Trunk
from pipeline.pair_codec import PairCodec
from pipeline.runfolder import read_json, verify, write_json_atomic, writing

HANDLE = "handle.json"


def find_artifact(resource: str, stage: str) -> Path | None:
    """The artifact that a user names by its folder, its stage's, or its run's (that of `stage`)."""
    folder = Path(resource)
    for artifact in (folder / stage / "artifact", folder / "artifact", folder):
        if (artifact / HANDLE).exists():
            return artifact
    return None


class ModelStore:
    """Opens, keeps and saves the handles of a run."""

    def __init__(
        self,
        model: ModelSection,
        data: DataSection,
        device: torch.device | str = "cpu",
        *,
        shards: bool = False,
        generation: GenerationSection | None = None,
    ) -> None:
        """`shards`: trunks lie on the host until `Runtime.shard` leaves each process its rows.

        `generation` is how the run samples; without it artifacts are sampled from as they were.
        """
        self.section = model
        self.data = data
        self.generation = generation
        self.shards = shards
        self.device = torch.device("cpu" if shards else device)
        self.computes_on = torch.device(device)
        self._trunks: dict[str, Trunk] = {}  # by identity of the base
        self._live: dict[Path, Handle] = {}  # by artifact folder

    # --- starting points ---

    def pretrained(self, path: str | None = None, revision: str | None = None) -> Handle:
        """The bare model of a Hub id or folder (default: `model.path`), which writes text.

        Raises:
            ModelError: it is an encoder.
        """
        if path is None:
            assert self.section.path is not None
            path, revision = self.section.path, self.section.revision
        handle = self._bare(path, revision)
        loading.refuse_encoder(handle.trunk.model.config, path)
        return replace(handle, codec=self._of_run(handle.codec))

    def other_base(
        self, path: str, revision: str | None, max_prompt_tokens: int, max_response_tokens: int
    ) -> Handle:
        """A bare model besides the run's base, encoders too, with token limits of its own.

        Its codec keeps prompt and response within its positions.
        """
        handle = self._bare(path, revision)
        codec = handle.codec.with_limits(max_prompt_tokens, max_response_tokens)
        codec = codec.with_positions(positions(handle.trunk.model))
        return replace(handle, codec=self._of_run(codec))

    def build(self, texts: list[str]) -> Handle:
        """A small model with random weights and a tokenizer trained on `texts` (init: config)."""
        tokenizer = loading.train_tokenizer(texts, self.section.vocabulary_size)
        model = loading.build_from_config(
            self.section.architecture, tokenizer, loading.torch_dtype(self.section.dtype)
        )
        trunk = Trunk(model, BaseOrigin("model.architecture", "random")).place(self.device)
        trunk.freeze()
        return Handle(trunk, Role("base"), self._of_run(self._codec(tokenizer, trunk)))

    def resolve(self, resource: str, stage: str) -> Handle:
        """The handle that a user names: a run, an artifact, a PEFT adapter, a model, a Hub id.

        Of a run, the artifact of `stage` is taken, under the token limits of this run. The base of
        this run by its id is the one of `model.revision`.
        """
        folder = Path(resource)
        artifact = find_artifact(resource, stage)
        if artifact is not None:
            verify(artifact)
            handle, limits = self.open(artifact), self.data
            if handle.codec.max_tokens is not None:
                return handle  # on a base with limits of its own
            return replace(
                handle,
                codec=handle.codec.with_limits(
                    limits.max_prompt_tokens, limits.max_response_tokens
                ),
            )
        if (folder / "config.yaml").exists() and not (folder / "config.json").exists():
            raise ModelError(f"run {folder} has no finished {stage} stage: run `rlhf {stage}`")
        if (folder / "adapter_config.json").exists():
            return self._open_peft(folder)
        return self.pretrained(
            resource, self.section.revision if resource == self.section.path else None
        )

    # --- roles ---

    def fork(self, handle: Handle, name: str) -> Handle:
        """The same role in memory of its own, without the source's other adapters and heads."""
        source, role = handle.trunk, handle.role
        model = copy.deepcopy(source.model)
        for other in adapters.adapter_names(model) - {role.adapter}:
            adapters.remove_adapter(model, other)
        if role.adapter is None:
            adapters.unwrap(model)
        trunk = Trunk(model, source.origin).place(self.device)
        if role.head is not None:
            trunk.heads[role.head] = copy.deepcopy(source.heads[role.head])
        trunk.freeze()
        return Handle(trunk, replace(role, name=name), handle.codec)

    def forget(self, trunk: Trunk) -> None:
        """Let go of a trunk: whoever asks for its base or artifacts has them loaded again."""
        self._trunks = {key: kept for key, kept in self._trunks.items() if kept is not trunk}
        self._live = {key: kept for key, kept in self._live.items() if kept.trunk is not trunk}

    def trainable_copy(
        self, source: Handle, name: str, tuning: Tuning, lora: LoraSection
    ) -> Handle:
        """The same function as `source`, computed with weights of its own to train.

        `lora` adds an adapter to the shared base: a copy of the source's, or a fresh one. `full`
        copies all weights; an adapter of the source is merged into the copy.

        Raises:
            ModelError: all weights of a quantised base cannot be trained, nor merged into.
        """
        if tuning == "full":
            if loading.is_quantised(source.trunk.model):
                raise ModelError(
                    f"model.quantization is {self.section.quantization}, which only a frozen base "
                    f"can be: {name} would get weights of its own. Set tuning to lora, or "
                    "model.quantization to none."
                )
            copied = self.fork(source, name)
            if source.role.adapter is not None:
                adapters.bake(copied.trunk.model, source.role.adapter)
            return copied.with_role(name, adapter=None)
        model = source.trunk.model
        adapter = _free_name(name, adapters.adapter_names(model))
        if source.role.adapter is not None:
            adapters.copy_adapter(model, source.role.adapter, adapter)
        else:
            adapters.add_adapter(model, adapter, adapters.lora_config(lora))
        return source.with_role(name, adapter=adapter)

    # --- artifacts ---

    def save(self, handle: Handle, folder: Path) -> None:
        """Write a handle as an artifact, and let the live handle stand for it from now on."""
        self.write(handle, trained_state(handle), folder)
        self.adopt(handle, folder)

    def write(self, handle: Handle, state: TrainedState, folder: Path) -> None:
        """Write a handle with its `trained_state` as an artifact. The files alone count."""
        trunk, role = handle.trunk, handle.role
        handle.codec.save(folder / "tokenizer")
        base = None
        if role.adapter is None:
            self._save_model(handle, state.weights, folder / "model")
        else:
            origin = trunk.origin
            base = asdict(origin)
            if origin.is_local:
                # A run that moves takes its own base along; a base elsewhere stays where it is.
                base["path"] = os.path.relpath(origin.path, folder.resolve())
                base["absolute"] = origin.path
            adapters.save_adapter(
                trunk.model,
                role.adapter,
                folder / "adapter",
                origin.path,
                origin.revision,
                state.weights,
            )
        if role.head is not None:
            save_head(state.head, folder / "head.safetensors")
        record = {"format": 1, "role": role.name, "head": role.head, "base": base}
        write_json_atomic(folder / HANDLE, record | {"pooling": role.pooling})
        self._live.pop(folder.resolve(), None)

    def adopt(self, handle: Handle, folder: Path) -> None:
        """Let the live handle stand for the artifact that it was saved as, by whichever process."""
        trunk = handle.trunk
        if handle.role.adapter is None:
            identity = loading.folder_identity(folder / "model")
            trunk.origin = BaseOrigin(str((folder / "model").resolve()), identity)
            # Training moved the weights: the trunk is no longer the base it was loaded as.
            self._trunks = {k: kept for k, kept in self._trunks.items() if kept is not trunk}
            self._trunks[identity] = trunk
        self._live[folder.resolve()] = handle

    def open(self, folder: Path) -> Handle:
        """The handle of an artifact: the live one, or one rebuilt from its files.

        Raises:
            ModelError: the base it was trained on is gone or another one.
            CheckpointError: a file is missing or damaged.
        """
        folder = folder.resolve()
        if folder in self._live:
            return self._live[folder]
        info = read_json(folder / HANDLE)
        codec = self._of_run(Codec.load(folder / "tokenizer"))
        adapter = head = None
        if info["base"] is None:
            trunk, _ = self._load_base(str(folder / "model"), None)
        else:
            trunk = self._base_of(info["base"], folder)
            adapter = _free_name(info["role"], adapters.adapter_names(trunk.model))
            adapters.load_adapter(trunk.model, adapter, folder / "adapter")
        if info["head"] is not None:
            head = _free_name(info["head"], set(trunk.heads))
            trunk.add_head(head, load_head(folder / "head.safetensors"))
        trunk.freeze()
        handle = Handle(trunk, Role(info["role"], adapter, head, info.get("pooling")), codec)
        self._live[folder] = handle
        return handle

    def reload(self, handle: Handle, folder: Path) -> None:
        """Set the weights of a handle back to those that it was written with into `folder`."""
        trunk, role = handle.trunk, handle.role
        if role.adapter is not None:
            adapters.load_adapter_state(
                trunk.model, role.adapter, adapters.read_adapter(folder / "adapter")
            )
            return
        own = dict(trunk.base_state())
        saved = self._read_model(folder / "model", own)
        for name, tensor in own.items():
            if name in saved:  # of tied weights one name is written
                local(tensor).copy_(rows_like(saved[name], tensor))

    def forget_sharded(self) -> None:
        """Let go of trunks that are sharded for their stage: the next one opens artifacts."""
        trunks = {id(h.trunk): h.trunk for h in self._live.values()}
        for trunk in [*trunks.values(), *self._trunks.values()]:
            if trunk.shards is not None:
                self.forget(trunk)

    def is_on(self, handle: Handle, other: Handle) -> bool:
        """Whether two handles share one base in memory."""
        return handle.trunk is other.trunk

    # --- inside ---

    def _read_model(self, folder: Path, known: Collection[str]) -> dict[str, Tensor]:
        """The weights of a model folder under the names that they have in memory."""
        from safetensors.torch import load_file

        saved: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            saved |= load_file(path)
        if saved.keys() <= set(known):
            return saved
        # transformers writes the experts of a mixture one by one, and puts them together again.
        model, _ = loading.load_pretrained(self.section, str(folder), None, torch.device("cpu"))
        whole: dict[str, Tensor] = model.state_dict()
        return whole

    def _bare(self, path: str, revision: str | None) -> Handle:
        trunk, tokenizer = self._load_base(path, revision)
        return Handle(trunk, Role("base"), self._codec(tokenizer, trunk))

    def _of_run(self, codec: Codec) -> Codec:
        return codec.of_run(self.data.system_prompt, self.generation)

    def _codec(self, tokenizer: Any, trunk: Trunk) -> Codec:
        kind = PairCodec if trunk.is_encoder else Codec
        return kind(
            tokenizer,
            stop_ids=loading.stop_ids(trunk.model),
            encoder_decoder=trunk.model.config.is_encoder_decoder,
            chat_template=self.section.chat_template,
            max_prompt_tokens=self.data.max_prompt_tokens,
            max_response_tokens=self.data.max_response_tokens,
        )

    def _load_base(self, path: str, revision: str | None) -> tuple[Trunk, Any]:
        identity = loading.base_identity(path, revision)
        if identity in self._trunks:
            trunk = self._trunks[identity]
            return trunk, trunk.tokenizer
        model, tokenizer = loading.load_pretrained(self.section, path, revision, self.device)
        # A branch of the Hub moves; what was trained on it belongs to the commit that it was at.
        commit = None if Path(path).is_dir() else loading.cached_commit(path, revision)
        origin = BaseOrigin(path, identity, revision)
        if commit is not None:
            origin = BaseOrigin(path, loading.base_identity(path, commit), commit)
        if not self.shards:  # shards get memory of their own
            loading.align(model)
        trunk = Trunk(model, origin).place(self.device)
        trunk.tokenizer = tokenizer
        trunk.freeze()
        self._trunks[identity] = self._trunks[origin.identity] = trunk
        return trunk, tokenizer

    def _base_of(self, base: dict[str, Any], folder: Path) -> Trunk:
        origin = BaseOrigin(base["path"], base["identity"], base["revision"])
        if origin.identity in self._trunks:
            return self._trunks[origin.identity]
        path = origin.path
        if origin.is_local:
            places = [(folder / path).resolve(), Path(base.get("absolute", path))]
            there = next((place for place in places if place.is_dir()), None)
            if there is None:
                raise ModelError(
                    f"the adapter in {folder} stands on a base that is no longer there: "
                    f"{' nor '.join(map(str, dict.fromkeys(places)))}. Put that folder back"
                )
            path = str(there)
        found = loading.base_identity(path, origin.revision)
        if found != origin.identity:
            raise ModelError(
                f"the adapter in {folder} was trained on a base with the weights "
                f"{origin.identity[:12]}, but {path} holds {found[:12]}"
            )
        return self._load_base(path, origin.revision)[0]

    def _open_peft(self, folder: Path) -> Handle:
        folder = folder.resolve()
        if folder in self._live:  # opened again, it would be one more adapter on the base
            return self._live[folder]
        config = read_json(folder / "adapter_config.json")
        base_path = config["base_model_name_or_path"]
        # Beside the adapter, or beside its folder, as an export of ours has it.
        beside = [(place / base_path).resolve() for place in (folder, folder.parent)]
        path = next((str(place) for place in beside if place.is_dir()), base_path)
        base = self.pretrained(path, config["revision"])
        name = _free_name("policy", adapters.adapter_names(base.trunk.model))
        adapters.load_adapter(base.trunk.model, name, folder)
        handle = base.with_role("policy", adapter=name)
        self._live[folder] = handle
        return handle

    def _save_model(self, handle: Handle, state: dict[str, Tensor], folder: Path) -> None:
        model = handle.trunk.model
        with loading.without_bars(), writing(folder):
            model.save_pretrained(str(folder), state_dict=state)
        handle.codec.save_tokenizer(folder)


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or `name-2`, ... if the trunk has one already (two artifacts of one role)."""
    number = 1
    free = name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free
