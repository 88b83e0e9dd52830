"""Adapters on the experts of mixtures, which are parameters of one module and not layers."""

import copy
import json

import pytest
import torch
from peft import PeftModel

from pipeline.batches import TokenBatch
from pipeline.config import DataSection, LoraSection, ModelSection
from pipeline.errors import ModelError
from pipeline.models import adapters
from pipeline.models.lora_targets import expert_parameters
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle, Role
from tests.families import FAMILIES, MIXTURES, make_model, write_model

RANK, ALPHA = 2, 6
LORA = LoraSection(rank=RANK, alpha=ALPHA)
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
IDS = torch.arange(3, 40).unsqueeze(0)


def mixture(name: str):
    """In float32: torch has no product of many experts at once in float64 on processors."""
    family = FAMILIES[name]
    return make_model(family, family.tokenizer()).requires_grad_(False)


def add(model, name: str, seed: int, lora: LoraSection = LORA) -> None:
    adapters.add_adapter(model, name, adapters.lora_config(lora))
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapters.adapter_parameters(model, name):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)


@torch.no_grad()
def logits(model, adapter: str | None = None) -> torch.Tensor:
    adapters.activate(model, adapter)
    return model(IDS).logits


@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_gets_its_own_product(name):
    """W_e + s B_e A_e, written into a plain model expert by expert, is what the adapter computes.

    peft keeps A as (experts x rank, in) and B as (out, rank x experts), B's experts innermost.
    """
    model = mixture(name)
    plain = copy.deepcopy(model)
    add(model, "a", 1)
    scaling = ALPHA / RANK
    with torch.no_grad():
        for path, layer in zip(
            (f"model.layers.{i}" for i in range(2)), plain.model.layers, strict=True
        ):
            adapted = model.get_submodule(path)
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                lora = getattr(adapted.self_attn, part)
                delta = lora.lora_B["a"].weight @ lora.lora_A["a"].weight
                getattr(layer.self_attn, part).weight += scaling * delta
            outer = adapted.mlp.experts  # of down_proj; within it gate_up_proj
            for part, wrapper in (("down_proj", outer), ("gate_up_proj", outer.base_layer)):
                weights = getattr(layer.mlp.experts, part)
                a, b = wrapper.lora_A["a"].weight, wrapper.lora_B["a"].weight
                for expert in range(4):
                    for r in range(RANK):
                        column, row = b[:, r * 4 + expert], a[expert * RANK + r]
                        weights[expert] += scaling * torch.outer(column, row)
    found = logits(model, "a")
    torch.testing.assert_close(found, plain(IDS).logits, rtol=0, atol=1e-4)
    assert (found - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("name", MIXTURES)
def test_targets_are_the_experts_and_the_attention(name):
    """Not the router; all with one rank, whatever peft makes of `all-linear` here."""
    model = mixture(name)
    assert expert_parameters(model) == EXPERTS
    add(model, "a", 1)
    config = model.peft_config["a"]
    assert sorted(config.target_parameters) == EXPERTS
    assert not config.rank_pattern and not config.alpha_pattern
    owners = {key.split(".lora_")[0] for key, _ in model.named_parameters() if ".lora_" in key}
    assert {owner.split(".", 3)[3] for owner in owners} == {
        *(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.experts", "mlp.experts.base_layer",
    }  # fmt: skip
    bare = mixture(name)
    add(bare, "a", 1, LoraSection(rank=2, target_parameters=()))
    assert not [key for key, _ in bare.named_parameters() if ".mlp." in key and ".lora_" in key]
    some = mixture(name)
    add(some, "a", 1, LoraSection(rank=2, target_parameters=("experts.down_proj",)))
    assert len([k for k, _ in some.named_parameters() if ".mlp." in k and ".lora_A" in k]) == 2


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_come_and_go_on_one_base(name, tmp_path):
    """Switched, copied, removed, saved and read again; the base keeps its names and its bits."""
    model = mixture(name)
    trunk_names = sorted(key for key, _ in model.named_parameters())
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain, bare = copy.deepcopy(model), logits(model)
    add(model, "policy", 1)
    adapters.copy_adapter(model, "policy", "value")
    assert torch.equal(logits(model, "value"), logits(model, "policy"))
    one = logits(model, "policy")
    for parameter in adapters.adapter_parameters(model, "value"):
        parameter.data.mul_(-1.5)
    two = logits(model, "value")
    assert (one - two).abs().max() > 0.1
    for adapter, wanted in (("policy", one), (None, bare), ("value", two), ("policy", one)):
        assert torch.equal(logits(model, adapter), wanted)
    adapters.save_adapter(model, "policy", tmp_path, "some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == EXPERTS
    theirs = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, one, rtol=0, atol=1e-4)
    adapters.remove_adapter(model, "policy")
    assert torch.equal(logits(model, "value"), two) and torch.equal(logits(model), bare)
    adapters.load_adapter(model, "again", tmp_path)
    assert torch.equal(logits(model, "again"), one)
    baked = copy.deepcopy(model)
    adapters.bake(baked, "again")
    assert sorted(key for key, _ in baked.named_parameters()) == trunk_names
    torch.testing.assert_close(baked(IDS).logits, one, rtol=0, atol=1e-4)
    names = adapters.adapter_names(model)
    found = {
        adapters.base_name(key): tensor
        for key, tensor in model.state_dict().items()
        if not any(adapters.is_of(key, name) for name in names)
    }
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def batch() -> TokenBatch:
    return TokenBatch.from_ragged([[5, 6, 7, 8, 9], [11, 12]], [[20, 21, 22], [23]], pad_id=0)


def trained_handle(name: str, folder) -> Handle:
    """Policy and value adapters that train, and a value head."""
    section = ModelSection(path=str(write_model(name, folder)))
    handle = ModelStore(section, DataSection()).pretrained()
    trunk = handle.trunk
    for seed, role in enumerate(("policy", "value")):
        add(trunk.model, role, seed)
    trunk.add_head("value").init_normal(torch.Generator().manual_seed(0))
    for role in ("policy", "value"):
        for parameter in adapters.adapter_parameters(trunk.model, role):
            parameter.requires_grad_(True)
    return handle


@pytest.mark.parametrize("name", MIXTURES)
def test_policy_and_value_train_at_once_with_and_without_recomputation(name, tmp_path):
    """Each adapter's gradients are those of its loss alone, and the base has none."""
    trunk = trained_handle(name, tmp_path).trunk
    policy, value = Role("policy", "policy"), Role("value", "value", "value")
    before = trunk.base_hash()

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            trunk(batch(), policy, {"logprobs"}).logprobs.sum(),
            trunk(batch(), value, {"values"}).values.pow(2).sum(),
        )

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        trunk.zero_grad()
        loss.backward()
        return {key: p.grad.clone() for key, p in trunk.named_parameters() if p.grad is not None}

    apart = gradients(losses()[0]) | gradients(losses()[1])
    assert any("mlp.experts" in key and ".policy." in key for key in apart)
    others = {key for key in apart if ".lora_" not in key}
    assert others == {"heads.value.weight", "heads.value.bias"}
    for recompute in (False, True):
        trunk.recompute = recompute
        both = gradients(sum(losses()))
        assert both.keys() == apart.keys()
        for key, gradient in both.items():
            assert gradient.abs().max() > 0 or ".lora_A" in key, key
            torch.testing.assert_close(gradient, apart[key], rtol=1e-4, atol=1e-5)
    assert trunk.base_hash() == before


@pytest.mark.parametrize("name", MIXTURES)
def test_all_weights_are_set_back_to_what_was_written(name, tmp_path):
    """Experts are one tensor in memory, and written one by one."""
    store = ModelStore(ModelSection(path=str(write_model(name, tmp_path / "base"))), DataSection())
    handle = store.trainable_copy(store.pretrained(), "policy", "full", LORA)
    store.save(handle, tmp_path / "kept")
    before = {key: tensor.clone() for key, tensor in handle.trunk.base_state()}
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(1)
    store.reload(handle, tmp_path / "kept")
    for key, tensor in handle.trunk.base_state():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"use_dora": True}, r"lora\.use_dora is true.*set lora\.use_dora to false"),
        ({"dropout": 0.1}, r"lora\.dropout is 0\.1.*set lora\.dropout to 0"),
    ],
)
def test_what_peft_has_not_for_parameters_is_refused(extra, words, tmp_path):
    with pytest.raises(ModelError, match=words):
        add(mixture("mixtral"), "a", 1, LoraSection(**extra))
    # Without the experts it is an adapter like others.
    model = mixture("mixtral")
    add(model, "a", 1, LoraSection(rank=2, target_parameters=(), **extra))
    assert adapters.adapter_names(model) == {"a"}
    with pytest.raises(ValueError, match=r"lora\.target_parameters"):
        LoraSection(target_parameters=("experts.down_proj",), **extra)


def test_parameters_that_do_not_exist_are_named():
    lora = LoraSection(target_parameters=("experts.up_proj",))
    with pytest.raises(ModelError, match=r"'experts\.up_proj'.*experts\.down_proj, experts\.gate"):
        add(mixture("mixtral"), "a", 1, lora)
    family = FAMILIES["llama3"]
    with pytest.raises(ModelError, match="no mixture of experts"):
        add(make_model(family, family.tokenizer()), "a", 1, lora)
