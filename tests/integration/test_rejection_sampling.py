"""Rejection sampling: what is kept, the loss on it, and the stage on a hand-made reward."""

import copy
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pipeline.batches import TokenBatch
from pipeline.models.adapters import adapter_names
from pipeline.records import Prompt
from stages.memory import predicted_footprint
from stages.ppo.config import PpoSection
from stages.ppo.experience import Experience
from stages.ppo.rejection import best_responses, kept_rows, take
from stages.ppo.rollout import Rollout
from stages.ppo.run import PpoStage, Training
from tests.integration.test_ppo_reward_rises import make_context
from tests.tiny_chain import Killed, assert_same, rlhf
from tests.tiny_ppo import TinyPpo

REJECTION = {"algorithm": "rejection_sampling"}


def rollout_of(
    indices: list[int], lengths: list[int], rewards: list[float], log_ratios: list[float]
) -> Rollout:
    """Responses whose every token has this log-ratio to the reference."""
    count = len(indices)
    batch = TokenBatch.from_ragged([[1]] * count, [[2] * length for length in lengths], 0)
    mask = batch.response_mask
    ref = torch.full(mask.shape, -2.0, dtype=torch.float64)
    logprobs = ref + torch.tensor(log_ratios, dtype=torch.float64).unsqueeze(1)
    numbers = {"entropy": ref, "values": torch.zeros_like(ref)}
    return Rollout(
        [Prompt(str(index)) for index in indices], indices, batch, [str(i) for i in indices],
        torch.ones(count, dtype=torch.bool), torch.tensor(rewards), torch.tensor(rewards),
        logprobs, ref, **numbers,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kl_coef", "keep", "expected"),
    [
        # Two prompts, responses 0 to 2 and 3 to 5. By reward alone: 1 (of 3.0), and of 3 and 5,
        # which are equal, the first.
        (0.0, 1, {1, 3}),
        (0.0, 2, {1, 2, 3, 5}),
        # Less 0.5 x KL: 1.0 - 0, 3.0 - 0.5 x 4 x 1.2 = 0.6, 2.0 - 0.5 x 2 x 1 = 1.0 (0 and 2 are
        # equal: 0 comes first); 1.0 - 0.5 x 3 x 0.2 = 0.7, 0.0 + 0.5 x 4 x 1 = 2.0, 1.0 - 0.
        (0.5, 1, {0, 4}),
        (0.5, 2, {0, 2, 4, 5}),
    ],
)
def test_the_best_of_each_prompt_are_kept(kl_coef: float, keep: int, expected: set[int]) -> None:
    lengths, rewards = [1, 4, 2, 3, 4, 2], [1.0, 3.0, 2.0, 1.0, 0.0, 1.0]
    log_ratios = [0.0, 1.2, 1.0, 0.2, -1.0, 0.0]
    for order in (range(6), [5, 2, 0, 4, 1, 3]):  # rows in any order

        def pick(values: list, order=order) -> list:
            return [values[row] for row in order]

        rollout = rollout_of(list(order), pick(lengths), pick(rewards), pick(log_ratios))
        experience = best_responses(rollout, kl_coef, keep, 3)
        assert {rollout.sample_indices[row] for row in kept_rows(experience)} == expected
        assert experience.advantages.sum() == sum(lengths[index] for index in expected)
        part = take(rollout, kept_rows(experience))
        assert set(part.sample_indices) == expected == {int(text) for text in part.texts}
        assert part.mask.shape == part.logprobs.shape


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_step_is_cross_entropy_on_what_is_kept(temperature: float) -> None:
    """One AdamW step by hand: -mean log p over the kept tokens, through transformers' forward."""
    rollout = {"responses_per_prompt": 4, "temperature": temperature, "prompts_per_iteration": 4}
    optim = {"ppo_epochs": 1, "micro_batch_tokens": 60, "max_grad_norm": 0.3}
    ppo = TinyPpo(**REJECTION, rejection={"keep": 2}, rollout=rollout, optim=optim, tuning="full")
    made = ppo.collect()
    experience = best_responses(made, 0.05, 2, 4)
    rows = kept_rows(experience)
    assert len(rows) == 8
    model = copy.deepcopy(ppo.models.policy.trunk.model).requires_grad_(True)
    tokens = int(made.mask[rows].sum())
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        batch = made.batch
        prompt = batch.prompt_ids[row, : batch.prompt_lengths[row]].tolist()
        response = batch.response_ids[row, : batch.response_lengths[row]].tolist()
        logits = model(torch.tensor([prompt + response])).logits[0] / temperature
        chosen = logits[len(prompt) - 1 : -1].log_softmax(-1)
        loss = loss - chosen[range(len(response)), response].sum() / tokens
    loss.backward()
    weights = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(weights, 0.3)
    section = ppo.section.optim
    torch.optim.AdamW(
        weights, section.learning_rate, (section.adam_beta1, section.adam_beta2),
        section.adam_eps, section.weight_decay,
    ).step()  # fmt: skip
    (step,) = ppo.updater.update(experience, 1)
    assert step.mean("policy_loss") == pytest.approx(float(loss.detach()), abs=1e-9)
    assert step.grad_norms == {"policy": pytest.approx(float(norm), abs=1e-9)}
    assert step.mean("approx_kl") == pytest.approx(0, abs=1e-12)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(ppo.policy_weights(), expected, rtol=0, atol=1e-9)


