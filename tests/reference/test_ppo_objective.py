"""PPO's mathematics against naive loops, closed forms, numpy, torch and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from stages.ppo.controllers import AdaptiveKl, FixedKl, StopRules, schedule_factor
from stages.ppo.objective import (
    explained_variance,
    final_scores,
    gae,
    importance_weights,
    kl_estimate,
    last_token,
    mean_variance,
    moments,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

LENGTHS = [5, 1, 3, 6]


def ragged(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values (NaN on padding) and mask of four responses with different lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)
    rewards, values = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    nan = torch.full_like(values, float("nan"))
    return torch.where(mask, rewards, nan), torch.where(mask, values, nan), mask


def naive_gae(rewards: list, values: list, gamma: float, gae_lambda: float) -> list[float]:
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, straight from the definition (GAE, eq. 16)."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [
        sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0)])
def test_gae_is_the_discounted_sum_of_errors(gamma: float, gae_lambda: float) -> None:
    rewards, values, mask = ragged()
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for row, length in enumerate(LENGTHS):
        r, v = rewards[row, :length].tolist(), values[row, :length].tolist()
        expected = naive_gae(r, v, gamma, gae_lambda)
        np.testing.assert_allclose(advantages[row, :length], expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(returns[row, :length], np.add(expected, v), rtol=0, atol=1e-12)
    assert torch.all(advantages[~mask] == 0) and torch.all(returns[~mask] == 0)


def test_gae_with_lambda_1_is_return_minus_value() -> None:
    rewards, values, mask = ragged(1)
    advantages, returns = gae(rewards, values, mask, 0.9, 1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            to_go = sum(0.9 ** (k - t) * rewards[row, k].item() for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(to_go - values[row, t].item())
            assert returns[row, t].item() == pytest.approx(to_go)


def test_gae_with_lambda_0_is_the_one_step_error() -> None:
    rewards, values, mask = ragged(2)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            bootstrap = values[row, t + 1].item() if t + 1 < length else 0.0
            error = rewards[row, t].item() + 0.9 * bootstrap - values[row, t].item()
            assert advantages[row, t].item() == pytest.approx(error)


def test_gae_does_not_depend_on_the_padding_side() -> None:
    rewards, values, mask = ragged(3)
    right, _ = gae(rewards, values, mask, 0.99, 0.9)
    shifts = [max(LENGTHS) - length for length in LENGTHS]

    def to_the_left(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(s) for row, s in zip(x, shifts, strict=True)])

    left, _ = gae(*(to_the_left(x) for x in (rewards, values, mask)), 0.99, 0.9)
    torch.testing.assert_close(left, to_the_left(right), rtol=0, atol=1e-12)


def test_token_rewards_by_hand() -> None:
    # Penalty: -0.1 (logp - ref): -0.1 (-1 - -2) = -0.1 and -0.1 (-3 - -2.5) = 0.05; the score 2
    # joins the second token. Row 2 has one token: -0.1 (-1 - -1) - 4 = -4.
    nan = float("nan")
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = token_rewards(
        torch.tensor([[-1.0, -3.0, nan], [-1.0, nan, nan]]),
        torch.tensor([[-2.0, -2.5, nan], [-1.0, nan, nan]]),
        torch.tensor([2.0, -4.0]),
        mask,
        kl_coef=0.1,
    )
    expected = torch.tensor([[-0.1, 2.05, 0.0], [-4.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)
    assert last_token(mask).tolist() == [[False, True, False], [True, False, False]]


def test_final_scores_by_hand() -> None:
    # Responses 2 and 3 were cut. Penalty 1: subtracted 3 - 1 = 2 and -4 - 1 = -5, clipped at 4 to
    # -4; replaced by -1; or kept, and clipped at 2.
    scores, ended = torch.tensor([1.5, 3.0, -4.0]), torch.tensor([True, False, False])
    assert final_scores(scores, ended, "subtract", 1.0, None).tolist() == [1.5, 2.0, -5.0]
    assert final_scores(scores, ended, "subtract", 1.0, 4.0).tolist() == [1.5, 2.0, -4.0]
    assert final_scores(scores, ended, "replace", 1.0, None).tolist() == [1.5, -1.0, -1.0]
    assert final_scores(scores, ended, "keep", 1.0, 2.0).tolist() == [1.5, 2.0, -2.0]


def test_kl_estimators_by_hand() -> None:
    # d = ln 2: k1 = ln 2; k2 = (ln 2)^2 / 2; k3 = 1/2 - 1 + ln 2.
    # d = -ln 2: k1 = -ln 2 (not clamped at 0); k2 as before; k3 = 2 - 1 - ln 2.
    ln2 = math.log(2)
    logprobs, reference = torch.tensor([[0.0, -ln2]]), torch.tensor([[-ln2, 0.0]])
    expected = {"k1": [ln2, -ln2], "k2": [ln2**2 / 2] * 2, "k3": [ln2 - 0.5, 1 - ln2]}
    for name, values in expected.items():
        estimate = kl_estimate(logprobs, reference, name)  # type: ignore[arg-type]
        np.testing.assert_allclose(estimate[0], values, rtol=1e-6)


def test_kl_estimators_have_the_true_kl_as_expectation() -> None:
    """k1 and k3 are unbiased: their expectation under p is KL(p || q), from torch's own formula."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    true = torch.distributions.kl_divergence(
        torch.distributions.Categorical(p), torch.distributions.Categorical(q)
    )
    for name in ("k1", "k3"):
        expectation = (p * kl_estimate(p.log(), q.log(), name)).sum()  # type: ignore[arg-type]
        assert expectation.item() == pytest.approx(true.item(), abs=1e-12)


