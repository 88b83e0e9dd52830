"""What `ppo.rewards` may hold: one reward source, or a list of them with ensembles among them.

An entry is known by the key that names its source: `model`, `function`, `http`, `builtin` or
`ensemble`. A text stands for an entry with all defaults, and one text for a list of one.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from pipeline.config import NonNegative, Section
from pipeline.reward_config import (
    FROM_LIST,
    OWN,
    FunctionEntry,
    HttpEntry,
    LengthPenaltyEntry,
    ModelEntry,
    RegexEntry,
    RepetitionPenaltyEntry,
    RewardEntry,
    RougeEntry,
    section_of_text,
)

_BUILTINS: dict[str, type[RewardEntry]] = {
    "length_penalty": LengthPenaltyEntry,
    "repetition_penalty": RepetitionPenaltyEntry,
    "regex": RegexEntry,
    "rouge": RougeEntry,
}
_KINDS = ("model", "function", "http", "builtin", "ensemble")


def _as_section(value: Any) -> Any:
    """A text as the section it stands for; of a section, its kind and keys are looked at."""
    if isinstance(value, Section):
        return value
    if isinstance(value, str):
        if value in _BUILTINS:
            raise ValueError(f"write {{builtin: {value}}} for the built-in one, ./{value} if not")
        return section_of_text(value)
    if not isinstance(value, dict):
        raise ValueError("write a text or a section, such as {model: org/name, weight: 0.5}")
    section = _section_type(value)
    allowed = list(section.model_fields)
    for key in value:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            has = f"did you mean {near[0]}?" if near else f"there are {', '.join(allowed)}"
            raise ValueError(f"unknown key {key}: {has}")
    return value


def _section_type(value: Mapping[str, Any]) -> type[RewardEntry]:
    kinds = [kind for kind in _KINDS if kind in value]
    if len(kinds) > 1:
        raise ValueError(f"it names {' and '.join(kinds)}: write an entry for each")
    if not kinds:
        close = [difflib.get_close_matches(str(key), _KINDS, n=1) for key in value]
        meant = next((f": did you mean {found[0]}?" for found in close if found), "")
        raise ValueError(f"it names no source (one of {', '.join(_KINDS)}){meant}")
    if kinds != ["builtin"]:
        return _SECTIONS[kinds[0]]
    named = value["builtin"]
    if named not in _BUILTINS:
        near = difflib.get_close_matches(str(named), _BUILTINS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(_BUILTINS)}"
        raise ValueError(f"builtin is {named!r}: {meant}")
    return _BUILTINS[named]


def _kind(value: Any) -> str:
    """The tag of a section in a union; no key of one, so that paths in errors stay right."""
    kind = type(value) if isinstance(value, Section) else _section_type(value)
    return f"<{kind.__name__}>"


Single = (
    Annotated[ModelEntry, Tag("<ModelEntry>")]
    | Annotated[FunctionEntry, Tag("<FunctionEntry>")]
    | Annotated[HttpEntry, Tag("<HttpEntry>")]
    | Annotated[LengthPenaltyEntry, Tag("<LengthPenaltyEntry>")]
    | Annotated[RepetitionPenaltyEntry, Tag("<RepetitionPenaltyEntry>")]
    | Annotated[RegexEntry, Tag("<RegexEntry>")]
    | Annotated[RougeEntry, Tag("<RougeEntry>")]
)


def _as_member(value: Any) -> Any:
    if isinstance(value, dict) and "ensemble" in value:
        raise ValueError("an ensemble holds sources, no ensembles: write its members out")
    return _as_section(value)


Member = Annotated[
    Single,
    Discriminator(_kind),
    BeforeValidator(_as_member, json_schema_input_type=str | Single),
]


class EnsembleEntry(RewardEntry):
    """Several sources as one, against over-optimisation (Coste et al. 2023, arXiv:2310.02743)."""

    ensemble: Annotated[tuple[Member, ...], FROM_LIST] = Field(
        min_length=2,
        description="Sources, best on one scale: their `weight` and `shift` come before `combine`.",
    )
    combine: Literal["mean", "minimum", "mean_minus_std"] = Field(
        "mean",
        description="`minimum` trusts the most doubtful member; `mean_minus_std` is the mean less "
        "`std_coef` standard deviations of the members' scores.",
    )
    std_coef: NonNegative = Field(1.0, description="With `combine: mean_minus_std`.")

    @model_validator(mode="after")
    def _the_coefficient_is_used(self) -> "EnsembleEntry":
        if self.combine != "mean_minus_std" and self.std_coef != 1:
            raise ValueError(
                f"std_coef is {self.std_coef:g} but combine is {self.combine}, which has no use "
                "for it: remove it or set combine to mean_minus_std"
            )
        return self


_SECTIONS: dict[str, type[RewardEntry]] = {
    "model": ModelEntry,
    "function": FunctionEntry,
    "http": HttpEntry,
    "ensemble": EnsembleEntry,
}
AnyEntry = Single | Annotated[EnsembleEntry, Tag("<EnsembleEntry>")]
Entry = Annotated[
    AnyEntry,
    Discriminator(_kind),
    BeforeValidator(_as_section, json_schema_input_type=str | AnyEntry),
]
Entries = Annotated[tuple[Entry, ...], Field(min_length=1), FROM_LIST]
Rewards = str | Sequence[RewardEntry] | None  # what `ppo.rewards` may be


# --- what others ask of it ------------------------------------------------------------------------


def single_entry(resource: str) -> RewardEntry:
    """The entry that a text stands for; what looks like nothing else names a model."""
    section: dict[str, Any] = {**section_of_text(resource)}
    return _SECTIONS[next(iter(section))].model_construct(**section)


def reward_entries(rewards: Rewards) -> tuple[RewardEntry, ...]:
    """The entries of `ppo.rewards`; null is the run's own reward model."""
    if rewards is None or isinstance(rewards, str):
        return (single_entry(rewards or OWN),)
    return tuple(rewards)


