"""Layers that are cast to bfloat16 before they are gathered, against autocast of whole weights.

Two processes (gloo), started by torchrun as a subprocess: a fork after torch has run would hang.
"""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.distributed.test_pipeline_ranks import CONFIG, FORMS, LAUNCHES, rlhf
from tests.tiny_chain import ROOT, rows

SETTINGS = {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_layers_are_gathered_in_half_and_leave_no_copies() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.test_half_precision_ranks"],
        cwd=ROOT, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as autocast, without its copies") == 2
    assert done.stdout.count("layers with LayerNorm stay as they are") == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "lora-shared"])
def test_the_chain_is_that_of_one_process_but_for_rounding(tmp_path: Path, form: str) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG.replace("float64", "float32"))
    half = [*FORMS[form], "run.mixed_precision=bf16"]
    for name, launch in (("one", []), ("two", LAUNCHES["FSDP2"])):
        done = rlhf(tmp_path, "run", "c.yaml", *half, f"run.name={name}", *launch)
        assert done.returncode == 0, done.stdout + done.stderr
    for stage, within in (("sft", 1e-3), ("reward", 1e-2)):
        one, two = (rows(tmp_path / "runs" / name / stage) for name in ("one", "two"))
        assert len(one) == len(two) >= 3
        for row, other in zip(one, two, strict=True):
            for key in (key for key in row if "loss" in key):
                assert other[key] == pytest.approx(row[key], rel=within), (stage, key)
    # Rollouts part where two tokens are nearly as likely; the first scores are of the same prompts.
    one, two = (rows(tmp_path / "runs" / name / "ppo")[0] for name in ("one", "two"))
    assert two["held_out_score"] == pytest.approx(one["held_out_score"], abs=0.1)
    paths = sorted((tmp_path / "runs/one").glob("*/artifact/**/*.safetensors"))
    assert paths
    for path in paths:
        other = load_file(tmp_path / "runs/two" / path.relative_to(tmp_path / "runs/one"))
        types = {name: (x.dtype, x.shape) for name, x in load_file(path).items()}
        assert types == {name: (x.dtype, x.shape) for name, x in other.items()}


def build(family: str) -> Any:
    """A trunk in float32, all of it trained, with a head that is not zero."""
    from pipeline.config import DataSection
    from pipeline.models.store import ModelStore
    from tests.conftest import TEXTS, tiny_section

    torch.manual_seed(0)
    trunk = ModelStore(tiny_section(family, "float32"), DataSection()).build(TEXTS).trunk
    trunk.add_head("value").init_normal(torch.Generator().manual_seed(1))
    return trunk.requires_grad_(True)


def passed(trunk: nn.Module) -> tuple[Tensor, int]:
    """A loss of logits and values under autocast; bytes that live on for its backward pass."""
    ids = torch.arange(5, 35).reshape(2, 15)
    kept: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = trunk(ids)
    # FSDP2 empties the storage of a weight that it lets go of.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().size() for t in kept}
    return loss, sum(storages.values())


class Losses(nn.Module):
    """A trunk as one module that makes a loss: what FSDP2 is laid over here."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, ids: Tensor) -> Tensor:
        """Loss of token ids (B, S): next tokens, and values near 1."""
        out = self.trunk.model(input_ids=ids, output_hidden_states=True)
        logprobs = out.logits[:, :-1].float().log_softmax(-1)
        values = self.trunk.heads["value"](out.hidden_states[-1])
        return -logprobs.gather(-1, ids[:, 1:, None]).mean() + (values - 1).square().mean()


def sharded(family: str, half: bool) -> Losses:
    from pipeline.distributed.sharding import shard

    module = Losses(build(family))
    layers, heads = module.trunk.layers(), module.trunk.heads.values()
    shard(module, layers, heads, torch.device("cpu"), half=half)
    return module


def worker() -> None:
    from benchmarks.ppo_scaling.communication import Collectives

    torch.distributed.init_process_group("gloo")
    plain = Losses(build("llama"))
    expected, _ = passed(plain)
    expected.backward()
    found: dict[bool, Any] = {}
    for half in (False, True):
        module = sharded("llama", half)
        counted = Collectives()
        counted.phase = "update"
        with counted:
            loss, live = passed(module)
            loss.backward()
        found[half] = (counted.counts()["update"], live, module)
        # One rounding to bfloat16 more: that of the norms' weights.
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        for (name, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
            gradient = ours.grad.full_tensor()
            assert gradient.dtype == ours.dtype == torch.float32
            size = theirs.grad.abs().max()
            torch.testing.assert_close(
                gradient, theirs.grad, rtol=0, atol=float(2e-2 * size), msg=lambda m, n=name: n + m
            )
    layers = [p for layer in plain.trunk.layers() for p in layer.parameters()]
    weights, linear = (sum(p.numel() for p in layers if p.dim() >= d) for d in (1, 2))
    whole, half = (found[half][0] for half in (False, True))
    # Layers are gathered for the forward and the backward pass, at 4 bytes a weight or at 2.
    assert whole["all_gather"]["bytes"] - half["all_gather"]["bytes"] == 2 * 2 * weights
    assert whole["reduce_scatter"] == half["reduce_scatter"]  # sums are of float32
    # Norms compute in float32, with copies of their own weights.
    assert found[False][1] - found[True][1] == 2 * linear - 4 * (weights - linear)
    print("as autocast, without its copies", flush=True)

    # Its norms of queries and keys give bfloat16, which autocast rounds them to a step later.
    module, plain = sharded("qwen3", half=True), Losses(build("qwen3"))
    torch.testing.assert_close(passed(module)[0], passed(plain)[0], rtol=1e-3, atol=0)
    module, plain = sharded("gpt2", half=True), Losses(build("gpt2"))
    torch.testing.assert_close(passed(module)[0], passed(deepcopy(plain))[0], rtol=1e-6, atol=0)
    print("layers with LayerNorm stay as they are", flush=True)


if __name__ == "__main__":
    worker()