def test_micro_batches_and_row_order_change_nothing() -> None:
    """To 1e-9 in float64, with two steps an epoch."""
    rollout = {"responses_per_prompt": 4, "prompts_per_iteration": 4}
    weights = []
    for tokens, order in ((40, None), (4000, None), (4000, [*range(15, -1, -1)])):
        optim = {"minibatches": 2, "micro_batch_tokens": tokens, "entropy_coef": 0.01}
        ppo = TinyPpo(**REJECTION, rollout=rollout, optim=optim)
        for iteration in (1, 2):
            made = ppo.collect(iteration, order=order)
            ppo.updater.update(best_responses(made, 0.05, 1, 4), iteration)
        weights.append(ppo.weights())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-9)


def test_there_is_no_value_model() -> None:
    ppo = TinyPpo(**REJECTION, rollout={"responses_per_prompt": 2})
    assert ppo.models.value is None
    assert set(ppo.models.roles(ppo.rewards)) == {"policy", "reference", "reward"}
    assert adapter_names(ppo.start.trunk.model) == {"sft", "reward", "policy"}
    assert ppo.updater.steps.rates.keys() == {"policy"}
    assert (ppo.collect().values == 0).all()


@pytest.mark.parametrize(
    ("tuning", "rate"), [("lora", 2e-2), pytest.param("full", 5e-3, marks=pytest.mark.slow)]
)
def test_the_held_out_reward_rises(tuning: str, rate: float, tmp_path: Path) -> None:
    """On the share of the letter e, about 4% at the start; 15 iterations bring 20 points."""
    ppo = {
        **REJECTION,
        "tuning": tuning,
        "iterations": 15,
        "rollout": {
            "prompts_per_iteration": 16,
            "responses_per_prompt": 8,
            "max_new_tokens": 12,
            "missing_eos": "keep",
        },
        "optim": {"learning_rate": rate, "minibatches": 2},
    }
    context = make_context(tmp_path, ppo)
    start = context.store.open(context.parents["sft"])
    base = start.trunk.base_hash()
    summary = PpoStage().run(context)
    context.tracker.close()
    assert start.trunk.base_hash() == base
    rows = [json.loads(line) for line in context.folder.metrics_jsonl.read_text().splitlines()]
    assert summary["held_out_reward_best"] > summary["held_out_reward_start"] + 0.2
    assert rows[15]["score"] > rows[1]["score"] + 0.2 and rows[15]["kl"] > 1
    for row in rows[1:]:
        assert row["kept_responses"] == 16
        assert row["kept_score"] > row["score"] or row["score"] == 1.0
        assert not {name for name in row if "value" in name or "explained" in name}
    assert rows[15]["cross_entropy"] < rows[1]["cross_entropy"]  # it has become sure
    measured = json.loads((context.folder.root / "memory.json").read_text())["measured"]
    assert "value" not in measured
    # The artifact is the policy of the best iteration; no value model has been left on the trunk.
    predicted = predicted_footprint(context.config, "ppo")
    assert predicted is not None and "value" not in predicted and "policy" in predicted
    policy = context.store.open(context.folder.artifact)
    assert not policy.trunk.heads and policy.role.name == "policy"


def test_a_killed_run_goes_on_as_if_it_had_not_been(place: Path) -> None:
    """Bit for bit: optimiser, adaptive KL coefficient, metrics, samples and texts."""
    asked = [
        "ppo.algorithm=rejection_sampling",
        "ppo.rollout.responses_per_prompt=3",
        "ppo.kl.controller=adaptive",
        "--from",
        "runs/parents",
    ]
    rlhf("ppo", "run.name=whole", *asked)
    own = Training.update

    def update(training: Training, experience: Experience, iteration: int) -> dict[str, float]:
        if iteration == 6:
            raise Killed
        return own(training, experience, iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "update", update)
        with pytest.raises(Killed):
            rlhf("ppo", "run.name=r", *asked)
    assert "going on after step 4" in rlhf("ppo", "run.name=r", *asked)
    assert_same(place / "runs/r/ppo", place / "runs/whole/ppo")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"responses_per_prompt = 1 responses ppo.rejection.keep = 1 are kept, .* raise"),
        ({"rollout": {"responses_per_prompt": 2}, "rejection": {"keep": 2}}, "none is rejected"),
        ({"value": "shared"}, "ppo.value is shared but ppo.algorithm is rejection_sampling"),
        ({"optim": {"dual_clip": 3.0}}, "ppo.optim.dual_clip is 3.0"),
        ({"optim": {"value_warmup_iterations": 1}}, "ppo.optim.value_warmup_iterations is 1"),
        (
            {"optim": {"minibatches": 3}},
            r"prompts_per_iteration x ppo.rejection.keep = 128 x 1 = 128 rollouts, not divisible",
        ),
    ],
)
def test_settings_without_effect_are_refused(section: dict, message: str) -> None:
    rollout = {"responses_per_prompt": 4} if section else {}
    with pytest.raises(ValidationError, match=message):
        PpoSection.model_validate({**REJECTION, "rollout": rollout, **section})


def test_keep_is_rejection_samplings() -> None:
    with pytest.raises(ValidationError, match=r"ppo.rejection.keep is 2 but ppo.algorithm is ppo"):
        PpoSection.model_validate({"rejection": {"keep": 2}})


def test_demonstrations_are_mixed_in_and_logged() -> None:
    ppo = TinyPpo(
        **REJECTION,
        rollout={"responses_per_prompt": 2},
        optim={"ptx_coef": 1.0, "learning_rate": 1e-2},
        demonstrations=[([5, 6], [7, 8, 1]), ([9], [10, 1])],
    )
    losses = []
    for iteration in range(1, 6):
        experience = best_responses(ppo.collect(iteration), 0.05, 1, 2)
        steps = ppo.updater.update(experience, iteration)
        losses.append(ppo.updater.metrics(experience, steps)["ptx_loss"])
    assert losses[-1] < losses[0]
