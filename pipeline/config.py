"""The common sections of a run's configuration; every stage owns its own beside its code.

A section is a frozen pydantic model that refuses unknown keys. Each field carries one sentence with
its unit: the config reference, the JSON Schema and editor completion are generated from them.
Reading YAML, overrides and the wording of errors live in `pipeline.yaml_config`.
"""

import re
from collections.abc import Iterator, Mapping
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
from pydantic.fields import FieldInfo


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


# A value's place in a configuration: names of fields, and numbers in lists.
Place = tuple[str | int, ...]


def is_resource(field: FieldInfo) -> bool:
    """Whether a field names a resource, or several."""
    marker = get_args(Resource)[1]
    return marker in field.metadata or _holds(field.annotation, marker)


def _holds(annotation: Any, marker: Any) -> bool:
    return any(argument is marker or _holds(argument, marker) for argument in get_args(annotation))


def sections_in(annotation: Any) -> Iterator[type["Section"]]:
    """The sections that a field may hold, in the order of its alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def resource_fields(section: type[Section]) -> list[str]:
    """The fields of a section that name a resource which its result depends on."""
    return [
        name
        for name, field in section.model_fields.items()
        if is_resource(field) and field.json_schema_extra != NOT_IN_KEY
    ]


def named_resources(section: Section, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every resource that a section and those in it name, with its place."""
    own = resource_fields(type(section))
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, str) and name in own and not _is_word(type(section), name, value):
            yield (*place, name), value
        for number, item in enumerate(value if isinstance(value, tuple) else ()):
            if isinstance(item, Section):
                yield from named_resources(item, (*place, name, number))
        if isinstance(value, Section):
            yield from named_resources(value, (*place, name))


def _is_word(section: type[Section], name: str, value: str) -> bool:
    """Whether a value is one of the words that a field takes beside resources."""
    options = get_args(section.model_fields[name].annotation)
    return any(value in get_args(option) for option in options)


def key_values(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """The dumped `values` of a section that belong in a key.

    Left out are `NOT_IN_KEY` and resources, whose content a key has in their place.
    """
    found = dict(values)
    for name, field in section.model_fields.items():
        nested, value = field.annotation, found.get(name)
        items = value if isinstance(value, list | tuple) else ()
        if field.json_schema_extra == NOT_IN_KEY:
            found.pop(name, None)
        elif any(isinstance(item, Mapping) for item in items):
            found[name] = [key_values(_section_of(nested, item), item) for item in items]
        elif name in resource_fields(section):
            found.pop(name, None)
        elif name in found and isinstance(nested, type) and issubclass(nested, Section):
            found[name] = key_values(nested, found[name])
    return found


def _section_of(annotation: Any, values: Mapping[str, Any]) -> type[Section]:
    """The alternative of a list's items that `values` were dumped from: it has their fields."""
    alternatives = (s for s in sections_in(annotation) if values.keys() <= s.model_fields.keys())
    return next(alternatives, Section)


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


ALL_LINEAR = "all-linear"


class LoraSection(Section):
    """Shape of every LoRA adapter of the run; the roles' adapters are copied from one another."""

    rank: PositiveInt = Field(16, description="Rank of the update matrices.")
    alpha: Positive = Field(32, description="Scale of the update: alpha / rank times B A x.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input in SFT and reward.")
    target_modules: str | tuple[str, ...] = Field(
        ALL_LINEAR, description="Modules that get an adapter, by name, or `all-linear`."
    )
    target_parameters: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="Parameters outside linear layers that get an adapter, by the ends of their "
        "names; `auto` takes the experts of a mixture with `all-linear`, and else none.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (DoRA).")

    @model_validator(mode="after")
    def _parameters_have_plain_adapters(self) -> "LoraSection":
        if self.target_parameters in ("auto", ()):
            return self
        for name, value, off in (
            ("dropout", self.dropout, "0"),
            ("use_dora", self.use_dora, "false"),
        ):
            if value:
                raise ValueError(
                    f"lora.{name} is {str(value).lower()}, which PEFT does not have for "
                    f"lora.target_parameters: set lora.{name} to {off} or "
                    "lora.target_parameters to []"
                )
        return self


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
    pretraining: Source | None = Field(
        None, description="Plain text (column `text`) that PPO may mix in; chunks fill the limits."
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
