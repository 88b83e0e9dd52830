"""Token log-probs and their hand-written gradient against torch's own and against arithmetic."""

import math

import pytest
import torch

from pipeline.tensors import token_logprobs


def test_log_probs_and_gradient_by_hand():
    # z = (0, ln 3): p = (1/4, 3/4). log p(1) = ln 3/4; its gradient is (-1/4, 1 - 3/4).
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(math.log(0.75), abs=1e-12)
    (2 * logprobs).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.5, 0.5], abs=1e-12)


@pytest.mark.parametrize("consume", [False, True])
def test_gradient_is_that_of_log_softmax(consume):
    torch.manual_seed(0)
    logits = (10 * torch.randn(6, 9, dtype=torch.float64)).requires_grad_(True)
    logits.data[2, 4] = -math.inf  # a forbidden token
    ids, weights = torch.tensor([3, 0, 8, 8, 1, 2]), torch.randn(6, dtype=torch.float64)
    given = logits * 1.0
    kept = given.detach().clone()
    (token_logprobs(given, ids, consume=consume) * weights).sum().backward()
    assert torch.equal(given, kept) is not consume
    ours, logits.grad = logits.grad, None
    rows = torch.arange(6)
    (logits.log_softmax(-1)[rows, ids] * weights).sum().backward()
    torch.testing.assert_close(ours, logits.grad, rtol=0, atol=1e-14)


def test_half_precision_is_reduced_in_float32():
    torch.manual_seed(0)
    logits = (8 * torch.randn(5, 2000)).bfloat16().requires_grad_(True)
    ids = torch.randint(2000, (5,))
    found = token_logprobs(logits, ids)
    assert found.dtype == torch.float32
    exact = logits.detach().double().log_softmax(-1)[torch.arange(5), ids]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    found.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_consumed_logits_are_not_read_twice():
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = token_logprobs(logits * 1.0, torch.tensor([1]), consume=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
