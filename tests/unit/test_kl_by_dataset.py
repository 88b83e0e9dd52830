"""KL and score by dataset: measured, weighed and steered apart."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.batches import TokenBatch
from pipeline.errors import DataError
from pipeline.generation import NativeEngine
from pipeline.records import Prompt
from stages.ppo.config import PpoSection
from stages.ppo.experience import appraise
from stages.ppo.kl import KlControl, datasets
from stages.ppo.learning_config import KlSection
from tests.tiny_ppo import TinyPpo


def control(**kl) -> KlControl:
    section = PpoSection(kl_coef=0.1, kl={"column": "set", **kl})
    return KlControl(section, ["a", "b", "c"])


def rollout(names: str, k1: list[list[float]], scores: list[float]):
    """Responses whose log-ratios are `k1`, zeros behind their ends."""
    logprobs = torch.tensor(k1, dtype=torch.float64)
    return SimpleNamespace(
        prompts=[Prompt("p", {"set": name}) for name in names],
        logprobs=logprobs,
        ref_logprobs=torch.zeros_like(logprobs),
        scores=torch.tensor(scores, dtype=torch.float64),
    )


def test_means_of_each_dataset_by_hand_over_all_processes() -> None:
    kl = control(coefs={"b": 0.4})
    one = rollout("ab", [[1.0, 2.0], [4.0, 0.0]], [5.0, -1.0])
    other = rollout("bb", [[1.0, 1.0], [0.0, 0.0]], [2.0, 2.0])
    parts: list[torch.Tensor] = []
    kl.measured(other, lambda x: parts.append(x) or x)
    found = kl.measured(one, lambda x: x + parts[0])
    assert found == {
        "score/a": 5.0, "kl/a": 3.0, "responses/a": 1.0,
        # (-1 + 2 + 2) / 3 and (4 + 2 + 0) / 3; nobody asked c
        "score/b": 1.0, "kl/b": 2.0, "responses/b": 3.0,
    }  # fmt: skip
    metrics = kl.metrics(found)
    assert metrics["kl_coef/a"] == 0.1 and metrics["kl_coef/b"] == 0.4
    assert metrics["kl_coef"] == pytest.approx((0.1 + 3 * 0.4) / 4)
    assert kl.coefs(one.prompts).tolist() == [0.1, 0.4]


def test_each_dataset_is_steered_to_its_own_target() -> None:
    kl = control(controller="adaptive", target=2.0, horizon=100, targets={"b": 10.0})
    kl.update({"kl/a": 2.2, "responses/a": 10, "kl/b": 5.0, "responses/b": 20}, 30)
    # a: 0.1 (1 + 0.1 x 10 / 100); b: the error -0.5 counts as -0.2: 0.1 (1 - 0.2 x 20 / 100).
    state = kl.state()
    assert state == pytest.approx({"a": 0.101, "b": 0.096, "c": 0.1})
    again = control(controller="adaptive")
    again.restore(state)
    assert again.state() == state


def test_without_a_column_there_is_one_coefficient() -> None:
    kl = KlControl(PpoSection(kl_coef=0.3, kl={"controller": "adaptive", "target": 1.0}), [])
    assert kl.coefs([Prompt("p")]) == 0.3
    assert kl.measured(rollout("a", [[1.0]], [1.0]), lambda x: x) == {}
    kl.update({"kl": 2.0}, 1000)
    assert kl.metrics({}) == {"kl_coef": pytest.approx(0.3 * 1.02)}


def test_values_are_sorted_few_and_those_of_the_config() -> None:
    prompts = [Prompt("p", {"set": name}, f"f:{name}") for name in ("b", "a", 7, "a")]
    assert datasets(prompts, KlSection()) == []
    assert datasets(prompts, KlSection(column="set")) == ["7", "a", "b"]
    with pytest.raises(DataError, match=r"^f:x: `set` \(ppo.kl.column\) is missing"):
        datasets([*prompts, Prompt("p", {}, "f:x")], KlSection(column="set"))
    with pytest.raises(DataError, match=r"^f:x: `set` \(ppo.kl.column\) is None"):
        datasets([*prompts, Prompt("p", {"set": None}, "f:x")], KlSection(column="set"))
    unknown = KlSection(column="set", coefs={"math": 0.1})
    many = [Prompt("p", {"set": f"maths{i}"}) for i in range(3)]
    with pytest.raises(DataError, match=r"names 'math', but .* are maths0, .*Did you mean 'maths"):
        datasets(many, unknown)
    with pytest.raises(DataError, match="has 65 values, more than 64"):
        datasets([Prompt("p", {"set": i}) for i in range(65)], KlSection(column="set"))


class Indifferent:
    """Reward: 0 for any response."""

    name = "indifferent"

    def score(self, completions):
        """See `RewardSource`."""
        return [0.0 for _ in completions.texts]


def exact_kl(ppo: TinyPpo, prompt: str) -> float:
    """KL(policy || reference) of the first token, in nats, over the whole vocabulary."""
    size = ppo.models.policy.trunk.model.config.vocab_size
    prompts = [ppo.start.codec.prompt_ids(prompt)] * size
    batch = TokenBatch.from_ragged(prompts, [[token] for token in range(size)], 0)
    with torch.no_grad():
        ours = ppo.models.policy(batch, ["logprobs"]).logprobs[:, 0]
        theirs = ppo.models.reference(batch, ["logprobs"]).logprobs[:, 0]
    assert ours.exp().sum().item() == pytest.approx(1.0)
    return float((ours.exp() * (ours - theirs)).sum())


@pytest.mark.parametrize("held", [0, 1])
def test_a_penalty_on_one_dataset_brings_back_its_prompts_alone(held: int) -> None:
    """A policy that has left the reference, and no reward: the penalty alone teaches."""
    coefs = {"a": 1.0 - held, "b": float(held)}
    ppo = TinyPpo(
        tuning="full",
        reward_model=False,
        iterations=40,
        rollout={"prompts_per_iteration": 64, "max_new_tokens": 1, "missing_eos": "keep"},
        optim={
            "learning_rate": 2e-3,
            "value_learning_rate": 1e-2,
            "ppo_epochs": 4,
            "micro_batch_tokens": 4096,
        },
        kl={"column": "set", "coefs": coefs},
    )
    ppo.rewards = Indifferent()
    ppo.order.prompts = [Prompt("the old cat", {"set": "a"}), Prompt("0123", {"set": "b"})]
    generator = torch.Generator().manual_seed(1)
    for weight in ppo.actor_critic.policy_parameters():
        if weight.dim() > 1:
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.data += 0.15 * noise
    control = KlControl(ppo.section, ["a", "b"])
    before = [exact_kl(ppo, prompt.prompt) for prompt in ppo.order.prompts]
    for iteration in range(1, 5):
        rollout = ppo.collect(iteration, NativeEngine(64))
        coefs_b = control.coefs(rollout.prompts)
        experience = appraise(rollout, coefs_b, ppo.section.advantage, lambda x: x)
        ppo.updater.update(experience, iteration)
    after = [exact_kl(ppo, prompt.prompt) for prompt in ppo.order.prompts]
    assert after[held] < 0.9 * before[held]
    assert after[1 - held] > 0.98 * before[1 - held]
