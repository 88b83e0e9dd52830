"""What must hold whatever the numbers are: in float64, to 1e-9."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.errors import TrainingError
from pipeline.inference import infer
from pipeline.models.joiner import DecoderJoiner
from pipeline.tensors import tensors_hash
from stages.ppo.config import RolloutSection
from stages.ppo.experience import Experience, rollout_metrics
from stages.ppo.rollout import PromptOrder, Rollout
from stages.ppo.samples import SampleFiles
from tests.tiny_ppo import PROMPTS, TinyPpo

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
FORMS = [
    {"tuning": "lora", "value": "separate"},
    {"tuning": "full", "value": "separate"},
    {"tuning": "lora", "value": "shared"},
    {"tuning": "full", "value": "shared", "reward_model": False},
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


@forms
def test_ratio_is_1_at_the_first_minibatch_of_every_iteration(form: dict) -> None:
    ppo = TinyPpo(**form, optim={"minibatches": 2}, rollout={"temperature": 0.7})
    for iteration in (1, 2, 3):
        steps = ppo.updater.update(ppo.appraise(ppo.collect(iteration)), iteration)
        assert len(steps) == 4  # 2 epochs of 2 minibatches
        assert steps[0].mean("ratio_mean") == pytest.approx(1.0, abs=1e-9)
        assert steps[0].ratio_max == pytest.approx(1.0, abs=1e-9)
        assert steps[0].mean("approx_kl") == pytest.approx(0.0, abs=1e-9)
        assert steps[-1].mean("approx_kl") > 1e-6  # the policy did move


@forms
def test_reference_is_the_start_and_never_moves(form: dict) -> None:
    ppo = TinyPpo(**form, rollout={"temperature": 0.7})
    rollout = ppo.collect()
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, **TOLERANCE)
    metrics = rollout_metrics(rollout, ppo.section.kl, ppo.runtime.all_sum)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-9)
    # Every weight that is not trained: base, start's adapter, reward's adapter and head.
    trained = {id(p) for p in ppo.actor_critic.parameters() if p.requires_grad}
    frozen = [
        (f"{number}.{name}", parameter)
        for number, handle in enumerate((ppo.models.reference, ppo.models.policy))
        for name, parameter in handle.trunk.named_parameters()
        if id(parameter) not in trained
    ]
    before, base = tensors_hash(frozen), ppo.start.trunk.base_hash()
    for iteration in (1, 2):
        ppo.updater.update(ppo.appraise(ppo.collect(iteration)), iteration)
    assert tensors_hash(frozen) == before
    assert ppo.start.trunk.base_hash() == base
    again = infer(ppo.models.reference, rollout.batch, ["logprobs"], 10_000, 0.7)["logprobs"]
    torch.testing.assert_close(again, rollout.ref_logprobs, **TOLERANCE)
    moved = infer(ppo.models.policy, rollout.batch, ["logprobs"], 10_000, 0.7)["logprobs"]
    assert (moved - again).abs().max() > 1e-3


def updated(ppo: TinyPpo, change=lambda experience: experience) -> tuple[torch.Tensor, list]:
    """Trained weights after one update from the (changed) experience of iteration 1."""
    steps = ppo.updater.update(change(ppo.appraise(ppo.collect())), 1)
    return ppo.weights(), steps


def permuted(experience: Experience) -> Experience:
    """The same experience with its rows in another order."""
    rollout = experience.rollout
    rows = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(5))
    order = rows.tolist()
    fields = vars(rollout).items()
    tensors = {name: x[rows] for name, x in fields if isinstance(x, torch.Tensor)}
    lists = {name: [x[row] for row in order] for name, x in fields if isinstance(x, list)}
    batch = rollout.batch
    mixed = TokenBatch(
        batch.prompt_ids[rows],
        batch.prompt_lengths[rows],
        batch.response_ids[rows],
        batch.response_lengths[rows],
    )
    return replace(
        experience,
        rollout=replace(rollout, batch=mixed, **tensors, **lists),
        advantages=experience.advantages[rows],
        returns=experience.returns[rows],
    )


OPTIM = {"minibatches": 2, "entropy_coef": 0.01, "dual_clip": 3.0}


@forms
def test_update_does_not_depend_on_the_micro_batch_size(form: dict) -> None:
    whole, steps = updated(TinyPpo(**form, optim=OPTIM))
    # 1 token: every row alone, accumulated; 40 tokens: two or three rows at a time.
    for budget in (1, 40):
        parts, part_steps = updated(
            TinyPpo(
                **form,
                optim=OPTIM | {"micro_batch_tokens": budget},
                rollout={"micro_batch_tokens": budget},
            )
        )
        torch.testing.assert_close(parts, whole, **TOLERANCE)
        for one, other in zip(part_steps, steps, strict=True):
            assert one.tokens == other.tokens
            assert one.sums == pytest.approx(other.sums, abs=1e-9)
            assert one.grad_norms == pytest.approx(other.grad_norms, abs=1e-9)


@forms
def test_update_does_not_depend_on_row_order(form: dict) -> None:
    straight, _ = updated(TinyPpo(**form, optim=OPTIM))
    mixed, _ = updated(TinyPpo(**form, optim=OPTIM), permuted)
    torch.testing.assert_close(mixed, straight, **TOLERANCE)


@forms
def test_update_does_not_depend_on_the_padding_side(form: dict) -> None:
    right, _ = updated(TinyPpo(**form, optim=OPTIM))
    ppo = TinyPpo(**form, optim=OPTIM)
    for handle in (ppo.models.policy, ppo.models.reference, ppo.models.value):
        handle.trunk.joiner = DecoderJoiner(handle.trunk.model, padding_side="left")
    left, _ = updated(ppo)
    torch.testing.assert_close(left, right, **TOLERANCE)


@forms
def test_update_does_not_depend_on_packing(form: dict, monkeypatch) -> None:
    padded, _ = updated(TinyPpo(**form, optim=OPTIM))
    monkeypatch.setattr("pipeline.models.sequence_attention.WORTH_IT_FROM", 0)
    sizes = {"micro_batch_tokens": 40}
    ppo = TinyPpo(**form, optim=OPTIM | sizes, rollout=sizes)
    assert ppo.updater.packs
    packed, _ = updated(ppo)
    torch.testing.assert_close(packed, padded, **TOLERANCE)


@forms
def test_zero_advantage_leaves_the_policy_unchanged(form: dict) -> None:
    # The shared form trains one trunk for policy and value: only without a value loss may it stay.
    optim = {"value_coef": 0.0} if form["value"] == "shared" else {}
    ppo = TinyPpo(**form, optim=optim)
    before = ppo.policy_weights()
    experience = ppo.appraise(ppo.collect())
    nothing = replace(experience, advantages=torch.zeros_like(experience.advantages))
    ppo.updater.update(nothing, 1)
    assert torch.equal(ppo.policy_weights(), before)


@forms
def test_value_warm_up_leaves_the_policy_unchanged(form: dict) -> None:
    ppo = TinyPpo(**form, optim={"value_coef": 1.0})
    before, all_before = ppo.policy_weights(), ppo.weights()
    ppo.updater.update(ppo.appraise(ppo.collect()), 1, train_policy=False)
    assert torch.equal(ppo.policy_weights(), before)
    assert not torch.equal(ppo.weights(), all_before)


def test_value_model_starts_as_the_reward_model() -> None:
    """Adapter copied, shift and scale folded: the value's head scores as the reward model does."""
    for tuning in ("lora", "full"):
        ppo = TinyPpo(tuning=tuning)
        batch = ppo.collect().batch
        reward = ppo.rewards.handle(batch, ["scores"]).scores  # type: ignore[attr-defined]
        value = ppo.models.value(batch, ["scores"]).scores
        assert reward.std() > 1e-3
        torch.testing.assert_close(value, reward, **TOLERANCE)


