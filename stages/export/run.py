"""Export: the run's models as folders and files that other programs load, without this one.

`runs/NAME/export/` holds, of what `export` asks for,

- `adapter/`, `sft_adapter/`, `reward_adapter/`: LoRA adapters in PEFT's own format, with DoRA and
  rsLoRA as they are. Where their base is a model that a run made (the SFT model), the base lies
  beside them in `base/`, and the adapter names it `./base`: a path from the export folder, so that
  the folder may be moved. It cannot be a Hub id: a loader that does not find it stops instead of
  asking the Hub.
- `merged/`: the policy as one plain model. The adapter is merged into a *copy* of the base; the
  shared base is never written. A fully tuned policy has this form only.
- `vllm/`: the policy's adapter, once it is known that vLLM takes it.
- `gguf/`: the merged policy, converted by llama.cpp's own script.
- `reward/`: the reward model as a plain sequence classifier.
- `export.json`: the forms, and the SHA-256 of every weight file of the policy's base.

Each form has a model card, and all but `gguf/` the tokenizer with its chat template; those of the
policy a `generation_config.json` with all stop ids. `docs/export.md` has the commands that load
them; pushing to the Hub (`stages/export/hub.py`) comes after the stage.

    rlhf export configs/quickstart.yaml
"""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.config import resource_path
from pipeline.models import adapters
from pipeline.models.loading import language_model
from pipeline.models.store import HANDLE
from pipeline.models.trunk import Handle
from pipeline.reward_config import OWN
from pipeline.reward_list import source_names, uses_own
from pipeline.runfolder import (
    file_hash,
    read_json,
    write_json_atomic,
    write_text_atomic,
    writing,
)
from pipeline.stage import Context, Summary
from stages.export import classifier, gguf
from stages.export.card import Base, CardFacts, Data, model_card
from stages.export.classifier import Scoring
from stages.export.forms import Form
from stages.export.weights import plain, refuse_untying, refuse_vllm, write_merged

KINDS = ("demonstrations", "rankings", "prompts", "pretraining")


class ExportStage:
    """Writes the run's models in the forms that `export` asks for."""

    name = "export"
    title = "Export"
    samples = False

    def needs(self, config: Any) -> tuple[str, ...]:
        """The exported models, and the evaluation whose numbers the cards state."""
        export = config.export
        sft = ("sft",) if "sft" in export.adapters else ()
        reward = ("reward",) if export.asks_for_reward else ()
        return (*sft, *reward, "ppo", "evaluation")

    def reads(self, config: Any) -> tuple[str, ...]:
        """No data."""
        return ()

    def resources(self, config: Any) -> Mapping[str, str]:
        """The converter to GGUF."""
        converter = config.export.gguf
        return {} if converter is None else {"export.gguf": converter}

    def run(self, context: Context) -> Summary:
        """Write the folders; returns their names and their size in megabytes (10^6 bytes)."""
        out = context.folder.artifact
        context.runtime.from_main(lambda: _Export(context, out).write())
        folders = sorted(path.name for path in out.iterdir() if path.is_dir())
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return {"folders": ", ".join(folders), "megabytes": round(size / 1e6, 2)}


