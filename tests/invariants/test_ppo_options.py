"""What PPO's options do to a policy: language-model terms, dual clip, length, the average."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.distributed.sharding import local
from stages.ppo.ema import PolicyAverage
from stages.ppo.experience import Experience
from stages.ppo.ptx import LanguageModelTerm, Ragged
from stages.ppo.update import Step, update_metrics
from tests.tiny_ppo import TEXTS, TinyPpo

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


def without_advantage(ppo: TinyPpo, iteration: int = 1) -> Experience:
    experience = ppo.appraise(ppo.collect(iteration))
    return replace(experience, advantages=torch.zeros_like(experience.advantages))


# --- language-model terms -------------------------------------------------------------------------


def demonstrations(ppo: TinyPpo) -> list[Ragged]:
    """The 12 texts, cut after the adjective."""
    codec, cuts = ppo.start.codec, (len("the old"), len("the red"))
    assert len(set(cuts)) == 1
    return [codec.pair_ids(text[: cuts[0]], text[cuts[0] :]) for text in TEXTS]


def terms(ppo: TinyPpo, coef: float = 0.3, rows: int | None = None) -> list[LanguageModelTerm]:
    chunks = [pair for text in TEXTS[::3] for pair in ppo.start.codec.chunks(text)]
    return [
        LanguageModelTerm("ptx", "demonstrations", coef, rows, demonstrations(ppo)),
        LanguageModelTerm("pretraining", "pretraining", 2 * coef, 24, chunks),
    ]


def nll(ppo: TinyPpo, pairs: Sequence[Ragged]) -> float:
    """Mean negative log-likelihood, in nats a token."""
    batch = TokenBatch.from_ragged(*zip(*pairs, strict=True), ppo.start.codec.pad_id)
    with torch.no_grad():
        logprobs = ppo.models.policy(batch, ["logprobs"]).logprobs
    return -float(logprobs[batch.response_mask].mean())


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_terms_do_not_depend_on_the_micro_batch_size(value: str) -> None:
    found = []
    for budget in (None, 1, 40):
        ppo = TinyPpo(value=value, optim={"minibatches": 2, "micro_batch_tokens": budget})
        ppo.updater.terms = terms(ppo)
        steps = ppo.updater.update(ppo.appraise(ppo.collect()), 1)
        found.append((ppo.weights(), update_metrics(steps)))
    for weights, metrics in found[1:]:
        torch.testing.assert_close(weights, found[0][0], **TOLERANCE)
        assert metrics == pytest.approx(found[0][1], abs=1e-9)


def test_a_term_is_its_coefficient_times_the_mean_nll_of_what_it_drew() -> None:
    """One step from zero advantages: the losses that are logged, and the gradient's norm."""
    optim = {"ppo_epochs": 1, "value_coef": 0.0, "max_grad_norm": 1e9}
    ppo = TinyPpo(optim=optim)
    both = terms(ppo)
    drawn = []
    for term, count in zip(both, (8, 24), strict=True):  # 8 rollouts; rows of its own
        random = np.random.default_rng([ppo.runtime.seed(term.name), 1, 0, 0])
        drawn.append([term.pairs[i] for i in random.integers(len(term.pairs), size=count)])
    losses = []
    for term, pairs in zip(both, drawn, strict=True):
        rows = [
            (ppo.models.policy(TokenBatch.from_ragged([p], [r], 0), ["logprobs"]).logprobs, len(r))
            for p, r in pairs
        ]
        total = -sum(logprobs.sum() for logprobs, _ in rows) / sum(tokens for _, tokens in rows)
        losses.append((term.coef * total, float(total.detach())))  # fmt: skip
    wanted = torch.autograd.grad(
        sum(loss for loss, _ in losses), ppo.actor_critic.policy_parameters()
    )
    norm = float(torch.cat([g.flatten() for g in wanted]).norm())
    ppo.updater.terms = both
    metrics = update_metrics(ppo.updater.update(without_advantage(ppo), 1))
    assert metrics["ptx_loss"] == pytest.approx(losses[0][1], abs=1e-9)
    assert metrics["pretraining_loss"] == pytest.approx(losses[1][1], abs=1e-9)
    assert metrics["grad_norm_policy"] == pytest.approx(norm, abs=1e-9)


def test_losses_of_steps_are_added_up_before_they_are_divided() -> None:
    step = Step(tokens=1.0, sums={"value_loss": 0.0, "value_clip_fraction": 0.0}, ratio_max=1.0)
    steps = [replace(step, language={"ptx": pair}) for pair in ((6.0, 2.0), (2.0, 6.0))]
    assert update_metrics(steps)["ptx_loss"] == 1.0  # 8 nats of 8 tokens, not (3 + 1/3) / 2


