"""The model card of an exported folder: what it is, how to load it, data, numbers and limits.

The YAML header follows the Hub's model-card metadata and holds Hub ids only; local datasets and
bases are named in the text.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from pipeline.vllm_config import vllm_max_rank
from stages.export.classifier import Scoring
from stages.export.forms import FORMS, TEXT_IDS, Form, turn_ids

Template = Literal["own", "plain", "none"]  # the base tokenizer's chat template, ours, or none
_SEQ2SEQ = "AutoModelForSeq2SeqLM"


@dataclass(frozen=True)
class Base:
    """What an adapter stands on: a Hub id with its commit, or a folder with its files' hashes.

    `path` is what a loader is given, from the folder that holds the exported ones.
    """

    path: str
    on_hub: bool
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)  # weight file -> SHA-256

    @property
    def is_beside(self) -> bool:
        """Whether it is exported beside the adapter: then `path` begins in the export folder."""
        return self.path.startswith("./")


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
    auto_class: str  # of transformers, which loads the model
    data: tuple[Data, ...]
    report: str  # Markdown of the evaluation, with headings of its own
    stop_tokens: tuple[str, ...]
    end_token: str  # the one that training appends
    lead: str  # what the template puts before a response
    template: Template
    text_as_turn: bool  # a plain-text prompt is rendered as a user's turn
    versions: Mapping[str, str]
    rank: int | None  # of the adapter
    scoring: Scoring | None  # of a reward model
    outtype: str  # of GGUF
    algorithm: str = "ppo"  # a tag
    stop_strings: tuple[str, ...] = ()
    forbidden_tokens: tuple[str, ...] = ()
    system_prompt: str | None = None


def model_card(facts: CardFacts) -> str:
    """README.md of one exported folder."""
    words = FORMS[facts.form]
    header = yaml.safe_dump(_header(facts), sort_keys=False, allow_unicode=True)
    report = re.sub(r"^# .*\n+", "", facts.report.strip())  # its title; its sections follow ours
    rewards = words.task == "text-classification"
    sections = [
        f"---\n{header}---",
        f"# {words.title}",
        f"This folder is {words.what}. Training started from {facts.start}; the steps of "
        f"RLHF (Ouyang et al. 2022, arXiv:2203.02155) were {facts.steps}.",
        "## Loading",
        f"{_HERE}\n\n```{words.language}\n{_loading(facts)}\n```",
        _base_note(facts),
        _scoring_note(facts) if facts.scoring else _prompt_note(facts),
        "## Data",
        _data_table(facts.data),
        "## Evaluation",
        words.whose_numbers,
        report,
        "## Intended use",
        _REWARD_USE if rewards else _POLICY_USE,
        "Made with " + ", ".join(f"{name} {v}" for name, v in facts.versions.items()) + ".",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_HERE = "From the folder that holds this one:"
_POLICY_USE = """\
- The policy was optimised against a reward that stands in for people's preferences; a high reward \
does not make a response true, useful or safe.
- It was measured on held-out prompts of its own data only, and no safety evaluation was made. \
Test it on your own use before relying on it.
- What is wrong with the data (errors, offence, bias) can be wrong with the policy."""
_REWARD_USE = """\
- Scores compare responses to one prompt. They stand in for the preferences of the people who \
ranked the training data; a high score does not make a response true, useful or safe.
- It was measured on held-out rankings of its own data only. A policy that is optimised against it \
finds responses that it scores too high.
- What is wrong with the data (errors, offence, bias) can be wrong with the scores."""


def on_hub(card: str, repository: str, at_root: str, revision: str | None) -> str:
    """The card of a folder as the Hub shows it: its Python loads from `repository`.

    The form `at_root` lies in the repository itself, the others in folders of their names.
    """

    def place(match: re.Match[str]) -> str:
        folder = match[1]
        inside = "" if folder == at_root else f', subfolder="{folder}"'
        branch = "" if revision is None else f', revision="{revision}"'
        return f'"{repository}"{inside}{branch}'

    changed = re.sub(r'"\./(\w+)"', place, card)
    branch = "" if revision is None else f" --revision {revision}"
    here = f"After `hf download {repository}{branch} --local-dir .`:"
    return changed.replace(_HERE, "From the Hub:" if changed != card else here)


def _header(facts: CardFacts) -> dict[str, Any]:
    words = FORMS[facts.form]
    header: dict[str, Any] = {}
    if facts.base is not None and facts.form not in ("base", "reward_base"):
        if facts.base.on_hub:
            header["base_model"] = facts.base.path
    elif facts.start_hub_id:
        header["base_model"] = facts.start_hub_id
    header["library_name"] = words.library
    generates = words.task == "text-generation"
    is_seq2seq = generates and facts.auto_class == _SEQ2SEQ
    header["pipeline_tag"] = "text2text-generation" if is_seq2seq else words.task
    header["tags"] = [facts.algorithm if tag == "ppo" else tag for tag in words.tags]
    datasets = dict.fromkeys(data.hub_id for data in facts.data if data.hub_id)
    if datasets:
        header["datasets"] = list(datasets)
    return header


def _loading(facts: CardFacts) -> str:
    base, how = facts.base, facts.scoring
    words = FORMS[facts.form]
    path, revision = (base.path, base.revision) if base is not None else ("", None)
    named = f', revision="{revision}"'
    if words.language == "sh":
        path, named = shlex.quote(path), f" --revision {revision}"
    return words.loading.format(
        folder=f"./{facts.form}",
        dtype=facts.dtype,
        auto_class=facts.auto_class,
        base=path,
        revision=named if revision else "",
        max_rank=vllm_max_rank(facts.rank) if facts.form == "vllm" and facts.rank else "",
        outtype=facts.outtype,
        shift=how.shift if how is not None else 0.0,
        pad_id=how.pad_id if how is not None else 0,
        prompt_ids=turn_ids(facts.system_prompt) if facts.text_as_turn else TEXT_IDS,
        response=f"{facts.lead!r} + response" if facts.text_as_turn and facts.lead else "response",
        end_token=facts.end_token,
    )


def _scoring_note(facts: CardFacts) -> str:
    """What a logit is, and what the classifier expects of a row."""
    how = facts.scoring
    assert how is not None
    return (
        f"The score of this run's reward model is logit - `reward_shift`, and `reward_shift` is "
        f"{how.shift!r}: the classifier has no bias, and the scale is part of its weights. Its "
        f"logit is that of the last token that is not the pad token `{how.pad_token}`; so every "
        f"row ends with the response's end token `{facts.end_token}`, as in training. Pad on the "
        "right." + "".join(f" {note}" for note in _system_notes(facts))
    )


def _base_note(facts: CardFacts) -> str:
    base = facts.base
    if base is None:
        return ""
    if base.on_hub:
        commit = f", commit `{base.revision}`" if base.revision else ""
        return f"The adapter belongs to the base model `{base.path}`{commit}."
    hashes = "\n".join(f"- `{name}`: SHA-256 `{digest}`" for name, digest in base.files.items())
    beside = (
        f"The adapter belongs to the model in `{base.path[2:]}/` beside it; move both together."
        if base.is_beside
        else f"The adapter belongs to the model in `{base.path}`."
    )
    return (
        f"{beside} On other weights it would give other numbers without any error; these are the "
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
    where = "set in `generation_config.json`"
    if facts.form == "gguf":
        where = "the file names one of them; give a program the others itself"
    ends = f"Responses end at {stops} ({where})"
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
    return notes + _system_notes(facts)


def _system_notes(facts: CardFacts) -> list[str]:
    if facts.system_prompt is None:
        return []
    text = json.dumps(facts.system_prompt, ensure_ascii=False)
    return [f"Conversations without a system turn were given this one: `{text}`."]


def _data_table(data: tuple[Data, ...]) -> str:
    lines = ["| data | source | training rows | held-out rows |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {row.kind} | {row.source} | {row.train} | {row.held_out} |" for row in data]
    return "\n".join(lines)