class _Export:
    """One export on its way: what it has written so far."""

    def __init__(self, context: Context, out: Path) -> None:
        self.context = context
        self.out = out
        self.section = context.config.export
        self.policy = self._open("ppo")
        self.base: Base | None = None  # of the policy's adapter
        self.forms: list[str] = []

    def write(self) -> None:
        """All forms that are asked for; what cannot be written is refused before anything is."""
        section, adapter = self.section, self.policy.role.adapter
        converter = None if section.gguf is None else gguf.check_converter(section.gguf)
        how = classifier.scoring(self._open("reward")) if section.asks_for_reward else None
        if section.vllm:
            refuse_vllm(self.policy.trunk.model, adapter)
        if adapter is not None and (section.merged or converter is not None):
            refuse_untying(self.policy.trunk.model)
        if adapter is None and "policy" in section.adapters:
            self.context.console.print("export: the policy was tuned in full: it has no adapter")
        policy: dict[Form, bool] = {"adapter": "policy" in section.adapters, "vllm": section.vllm}
        if adapter is not None and any(policy.values()):
            self.base = self._base_of(self.policy)
            for form in (form for form, wanted in policy.items() if wanted):
                self._adapter(form, self.policy, self.base)
        if "sft" in section.adapters:
            sft = self._open("sft")
            self._adapter("sft_adapter", sft, self._base_of(sft))
        if how is not None:
            self._reward(how)
        if adapter is None or section.merged:
            write_merged(self.context, self.out / "merged")
            self._finish("merged", self.policy)
        if converter is not None:
            self._gguf(converter)
        write_json_atomic(
            self.out / "export.json",
            {"policy": "ppo", "forms": self.forms, "base": self.base and asdict(self.base)},
        )

    def _open(self, stage: str) -> Handle:
        return self.context.store.open(self.context.parents[stage])

    def _adapter(self, form: Form, handle: Handle, base: Base) -> None:
        model, adapter = handle.trunk.model, handle.role.adapter
        assert adapter is not None
        folder = self.out / form
        adapters.save_adapter(model, adapter, folder, base.path, base.revision)
        self._finish(form, handle, base)

    def _reward(self, how: Scoring) -> None:
        reward = self._open("reward")
        if "reward" in self.section.adapters:
            base = self._base_of(reward)
            folder = self.out / "reward_adapter"
            classifier.write_adapter(reward, folder, base.path, base.revision)
            self._finish("reward_adapter", reward, base, how)
        if self.section.reward:
            alone = plain(self.context, self.context.parents["reward"])
            folder = self.out / "reward"
            classifier.write_classifier(alone, how, folder, self.section.max_shard_size)
            self._finish("reward", reward, how=how)

    def _gguf(self, converter: Path) -> None:
        outtype = self.section.gguf_outtype
        file = self.out / "gguf" / f"policy-{outtype}.gguf"
        if "merged" in self.forms:
            gguf.convert(self.out / "merged", converter, outtype, file)
        else:
            with (
                writing(self.out),
                TemporaryDirectory(dir=self.out, prefix=".") as scratch,
            ):
                write_merged(self.context, Path(scratch))
                self.policy.codec.save_tokenizer(Path(scratch))
                _write_generation_config(self.policy, Path(scratch))
                gguf.convert(Path(scratch), converter, outtype, file)
        self._finish("gguf", self.policy)

    def _base_of(self, handle: Handle) -> Base:
        """What an adapter stands on; a base that a run made is copied to `base/`."""
        origin = handle.trunk.origin
        folder = Path(origin.path)
        if not folder.is_dir():
            return Base(origin.path, on_hub=True, revision=origin.revision)
        files = {path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))}
        if not (folder.parent / HANDLE).exists():
            return Base(origin.path, on_hub=False, files=files)
        form: Form = "base"
        if self.base is not None and self.base.files != files:
            form = "reward_base"  # PPO began with another run's policy (ppo.policy)
        base = Base(f"./{form}", on_hub=False, files=files)
        if form not in self.forms:
            with writing(self.out / form):
                shutil.copytree(folder, self.out / form)
            self._finish(form, handle, base)
        return base

    def _finish(
        self, form: Form, handle: Handle, base: Base | None = None, how: Scoring | None = None
    ) -> None:
        """Tokenizer and card of a form whose weights are there."""
        folder = self.out / form
        if form != "gguf":
            codec = handle.codec if how is None else classifier.padded(handle.codec, how)
            codec.save_tokenizer(folder)
            if how is None:
                _write_generation_config(handle, folder)
        card = model_card(_facts(self.context, handle, form, base, how))
        write_text_atomic(folder / "README.md", card)
        self.forms.append(form)