def test_whitening_is_numpys_and_global() -> None:
    x, _, mask = ragged(4)
    # Moments of two "ranks" added up: whitening uses the statistics of the whole batch.
    total = moments(x[:2], mask[:2]) + moments(x[2:], mask[2:])
    real = x[mask].numpy()
    mean, variance = mean_variance(total)
    assert mean == pytest.approx(real.mean()) and variance == pytest.approx(real.var())
    centred = whiten(x, mask, total, shift_mean=True)
    np.testing.assert_allclose(
        centred[mask], (real - real.mean()) / np.sqrt(real.var() + 1e-8), rtol=0, atol=1e-12
    )
    scaled = whiten(x, mask, total, shift_mean=False)
    np.testing.assert_allclose(scaled[mask], real / np.sqrt(real.var() + 1e-8), rtol=0, atol=1e-12)
    assert torch.all(centred[~mask] == 0) and torch.all(scaled[~mask] == 0)


def test_policy_loss_by_hand() -> None:
    # eps = 0.2, six real tokens and a padding one (NaN):
    #   r    A   -A r   -A clip(r)  max    clip decides
    #   1.0  2   -2     -2          -2
    #   1.5  1   -1.5   -1.2        -1.2   yes
    #   0.5  1   -0.5   -0.8        -0.5
    #   1.5  -1   1.5    1.2         1.5
    #   0.5  -1   0.5    0.8         0.8   yes
    #   4.0  -1   4      1.2         4
    # sum of max = -2 - 1.2 - 0.5 + 1.5 + 0.8 + 4 = 2.6; ratios sum to 9.
    ratio = torch.tensor([[1.0, 1.5, 0.5, 1.5, 0.5, 4.0, float("nan")]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, 1, 1, -1, -1, -1, float("nan")]], dtype=torch.float64)
    mask = torch.tensor([[True] * 6 + [False]])
    old = torch.full_like(ratio, -3.0)
    logprobs = (ratio.log() + old).requires_grad_()
    result = policy_loss(logprobs, old, advantages, mask, 0.2)
    assert result.loss.item() == pytest.approx(2.6)
    assert result.clipped.item() == 2
    assert result.ratio.item() == pytest.approx(9.0)
    assert result.ratio_max.item() == pytest.approx(4.0)
    # k3 = r - 1 - ln r: sum r - 6 - sum ln r = 9 - 6 - ln(1.5 * 0.5 * 1.5 * 0.5 * 4) = 3 - ln 2.25.
    assert result.approx_kl.item() == pytest.approx(3 - math.log(2.25))
    # d/dlogp = -A r where the plain term decides (or both are equal), else 0.
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    expected = [-2.0, 0.0, -0.5, 1.5, 0.0, 4.0, 0.0]
    np.testing.assert_allclose(gradient[0], expected, rtol=0, atol=1e-12)
    # Dual clip 3: only the last token's 4 is above -A c = 3; its gradient is gone: 2.6 - 1 = 1.6.
    dual = policy_loss(logprobs, old, advantages, mask, 0.2, dual_clip=3.0)
    assert dual.loss.item() == pytest.approx(1.6)
    assert dual.clipped.item() == 3
    (gradient,) = torch.autograd.grad(dual.loss, logprobs)
    np.testing.assert_allclose(gradient[0], [-2.0, 0.0, -0.5, 1.5, 0.0, 0.0, 0.0], atol=1e-12)


