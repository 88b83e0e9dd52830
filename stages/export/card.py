"""The model card of an exported folder: what it is, how to load it, data, numbers and limits.

The YAML header follows the Hub's model-card metadata and holds Hub ids only; local datasets and
bases are named in the text.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

Form = Literal["adapter", "base", "merged"]
Template = Literal["own", "plain", "none"]  # the base tokenizer's chat template, ours, or none
BESIDE = "./base"  # how an adapter names the base that is exported beside it

_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype="{dtype}")
model = PeftModel.from_pretrained(base, "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

_TITLE = {
    "adapter": "RLHF policy (LoRA adapter)",
    "base": "Base of an RLHF policy",
    "merged": "RLHF policy",
}
_WHAT = {
    "adapter": "the policy as a LoRA adapter (PEFT)",
    "base": "the base model of the policy's adapter, which lies beside it in `adapter/`",
    "merged": "the policy as one plain model",
}
_WHOSE_NUMBERS = {
    "adapter": "On its base, this is the policy called PPO.",
    "base": "With the adapter, this is the policy called PPO.",
    "merged": "This is the policy called PPO.",
}


@dataclass(frozen=True)
class Base:
    """What an adapter stands on: a Hub id with its commit, or a folder with its files' hashes.

    `path` is what a loader is given, from the folder that holds the exported ones.
    """

    path: str
    on_hub: bool
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)  # weight file -> SHA-256


@dataclass(frozen=True)
class Data:
    """One dataset of the run; `hub_id` is None for a local file."""

    kind: str
    source: str
    train: int  # rows
    held_out: int  # rows
    hub_id: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card states; not the run's name, as runs take finished work over."""

    form: Form
    start: str  # what the run started from, in words
    start_hub_id: str | None
    steps: str  # what the run did, in words
    base: Base | None  # of the adapter; None where none is exported
    dtype: str
    data: tuple[Data, ...]
    report: str  # Markdown of the evaluation, with headings of its own
    stop_tokens: tuple[str, ...]
    template: Template
    text_as_turn: bool  # a plain-text prompt is rendered as a user's turn
    versions: Mapping[str, str]
    algorithm: str = "ppo"  # a tag
    stop_strings: tuple[str, ...] = ()
    forbidden_tokens: tuple[str, ...] = ()
    system_prompt: str | None = None


def model_card(facts: CardFacts) -> str:
    """README.md of one exported folder."""
    header = yaml.safe_dump(_header(facts), sort_keys=False, allow_unicode=True)
    report = re.sub(r"^# .*\n+", "", facts.report.strip())  # its title; its sections follow ours
    sections = [
        f"---\n{header}---",
        f"# {_TITLE[facts.form]}",
        f"This folder is {_WHAT[facts.form]}. Training started from {facts.start}; the steps of "
        f"RLHF (Ouyang et al. 2022, arXiv:2203.02155) were {facts.steps}.",
        "## Loading",
        f"From the folder that holds this one:\n\n```python\n{_loading(facts)}\n```",
        _base_note(facts),
        _prompt_note(facts),
        "## Data",
        _data_table(facts.data),
        "## Evaluation",
        _WHOSE_NUMBERS[facts.form],
        report,
        "## Intended use",
        "- The policy was optimised against a reward that stands in for people's preferences; "
        "a high reward does not make a response true, useful or safe.\n"
        "- It was measured on held-out prompts of its own data only, and no safety evaluation "
        "was made. Test it on your own use before relying on it.\n"
        "- What is wrong with the data (errors, offence, bias) can be wrong with the policy.",
        "Made with " + ", ".join(f"{name} {v}" for name, v in facts.versions.items()) + ".",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(facts: CardFacts) -> dict[str, Any]:
    header: dict[str, Any] = {}
    if facts.form == "adapter":
        assert facts.base is not None
        if facts.base.on_hub:
            header["base_model"] = facts.base.path
    elif facts.start_hub_id:
        header["base_model"] = facts.start_hub_id
    header["library_name"] = "peft" if facts.form == "adapter" else "transformers"
    header["pipeline_tag"] = "text-generation"
    header["tags"] = ["rlhf", "sft" if facts.form == "base" else facts.algorithm]
    if facts.form == "adapter":
        header["tags"].append("lora")
    datasets = dict.fromkeys(data.hub_id for data in facts.data if data.hub_id)
    if datasets:
        header["datasets"] = list(datasets)
    return header


def _loading(facts: CardFacts) -> str:
    folder = f"./{facts.form}"
    if facts.form != "adapter":
        return _LOAD_MODEL.format(folder=folder, dtype=facts.dtype)
    assert facts.base is not None
    revision = f', revision="{facts.base.revision}"' if facts.base.revision else ""
    return _LOAD_ADAPTER.format(
        base=facts.base.path, revision=revision, folder=folder, dtype=facts.dtype
    )


def _base_note(facts: CardFacts) -> str:
    base = facts.base
    if facts.form == "merged" or base is None:
        return ""
    if base.on_hub:
        commit = f", commit `{base.revision}`" if base.revision else ""
        return f"The adapter belongs to the base model `{base.path}`{commit}."
    hashes = "\n".join(f"- `{name}`: SHA-256 `{digest}`" for name, digest in base.files.items())
    beside = (
        "The adapter belongs to the model in `base/` beside it; move both together."
        if base.path == BESIDE
        else f"The adapter belongs to the model in `{base.path}`."
    )
    return (
        f"{beside} On other weights it would give other text without any error; these are the "
        f"right ones:\n\n{hashes}"
    )


def _prompt_note(facts: CardFacts) -> str:
    stops = ", ".join(f"`{token}`" for token in facts.stop_tokens)
    texts = "Prompts in plain text are used as they stand"
    template = {
        "own": "with the tokenizer's chat template",
        "plain": "as a plain transcript (`Human: ...`, `Assistant:`) by the tokenizer's chat "
        "template, which this run gave it",
        "none": "",
    }[facts.template]
    if facts.text_as_turn:
        prompts = f"Prompts are rendered {template}, plain text as a user's turn"
    else:
        prompts = f"{texts}; conversations are rendered {template}" if template else texts
    ends = f"Responses end at {stops} (set in `generation_config.json`)"
    return " ".join([f"{prompts}.", f"{ends}.", *_sampling_notes(facts)])


def _sampling_notes(facts: CardFacts) -> list[str]:
    """What else the run did in sampling; a loader has to do it too."""
    notes = []
    if facts.stop_strings:
        strings = list(facts.stop_strings)
        notes.append(
            f"In training they also ended at these strings, which are no part of the response: "
            f"`model.generate(..., stop_strings={strings!r}, tokenizer=tokenizer)`."
        )
    if facts.forbidden_tokens:
        tokens = ", ".join(f"`{token}`" for token in facts.forbidden_tokens)
        notes.append(f"Never sampled: {tokens} (set in `generation_config.json`).")
    if facts.system_prompt is not None:
        text = json.dumps(facts.system_prompt, ensure_ascii=False)
        notes.append(f"Conversations without a system turn were given this one: `{text}`.")
    return notes


def _data_table(data: tuple[Data, ...]) -> str:
    lines = ["| data | source | training rows | held-out rows |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {row.kind} | {row.source} | {row.train} | {row.held_out} |" for row in data]
    return "\n".join(lines)