def _write_generation_config(handle: Handle, folder: Path) -> None:
    """It ends where the policy ends, and never samples what the policy never did.

    Its stop strings stand in the card: with them in the config, transformers' `generate` would
    refuse whoever does not hand it the tokenizer.
    """
    from transformers import GenerationConfig

    codec = handle.codec
    own = getattr(handle.trunk.model, "generation_config", None)
    config = copy.deepcopy(own) if own is not None else GenerationConfig()
    config.eos_token_id = sorted(codec.stop_ids)
    config.pad_token_id = codec.pad_id
    if codec.forbidden_ids:
        config.suppress_tokens = sorted(codec.forbidden_ids)
    with writing(folder):
        config.save_pretrained(str(folder))


def _facts(
    context: Context, handle: Handle, form: Form, base: Base | None, how: Scoring | None
) -> CardFacts:
    config, codec, adapter = context.config, handle.codec, handle.role.adapter
    own_template = codec.template_source == "tokenizer"
    evaluation = context.parents["evaluation"]
    start, start_hub_id = _start(config, of_reward=form.startswith("reward"))
    own_type = form in ("merged", "reward") and config.export.dtype
    rank = None if adapter is None else handle.trunk.model.peft_config[adapter].r
    return CardFacts(
        form=form,
        start=start,
        start_hub_id=start_hub_id,
        steps=_steps(config),
        base=base,
        dtype=own_type or config.model.dtype,
        auto_class=language_model(handle.trunk.model.config).__name__,
        data=_data(read_json(context.run.data_json)),
        report=(evaluation / "report.md").read_text(encoding="utf-8"),
        stop_tokens=tuple(codec.tokenizer.convert_ids_to_tokens(sorted(codec.stop_ids))),
        end_token=codec.tokenizer.convert_ids_to_tokens(codec.end_id),
        lead=codec.lead,
        algorithm=config.ppo.algorithm.replace("_", "-"),
        stop_strings=codec.stop_strings.strings,
        forbidden_tokens=tuple(codec.tokenizer.convert_ids_to_tokens(sorted(codec.forbidden_ids))),
        system_prompt=codec.system_prompt,
        template="own" if own_template else "plain" if codec.has_template else "none",
        text_as_turn=own_template and codec.chat_template == "auto",
        versions=read_json(evaluation / "metrics.json")["about"]["versions"],
        rank=rank,
        scoring=how,
        outtype=config.export.gguf_outtype,
    )


def _start(config: Any, *, of_reward: bool) -> tuple[str, str | None]:
    """What policy or reward model was before the run, in words, and its Hub id if it has one."""
    path = config.reward.base if of_reward else None
    path = path or config.ppo.policy or config.model.path
    if path is None:
        return f"a {config.model.architecture.model_type} model with random weights", None
    if Path(path).exists():
        return f"the local model `{Path(path).name}`", None
    return f"`{path}`", path


def _steps(config: Any) -> str:
    sft = "" if config.ppo.policy else "supervised fine-tuning on demonstrations, "
    method = {"ppo": "PPO", "rejection_sampling": "rejection sampling"}[config.ppo.algorithm]
    rewards = config.ppo.rewards
    trained = "a reward model from ranked responses, and " if uses_own(rewards) else ""
    if rewards is None or rewards == OWN:
        return f"{sft}{trained}{method} against it"
    if isinstance(rewards, str):
        local = resource_path(rewards).exists()
        return f"{sft}{method} against the reward `{Path(rewards).name if local else rewards}`"
    names = ", ".join(f"`{name}`" for name in source_names(rewards))
    return f"{sft}{trained}{method} against the rewards {names}"


def _data(report: Mapping[str, Any]) -> tuple[Data, ...]:
    """The datasets of data.json; local ones by the names of their files."""
    return tuple(_dataset(kind, report[kind]) for kind in KINDS if kind in report)


def _dataset(kind: str, entry: Mapping[str, Any]) -> Data:
    kept, path = entry["kept"], entry["source"].get("path")
    if path is None:
        return Data(kind, "the prompts of the other data", kept["train"], kept["held_out"])
    # The config made local paths absolute, so what is neither there nor absolute is a Hub id.
    hub_id = None if Path(path).exists() or Path(path).is_absolute() else path
    return Data(kind, hub_id or Path(path).name, kept["train"], kept["held_out"], hub_id)
