"""Lean layers are the functions that they replace, forward and backward."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline.models import lean_layers
from pipeline.models.lean_layers import LeanRmsNorm


def test_rms_norm_is_transformers_forward_and_backward():
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(7, eps=1e-3).double()
    theirs.weight.data.normal_()
    ours = LeanRmsNorm(theirs.weight, 1e-3)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x,))
    found = []
    for norm in (ours, theirs):
        x.grad = theirs.weight.grad = None
        y = norm(x)
        (y**3).sum().backward()
        found.append([y.detach(), x.grad.clone(), theirs.weight.grad.clone()])
    for one, other in zip(*found, strict=True):
        # theirs squares in float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    # By hand: x = (3, 4), mean of squares 12.5, eps 0: 3 / 3.5355 and 4 / 3.5355.
    norm = LeanRmsNorm(torch.nn.Parameter(torch.tensor([1.0, 2.0])), 0.0)
    assert norm(torch.tensor([[3.0, 4.0]]))[0].tolist() == pytest.approx([0.848528, 2.262742])


def test_half_precision_is_computed_in_float32_and_rounded_once():
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(64).bfloat16()
    theirs.weight.data.normal_()
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(LeanRmsNorm(theirs.weight, 1e-6)(x), theirs(x))


def test_a_half_weight_on_a_wide_input_is_widened_and_gets_a_half_gradient():
    """As FSDP2 gathers it under autocast: between layers the states stay in float32."""
    torch.manual_seed(0)
    half = torch.nn.Parameter(torch.randn(64).bfloat16())
    wide = torch.nn.Parameter(half.detach().float())
    x = torch.randn(3, 64)
    found = []
    for weight in (half, wide):
        own = x.clone().requires_grad_(True)
        y = LeanRmsNorm(weight, 1e-6)(own)
        (y**3).sum().backward()
        found.append((y, own.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(half.grad, wide.grad.bfloat16())
    # A weight wider than the input makes the result wide, as in transformers.
    assert LeanRmsNorm(wide, 1e-6)(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "phi", "gemma"])
def test_a_slim_model_has_the_same_names_and_logits(make_handle, model_type):
    model = make_handle(model_type, "float32").trunk.model
    plain = AutoModelForCausalLM.from_config(model.config).eval()
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    slimmer = copy.deepcopy(plain)
    lean_layers.slim(slimmer)
    kinds = {type(module).__name__ for module in slimmer.modules()}
    assert ("LeanRmsNorm" in kinds) == (model_type in ("llama", "qwen3"))
    assert ("GELU" in kinds) == (model_type in ("gpt2", "phi"))


def test_norms_with_another_formula_stay():
    torch.manual_seed(0)
    model = torch.nn.Sequential(GemmaRMSNorm(8), LlamaRMSNorm(8))
    lean_layers.slim(model)
    assert type(model[0]) is GemmaRMSNorm and type(model[1]) is LeanRmsNorm