def test_policy_gradient_at_ratio_1_is_reinforce() -> None:
    """At r = 1 the surrogate's gradient is that of -sum A logp, by torch's autograd."""
    advantages, logprobs, mask = (x.nan_to_num(nan=0) for x in ragged(5))
    logprobs.requires_grad_()
    (ours,) = torch.autograd.grad(
        policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2).loss, logprobs
    )
    (theirs,) = torch.autograd.grad(-(advantages * logprobs)[mask].sum(), logprobs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_log_ratio_is_clamped_at_20() -> None:
    # A = -1: -A r = exp(20) at log-ratio 1000, and 0 gradient; at -1000 the ratio is exp(-20).
    mask = torch.ones(1, 1, dtype=torch.bool)
    for log_ratio, ratio in ((1000.0, math.exp(20)), (-1000.0, math.exp(-20))):
        logprobs = torch.full((1, 1), log_ratio, requires_grad=True)
        result = policy_loss(logprobs, torch.zeros(1, 1), -torch.ones(1, 1), mask, 0.2)
        assert result.ratio.item() == pytest.approx(ratio, rel=1e-6)
        (gradient,) = torch.autograd.grad(result.loss, logprobs)
        assert gradient.item() == 0.0


def test_nan_ratio_is_not_hidden() -> None:
    logprobs = torch.tensor([[float("nan"), 0.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), mask, 0.2).loss.isnan()


def test_importance_weights_by_hand() -> None:
    # pi / mu: 0.5 / 0.25 = 2; 0.2 / 0.4 = 0.5; 0.9 / 0.1 = 9, cut at the cap 3; padding 0.
    nan = float("nan")
    pi = torch.tensor([[0.5, 0.2, 0.9, nan]], dtype=torch.float64).log().requires_grad_()
    mu = torch.tensor([[0.25, 0.4, 0.1, nan]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True, False]])
    weights = importance_weights(pi, mu, mask, cap=3.0)
    np.testing.assert_allclose(weights[0], [2.0, 0.5, 3.0, 0.0], rtol=1e-12)
    assert not weights.requires_grad
    # An engine that gave a token probability 0 has no infinite weight, whatever the cap.
    never = importance_weights(torch.zeros(1, 1), torch.full((1, 1), -1e4), mask[:, :1], cap=1e30)
    assert never.item() == pytest.approx(math.exp(20), rel=1e-6)


def test_weights_scale_each_tokens_loss_and_nothing_else() -> None:
    # eps = 0.2. Unweighted losses max(-A r, -A clip r) of three tokens, as in the table above:
    #   r 1.0, A 2: -2;  r 1.5, A 1: -1.2 (clipped);  r 0.5, A -1: 0.8 (clipped);  padding.
    # Weights 2, 0.5, 3: -4 - 0.6 + 2.4 = -2.2. d/dlogp = -w A r where plain decides: -4, 0, 0.
    nan = float("nan")
    ratio = torch.tensor([[1.0, 1.5, 0.5, nan]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, 1.0, -1.0, nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    weights = torch.tensor([[2.0, 0.5, 3.0, nan]], dtype=torch.float64)
    old = torch.full_like(ratio, -3.0)
    logprobs = (ratio.log() + old).requires_grad_()
    result = policy_loss(logprobs, old, advantages, mask, 0.2, weights_bt=weights)
    assert result.loss.item() == pytest.approx(-2.2)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    np.testing.assert_allclose(gradient[0], [-4.0, 0.0, 0.0, 0.0], rtol=0, atol=1e-12)
    # What is logged of the ratio is the policy's own affair: r sums to 3, two tokens are clipped.
    assert result.ratio.item() == pytest.approx(3.0)
    assert result.ratio_max.item() == pytest.approx(1.5)
    assert result.clipped.item() == 2


def test_importance_weights_correct_the_expected_gradient() -> None:
    """Sampling from mu with weights pi / mu has the gradient that sampling from pi has.

    Exact, by summing over a vocabulary of 5: E_mu[w(a) grad loss(a)] = E_pi[grad loss(a)]. Without
    weights, and where a cap binds, it has not.
    """
    generator = torch.Generator().manual_seed(0)
    logits, other, advantages = torch.randn((3, 5), generator=generator, dtype=torch.float64)
    log_mu = (logits + 0.3 * other).log_softmax(0)
    mask = torch.ones(1, 5, dtype=torch.bool)

    def expected_gradient(log_sampler: torch.Tensor, cap: float | None) -> torch.Tensor:
        free = logits.clone().requires_grad_()
        log_pi = free.log_softmax(0).unsqueeze(0)
        old = log_pi.detach()
        weights = None if cap is None else importance_weights(old, log_sampler[None], mask, cap)
        total = torch.zeros(())
        for token in range(5):  # each token as its own sample, with the probability of drawing it
            only = torch.zeros_like(mask)
            only[0, token] = True
            loss = policy_loss(log_pi, old, advantages[None], only, 0.2, weights_bt=weights).loss
            total = total + log_sampler[token].exp() * loss
        return torch.autograd.grad(total, free)[0]

    pi = logits.softmax(0)
    # REINFORCE in closed form: d/dlogits of -E_pi[A] = -pi (A - E_pi[A]).
    closed = -pi * (advantages - (pi * advantages).sum())
    on_policy = expected_gradient(pi.log(), None)
    torch.testing.assert_close(on_policy, closed, rtol=0, atol=1e-12)
    ratios = (pi.log() - log_mu).exp()
    assert ratios.max() < 10
    corrected = expected_gradient(log_mu, 10.0)
    torch.testing.assert_close(corrected, closed, rtol=0, atol=1e-12)
    assert (expected_gradient(log_mu, None) - closed).abs().max() > 0.01
    assert ratios.max() > 1.05
    assert (expected_gradient(log_mu, 1.05) - closed).abs().max() > 1e-3


def test_value_loss_by_hand() -> None:
    # eps = 0.2, old values 0:
    #   V    R    (V-R)^2  clipped V  (clip-R)^2  max    clip decides
    #   0.1  1.0  0.81     0.1        0.81        0.81
    #   1.0  1.0  0        0.2        0.64        0.64   yes
    #   1.0  -1   4        0.2        1.44        4
    #  -0.5  0.5  1        -0.2       0.49        1
    # 1/2 sum max = (0.81 + 0.64 + 4 + 1) / 2 = 3.225; unclipped (0.81 + 0 + 4 + 1) / 2 = 2.905.
    values = torch.tensor([[0.1, 1.0], [1.0, -0.5]], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([[1.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    mask = torch.ones(2, 2, dtype=torch.bool)
    result = value_loss(values, torch.zeros_like(returns), returns, mask, 0.2)
    assert result.loss.item() == pytest.approx(3.225)
    assert result.clipped.item() == 1
    (gradient,) = torch.autograd.grad(result.loss, values)
    # (V - R) where the plain error decides, 0 where the clipped one does.
    np.testing.assert_allclose(gradient, [[-0.9, 0.0], [2.0, -1.0]], rtol=0, atol=1e-12)
    plain = value_loss(values, torch.zeros_like(returns), returns, mask, None)
    assert plain.loss.item() == pytest.approx(2.905)
    assert plain.loss.item() == pytest.approx(
        torch.nn.functional.mse_loss(values, returns, reduction="sum").item() / 2
    )


def test_losses_ignore_padding() -> None:
    advantages, logprobs, mask = ragged(6)
    old = logprobs - 0.3
    whole = policy_loss(logprobs, old, advantages, mask, 0.2)
    parts = [
        policy_loss(logprobs[i : i + 1, :n], old[i : i + 1, :n], advantages[i : i + 1, :n],
                    mask[i : i + 1, :n], 0.2)
        for i, n in enumerate(LENGTHS)
    ]  # fmt: skip
    for name in ("loss", "clipped", "approx_kl", "ratio"):
        total = sum(getattr(part, name).item() for part in parts)
        assert getattr(whole, name).item() == pytest.approx(total, abs=1e-12)
    value = value_loss(logprobs, old, advantages, mask, 0.2).loss.item()
    assert value == pytest.approx(
        sum(
            value_loss(logprobs[i : i + 1, :n], old[i : i + 1, :n], advantages[i : i + 1, :n],
                       mask[i : i + 1, :n], 0.2).loss.item()
            for i, n in enumerate(LENGTHS)
        ),
        abs=1e-12,
    )  # fmt: skip


def test_explained_variance_by_hand() -> None:
    # returns 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5.
    # values 1, 3, 3, 5: residuals 0, -1, 0, 1: mean 0, variance 0.5. 1 - 0.5 / 3.5 = 6 / 7.
    returns = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    values = torch.tensor([[1.0, 3.0, 3.0, 5.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    measured = explained_variance(moments(returns - values, mask), moments(returns, mask))
    assert measured == pytest.approx(6 / 7)
    same = moments(torch.ones(1, 4), mask)
    assert explained_variance(same, same) == 0.0


def test_adaptive_kl_is_zieglers_controller() -> None:
    # target 6, horizon 10,000, n = 256.
    # KL 6.6: error 0.1: 0.2 (1 + 0.1 * 256 / 10000) = 0.200512.
    # KL 60: error clipped to 0.2: 0.200512 (1 + 0.2 * 0.0256) = 0.20153862144.
    # KL 0: error clipped to -0.2: 0.20153862144 (1 - 0.00512) = 0.200506743698...
    controller = AdaptiveKl(0.2, target=6.0, horizon=10_000)
    for kl, expected in ((6.6, 0.200512), (60.0, 0.20153862144), (0.0, 0.20050674369822720)):
        controller.update(kl, 256)
        assert controller.coef == pytest.approx(expected, rel=1e-12)
    fixed = FixedKl(0.2)
    fixed.update(60.0, 256)
    assert fixed.coef == 0.2


def test_schedules_by_hand() -> None:
    # 6 steps, 2 of warm-up: 1/2, 1, then 4 steps: linear 1, 3/4, 1/2, 1/4.
    linear = [schedule_factor("linear", step, 6, 2) for step in range(6)]
    assert linear == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    half = math.sqrt(0.5)
    cosine = [schedule_factor("cosine", step, 4) for step in range(4)]
    assert cosine == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert [schedule_factor("constant", step, 4) for step in range(4)] == [1.0] * 4


def test_stop_rules_wait_for_patience_and_name_the_rule() -> None:
    rules = StopRules(max_kl=10.0, max_score_drop=2.0, min_eos_share=0.5, patience=2)
    good = {"kl": 1.0, "score": 0.0, "score_std": 1.0, "eos_rate": 0.8}
    assert rules.check(**good) is None
    assert rules.check(**good | {"kl": 11.0}) is None
    assert rules.check(**good) is None  # a good iteration starts the count again
    assert rules.check(**good | {"kl": 11.0}) is None
    assert "ppo.stop.max_kl = 10" in (rules.check(**good | {"kl": 12.0}) or "")


@pytest.mark.parametrize(
    ("change", "rule"),
    [({"score": -2.1}, "ppo.stop.max_score_drop"), ({"eos_rate": 0.39}, "ppo.stop.min_eos_share")],
)
def test_stop_rules_measure_from_the_first_iteration(change: dict, rule: str) -> None:
    # First: score 0, std 1, EOS rate 0.8: floors 0 - 2 x 1 = -2 and 0.5 x 0.8 = 0.4.
    first = {"kl": 0.0, "score": 0.0, "score_std": 1.0, "eos_rate": 0.8}
    rules = StopRules(max_kl=None, max_score_drop=2.0, min_eos_share=0.5, patience=1)
    assert rules.check(**first) is None
    assert rules.check(kl=1e9, score=-1.9, score_std=9.0, eos_rate=0.41) is None
    assert rule in (rules.check(**first | change) or "")
