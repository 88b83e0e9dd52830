"""Export: the policy as folders that plain `peft` and `transformers` load, without this project.

`runs/NAME/export/` holds

- `adapter/`: the policy's LoRA adapter in PEFT's own format. Where its base is a model that a run
  made (the SFT model), the base lies beside it in `base/`, and the adapter names it `./base`: a
  path from the export folder, so that the folder may be moved. It cannot be a Hub id: a loader that
  does not find it stops instead of asking the Hub.
- `merged/`: the policy as one plain model. The adapter is merged into a *copy* of the base; the
  shared base is never written. A fully tuned policy has this form only.
- `export.json`: the forms, and the SHA-256 of every weight file of the base.

Each form has the tokenizer with its chat template, `generation_config.json` with all stop ids, and
a model card.

    rlhf export configs/quickstart.yaml
"""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import resource_path
from pipeline.errors import ModelError
from pipeline.models import adapters
from pipeline.models.loading import is_quantised, without_bars
from pipeline.models.store import HANDLE, ModelStore
from pipeline.models.trunk import Handle
from pipeline.runfolder import (
    file_hash,
    read_json,
    write_json_atomic,
    write_text_atomic,
    writing,
)
from pipeline.stage import Context, Summary
from stages.export.card import BESIDE, Base, CardFacts, Data, Form, model_card

KINDS = ("demonstrations", "rankings", "prompts")


class ExportStage:
    """Writes the PPO policy in the forms that `export` asks for."""

    name = "export"
    title = "Export"
    samples = False

    def needs(self, config: Any) -> tuple[str, ...]:
        """The policy, and the evaluation whose numbers the cards state."""
        return ("ppo", "evaluation")

    def reads(self, config: Any) -> tuple[str, ...]:
        """No data."""
        return ()

    def resources(self, config: Any) -> Mapping[str, str]:
        """No further files."""
        return {}

    def run(self, context: Context) -> Summary:
        """Write the folders; returns their names and their size in megabytes (10^6 bytes)."""
        out = context.folder.artifact
        if context.runtime.is_main:
            self._write(context, out)
        context.runtime.barrier()
        folders = sorted(path.name for path in out.iterdir() if path.is_dir())
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return {"folders": ", ".join(folders), "megabytes": round(size / 1e6, 2)}

    def _write(self, context: Context, out: Path) -> None:
        section = context.config.export
        policy = context.store.open(context.parents["ppo"])
        adapter = policy.role.adapter
        base = None
        forms: list[Form] = []
        if adapter is not None and section.adapter:
            base = _base_of(policy, out)
            forms += ["adapter", "base"] if base.path == BESIDE else ["adapter"]
            adapters.save_adapter(
                policy.trunk.model, adapter, out / "adapter", base.path, base.revision
            )
        if adapter is None or section.merged:
            forms.append("merged")
            write_merged(policy, context, out / "merged")
        if adapter is None and section.adapter:
            context.console.print("export: the policy was tuned in full, so it has no adapter")
        for form in forms:
            _write_tokenizer(policy, out / form)
            card = model_card(_facts(context, policy, form, base, out / form))
            write_text_atomic(out / form / "README.md", card)
        write_json_atomic(
            out / "export.json",
            {
                "policy": "ppo",
                "forms": forms,
                "base": base and asdict(base),
            },
        )


def write_merged(policy: Handle, context: Context, folder: Path) -> None:
    """Write the policy as one plain transformers model; the handle's own weights stay untouched.

    An adapter that was trained on a quantised base is merged into the base as it is on disk.

    Raises:
        ModelError: merging would untie embeddings that the architecture ties.
    """
    if policy.role.adapter is not None:
        _refuse_untying(policy.trunk.model)
        if is_quantised(policy.trunk.model):
            section = context.config.model.model_copy(update={"quantization": "none"})
            plain = ModelStore(section, context.config.data)
            policy = plain.open(context.parents["ppo"])
        policy = context.store.trainable_copy(policy, "merged", "full", context.config.lora)
    with without_bars(), writing(folder):
        policy.trunk.model.save_pretrained(
            str(folder),
            state_dict=dict(policy.trunk.base_state()),
            max_shard_size=context.config.export.max_shard_size,
        )


