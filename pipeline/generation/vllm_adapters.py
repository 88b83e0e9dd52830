"""Handing a policy's adapter to a vLLM server: through files, a new name for each version.

A name is never used twice. vLLM keys its prefix cache by the adapter's name (its issue 42125), so
new weights under an old name would continue prompts that the old weights read; for the same reason
`load_inplace` is not used.
"""

import math
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.json_http import JsonServer, ServerFault
from pipeline.models.adapters import save_adapter
from pipeline.models.trunk import Handle
from pipeline.runfolder import writing
from pipeline.tensors import tensors_hash
from pipeline.vllm_config import VllmSection, vllm_max_rank, vllm_refusals

SETTING = "ppo.rollout.vllm"
_PREFIX = "policy-"


class AdapterHandover:
    """Keeps the newest version of one policy's adapter loaded on the server, and no other."""

    def __init__(
        self, server: JsonServer, section: VllmSection, folder: Path, seen_at: str
    ) -> None:
        """`folder` is the run's own; the server sees it at `seen_at`."""
        self._server = server
        self._section = section
        self._folder = folder
        self._seen_at = seen_at.rstrip("/")
        # A server outlives runs: names of this one must be new to it.
        self._series = f"{_PREFIX}{secrets.token_hex(4)}"
        self._version = 0
        self._digest: str | None = None  # of the weights that the server has
        self._name: str | None = None

    def current(self, handle: Handle, state: Mapping[str, Tensor] | None, longest: int) -> str:
        """Name on the server of the adapter as it is now; hands it over if it changed.

        `state` is its weights (`adapter_state`), `longest` the longest sequence that will be asked
        for, in tokens.

        Raises:
            ConfigError: the server is not there, serves something else, or cannot take adapters.
            TrainingError: it refused the adapter.
        """
        adapter = handle.role.adapter
        if adapter is None or state is None:
            raise ConfigError(
                "ppo.rollout.engine = vllm, but the policy has no adapter to hand to the server: "
                "set ppo.tuning to lora or ppo.rollout.engine to native"
            )
        model = handle.trunk.model
        digest = tensors_hash(state.items())
        if self._name is not None and digest == self._digest:
            return self._name
        if self._version == 0:
            self._check(handle, longest)
        self._version += 1
        name = f"{self._series}-{self._version:06d}"
        folder = self._folder / name
        # Named only when it is whole: nobody takes a part of it for a version.
        part = self._folder / f".{name}"
        origin = handle.trunk.origin
        save_adapter(model, adapter, part, origin.path, origin.revision, state)
        with writing(folder):
            os.replace(part, folder)
        # First out, then in: with --max-loras 1 the new one would push the old one out, and vLLM
        # does not forget the name of an adapter that was pushed out.
        self.drop()
        self._load(name)
        self._name, self._digest = name, digest
        return name

    def drop(self) -> None:
        """Take the loaded version off the server and delete its files; a dead server is no fault.

        Nobody may be sampling with it.
        """
        if self._name is not None:
            self._unload(self._name)
        self._name = self._digest = None

    # --- the server ---

    def _load(self, name: str) -> None:
        body = {"lora_name": name, "lora_path": f"{self._seen_at}/{name}"}
        try:
            # vLLM answers 500 for an adapter that it cannot load: asking again changes nothing.
            self._server.post("/v1/load_lora_adapter", body, final=(500,))
        except ServerFault as fault:
            if fault.status == 400 and "already been loaded" in str(fault):
                return  # an attempt whose answer was lost
            if fault.status in (404, 405):
                raise ConfigError(
                    f"{self._server.url} takes no adapters at run time ({fault}): start it with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
                ) from fault
            raise ServerFault(
                f"the vLLM server did not load the policy's adapter: {fault}. It read "
                f"{body['lora_path']}; this program wrote {self._folder / name}. Check that both "
                f"are one folder ({SETTING}.adapters, {SETTING}.adapters_on_server), that "
                "--max-lora-rank is large enough, and that vLLM supports LoRA on these modules",
                fault.status,
            ) from fault

    def _unload(self, name: str) -> None:
        with suppress(ServerFault):
            body = {"lora_name": name}
            self._server.post("/v1/unload_lora_adapter", body, final=(500,))
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def _check(self, handle: Handle, longest: int) -> None:
        """Before the first version: is this the server that the run needs?"""
        assert handle.role.adapter is not None
        faults = adapter_refusals(handle.trunk.model, handle.role.adapter)
        if faults:
            raise ConfigError(
                f"vLLM cannot load the policy's adapter: {'; '.join(faults)}. Set "
                "ppo.rollout.engine to native, or start from another adapter (ppo.policy)"
            )
        command = serve_command(handle, self._section, longest)
        try:
            cards: list[dict[str, Any]] = self._server.get("/v1/models")["data"]
        except ServerFault as fault:
            if fault.status in (401, 403):
                raise ConfigError(
                    f"{self._server.url} refuses the key ({fault}): name the environment variable "
                    f"that holds it in {SETTING}.api_key_env"
                ) from fault
            raise ConfigError(
                f"ppo.rollout.engine is vllm, but no vLLM server answers at {self._server.url} "
                f"({SETTING}.url): {fault}. Start it in an environment of its own:\n  {command}"
            ) from fault
        except (TypeError, KeyError) as error:
            raise ConfigError(
                f"{self._server.url} ({SETTING}.url) lists no models: it is no vLLM server"
            ) from error
        card = _base_card(cards, self._section.model, handle.trunk.origin.path)
        if card is None:
            served = ", ".join(str(c.get("id")) for c in cards if not c.get("parent")) or "nothing"
            wanted = self._section.model or handle.trunk.origin.path
            raise ConfigError(
                f"the vLLM server at {self._server.url} serves {served}, but the policy's base is "
                f"{wanted}. If they are one model, set {SETTING}.model to its name on the server; "
                f"otherwise start the server with that base:\n  {command}"
            )
        room = card.get("max_model_len")
        if room is not None and room < longest:
            raise ConfigError(
                f"the vLLM server at {self._server.url} takes {room} tokens, but data."
                f"max_prompt_tokens + ppo.rollout.max_new_tokens = {longest}: lower one of them, "
                f"or start the server with more room:\n  {command}"
            )
        self._sweep(cards)

    def _sweep(self, cards: Sequence[Mapping[str, Any]]) -> None:
        """Take off what an earlier process of this run left: one process works in a run's folder.

        Adapters that lie elsewhere are other people's.
        """
        for card in cards:
            place, _, name = str(card.get("root")).rpartition("/")
            if card.get("parent") and place == self._seen_at and name.startswith(_PREFIX):
                self._unload(name)
        for folder in (*self._folder.glob(f"{_PREFIX}*"), *self._folder.glob(f".{_PREFIX}*")):
            shutil.rmtree(folder, ignore_errors=True)