def test_value_warm_up_and_target_kl_leave_the_terms_out_of_the_weights() -> None:
    ppo = TinyPpo()
    ppo.updater.terms = terms(ppo)
    before = ppo.policy_weights()
    steps = ppo.updater.update(ppo.appraise(ppo.collect()), 1, train_policy=False)
    assert torch.equal(ppo.policy_weights(), before)
    assert "ptx_loss" not in update_metrics(steps)
    # A policy as far away as target_kl allows is not moved by terms either.
    experience = ppo.appraise(ppo.collect())
    ppo.updater.update(experience, 1)
    moved = ppo.policy_weights()
    assert not torch.equal(moved, before)
    ppo.updater.section = ppo.section.optim.model_copy(update={"target_kl": 1e-9})
    (stopped,) = ppo.updater.update(experience, 2)
    assert not stopped.grad_norms and torch.equal(ppo.policy_weights(), moved)


def taught_ppo(taught: Sequence[Ragged]) -> TinyPpo:
    """A policy that was taught some rows by maximum likelihood, before PPO for the letter e."""
    ppo = TinyPpo(
        tuning="full",
        reward_model=False,
        iterations=12,
        kl_coef=0.0,
        optim={"ppo_epochs": 4, "learning_rate": 1e-3},
        rollout={"prompts_per_iteration": 24, "max_new_tokens": 12},
    )
    batch = TokenBatch.from_ragged(*zip(*taught, strict=True), ppo.start.codec.pad_id)
    optimiser = torch.optim.Adam(ppo.actor_critic.policy_parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        logprobs = ppo.models.policy(batch, ["logprobs"]).logprobs
        (-logprobs[batch.response_mask].mean()).backward()
        optimiser.step()
    optimiser.zero_grad()
    return ppo


def test_ptx_is_stable_over_four_epochs() -> None:
    """PPO for the letter e forgets what the policy was taught; with a strong term it does not.

    Of the 12 texts 9 are taught, and drawn by the term; 3 are held out. With the term and without,
    the ratio stays where the clip holds it over 6 iterations of 4 epochs, and the score rises.
    """
    pairs = demonstrations(TinyPpo())
    taught, held_out = [pair for i, pair in enumerate(pairs) if i % 4], pairs[::4]
    ends, untaught = {}, nll(TinyPpo(), held_out)
    for coef in (0.0, 3.0):
        ppo = taught_ppo(taught)
        start = nll(ppo, held_out)
        assert start < 1.0 < 5.0 < untaught
        term = LanguageModelTerm("ptx", "demonstrations", coef, None, taught)
        ppo.updater.terms = [term] if coef else []
        metrics, scores = [], []
        for iteration in range(1, 7):
            rollout = ppo.collect(iteration)
            scores.append(float(rollout.scores.mean()))
            steps = ppo.updater.update(ppo.appraise(rollout), iteration)
            metrics.append(update_metrics(steps))
        ends[coef] = nll(ppo, held_out)
        assert all(0.9 < row["ratio_mean"] < 1.1 for row in metrics)
        assert all(row["approx_kl"] < 0.2 for row in metrics)
        assert scores[-1] > scores[0] + 0.5
        if coef:
            losses = [row["ptx_loss"] for row in metrics]
            assert losses[-1] < losses[0] < 1.0
    assert ends[0.0] > start + 0.15  # PPO alone forgets
    assert ends[3.0] < start


# --- dual clip ------------------------------------------------------------------------------------


def test_dual_clip_takes_the_gradient_of_stale_bad_samples() -> None:
    """Every token five times as likely as when it was sampled, and bad: beyond 3 nothing pulls."""
    norms = {}
    for dual_clip in (None, 3.0, 6.0):
        optim = {"dual_clip": dual_clip, "ppo_epochs": 1}
        ppo = TinyPpo(optim=optim)
        before = ppo.policy_weights()
        experience = ppo.appraise(ppo.collect())
        mask = experience.rollout.mask
        old = experience.rollout.logprobs - np.log(5.0) * mask
        stale = replace(
            experience,
            rollout=replace(experience.rollout, logprobs=old),
            advantages=-mask.to(old.dtype),
        )
        (step,) = ppo.updater.update(stale, 1)
        norms[dual_clip] = step.grad_norms["policy"]
        beyond = dual_clip == 3.0
        assert torch.equal(ppo.policy_weights(), before) == beyond
        assert step.mean("clip_fraction") == float(beyond)
        assert step.mean("policy_loss") == pytest.approx(min(5.0, dual_clip or 5.0))
    assert norms[3.0] == 0.0 and norms[6.0] == pytest.approx(norms[None], abs=1e-12) and norms[None]


# --- length-normalised scores ---------------------------------------------------------------------


class Always:
    """Reward: 1 for any response."""

    name = "always"

    def score(self, completions):
        """See `RewardSource`."""
        return [1.0 for _ in completions.texts]


def test_length_normalised_scores_shorten_what_is_always_good() -> None:
    """A score of 1 whatever is answered teaches nothing; a score of 8 / length teaches brevity."""
    ends = {}
    for reference in (None, 8.0):
        ppo = TinyPpo(
            tuning="full",
            reward_model=False,
            iterations=30,
            kl_coef=0.0,
            stop_ids=frozenset(range(40)),
            rollout={"prompts_per_iteration": 48, "max_new_tokens": 16, "missing_eos": "keep"},
            optim={"learning_rate": 2e-3, "value_learning_rate": 1e-2, "ppo_epochs": 4},
            advantage={"reference_length": reference},
        )
        ppo.rewards = Always()
        lengths = []
        for iteration in range(1, 11):
            rollout = ppo.collect(iteration)
            lengths_b = rollout.batch.response_lengths.to(rollout.rewards.dtype)
            expected = torch.ones_like(lengths_b) if reference is None else reference / lengths_b
            assert torch.equal(rollout.rewards, expected)
            assert torch.equal(rollout.scores, torch.ones_like(lengths_b))  # as they were given
            lengths.append(float(lengths_b.mean()))
            ppo.updater.update(ppo.appraise(rollout), iteration)
        ends[reference] = sum(lengths[-3:]) / sum(lengths[:3])
    assert ends[8.0] < 0.75 < 0.9 < ends[None]


# --- average of the policy ------------------------------------------------------------------------


def policy(ppo: TinyPpo) -> dict[str, torch.Tensor]:
    return {n: local(x).detach().clone() for n, x in ppo.updater.steps.weights("policy").items()}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_the_average_is_that_of_the_recorded_weights(tuning: str, value: str) -> None:
    ppo = TinyPpo(tuning=tuning, value=value)
    average = PolicyAverage(ppo.updater.steps, 0.8)
    recorded = [policy(ppo)]
    assert sum(x.numel() for x in recorded[0].values()) == ppo.policy_weights().numel()
    for iteration in (1, 2, 3):
        ppo.updater.update(ppo.appraise(ppo.collect(iteration)), iteration)
        average.update()
        recorded.append(policy(ppo))
    # 0.8^3 of the start, then 0.2 x 0.8^(3 - n) of the policy that iteration n left.
    weights = [0.512, 0.128, 0.16, 0.2]
    expected = {
        name: sum(w * x[name] for w, x in zip(weights, recorded, strict=True))
        for name in recorded[0]
    }
    batch = ppo.collect().batch
    own = ppo.models.policy(batch, ["logprobs"]).logprobs
    with average.in_place():
        torch.testing.assert_close(policy(ppo), expected, **TOLERANCE)
        averaged = ppo.models.policy(batch, ["logprobs"]).logprobs
    assert (averaged - own).abs().max() > 1e-4
    assert all(torch.equal(x, recorded[-1][n]) for n, x in policy(ppo).items())
    # A state brings it back, bit for bit.
    state = {name: x.clone() for name, x in average.state().items()}
    average.update()
    average.restore(state)
    assert all(torch.equal(x, state[name]) for name, x in average.state().items())
    average.become()
    torch.testing.assert_close(policy(ppo), expected, **TOLERANCE)


def test_half_precision_is_averaged_in_float32() -> None:
    """Steps too small for bfloat16 add up in the average."""
    ppo = TinyPpo(tuning="full", dtype=torch.bfloat16)
    average = PolicyAverage(ppo.updater.steps, 0.99)
    assert {x.dtype for x in average.rows.values()} == {torch.float32}
    name = next(iter(average.rows))
    with torch.no_grad():
        weight = dict(ppo.updater.steps.trained)[name]
        weight.fill_(1.0)
        average.rows[name].fill_(1.0)
        weight.fill_(1.0 + 2**-7)  # the next number of bfloat16
    for _ in range(3):
        average.update()
    expected = 1.0 + 2**-7 * (1 - 0.99**3)
    assert average.rows[name].flatten()[0].item() == pytest.approx(expected, abs=1e-6)