def single_entries(rewards: Rewards) -> dict[str, RewardEntry]:
    """Every source but ensembles by its place after `ppo.rewards`, as in `.0.ensemble.1`."""
    if rewards is None or isinstance(rewards, str):
        return {"": reward_entries(rewards)[0]}
    found: dict[str, RewardEntry] = {}
    for number, entry in enumerate(rewards):
        if isinstance(entry, EnsembleEntry):
            members = enumerate(entry.ensemble)
            found |= {f".{number}.ensemble.{inner}": member for inner, member in members}
        else:
            found[f".{number}"] = entry
    return found


def walk_entries(rewards: Rewards) -> Iterator[RewardEntry]:
    """Every entry, ensembles before their members: the order of `source_names`."""
    for entry in reward_entries(rewards):
        yield entry
        if isinstance(entry, EnsembleEntry):
            yield from entry.ensemble


def uses_own(rewards: Rewards) -> bool:
    """Whether the run's own reward model is among the sources."""
    return any(isinstance(e, ModelEntry) and e.model == OWN for e in walk_entries(rewards))


def source_names(rewards: Rewards) -> list[str]:
    """A name for each of `walk_entries`, no two alike: `name`, or one made from the source."""
    entries = list(walk_entries(rewards))
    taken = {entry.name for entry in entries if entry.name}
    found = []
    for entry in entries:
        name = entry.name or _name(entry)
        if not entry.name:
            number, plain = 1, name
            while name in taken:
                number += 1
                name = f"{plain}-{number}"
            taken.add(name)
        found.append(name)
    return found


def repeated_name(rewards: Rewards) -> str | None:
    """A `name` that two entries have, if any."""
    names = Counter(entry.name for entry in walk_entries(rewards) if entry.name)
    return next((name for name, count in names.items() if count > 1), None)


def _name(entry: RewardEntry) -> str:
    match entry:
        case ModelEntry():
            # Of a run's folders, the run's own says which it is.
            parts = [p for p in Path(entry.model).parts if p not in ("reward", "artifact")]
            name = parts[-1] if parts else entry.model
        case FunctionEntry():
            name = entry.function.rpartition(":")[2]
        case HttpEntry():
            name = urlsplit(entry.http).hostname or ""
        case EnsembleEntry():
            name = "ensemble"
        case _:
            name = str(getattr(entry, "builtin", ""))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64] or "source"
