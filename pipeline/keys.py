"""Keys of stages: the hash of everything that a stage's result depends on.

That is its own section, the common fields that it reads, the content of its data and of the files
it names, and its parents' keys; not memory knobs, and not where things lie. Work whose key is
unchanged is never done twice.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import (
    Section,
    function_reference,
    key_values,
    named_resources,
    resource_path,
)
from pipeline.runfolder import file_hash, json_hash
from pipeline.stage import Stage

KEY_FORMAT = 1  # raise it when a stage computes something else from the same inputs


def stage_material(
    stage: Stage,
    config: Any,
    data_fingerprint: Callable[[str], str],
    parent_keys: Mapping[str, str],
) -> dict[str, Any]:
    """What a stage's key is made of, as JSON values that `difference` can compare."""
    section = getattr(config, stage.name)
    resources = stage.resources(config)
    own = {field for field in resources if field.startswith(f"{stage.name}.")}
    named = {".".join(map(str, (stage.name, *place))) for place, _ in named_resources(section)}
    assert own == named, sorted(own ^ named)
    common: dict[str, Any] = {
        "seed": config.run.seed,
        "mixed_precision": config.run.mixed_precision,
        "model": _key_values(config.model),
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "max_response_tokens": config.data.max_response_tokens,
        "system_prompt": config.data.system_prompt,
    }
    if stage.samples:
        common["generation"] = _key_values(config.generation)
    if getattr(section, "tuning", None) == "lora":
        common["lora"] = _key_values(config.lora)
    return {
        "format": KEY_FORMAT,
        "stage": stage.name,
        stage.name: _key_values(section),
        "common": common,
        "data": {kind: data_fingerprint(kind) for kind in stage.reads(config)},
        "resources": {
            field: resource_fingerprint(resource) for field, resource in resources.items()
        },
        "parents": dict(parent_keys),
    }


def _key_values(section: Section) -> dict[str, Any]:
    return key_values(type(section), section.model_dump(mode="json"))


def resource_fingerprint(resource: str) -> str:
    """What identifies a function, a file, a folder or a Hub id that a stage reads.

    Wherever they lie, files and folders are their content; a function's name is part of it.
    """
    if (reference := function_reference(resource)) is not None:
        file = _module_file(resource) or resource_path(resource)
        # A file may move; a module's name says which of its package's files count too.
        name = reference[1] if reference[0].endswith(".py") else resource
        return f"{file_hash(file)}:{name}" if file.is_file() else resource
    path = resource_path(resource)
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        manifests = sorted(path.rglob("manifest.json"))
        names = manifests or sorted(p for p in path.rglob("*") if p.is_file())
        return json_hash({p.relative_to(path).as_posix(): file_hash(p) for p in names})
    return resource


def _module_file(resource: str) -> Path | None:
    """The file of the module in `module:function`; None of anything else, or where it has none."""
    reference = function_reference(resource)
    if reference is None or reference[0].endswith(".py"):
        return None
    try:
        spec = importlib.util.find_spec(reference[0])
    except (ImportError, ValueError):
        return None  # whoever opens it says so
    return Path(spec.origin) if spec is not None and spec.origin else None


def difference(old: Any, new: Any, prefix: str = "") -> str:
    """The leaves in which two nested mappings differ, as `path: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        parts = [
            difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        return ", ".join(parts)
    return f"{prefix}: {json.dumps(old)} -> {json.dumps(new)}"
