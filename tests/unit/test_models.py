"""Trunk, heads, adapters and store against plain transformers and plain peft."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.config import DataSection, LoraSection, ModelSection
from pipeline.errors import ModelError
from pipeline.models import adapters
from pipeline.models.heads import ScalarHead
from pipeline.models.store import HANDLE, ModelStore, find_artifact
from pipeline.models.trunk import BaseOrigin, Role

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [27]]
EVERYTHING = {"logprobs", "entropy", "values", "scores"}
DECODERS = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "do_layer_norm_before": True},
    "phi": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "bloom": {"n_layer": 2, "n_head": 2},
}
# Their attention takes softmax in float32, where float64's mask of -1.8e308 becomes -inf and a
# padding position that sees nothing becomes NaN: a float64 run of them is not possible.
FLOAT32_ONLY = {"gemma2", "bloom"}


def batch() -> TokenBatch:
    return TokenBatch.from_ragged(PROMPTS, RESPONSES, pad_id=0)


def train_adapter(model, name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.adapter_parameters(model, name):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.1 * noise.to(parameter.dtype))


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_outputs_equal_plain_transformers_row_by_row(make_handle, model_type, padding_side):
    dtype, tolerance = ("float32", 1e-4) if model_type in FLOAT32_ONLY else ("float64", 1e-9)
    handle = make_handle(model_type, dtype, **DECODERS[model_type])
    handle.trunk.add_head("h").init_normal(torch.Generator().manual_seed(1))
    handle.trunk.joiner.padding_side = padding_side
    out = handle.with_role("r", head="h")(batch(), EVERYTHING, temperature=0.7)
    head = handle.trunk.heads["h"]
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([prompt + response])
        seen = []
        layer = handle.trunk.model.get_output_embeddings()
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        logp = (handle.trunk.model(ids).logits[0] / 0.7).log_softmax(-1)
        hook.remove()
        for t, token in enumerate(response):
            at = len(prompt) - 1 + t  # the position that predicts response token t
            assert out.logprobs[row, t] == pytest.approx(logp[at, token].item(), abs=tolerance)
            entropy = -(logp[at].exp() * logp[at]).sum().item()
            assert out.entropy[row, t] == pytest.approx(entropy, abs=tolerance)
            value = (seen[0][at] @ head.weight + head.bias).item()
            assert out.values[row, t] == pytest.approx(value, abs=tolerance)
        score = (seen[0][-1] @ head.weight + head.bias).item()
        assert out.scores[row] == pytest.approx(score, abs=tolerance)
        for field in (out.logprobs, out.entropy, out.values):
            assert not field[row, len(response) :].any()  # zeros on padding


def test_logits_are_made_at_response_positions_only(make_handle):
    handle = make_handle()
    rows = []
    handle.trunk.model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, out: rows.append(out.shape[:-1].numel())
    )
    handle(batch(), {"logprobs"})
    assert rows == [2 + 5 + 1]
    handle.trunk.add_head("h")
    handle.with_role("r", head="h")(batch(), {"scores"})
    assert rows[1] == 0


def test_head_normalisation_moves_scores_to_mean_0_and_deviation_1():
    head = ScalarHead(3, torch.float64)
    head.init_normal(torch.Generator().manual_seed(0))
    hidden = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        raw = head(hidden)
        head.normalise(raw.mean().item(), raw.std().item())
        scores = head(hidden)
        assert scores.mean().item() == pytest.approx(0, abs=1e-12)
        assert scores.std().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(scores, (raw - raw.mean()) / raw.std(), rtol=0, atol=1e-12)
        # A second normalisation composes with the first; folding changes no score.
        head.normalise(0.25, 2.0)
        torch.testing.assert_close(head(hidden), (scores - 0.25) / 2, rtol=0, atol=1e-12)
        torch.testing.assert_close(head.folded()(hidden), head(hidden), rtol=0, atol=1e-12)
    assert (head.folded().shift.item(), head.folded().scale.item()) == (0, 1)


def test_head_init_has_deviation_one_over_root_of_width_plus_one():
    head = ScalarHead(40_000)
    head.init_normal(torch.Generator().manual_seed(0))
    # 1 / sqrt(40001) = 0.0049999; the sample deviation of 40,000 draws is within 2% of it
    assert head.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert head.bias.item() == 0


def test_roles_switch_without_touching_requires_grad_or_the_base(make_handle):
    handle = make_handle()
    model = handle.trunk.model
    with torch.no_grad():
        bare = handle(batch(), {"logprobs"}).logprobs
    before = handle.trunk.base_hash()
    adapters.add_adapter(model, "sft", adapters.lora_config(LoraSection(rank=4)))
    train_adapter(model, "sft")
    adapters.copy_adapter(model, "sft", "policy")
    train_adapter(model, "policy", seed=1)
    for parameter in adapters.adapter_parameters(model, "policy"):
        parameter.requires_grad_(True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    outputs = {}
    for adapter in [None, "sft", "policy", None, "sft"]:
        role = handle.with_role("r", adapter=adapter)
        with torch.no_grad():
            logprobs = role(batch(), {"logprobs"}).logprobs
        torch.testing.assert_close(logprobs, outputs.setdefault(adapter, logprobs), rtol=0, atol=0)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    torch.testing.assert_close(outputs[None], bare, rtol=0, atol=0)
    assert (outputs["sft"] - bare).abs().max() > 1e-3
    assert (outputs["policy"] - outputs["sft"]).abs().max() > 1e-3
    assert handle.trunk.base_hash() == before
    assert all(".policy." in name for name in trainable)


def test_one_backward_through_two_roles_reaches_both_adapters(make_handle):
    handle = make_handle()
    trunk = handle.trunk
    adapters.add_adapter(trunk.model, "policy", adapters.lora_config(LoraSection(rank=4)))
    adapters.copy_adapter(trunk.model, "policy", "value")
    trunk.add_head("value").init_normal()
    policy, value = Role("policy", "policy"), Role("value", "value", "value")
    for role in (policy, value):
        train_adapter(trunk.model, role.adapter)
        for parameter in trunk.role_parameters(role):
            parameter.requires_grad_(True)

    def gradients(loss):
        trunk.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in trunk.named_parameters() if p.grad is not None}

    both = gradients(
        trunk(batch(), policy, {"logprobs"}).logprobs.sum()
        + trunk(batch(), value, {"values"}).values.pow(2).sum()
    )
    apart = gradients(trunk(batch(), policy, {"logprobs"}).logprobs.sum())
    apart |= gradients(trunk(batch(), value, {"values"}).values.pow(2).sum())
    assert both.keys() == apart.keys()
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-12, atol=1e-12)


def test_saved_adapter_loads_in_plain_peft(tmp_path, make_handle):
    from peft import PeftModel

    handle = make_handle()
    plain = copy.deepcopy(handle.trunk.model)
    adapters.add_adapter(handle.trunk.model, "sft", adapters.lora_config(LoraSection(rank=4)))
    train_adapter(handle.trunk.model, "sft")
    adapters.save_adapter(handle.trunk.model, "sft", tmp_path, "some/base")
    adapters.activate(handle.trunk.model, "sft")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        ours = handle.trunk.model(ids).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"


def test_an_adapter_of_another_rank_is_refused(make_handle):
    model = make_handle().trunk.model
    adapters.add_adapter(model, "a", adapters.lora_config(LoraSection(rank=4)))
    adapters.add_adapter(model, "b", adapters.lora_config(LoraSection(rank=8)))
    with pytest.raises(ModelError, match=r"adapter 'a' does not fit.*lora\.rank"):
        adapters.load_adapter_state(model, "a", adapters.adapter_state(model, "b"))


def test_targets_that_do_not_exist_are_named(make_handle):
    model = make_handle().trunk.model
    config = adapters.lora_config(LoraSection(target_modules=("no_such_proj",)))
    with pytest.raises(ModelError, match=r"lora\.target_modules.*no_such_proj"):
        adapters.add_adapter(model, "a", config)


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


def test_a_module_called_like_an_adapter_is_not_taken_for_it():
    assert adapters.is_of("layers.0.q_proj.lora_A.value.weight", "value")
    assert adapters.is_of("embed_tokens.lora_embedding_A.value", "value")
    assert not adapters.is_of("layers.0.attention.value.weight", "value")
    assert not adapters.is_of("layers.0.q_proj.lora_A.value-2.weight", "value")


def test_of_a_run_only_what_is_taken_counts(tmp_path):
    from pipeline.chain import resource_fingerprint

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
