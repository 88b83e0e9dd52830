"""What is kept for the backward pass, and what is computed again."""

import gc
import weakref

import torch
from torch import nn

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


def test_a_frozen_output_layer_makes_logits_once(make_handle, monkeypatch):
    """LoRA: the slopes of the log-probs are kept, (N, d), in place of logits or a second pass."""
    handle = make_handle()
    prompts, responses = [[5, 6, 7, 8], [9, 10], [11]], [[12, 13], [14, 15, 16, 17, 18], [19]]
    batch = TokenBatch.from_ragged(prompts, responses, pad_id=0)
    adapters.add_adapter(handle.trunk.model, "a", adapters.lora_config(LoraSection(rank=2)))
    for parameter in adapters.adapter_parameters(handle.trunk.model, "a"):
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
        parameter.requires_grad_(True)
    handle = handle.with_role("r", adapter="a")
    limit = 3 * handle.trunk.vocabulary_size
    monkeypatch.setattr("pipeline.models.trunk.LOGITS_AT_A_TIME", limit)
    logits: list[weakref.ref[torch.Tensor]] = []
    widest: list[int] = []

    def watch(_module: nn.Module, _args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        logits.append(weakref.ref(out))
        widest.append(out.shape[:-1].numel())

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        handle.trunk.zero_grad()
        logprobs = handle(batch, {"logprobs"}, 0.7).logprobs
        gc.collect()
        held = sum(made() is not None for made in logits)
        # Each log-prob pulls with a weight of its own.
        (logprobs.flatten() * torch.linspace(-1, 2, logprobs.numel())).sum().backward()
        grads = [p.grad.flatten() for p in handle.parameters()]
        assert held == 0
        return logprobs.detach(), torch.cat(grads)

    with monkeypatch.context() as plain:
        plain.setattr("pipeline.models.trunk.row_by_row", lambda function, x: function(x))
        wanted = run()
    handle.trunk.model.get_output_embeddings().register_forward_hook(watch)
    found = run()
    assert widest == [3, 3, 2]  # 2 + 5 + 1 tokens, each once
    # Gradients of up to 0.58, through adapters and matrices that magnify what is rounded: by a
    # processor's kernels, to 2.4e-12 on one and below 1e-12 on others.
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
