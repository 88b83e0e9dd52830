"""The store: what is saved opens again to the same numbers, on one base, or says why not."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.config import DataSection, LoraSection, ModelSection
from pipeline.errors import ModelError, PipelineError
from pipeline.models import adapters
from pipeline.models.origin import BaseOrigin
from pipeline.models.store import HANDLE, ModelStore, find_artifact
from pipeline.models.trained import save_head
from pipeline.runfolder import write_manifest
from tests.unit.test_models import batch, train_adapter


class TestStore:
    def lora_pair(self, store, folder: Path):
        """An SFT model with weights of its own and a reward adapter on it, saved."""
        base = store.build(["the cat sat on the mat"] * 4)
        sft = base.with_role("sft")
        store.save(sft, folder / "sft")
        model = sft.trunk.model
        adapters.add_adapter(model, "reward", adapters.lora_config(LoraSection(rank=4)))
        train_adapter(model, "reward")
        head = sft.trunk.add_head("reward")
        head.init_normal()
        head.normalise(0.5, 2.0)
        reward = sft.with_role("reward", adapter="reward", head="reward")
        store.save(reward, folder / "reward")
        return sft, reward

    def test_artifacts_open_to_the_same_numbers_on_one_base(self, tmp_path, make_store):
        store = make_store()
        sft, reward = self.lora_pair(store, tmp_path)
        assert store.open(tmp_path / "reward") is reward  # live: nothing is loaded again
        again = ModelStore(store.section, store.data)
        opened = again.open(tmp_path / "reward")
        base = again.open(tmp_path / "sft")
        assert opened.trunk is base.trunk
        with torch.no_grad():
            for ours, theirs, want in [(sft, base, "logprobs"), (reward, opened, "scores")]:
                a = getattr(ours(batch(), {want}), want)
                b = getattr(theirs(batch(), {want}), want)
                torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert base.trunk.base_hash() == sft.trunk.base_hash()
        assert opened.codec.same_ids(reward.codec)

    def test_artifacts_open_after_the_run_has_moved(self, tmp_path, make_store):
        store = make_store()
        self.lora_pair(store, tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / "moved")
        opened = ModelStore(store.section, store.data).open(tmp_path / "moved" / "reward")
        assert opened.role.adapter == "reward"

    def test_an_adapter_on_another_base_is_refused(self, tmp_path, make_store):
        store = make_store()
        self.lora_pair(store, tmp_path)
        torch.manual_seed(99)
        other = make_store()
        other.save(other.build(["another text"] * 9).with_role("sft"), tmp_path / "other")
        weights = (tmp_path / "other/model/model.safetensors").read_bytes()
        (tmp_path / "sft/model/model.safetensors").write_bytes(weights)
        with pytest.raises(ModelError, match="was trained on a base with the weights"):
            ModelStore(store.section, store.data).open(tmp_path / "reward")

    def test_two_artifacts_of_one_role_live_beside_each_other(self, tmp_path, make_store):
        store = make_store()
        _, reward = self.lora_pair(store, tmp_path)
        train_adapter(reward.trunk.model, "reward", seed=5)
        store.save(reward, tmp_path / "later")
        again = ModelStore(store.section, store.data)
        first, second = again.open(tmp_path / "reward"), again.open(tmp_path / "later")
        assert first.trunk is second.trunk
        with torch.no_grad():
            a, b = (h(batch(), {"scores"}).scores for h in (first, second))
        assert (a - b).abs().max() > 1e-3

    def test_fork_moves_alone(self, make_store):
        store = make_store()
        base = store.build(["the cat sat on the mat"] * 4)
        fork = store.fork(base, "policy")
        before = base.trunk.base_hash()
        assert fork.trunk.base_hash() == before
        with torch.no_grad():
            for parameter in fork.trunk.model.parameters():
                parameter.add_(1)
        assert base.trunk.base_hash() == before
        assert fork.trunk.base_hash() != before

    def test_a_fork_holds_what_its_role_needs_and_no_more(self, tmp_path, make_store):
        store = make_store()
        sft, reward = self.lora_pair(store, tmp_path)
        adapters.copy_adapter(sft.trunk.model, "reward", "value")
        sft.trunk.add_head("value").init_normal()

        bare = store.fork(sft, "policy")
        plain = {name for name, _ in make_store().build(["a b"]).trunk.model.named_parameters()}
        assert {name for name, _ in bare.trunk.model.named_parameters()} == plain
        assert len(bare.trunk.heads) == 0
        scorer = store.fork(reward, "judge")
        assert adapters.adapter_names(scorer.trunk.model) == {"reward"}
        assert list(scorer.trunk.heads) == ["reward"]
        with torch.no_grad():
            for ours, theirs, want in [(sft, bare, "logprobs"), (reward, scorer, "scores")]:
                a, b = (getattr(h(batch(), {want}), want) for h in (ours, theirs))
                torch.testing.assert_close(a, b, rtol=0, atol=0)

        # Adapters go onto the bare copy as onto any base: one layer of them, not one in another.
        config = LoraSection(rank=4)
        grown = store.trainable_copy(bare, "policy", "lora", config).trunk.model
        assert len(adapters.tuner_layers(grown)) == len(adapters.tuner_layers(sft.trunk.model))
        # What a copy remembers of its layers is its own, also after adapters are baked into it.
        again = copy.deepcopy(grown)
        own = {id(module) for module in again.modules()}
        assert {id(layer) for layer in adapters.tuner_layers(again)} <= own
        adapters.bake(again, "policy")
        assert adapters.tuner_layers(again) == [] != adapters.tuner_layers(grown)
        # The source has all that it had.
        assert adapters.adapter_names(sft.trunk.model) == {"reward", "value"}
        assert set(sft.trunk.heads) == {"reward", "value"}

    def test_a_forgotten_trunk_is_loaded_again_to_the_same_numbers(self, tmp_path, make_store):
        store = make_store()
        sft, reward = self.lora_pair(store, tmp_path)
        with torch.no_grad():
            before = reward(batch(), {"scores"}).scores
            store.forget(sft.trunk)
            for parameter in sft.trunk.model.parameters():
                parameter.zero_()
            opened = store.open(tmp_path / "reward")
            assert opened.trunk is store.open(tmp_path / "sft").trunk is not sft.trunk
            after = opened(batch(), {"scores"}).scores
        torch.testing.assert_close(before, after, rtol=0, atol=0)

    def test_training_a_base_takes_it_out_of_the_stores_index(self, tmp_path, make_store):
        store = make_store()
        self.lora_pair(store, tmp_path)
        section = ModelSection(path=str(tmp_path / "sft/model"), dtype="float64")
        again = ModelStore(section, DataSection())
        handle = again.pretrained()
        with torch.no_grad():
            next(handle.trunk.model.parameters()).add_(1)  # full fine-tuning, in place
        again.save(handle.with_role("sft"), tmp_path / "tuned")
        assert again.pretrained().trunk is not handle.trunk
        assert again.open(tmp_path / "tuned").trunk is handle.trunk

    def test_pickled_weights_are_refused(self, tmp_path, make_store):
        store = make_store()
        self.lora_pair(store, tmp_path)
        folder = tmp_path / "sft/model"
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"no \.safetensors weights.*save_pretrained"):
            ModelStore(ModelSection(path=str(folder)), DataSection()).pretrained()

    def test_a_model_that_is_nowhere_says_what_to_do(self):
        store = ModelStore(ModelSection(path="nobody/no-such-model"), DataSection())
        with pytest.raises(ModelError, match=r"nobody/no-such-model.*(Hub|model\.path)"):
            store.pretrained()

    def test_a_run_without_the_stage_says_which_to_run(self, tmp_path):
        (tmp_path / "config.yaml").write_text("{}")
        store = ModelStore(ModelSection(path="x"), DataSection())
        with pytest.raises(ModelError, match=r"no finished reward stage: run `rlhf reward`"):
            store.resolve(str(tmp_path), "reward")

    def test_a_model_of_another_run_is_read_under_the_limits_of_this_one(
        self, tmp_path, make_store
    ):
        store = make_store()
        self.lora_pair(store, tmp_path)
        write_manifest(tmp_path / "sft", stage="sft", key="", material={}, summary={}, seconds=0)
        here = ModelStore(store.section, DataSection(max_prompt_tokens=3, max_response_tokens=2))
        codec = here.resolve(str(tmp_path / "sft"), "sft").codec
        assert len(codec.prompt_ids("the cat sat on the mat")) == 3
        assert len(store.open(tmp_path / "sft").codec.prompt_ids("the cat sat on the mat")) > 3
        assert len(codec.response_ids("the cat sat")) == 2

    def test_the_runs_own_base_is_taken_at_its_revision(self, monkeypatch):
        asked = []
        monkeypatch.setattr(ModelStore, "pretrained", lambda _, *which: asked.append(which))
        store = ModelStore(ModelSection(path="org/base", revision="v2"), DataSection())
        store.resolve("org/base", "sft")
        store.resolve("org/other", "sft")
        assert asked == [("org/base", "v2"), ("org/other", None)]

    def test_a_full_disk_is_named_whatever_is_saved(self, tmp_path, make_store):
        _, reward = self.lora_pair(make_store(), tmp_path)
        model, full = reward.trunk.model, Path("/dev/full")
        state, head = dict(reward.trunk.base_state()), reward.trunk.heads["reward"]
        for name in ("adapter/adapter_config.json", "tokenizer/tokenizer_config.json",
                     "model/config.json"):  # fmt: skip
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).symlink_to(full)
        (tmp_path / "file").touch()
        saves = {
            "adapter": lambda path: adapters.save_adapter(model, "reward", path, "some/base"),
            "tokenizer": reward.codec.save_tokenizer,
            "model": lambda path: make_store()._save_model(reward, state, path),
            "file/head.safetensors": lambda path: save_head(head.state_dict(), path),
        }
        for name, save in saves.items():
            reason = "Not a directory" if name.startswith("file") else "No space left"
            with pytest.raises(PipelineError, match=rf"cannot write .*{name}: .*{reason}"):
                save(tmp_path / name)

    def test_weights_of_a_file_lie_as_those_of_a_live_model(self, tmp_path, make_store):
        store = make_store()
        self.lora_pair(store, tmp_path)
        opened = ModelStore(store.section, store.data).open(tmp_path / "reward").trunk
        assert all(x.data_ptr() % 64 == 0 for x in (*opened.parameters(), *opened.buffers()))
        ends = opened.model.get_input_embeddings(), opened.model.get_output_embeddings()
        assert ends[0].weight is ends[1].weight  # still tied

    def test_a_kept_artifact_opens_from_another_depth(self, tmp_path, make_store):
        store = make_store()
        self.lora_pair(store, tmp_path)
        (tmp_path / "previous").mkdir()
        kept = (tmp_path / "reward").rename(tmp_path / "previous/reward-1")
        again = ModelStore(store.section, store.data)
        assert again.open(kept).role.adapter == "reward"
        (tmp_path / "sft").rename(tmp_path / "gone")
        with pytest.raises(ModelError, match="base that is no longer there"):
            ModelStore(store.section, store.data).open(kept)

    def test_an_exported_adapter_finds_the_base_beside_it(self, tmp_path, make_store):
        store = make_store()
        _, reward = self.lora_pair(store, tmp_path)
        folder = tmp_path / "export"
        shutil.copytree(tmp_path / "sft/model", folder / "base")
        adapters.save_adapter(reward.trunk.model, "reward", folder / "adapter", "./base")
        again = ModelStore(store.section, store.data)
        opened = again.resolve(str(folder / "adapter"), "sft")
        assert again.resolve(str(folder / "adapter"), "sft") is opened
        with torch.no_grad():
            ours, theirs = (h(batch(), {"logprobs"}).logprobs for h in (reward, opened))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    def test_a_hub_base_is_known_by_its_commit(self, tmp_path, make_store, monkeypatch):
        from huggingface_hub import constants

        store = make_store()
        self.lora_pair(store, tmp_path)
        cached = tmp_path / "hub/models--someone--model"
        shutil.copytree(tmp_path / "sft/model", cached / "snapshots" / ("a" * 40))
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text("a" * 40)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        section = ModelSection(path="someone/model", dtype="float64")
        hub = ModelStore(section, DataSection())
        base = hub.pretrained()
        assert base.trunk.origin == BaseOrigin(
            "someone/model", f"someone/model@{'a' * 40}", "a" * 40
        )
        adapters.add_adapter(base.trunk.model, "sft", adapters.lora_config(LoraSection(rank=4)))
        hub.save(base.with_role("sft", adapter="sft"), tmp_path / "adapted")
        config = json.loads((tmp_path / "adapted/adapter/adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (
            "someone/model",
            "a" * 40,
        )
        # The branch moves on; the artifact still opens on the commit that it was trained on.
        shutil.copytree(tmp_path / "sft/model", cached / "snapshots" / ("b" * 40))
        (cached / "refs/main").write_text("b" * 40)
        again = ModelStore(section, DataSection())
        assert again.open(tmp_path / "adapted").trunk.origin.revision == "a" * 40
        assert again.pretrained().trunk.origin.revision == "b" * 40


def test_of_a_run_only_what_is_taken_counts(tmp_path):
    from pipeline.keys import resource_fingerprint

    artifact = tmp_path / "run/sft/artifact"
    artifact.mkdir(parents=True)
    (artifact / HANDLE).write_text("{}")
    (artifact / "manifest.json").write_text("{}")
    found = str(find_artifact(str(tmp_path / "run"), "sft"))
    assert found == str(artifact)
    before = resource_fingerprint(found)
    (tmp_path / "run/export").mkdir()
    (tmp_path / "run/export/manifest.json").write_text("{}")
    assert resource_fingerprint(found) == before
    assert find_artifact(str(tmp_path / "run"), "reward") is None
