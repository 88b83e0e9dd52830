"""A micro-batch's passes read nothing back from the device: ours never wait for it.

The models lie on torch's meta device, where tensors have no numbers: reading one is an error.
transformers reads a number a pass itself, whether position ids are packed, and in GPT-2 one more,
for a warning; these are answered here.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.config import LoraSection
from pipeline.models import adapters
from pipeline.models.last_layer import Places, selective_layer
from pipeline.models.trunk import Handle
from stages.ppo.losses import losses
from stages.reward.config import RewardSection
from stages.reward.rankings import EncodedRanking, RankingBatch
from stages.reward.trainer import RankingTrainer
from stages.sft.trainer import SftTrainer
from tests.tiny_ppo import TinyPpo

META = torch.device("meta")
PROMPTS = [[5, 6, 7, 8, 9, 10, 14], [11, 12, 15, 16, 17], [13]]
RESPONSES = [[20, 21], [22, 23, 24], [27]]
EVERYTHING = {"logprobs", "entropy", "values", "scores"}


@pytest.fixture(autouse=True)
def _what_meta_tensors_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(packed, lambda position_ids: None)
    warning = "transformers.PreTrainedModel.warn_if_padding_and_no_attention_mask"
    monkeypatch.setattr(warning, lambda *_: None)
    # No number is computed in another type.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_kwargs: nullcontext())


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero])
def test_reading_back_is_an_error(read):
    with pytest.raises(RuntimeError, match="meta"):
        read(torch.ones(3, device=META))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("value", ["separate", "shared"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ppo(tuning: str, value: str, recompute: bool, monkeypatch: Any) -> None:
    # Less than a micro-batch's logits at a time: several chunks.
    monkeypatch.setattr("pipeline.models.trunk.LOGITS_AT_A_TIME", 3 * 300)
    ppo = TinyPpo(tuning=tuning, value=value, optim={"entropy_coef": 0.1})
    experience = ppo.appraise(ppo.collect())
    module = ppo.actor_critic
    for trunk in module.distinct_trunks():
        trunk.place(META)
        trunk.recompute = recompute
    for want in ppo.updater._passes(train_policy=True):
        rows = [0, 3, 5]
        out = module(experience.rollout.batch.take(rows), want, 0.7, frozenset({3, 9}))
        loss, sums = losses(ppo.section.optim, experience, rows, out)
        loss.backward()
        assert sums.device == META
    for parameters in (module.policy_parameters(), module.value_parameters()):
        assert {p.grad.device for p in parameters if p.grad is not None} == {META}


@pytest.mark.parametrize(
    "model_type", ["gpt2", "gpt_neox", "opt", "bloom", "llama", "qwen3", "gemma2", "phi", "qwen2"]
)
def test_families(make_handle, model_type):
    handle = on_meta(make_handle(model_type, "float32"))
    out = handle(TokenBatch.from_ragged(PROMPTS, RESPONSES, pad_id=0), EVERYTHING)
    sum(getattr(out, name).sum() for name in EVERYTHING).backward()


@pytest.mark.parametrize("is_flat", [False, True])
def test_the_last_layer_at_places(make_handle, is_flat, monkeypatch):
    chosen: list[Places] = []

    def choose(reads, joined, hidden_size) -> Places:
        per_row = reads.columns.shape[1]
        rows, columns = torch.arange(len(PROMPTS)).unsqueeze(1).expand(-1, per_row), reads.columns
        if is_flat:
            rows, columns = (x.flatten()[reads.order].unsqueeze(0) for x in (rows, columns))
        chosen.append(Places(rows, columns, is_flat))
        return chosen[-1]

    monkeypatch.setattr("pipeline.models.trunk.choose_places", choose)
    handle = on_meta(make_handle())
    assert selective_layer(handle.trunk.model) is not None
    out = handle(TokenBatch.from_ragged(PROMPTS, RESPONSES, pad_id=0), EVERYTHING)
    sum(getattr(out, name).sum() for name in EVERYTHING).backward()
    assert chosen


@pytest.mark.parametrize("loss", ["pairwise", "plackett_luce"])
def test_sft_and_reward(make_handle, loss):
    handle = on_meta(make_handle())
    sft = object.__new__(SftTrainer)
    sft.role = handle.role
    sft.loss_sum(handle.trunk, TokenBatch.from_ragged(PROMPTS, RESPONSES, pad_id=0)).backward()

    reward = object.__new__(RankingTrainer)
    reward.role, reward.section = handle.role, RewardSection(loss=loss)
    rankings = [
        EncodedRanking(PROMPTS[0], [[20], [21, 22], [23]], (0, 1, 1), None, None),
        EncodedRanking(PROMPTS[1], [[24, 25], [26]], (0, 1), None, None),
    ]
    batch = RankingBatch.collate(rankings, pad_id=0)
    reward.loss_sum(handle.trunk, batch).backward()
    assert {x.device for x in reward.eval_sums(handle.trunk, batch).values()} == {META}


def on_meta(handle: Handle) -> Handle:
    """The handle with a head and an adapter, without numbers."""
    adapters.add_adapter(handle.trunk.model, "a", adapters.lora_config(LoraSection(rank=2)))
    handle.trunk.add_head("h")
    handle = handle.with_role("r", adapter="a", head="h")
    handle.trunk.place(META)
    for parameter in handle.parameters():
        parameter.requires_grad_(True)
    return handle