@forms
def test_nan_is_named_and_nothing_is_stepped(form: dict) -> None:
    ppo = TinyPpo(**form)
    before = ppo.weights()
    experience = ppo.appraise(ppo.collect())
    experience.advantages[3, 0] = float("nan")
    index = experience.rollout.sample_indices[3]
    fault = rf"policy_loss is not finite in iteration 2, epoch 0.*\b{index}\b"
    with pytest.raises(TrainingError, match=fault):
        ppo.updater.update(experience, 2)
    assert torch.equal(ppo.weights(), before)


@forms
def test_target_kl_ends_the_iteration_before_the_step(form: dict) -> None:
    # Full fine-tuning moves every weight by the rate: the same KL takes less.
    optim = {"ppo_epochs": 5, "learning_rate": 1e-3 if form["tuning"] == "lora" else 1e-4}
    _, steps = updated(TinyPpo(**form, optim=optim))
    assert len(steps) == 5
    # A target between the approximate KL of the second and the third step's forward.
    first, second = steps[1].mean("approx_kl"), steps[2].mean("approx_kl")
    assert 0 < first < second
    optim |= {"target_kl": (first + second) / 2}
    _, stopped = updated(TinyPpo(**form, optim=optim))
    assert [bool(step.grad_norms) for step in stopped] == [True, True, False]


