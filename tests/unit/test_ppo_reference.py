"""The reference of full fine-tuning elsewhere, or in bfloat16: near, finite, and nobody else's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config import LoraSection
from pipeline.errors import ModelError
from pipeline.inference import infer
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from pipeline.rewards import ModelReward, RewardSource
from stages.ppo.config import PpoSection
from stages.ppo.models import Models, build_models
from tests.tiny_ppo import LORA, CountsE, TinyPpo, store, tiny_handle, tiny_reward
from tests.unit.test_models import batch


def full(
    start: Handle, rewards: RewardSource, reference: dict[str, Any], kept: ModelStore
) -> Models:
    """Models of full fine-tuning with this `ppo.reference`."""
    section = PpoSection(tuning="full", reference=reference)
    return build_models(start, rewards, SimpleNamespace(ppo=section, lora=LORA), kept)


def logprobs(handle: Handle) -> torch.Tensor:
    return infer(handle, batch(), ["logprobs"], 4096)["logprobs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bfloat16_reference_is_near_and_finite(dtype: torch.dtype) -> None:
    start = tiny_handle(dtype, adapter=False)
    with torch.no_grad():  # logits as far from uniform as a trained model's
        for parameter in start.trunk.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    exact = logprobs(start)
    before = start.trunk.base_hash()
    models = full(start, tiny_reward(start), {"dtype": "bfloat16"}, store())
    assert {p.dtype for p in models.reference.parameters()} == {torch.bfloat16}
    found = logprobs(models.reference)
    error = (found - exact)[batch().response_mask].abs()
    # Rounding to 8 bits of mantissa, 2^-9 of each weight and product, in two layers and an output
    # layer whose logits are about 5: some hundredths of a nat, neither none nor a tenth of a token.
    assert 1e-4 < error.max() < 0.15
    assert bool(found.isfinite().all())
    # The start KL, which is 0 with the reference in the policy's own type, is within that.
    kl = (logprobs(models.policy) - found)[batch().response_mask].mean()
    assert 0 < kl.abs() < error.max()
    # The reward model stands on the start's trunk, which stays as it was.
    assert start.trunk.base_hash() == before
    assert models.reference.trunk is not start.trunk


def test_a_trunk_of_the_references_own_moves_and_the_store_lets_go_of_it(tmp_path: Any) -> None:
    kept = store()
    built = tiny_handle(torch.float32, adapter=False)
    kept.save(built.with_role("sft"), tmp_path / "sft")
    start = kept.open(tmp_path / "sft")
    exact = logprobs(start)
    models = full(start, CountsE(), {"dtype": "bfloat16"}, kept)
    assert models.reference.trunk is start.trunk  # no second copy
    opened = kept.open(tmp_path / "sft")
    assert opened.trunk is not start.trunk
    torch.testing.assert_close(logprobs(opened), exact, rtol=0, atol=0)


def test_rotary_frequencies_keep_their_precision() -> None:
    start = tiny_handle(torch.float32, adapter=False)
    before = {key: value.clone() for key, value in start.trunk.model.named_buffers()}
    assert before
    models = full(start, CountsE(), {"dtype": "bfloat16"}, store())
    for key, value in models.reference.trunk.model.named_buffers():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("reference", [{}, {"device": "cpu"}, {"dtype": "float32"}])
def test_where_it_lies_already_nothing_changes(reference: dict[str, str]) -> None:
    start = tiny_handle(torch.float32, adapter=False)
    models = full(start, CountsE(), reference, store())
    assert type(models.reference) is Handle
    assert models.reference.trunk is start.trunk
    torch.testing.assert_close(logprobs(models.reference), logprobs(start), rtol=0, atol=0)


def test_training_is_that_of_the_default_but_for_the_references_rounding() -> None:
    runs = [
        TinyPpo(tuning="full", reference={"dtype": dtype}, kl_coef=kl)
        for dtype, kl in ((None, 0.0), ("bfloat16", 0.0), ("bfloat16", 0.1), (None, 0.1))
    ]
    weights = []
    for run in runs:
        rollout = run.collect()
        run.updater.update(run.appraise(rollout), 1)
        weights.append(run.weights())
    # Without a penalty the reference has no part in the update. With one, the policy that is still
    # the start has a KL of the reference's rounding where it had none: that much and no more.
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    torch.testing.assert_close(weights[0], weights[3], rtol=0, atol=1e-9)
    rounding = (weights[2] - weights[3]).abs().max()
    assert 0 < rounding < 5e-3  # two steps of Adam at 1e-2 move a weight by 2e-2


def test_a_device_that_is_not_there_is_named() -> None:
    start = tiny_handle(torch.float32, adapter=False)
    with pytest.raises(ModelError, match=r"ppo\.reference\.device is cuda:77 but this machine has"):
        full(start, CountsE(), {"device": "cuda:77"}, store())


@pytest.mark.parametrize("reference", [{"device": "cpu"}, {"dtype": "bfloat16"}])
def test_with_adapters_the_reference_is_the_shared_base(reference: dict[str, str]) -> None:
    name, value = next(iter(reference.items()))
    message = rf"ppo\.reference\.{name} is {value} but ppo\.tuning is lora.*remove ppo\.reference"
    with pytest.raises(ValueError, match=message):
        PpoSection(tuning="lora", reference=reference)
    start = tiny_handle(torch.float64)
    reward = tiny_reward(start)
    assert isinstance(reward, ModelReward)
    config = SimpleNamespace(ppo=PpoSection(tuning="lora"), lora=LoraSection(rank=4, alpha=8))
    models = build_models(start, reward, config, store())
    assert models.reference.trunk is models.policy.trunk is start.trunk


def test_a_full_value_model_holds_its_own_head_alone() -> None:
    start = tiny_handle(torch.float32, adapter=False)
    models = full(start, tiny_reward(start), {}, store())
    assert list(models.value.trunk.heads) == ["value"]
    assert list(start.trunk.heads) == ["reward"]
    assert list(models.policy.trunk.heads) == []
