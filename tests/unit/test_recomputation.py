"""Recomputed activations in training mode: the same dropout the second time, and it does happen."""

import torch

from pipeline.batches import TokenBatch
from pipeline.config import LoraSection
from pipeline.models import adapters
from pipeline.models.trunk import Role


def test_the_second_pass_drops_what_the_first_one_dropped(make_handle):
    handle = make_handle("gpt2", resid_pdrop=0.3, attn_pdrop=0.3)
    section = LoraSection(rank=2, dropout=0.5)
    adapters.add_adapter(handle.trunk.model, "sft", adapters.lora_config(section))
    role = Role("sft", adapter="sft")
    parameters = handle.trunk.role_parameters(role)
    for parameter in parameters:
        parameter.data = torch.randn_like(parameter) * 0.1
        parameter.requires_grad_(True)
    batch = TokenBatch.from_ragged([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], pad_id=0)
    passes = []
    handle.trunk.model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    handle.trunk.train()

    def gradients(recompute: bool, seed: int) -> torch.Tensor:
        handle.trunk.recompute = recompute
        handle.trunk.zero_grad()
        torch.manual_seed(seed)
        handle.trunk(batch, role, {"logprobs"}).logprobs.sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in parameters])

    plain = gradients(False, seed=1)
    assert len(passes) == 1
    torch.testing.assert_close(gradients(True, seed=1), plain, rtol=0, atol=1e-12)
    assert len(passes) == 1 + 2
    assert not torch.allclose(gradients(True, seed=2), plain)  # dropout was on
    blocks = handle.trunk.model.transformer.h
    assert all(block.training and not block.gradient_checkpointing for block in blocks)