@forms
def test_demonstrations_pull_the_policy_towards_them(form: dict) -> None:
    """With ptx alone (no advantage) the NLL of the demonstrations falls; at 0 nothing happens."""
    start = TinyPpo().start.codec
    pairs = [(start.prompt_ids("the old"), start.response_ids(" cat went to the sea"))] * 4
    batch = TokenBatch.from_ragged(*zip(*pairs, strict=True), start.pad_id)
    likelihoods = []
    for coef in (0.0, 1.0):
        # Without a value loss, which moves a shared trunk too.
        optim = {"ptx_coef": coef, "value_coef": 0.0}
        ppo = TinyPpo(**form, optim=optim, demonstrations=pairs if coef else ())
        experience = ppo.appraise(ppo.collect())
        nothing = replace(experience, advantages=torch.zeros_like(experience.advantages))
        before = ppo.models.policy(batch, ["logprobs"]).logprobs.sum().item()
        ppo.updater.update(nothing, 1)
        likelihoods.append(ppo.models.policy(batch, ["logprobs"]).logprobs.sum().item() - before)
    assert likelihoods[0] == 0.0
    assert likelihoods[1] > 1.0


@forms
def test_rollout_does_not_depend_on_batches_or_padding(form: dict) -> None:
    """Each row measured alone gives the numbers of the whole batch; padding is zero."""
    ppo = TinyPpo(**form, rollout={"temperature": 0.7})
    rollout: Rollout = ppo.collect()
    assert len(set(rollout.batch.lengths)) > 1
    for row, length in enumerate(rollout.batch.response_lengths.tolist()):
        alone = infer(ppo.models.policy, rollout.batch.take([row]), ["logprobs"], 1, 0.7)
        torch.testing.assert_close(
            alone["logprobs"][0], rollout.logprobs[row, :length], **TOLERANCE
        )
        for numbers in (rollout.logprobs, rollout.ref_logprobs, rollout.values):
            assert torch.all(numbers[row, length:] == 0)


def test_prompt_order_covers_epochs_and_shards() -> None:
    section = RolloutSection(prompts_per_iteration=8, responses_per_prompt=2)
    order = PromptOrder(PROMPTS, seed=1)
    drawn = [order.draw(i, section) for i in range(3)]  # 24 prompts: two epochs of 12
    origins = [prompt.origin for prompts, _ in drawn for prompt in prompts[::2]]
    everyone = sorted(prompt.origin for prompt in PROMPTS)
    assert sorted(origins[:12]) == everyone and sorted(origins[12:]) == everyone
    assert origins[:12] != origins[12:]
    indices = [index for _, indices in drawn for index in indices]
    assert indices == list(range(48))
    assert all(a is b for prompts, _ in drawn for a, b in pairwise(prompts[:2]))
    shards = [PromptOrder(PROMPTS, seed=1).draw(1, section, rank, 2) for rank in (0, 1)]
    together = {i: p.origin for prompts, ids in shards for p, i in zip(prompts, ids, strict=True)}
    assert together == {i: p.origin for p, i in zip(*drawn[1], strict=True)}


def test_sample_files_hold_every_rollout_with_its_numbers(tmp_path) -> None:
    ppo = TinyPpo()
    files = SampleFiles(tmp_path, ppo.start.codec, rows_per_file=6, prefix="rank0")
    kept: list[Experience] = []
    for iteration in (1, 2, 3):
        kept.append(ppo.appraise(ppo.collect(iteration)))
        files.write(kept[-1], iteration)
        ppo.updater.update(kept[-1], iteration)
    names = sorted(path.name for path in tmp_path.iterdir())
    # 3 x 8 = 24 rows = 4 files of 6.
    assert names == [f"rank0-{number:05d}.parquet" for number in range(4)]
    rows = [row for name in names for row in pq.read_table(tmp_path / name).to_pylist()]
    assert [row["sample_index"] for row in rows] == list(range(24))
    assert [row["iteration"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
    row, experience = rows[11], kept[1]
    length = len(row["response_ids"])
    assert length == int(experience.rollout.batch.response_lengths[3])
    for name in ("advantages", "returns"):
        np.testing.assert_allclose(
            row[name], getattr(experience, name)[3, :length], rtol=1e-6, atol=1e-6
        )
    assert row["kl"] == pytest.approx(sum(row["logprobs"]) - sum(row["ref_logprobs"]), abs=1e-5)
    assert row["response"] == ppo.start.codec.text(row["response_ids"])