def adapter_refusals(model: Any, name: str) -> list[str]:
    """What vLLM's reader of PEFT adapters refuses or passes over in silence of adapter `name`."""
    adapter = model.peft_config[name]
    family = model.config.model_type
    found = vllm_refusals(adapter.r, dora=adapter.use_dora, model_type=family)
    if model.config.is_encoder_decoder:
        found.append(f"it serves no encoder-decoder ({family}) with adapters: take another base")
    if adapter.bias != "none":
        found.append(f"it has biases (bias={adapter.bias})")
    if adapter.modules_to_save:
        found.append(f"it replaces whole modules (modules_to_save={adapter.modules_to_save})")
    for pattern in ("rank_pattern", "alpha_pattern"):
        if getattr(adapter, pattern, None):
            found.append(f"its layers differ in scale ({pattern})")
    if adapter.target_parameters:
        found.append(
            f"it adapts bare parameters (target_parameters={adapter.target_parameters}): set "
            "lora.target_parameters to []"
        )
    return found


def _base_card(
    cards: Sequence[Mapping[str, Any]], name: str | None, path: str
) -> Mapping[str, Any] | None:
    """The server's entry of the base: by the name given, else by its path or Hub id."""
    bases = [card for card in cards if not card.get("parent")]
    if name is not None:
        return next((card for card in bases if card.get("id") == name), None)
    return next(
        (c for c in bases if any(_same(str(c.get(key)), path) for key in ("id", "root"))), None
    )


def _same(served: str, path: str) -> bool:
    if served == path:
        return True
    return Path(path).is_dir() and Path(served).resolve() == Path(path).resolve()


def serve_command(handle: Handle, section: VllmSection, longest: int) -> str:
    """The shell command that starts the server that this policy needs."""
    origin = handle.trunk.origin
    max_rank = vllm_max_rank(handle.trunk.model.peft_config[handle.role.adapter].r)
    words = ["vllm", "serve", origin.path]
    if origin.revision is not None:
        words += ["--revision", origin.revision]
    if section.model is not None:
        words += ["--served-model-name", section.model]
    words += ["--enable-lora", "--max-lora-rank", str(max_rank)]
    # Room in whole blocks of 16 tokens, the size of vLLM's cache blocks.
    words += ["--max-model-len", str(16 * math.ceil(longest / 16))]
    words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True " + shlex.join(words)
