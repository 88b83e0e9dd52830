"""The common sections of a run's configuration; every stage owns its own beside its code.

A section is a frozen pydantic model that refuses unknown keys. Each field carries one sentence with
its unit: the config reference, the JSON Schema and editor completion are generated from them.
Reading YAML, overrides and the wording of errors live in `pipeline.yaml_config`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)


class Section(BaseModel):
    """Base of every section: immutable, strict about types, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


_FUNCTION = re.compile(r"(?P<where>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def function_reference(resource: str) -> tuple[str, str] | None:
    """(file or module, function) of `file.py:function` or `module:function`, else None."""
    match = _FUNCTION.fullmatch(resource)
    return (match["where"], match["name"]) if match else None


def resource_path(resource: str) -> Path:
    """Where a resource would lie as a local file or folder; of a function, its file."""
    reference = function_reference(resource)
    return Path(reference[0] if reference else resource).expanduser()


def _resolve(value: str, info: ValidationInfo) -> str:
    """Make a local path absolute: looked up beside the config file, then in the current folder.

    What exists in neither place stays as written: a Hub id, or an error for whoever opens it.
    A reference to a function keeps the function's name.
    """
    path, reference = resource_path(value), function_reference(value)
    base = Path((info.context or {}).get("base_dir", "."))
    for folder in (base, Path()):
        candidate = (folder / path).resolve()
        if candidate.exists():
            return f"{candidate}:{reference[1]}" if reference else str(candidate)
    return value


# A local path (relative to the config file, else to the current folder) or a Hub id.
Resource = Annotated[str, AfterValidator(_resolve)]

# Of a field that sets memory or logging but no result: it is no part of a stage's key.
NOT_IN_KEY: dict[str, Any] = {"in_key": False}


def resource_fields(section: type[Section]) -> list[str]:
    """The optional fields of a section that name a resource."""
    fields = section.model_fields.items()
    return [name for name, field in fields if Resource in get_args(field.annotation)]


def key_values(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """The dumped `values` of a section that belong in a key.

    Left out are `NOT_IN_KEY` and resources, whose content a key has in their place.
    """
    found = dict(values)
    for name, field in section.model_fields.items():
        nested = field.annotation
        if field.json_schema_extra == NOT_IN_KEY or name in resource_fields(section):
            found.pop(name, None)
        elif name in found and isinstance(nested, type) and issubclass(nested, Section):
            found[name] = key_values(nested, found[name])
    return found


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class RunSection(Section):
    """Where a run lives and what makes it repeatable."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run: its folder under `run.folder` (letters, digits, . _ -).",
    )
    folder: str = Field("runs", description="Folder that holds all runs, from the current folder.")
    seed: NonNegativeInt = Field(1, description="Seed of every random choice in the run.")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="Autocast of training and generation; reductions stay in float32."
    )
    device: Literal["auto", "cpu"] = Field(
        "auto", description="`auto` takes the accelerator if there is one; `cpu` never does."
    )
    cuda_graphs: bool = Field(
        True,
        description="On CUDA, decoding replays captured graphs; off for models that cannot be.",
        json_schema_extra=NOT_IN_KEY,
    )
    save_in_background: bool | None = Field(
        None,
        description="Write states to go on from while training goes on; unset, on accelerators.",
        json_schema_extra=NOT_IN_KEY,
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim"], ...] = Field(
        ("tensorboard",), description="Trackers that get the metrics besides metrics.jsonl."
    )


class ArchitectureSection(Section):
    """A small decoder built from a config with random weights (`model.init: config`)."""

    model_type: str = Field("llama", description="Architecture, by its transformers `model_type`.")
    hidden_size: PositiveInt = Field(128, description="Width of the hidden states.")
    num_hidden_layers: PositiveInt = Field(2, description="Number of layers.")
    num_attention_heads: PositiveInt = Field(4, description="Attention heads a layer.")
    intermediate_size: PositiveInt = Field(384, description="Width of the feed-forward layers.")
    max_position_embeddings: PositiveInt = Field(1024, description="Longest sequence, in tokens.")
    tie_word_embeddings: bool = Field(
        True, description="Whether input and output embeddings share their weights."
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of the architecture's own config."
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ArchitectureSection":
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise ValueError(
                f"model.architecture.hidden_size = {width} is not divisible by "
                f"model.architecture.num_attention_heads = {heads} "
                f"({width} = {heads} x {width // heads} + {width % heads}): change one of the two"
            )
        return self


class ModelSection(Section):
    """The base model of the run."""

    init: Literal["pretrained", "config"] = Field(
        "pretrained",
        description="`pretrained` loads `model.path`; `config` builds `model.architecture` with "
        "random weights and trains a BPE tokenizer on the run's own training text.",
    )
    path: Resource | None = Field(None, description="Hub id or local folder of the base model.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub model.")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="Type of the base model's weights in memory."
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Bits of a frozen base's linear layers in memory, by bitsandbytes (`pip "
        "install 'rlhf-pipeline[quant]'`); needs `lora` in every stage.",
    )
    attn_implementation: str | None = Field(
        None, description="Attention of transformers: eager, sdpa, flash_attention_2, ..."
    )
    trust_remote_code: bool = Field(
        False, description="Whether Python code from the model's repository may run."
    )
    chat_template: Literal["auto", "none"] = Field(
        "auto",
        description="`auto` renders prompts with the tokenizer's chat template (a plain one for "
        "conversations if it has none); `none` uses plain-text prompts as they stand.",
    )
    architecture: ArchitectureSection = Field(
        ArchitectureSection(), description="The architecture, with `model.init: config`."
    )
    vocabulary_size: Annotated[int, Field(ge=258)] = Field(
        2048, description="Tokens of the BPE tokenizer trained with `model.init: config`."
    )

    @model_validator(mode="after")
    def _path_or_config(self) -> "ModelSection":
        if self.init == "pretrained" and self.path is None:
            raise ValueError(
                "model.path is missing: name a Hub id or a local folder, "
                "or set model.init to config to start from random weights"
            )
        if self.init == "config" and self.path is not None:
            raise ValueError(
                f"model.path is {self.path!r} but model.init is config, which loads nothing: "
                "remove model.path or set model.init to pretrained"
            )
        return self


class LoraSection(Section):
    """Shape of every LoRA adapter of the run; the roles' adapters are copied from one another."""

    rank: PositiveInt = Field(16, description="Rank of the update matrices.")
    alpha: Positive = Field(32, description="Scale of the update: alpha / rank times B A x.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input in SFT and reward.")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="Modules that get an adapter, by name, or `all-linear`."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (DoRA).")


class VllmSection(Section):
    """A vLLM server that samples rollouts (docs/vllm.md); it runs in an environment of its own."""

    url: str = Field(
        "http://127.0.0.1:8000",
        pattern=r"^https?://[^/\s]+(/[^\s]*)?$",
        description="Address of the server, without `/v1`.",
    )
    model: str | None = Field(
        None,
        description="Name under which the server lists the base model; unset, the base's own path.",
    )
    adapters: str | None = Field(
        None,
        description="Folder in which adapters are handed over, on a disk that the server reads "
        "too; unset, `adapters/` in the stage's folder.",
    )
    adapters_on_server: str | None = Field(
        None, description="The same folder as the server sees it, where it is mounted elsewhere."
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the server's API key."
    )
    timeout_seconds: Positive = Field(600.0, description="Longest wait for one answer, in seconds.")
    retries: NonNegativeInt = Field(
        5, description="Attempts after a lost connection, a timeout or an error 429 or 5xx."
    )


# The values that vLLM's --max-lora-rank takes (vllm/config/lora.py, but for 1).
VLLM_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_refusals(rank: int, *, dora: bool) -> list[str]:
    """Why vLLM would not load an adapter of this shape, with the remedy; empty if it would."""
    faults = []
    if rank > VLLM_MAX_RANKS[-1]:
        faults.append(f"rank {rank} is above {VLLM_MAX_RANKS[-1]}: lower lora.rank")
    if dora:
        faults.append("it has no DoRA: set lora.use_dora to false")
    return faults


class SourceSection(Section):
    """One dataset: a local file or folder, or a Hub dataset."""

    path: Resource = Field(
        description="Local .jsonl, .json, .csv or .parquet file (.gz too), or a Hub dataset id."
    )
    held_out_path: Resource | None = Field(
        None, description="Separate held-out file or Hub id; otherwise rows are split by hash."
    )
    name: str | None = Field(None, description="Configuration (subset) of the Hub dataset.")
    data_dir: str | None = Field(None, description="Folder inside the Hub dataset.")
    split: str = Field("train", description="Split of the Hub dataset.")
    held_out_split: str | None = Field(
        None, description="Split of the Hub dataset that is held out; otherwise split by hash."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub dataset.")
    format: str = Field(
        "auto", description="Row format (docs/data-formats.md), or `auto` from the columns."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Renames: our field name to the dataset's column name."
    )
    limit: PositiveInt | None = Field(None, description="Use only the first rows, this many.")


def _path_only(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[
    SourceSection, BeforeValidator(_path_only, json_schema_input_type=str | SourceSection)
]


class DataSection(Section):
    """The run's datasets and how they are checked and split."""

    demonstrations: Source | None = Field(
        None, description="Prompts with responses for SFT (a path, or a section)."
    )
    rankings: Source | None = Field(
        None, description="Prompts with ranked responses for the reward model."
    )
    prompts: Source | None = Field(
        None,
        description="Prompts for PPO and evaluation; default: those of the other datasets.",
    )
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of prompts, chosen by hash, that no stage trains on."
    )
    split_salt: str = Field("rlhf", description="Salt of the split's hash.")
    group_column: str | None = Field(
        None, description="Column whose value is split as one; default: the first user turn."
    )
    on_bad_row: Literal["skip", "refuse"] = Field(
        "skip", description="`skip` counts and shows bad rows; `refuse` stops at the first."
    )
    max_bad_fraction: Fraction = Field(
        0.05, description="Largest share of bad rows of a dataset that `skip` accepts."
    )
    system_prompt: Annotated[str, Field(pattern=r"\S")] | None = Field(
        None,
        description="System turn of every conversation that has none; unset, that of the model "
        "that is opened, where a run gave it one.",
    )
    max_prompt_tokens: PositiveInt = Field(
        512, description="Longest prompt, in tokens; longer ones keep their end."
    )
    max_response_tokens: PositiveInt = Field(
        512, description="Longest response in SFT and reward training, in tokens; cut at the end."
    )


Tuning = Literal["full", "lora"]
