"""The arithmetic of PPO's options against naive loops and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from stages.ppo.config import CurriculumSection
from stages.ppo.curriculum import open_share
from stages.ppo.experience import appraise
from stages.ppo.learning_config import AdvantageSection
from stages.ppo.objective import (
    gae,
    length_adaptive_lambda,
    length_normalised,
    policy_loss,
    token_rewards,
)
from tests.reference.test_ppo_objective import LENGTHS, naive_gae, ragged
from tests.tiny_ppo import TinyPpo

# --- GAE ------------------------------------------------------------------------------------------


def test_gae_takes_a_lambda_for_each_response() -> None:
    rewards, values, mask = ragged()
    lambdas = [0.0, 1.0, 0.3, 0.95]
    advantages, returns = gae(rewards, values, mask, 0.97, torch.tensor(lambdas))
    for row, length in enumerate(LENGTHS):
        r, v = rewards[row, :length].tolist(), values[row, :length].tolist()
        # lambdas are float32 until they meet float64 values
        expected = naive_gae(r, v, 0.97, float(torch.tensor(lambdas[row])))
        np.testing.assert_allclose(advantages[row, :length], expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(returns[row, :length], np.add(expected, v), rtol=0, atol=1e-12)
    assert torch.all(advantages[~mask] == 0) and torch.all(returns[~mask] == 0)
    # One lambda for all, as a number or as a tensor, is the same.
    one = gae(rewards, values, mask, 0.97, 0.5)
    for x, y in zip(one, gae(rewards, values, mask, 0.97, torch.full((4,), 0.5)), strict=True):
        assert torch.equal(x, y)


def test_length_adaptive_lambda_by_hand() -> None:
    # 1 - 1 / (0.05 l): of 100 tokens 1 - 1/5, of 1000 1 - 1/50; 20 and fewer give 0.
    found = length_adaptive_lambda(torch.tensor([100, 1000, 20, 5]), 0.05)
    assert found.tolist() == pytest.approx([0.8, 0.98, 0.0, 0.0], abs=1e-12)
    # The weights lambda^k of its errors add up to alpha l = 50: a share of the response.
    assert sum(float(found[1]) ** k for k in range(10_000)) == pytest.approx(50)


def test_advantages_and_returns_have_lambdas_of_their_own_by_hand() -> None:
    """One response, values 1, 2, 3, score 4, no KL: deltas are 2-1, 3-2, 4-3 = 1, 1, 1."""
    rewards, values = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, _ = gae(rewards, values, mask, 1.0, 0.5)
    assert advantages.tolist() == [[1 + 0.5 * 1.5, 1 + 0.5 * 1, 1.0]]
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    assert returns.tolist() == [[4.0, 4.0, 4.0]]  # Monte Carlo


@pytest.mark.parametrize(
    ("settings", "policy", "value"),
    [
        ({"gae_lambda": 0.9}, 0.9, 0.9),
        ({"gae_lambda": 0.9, "value_lambda": 1.0}, 0.9, 1.0),
        ({"gae_lambda": 0.9, "length_adaptive_alpha": 0.4}, "adaptive", 0.9),
        ({"value_lambda": 1.0, "length_adaptive_alpha": 0.4}, "adaptive", 1.0),
    ],
)
def test_appraise_gives_policy_and_value_their_lambdas(settings, policy, value) -> None:
    ppo = TinyPpo(stop_ids=frozenset(range(60)), rollout={"max_new_tokens": 12})
    rollout = ppo.collect()
    section = AdvantageSection(whiten=False, **settings)
    experience = appraise(rollout, 0.05, section, lambda x: x)
    lengths = rollout.batch.response_lengths.tolist()
    assert len(set(lengths)) > 1
    lambdas = []
    for row, length in enumerate(lengths):
        k1 = (rollout.logprobs - rollout.ref_logprobs)[row, :length]
        rewards = (-0.05 * k1).tolist()
        rewards[-1] += float(rollout.rewards[row])
        values = rollout.values[row, :length].tolist()
        lambdas.append(max(0.0, 1 - 1 / (0.4 * length)) if policy == "adaptive" else policy)
        advantages = naive_gae(rewards, values, 1.0, lambdas[-1])
        returns = np.add(naive_gae(rewards, values, 1.0, value), values)
        np.testing.assert_allclose(experience.advantages[row, :length], advantages, atol=1e-12)
        np.testing.assert_allclose(experience.returns[row, :length], returns, atol=1e-12)
    if policy == "adaptive":
        assert experience.mean_lambda == pytest.approx(sum(lambdas) / len(lambdas), abs=1e-12)
    else:
        assert experience.mean_lambda is None


# --- scores and their penalty ---------------------------------------------------------------------


def test_length_normalised_scores_by_hand() -> None:
    scores = torch.tensor([3.0, 3.0, -4.0], dtype=torch.float64)
    lengths = torch.tensor([50, 25, 100])
    # x 50/50, 50/25, 50/100: at the reference length a score stays.
    assert length_normalised(scores, lengths, 50).tolist() == [3.0, 6.0, -2.0]
    assert length_normalised(scores, lengths, 1).tolist() == [0.06, 0.12, -0.04]  # a token


def test_each_response_has_its_own_weight_of_the_penalty() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    reference = torch.tensor([[-1.5, -1.0], [-1.5, -1.0]])  # k1 = 0.5, -1
    mask = torch.ones(2, 2, dtype=torch.bool)
    coefs = torch.tensor([0.1, 1.0], dtype=torch.float64)
    rewards = token_rewards(logprobs, reference, torch.tensor([2.0, 3.0]), mask, coefs)
    assert rewards.dtype == torch.float32
    expected = [[-0.05, 0.1 + 2.0], [-0.5, 1.0 + 3.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


# --- dual clip ------------------------------------------------------------------------------------


def test_beyond_the_dual_clip_there_is_no_gradient() -> None:
    """Ratios 5 and 2, advantage -1, c = 3: the loss -A min(r, c) is 3 and 2, its slope 0 and 2."""
    logprobs = torch.tensor([[5.0, 2.0]]).log().requires_grad_()
    old, advantages = torch.zeros(1, 2), -torch.ones(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = policy_loss(logprobs, old, advantages, mask, 0.2, dual_clip=3.0)
    assert found.loss.item() == pytest.approx(3 + 2)
    found.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 2.0]]))


# --- curriculum -----------------------------------------------------------------------------------


def test_shares_of_the_curriculum_by_hand() -> None:
    linear = CurriculumSection(column="x", start_share=0.2, iterations=5)
    # 5 iterations are 4 steps from 0.2 to 1.
    shares = [open_share(linear, i, 20) for i in range(7)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    root = linear.model_copy(update={"pacing": "root"})
    # sqrt(0.04 + 0.96 x 2/4) in the middle
    assert open_share(root, 2, 20) == pytest.approx(math.sqrt(0.52))
    assert [open_share(root, i, 20) for i in (0, 4, 9)] == pytest.approx([0.2, 1.0, 1.0])
    half = CurriculumSection(column="x", start_share=0.5)  # null: half of 20
    assert [open_share(half, i, 20) for i in (0, 9, 10)] == pytest.approx([0.5, 1.0, 1.0])
    assert open_share(half, 0, 1) == 1.0
