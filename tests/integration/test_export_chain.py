"""Exports through the real command line: all forms at once, and pushes that repeat no work."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_chain import SMALLEST, rlhf

CONFIG = f"""{SMALLEST}
sft: {{max_steps: 2, batch_size: 4}}
reward: {{tuning: lora, max_steps: 2, batch_size: 4, normalisation: {{num_samples: 4}}}}
ppo:
  tuning: lora
  iterations: 2
  rollout: {{prompts_per_iteration: 4, max_new_tokens: 8}}
  optim: {{ppo_epochs: 1, minibatches: 1}}
  held_out: {{num_prompts: 3}}
evaluation: {{prompts: 4, max_new_tokens: 4}}
export:
  {{adapters: [policy, reward], merged: true, vllm: true, reward: true, dtype: bfloat16,
    gguf: convert_hf_to_gguf.py, gguf_outtype: bf16}}
"""
CONVERTER = "import pathlib, sys; pathlib.Path(sys.argv[3]).write_text('GGUF')"
FORMS = ["adapter", "base", "gguf", "merged", "reward", "reward_adapter", "vllm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run in the current folder."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rlhf("run")
        yield folder


class Hub:
    """Stands in for huggingface_hub's client; refuses while `refuses` is set."""

    def __init__(self) -> None:
        self.refuses = True
        self.repositories: list[tuple[str, bool]] = []
        self.commits: list[list[str]] = []

    def __call__(self, **settings: Any) -> "Hub":
        return self

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.refuses:
            raise ConnectionError("no route to host")
        self.repositories.append((repository, private))

    def create_commit(self, repository: str, *, operations: list[Any], **settings: Any) -> Any:
        self.commits.append([operation.path_in_repo for operation in operations])
        return type("Commit", (), {"commit_url": f"hub/{repository}"})


def test_all_forms_are_written_and_held_by_the_manifest(folder: Path) -> None:
    out = folder / "runs" / "r" / "export"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["summary"]["folders"] == ", ".join(FORMS)
    for form in FORMS:
        assert f"{form}/README.md" in manifest["files"]
    assert (out / "gguf" / "policy-bf16.gguf").read_text() == "GGUF"
    assert "gguf/policy-bf16.gguf" in manifest["files"]
    assert manifest["material"]["export"]["adapters"] == ["policy", "reward"]
    assert (
        not {"push_to_hub", "hub_private", "hub_revision"} & manifest["material"]["export"].keys()
    )
    shift = json.loads((out / "reward" / "config.json").read_text())["reward_shift"]
    assert f"reward_shift = {shift!r}" in (out / "reward_adapter" / "README.md").read_text()


def test_a_push_that_failed_is_made_again_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    out = folder / "runs" / "r" / "export"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said = rlhf("export", "export.push_to_hub=me/mine", code=2)
    assert "nothing was pushed to me/mine: ConnectionError: no route to host" in said
    assert "export: finished, reused from" in said
    hub.refuses = False
    said = rlhf("export", "export.push_to_hub=me/mine")
    assert "export: finished, reused from" in said and "pushed to hub/me/mine" in said
    assert hub.repositories == [("me/mine", True)]
    (commit,) = hub.commits
    assert {"README.md", "config.json", "vllm/adapter_config.json", "reward/README.md"} <= set(
        commit
    )
    assert not {"manifest.json", "export.json"} & set(commit)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