def _refuse_untying(model: Any) -> None:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tuned = {id(layer) for layer in adapters.tuner_layers(model)}
    if model.config.tie_word_embeddings and any(id(layer) in tuned for layer in ends):
        raise ModelError(
            "export.merged cannot write this policy: lora.target_modules has the input or output "
            "embeddings, which this architecture ties, and merging would make them differ. Set "
            "export.merged to false and use the adapter."
        )


def _base_of(policy: Handle, out: Path) -> Base:
    """What the adapter stands on; a base that a run made is copied to `base/`."""
    origin = policy.trunk.origin
    folder = Path(origin.path)
    if not folder.is_dir():
        return Base(origin.path, on_hub=True, revision=origin.revision)
    files = {path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))}
    if not (folder.parent / HANDLE).exists():
        return Base(origin.path, on_hub=False, files=files)
    with writing(out / "base"):
        shutil.copytree(folder, out / "base")
    return Base(BESIDE, on_hub=False, files=files)


def _write_tokenizer(policy: Handle, folder: Path) -> None:
    """Tokenizer, chat template, and a generation config that ends where the policy ends.

    Its stop strings stand in the card: with them in the config, transformers' `generate` would
    refuse whoever does not hand it the tokenizer.
    """
    from transformers import GenerationConfig

    codec = policy.codec
    codec.save_tokenizer(folder)
    own = getattr(policy.trunk.model, "generation_config", None)
    config = copy.deepcopy(own) if own is not None else GenerationConfig()
    config.eos_token_id = sorted(codec.stop_ids)
    config.pad_token_id = codec.pad_id
    if codec.forbidden_ids:
        config.suppress_tokens = sorted(codec.forbidden_ids)
    with writing(folder):
        config.save_pretrained(str(folder))


def _facts(
    context: Context, policy: Handle, form: Form, base: Base | None, folder: Path
) -> CardFacts:
    config, codec = context.config, policy.codec
    own_template = codec.template_source == "tokenizer"
    has_template = (folder / "chat_template.jinja").exists()
    evaluation = context.parents["evaluation"]
    start, start_hub_id = _start(config)
    return CardFacts(
        form=form,
        start=start,
        start_hub_id=start_hub_id,
        steps=_steps(config),
        base=base,
        dtype=config.model.dtype,
        data=_data(read_json(context.run.data_json)),
        report=(evaluation / "report.md").read_text(encoding="utf-8"),
        stop_tokens=tuple(codec.tokenizer.convert_ids_to_tokens(sorted(codec.stop_ids))),
        algorithm=config.ppo.algorithm.replace("_", "-"),
        stop_strings=codec.stop_strings.strings,
        forbidden_tokens=tuple(codec.tokenizer.convert_ids_to_tokens(sorted(codec.forbidden_ids))),
        system_prompt=codec.system_prompt,
        template="own" if own_template else "plain" if has_template else "none",
        text_as_turn=own_template and codec.chat_template == "auto",
        versions=read_json(evaluation / "metrics.json")["about"]["versions"],
    )


def _start(config: Any) -> tuple[str, str | None]:
    """What the policy was before the run, in words, and its Hub id if it has one."""
    path = config.ppo.policy or config.model.path
    if path is None:
        return f"a {config.model.architecture.model_type} model with random weights", None
    if Path(path).exists():
        return f"the local model `{Path(path).name}`", None
    return f"`{path}`", path


def _steps(config: Any) -> str:
    sft = "" if config.ppo.policy else "supervised fine-tuning on demonstrations, "
    method = {"ppo": "PPO", "rejection_sampling": "rejection sampling"}[config.ppo.algorithm]
    if config.ppo.rewards is None:
        return f"{sft}a reward model from ranked responses, and {method} against it"
    rewards = config.ppo.rewards
    local = resource_path(rewards).exists()
    return f"{sft}{method} against the reward `{Path(rewards).name if local else rewards}`"


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
