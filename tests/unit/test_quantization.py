"""Quantised bases: frozen numbers of 4 or 8 bits under the same handles, or a clear refusal.

The tests of real ones need bitsandbytes, which computes on a CPU as well.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config import ArchitectureSection, DataSection, LoraSection, ModelSection
from pipeline.errors import ConfigError, ModelError
from pipeline.models import adapters
from pipeline.models.empty import empty_model
from pipeline.models.footprint import measured
from pipeline.models.loading import is_quantised, quantised_loading
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from pipeline.yaml_config import read_config
from stages.config import RunConfig
from tests.conftest import TEXTS
from tests.unit.test_models import batch

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
BITS = pytest.mark.parametrize("bits", ["4bit", "8bit"])


def folder_of_a_model(folder: Path, model_type: str = "llama") -> str:
    """A tiny model on disk, wide enough that its layers have several scales each."""
    torch.manual_seed(3)
    section = ModelSection(
        init="config",
        vocabulary_size=300,
        architecture=ArchitectureSection(
            model_type=model_type, hidden_size=64, num_attention_heads=2, intermediate_size=192
        ),
    )
    store = ModelStore(section, DataSection())
    store.save(store.build(TEXTS).with_role("sft"), folder / "sft")
    return str(folder / "sft/model")


def quantised(path: str, bits: str) -> ModelStore:
    return ModelStore(ModelSection(path=path, quantization=bits), DataSection())


def disturb(handle: Handle) -> None:
    torch.manual_seed(5)
    for parameter in handle.parameters():
        parameter.data.normal_(0, 0.05)


# --- refusals ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.tuning=lora", "ppo.tuning=lora"], "sft.tuning is full, which trains the base"),
        (["sft.tuning=lora", "ppo.tuning=lora"], "reward.tuning is full"),
        (["sft.tuning=lora", "reward.tuning=lora", "ppo.tuning=full"], "ppo.tuning is full"),
        (["model={init: config}"], "model.init is config, whose random weights"),
        (["model.dtype=float64"], "model.dtype is float64"),
    ],
)
def test_bases_that_are_trained_are_refused_with_the_config(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: org/base}\n")
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "c.yaml", [*overrides, "model.quantization=4bit"], RunConfig)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it fails
    section = ModelSection(path="org/base", quantization="8bit")
    with pytest.raises(ModelError, match=r"model.quantization is 8bit.*rlhf-pipeline\[quant\]"):
        quantised_loading(section, torch.device("cpu"))


@pytest.mark.parametrize("known", [{"cuda"}, set()])
def test_a_device_that_it_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch, known: set[str]
) -> None:
    class Package:
        supported_torch_devices = known
        __version__ = "0.50"

    monkeypatch.setitem(sys.modules, "bitsandbytes", Package)
    section = ModelSection(path="org/base", quantization="4bit")
    with pytest.raises(
        ModelError, match=r"not on cpu: set run\.device .*model\.quantization to none"
    ):
        quantised_loading(section, torch.device("cpu"))


def test_without_the_setting_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert quantised_loading(ModelSection(path="org/base"), torch.device("cpu")) == {}


# --- real ones ---


@needs_bitsandbytes
@BITS
def test_logprobs_are_those_of_plain_peft_on_plain_transformers(tmp_path: Path, bits: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = folder_of_a_model(tmp_path)
    store = quantised(path, bits)
    base = store.pretrained()
    before = base.trunk.base_hash()
    assert is_quantised(base.trunk.model)
    # Everything but the embedding (tied to the output) and the norms is in whole bytes now.
    stored = {parameter.dtype for _, parameter in base.trunk.base_parameters()}
    assert stored == {torch.float32, torch.uint8 if bits == "4bit" else torch.int8}
    assert base.trunk.number_dtype == torch.float32
    policy = store.trainable_copy(base, "policy", "lora", LoraSection(rank=4))
    disturb(policy)
    ours = policy(batch(), {"logprobs"}).logprobs
    assert ours is not None and ours.dtype == torch.float32

    store.save(policy, tmp_path / "policy")
    settings = (
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        if bits == "4bit"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    plain = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    )
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "policy/adapter"))
    theirs.train()  # no dropout here, and bitsandbytes leaves its layers as they are
    rows = batch()
    for row in range(len(rows)):
        prompt = rows.prompt_ids[row, : int(rows.prompt_lengths[row])]
        length = int(rows.response_lengths[row])
        response = rows.response_ids[row, :length]
        ids = torch.cat([prompt, response]).unsqueeze(0)
        with torch.no_grad():
            logits = theirs(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, response.unsqueeze(1)).squeeze(1)
        # LLM.int8() computes in float16, whose unit roundoff is 5e-4, row by row or together.
        tolerance = 1e-5 if bits == "4bit" else 5e-3
        torch.testing.assert_close(ours[row, :length], expected, rtol=0, atol=tolerance)
    assert base.trunk.base_hash() == before


@needs_bitsandbytes
@BITS
def test_it_is_near_the_base_that_it_stands_for(tmp_path: Path, bits: str) -> None:
    path = folder_of_a_model(tmp_path)
    plain = ModelStore(ModelSection(path=path), DataSection()).pretrained()
    near = quantised(path, bits).pretrained()
    a, b = (handle(batch(), {"logprobs"}).logprobs for handle in (plain, near))
    error = (a - b).abs().max()
    assert 0 < error < 0.1


@needs_bitsandbytes
@BITS
def test_adapters_train_and_the_base_stays(tmp_path: Path, bits: str) -> None:
    store = quantised(folder_of_a_model(tmp_path), bits)
    base = store.pretrained()
    before = base.trunk.base_hash()
    policy = store.trainable_copy(base, "policy", "lora", LoraSection(rank=4))
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        with torch.no_grad():
            policy(batch(), {"logprobs"})  # a rollout comes before every update
        loss = -policy(batch(), {"logprobs"}).logprobs.sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2
    assert base.trunk.base_hash() == before
    again = quantised(store.section.path, bits)
    store.save(policy, tmp_path / "policy")
    with torch.no_grad():
        ours, theirs = (
            h(batch(), {"logprobs"}).logprobs for h in (policy, again.open(tmp_path / "policy"))
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@needs_bitsandbytes
def test_gradients_are_those_of_the_dequantised_weights(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    path = folder_of_a_model(tmp_path)
    near, plain = quantised(path, "4bit"), ModelStore(ModelSection(path=path), DataSection())
    bases = [store.pretrained() for store in (near, plain)]
    real = dict(bases[1].trunk.model.named_parameters())
    for name, weight in bases[0].trunk.model.named_parameters():
        if weight.dtype == torch.uint8:
            assert real[name].numel() == 2 * weight.numel()
            real[name].data = dequantize_4bit(weight.data, weight.quant_state)
    gradients = []
    for store, base in zip((near, plain), bases, strict=True):
        with torch.no_grad():
            base(batch(), {"logprobs"})
        policy = store.trainable_copy(base, "policy", "lora", LoraSection(rank=4))
        disturb(policy)
        for parameter in policy.parameters():
            parameter.requires_grad_(True)
        policy(batch(), {"logprobs"}).logprobs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert gradients[1].abs().max() > 1e-2
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5)


@needs_bitsandbytes
@BITS
def test_it_gets_no_weights_of_its_own_to_train(tmp_path: Path, bits: str) -> None:
    store = quantised(folder_of_a_model(tmp_path), bits)
    base = store.pretrained()
    with pytest.raises(ModelError, match=f"model.quantization is {bits}.*policy would get weights"):
        store.trainable_copy(base, "policy", "full", LoraSection())


@needs_bitsandbytes
@BITS
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_predicted_size_is_the_real_one(tmp_path: Path, bits: str, model_type: str) -> None:
    path = folder_of_a_model(tmp_path, model_type)
    store = quantised(path, bits)
    base = store.pretrained()
    policy = store.trainable_copy(base, "policy", "lora", LoraSection(rank=4))
    policy(batch(), {"logprobs"})  # the first forward moves an 8-bit layer's scales
    optimiser = torch.optim.AdamW(policy.parameters())
    real = measured({"base": base, "policy": policy}, optimiser)
    empty = empty_model(store.section)
    predicted = sum(t.numel() * t.element_size() for t in (*empty.parameters(), *empty.buffers()))
    assert real["base"].weights == predicted
    with torch.device("meta"):
        adapters.add_adapter(empty, "policy", adapters.lora_config(LoraSection(rank=4)))
    weights = adapters.adapter_parameters(empty, "policy")
    assert real["policy"].weights == sum(p.numel() * p.element_size() for p in weights)
