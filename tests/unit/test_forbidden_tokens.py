"""Forbidden tokens: never sampled, and no part of any distribution that PPO compares."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.errors import ConfigError
from pipeline.generation import NativeEngine, Sampling, StaticEngine
from pipeline.generation_config import GenerationSection
from pipeline.inference import infer
from pipeline.models.loading import train_tokenizer
from pipeline.models.trunk import Handle
from tests.tiny_ppo import TinyPpo
from tests.tiny_vllm import GREEDY, PROMPTS, engine_of, make_policy
from tests.vllm_stand_in import StandIn

PROMPT_IDS = [[5 + i % 40, 9, 11] for i in range(150)]
ROWS = range(150)


def without(handle: Handle, ids: list[int]) -> Handle:
    section = GenerationSection(forbidden_tokens=tuple(ids))
    return replace(handle, codec=handle.codec.sampling_by(section))


def frequent(handle: Handle, rows: list[list[int]], number: int = 5) -> list[int]:
    """The tokens that are sampled most often."""
    seen = torch.tensor([id_ for row in rows for id_ in row]).bincount(minlength=300)
    seen[list(handle.codec.stop_ids)] = 0
    assert int(seen.topk(number).values.min()) >= 10
    return seen.topk(number).indices.tolist()


@pytest.mark.parametrize("engine", [NativeEngine(), StaticEngine()], ids=lambda e: e.name)
def test_a_frequent_token_is_never_sampled_again(make_handle, engine) -> None:
    """Of 3,000 tokens; the other tokens are drawn from the distribution without it."""
    handle = make_handle()
    sampling = Sampling(max_new_tokens=20, temperature=1.3, seed=1)
    free = engine.generate(handle, PROMPT_IDS, ROWS, sampling)
    banned = frequent(handle, free.response_ids)
    masked = without(handle, banned)
    made = engine.generate(masked, PROMPT_IDS, ROWS, sampling)
    assert sum(map(len, made.response_ids)) > 2000
    assert not {id_ for row in made.response_ids for id_ in row} & set(banned)
    # A row that never drew one of them is the same: Gumbel-max over fewer tokens.
    pairs = list(zip(free.response_ids, made.response_ids, strict=True))
    untouched = [a == b for a, b in pairs if not set(a) & set(banned)]
    assert all(untouched)
    greedy = engine.generate(masked, PROMPT_IDS, ROWS, Sampling(max_new_tokens=8, temperature=0))
    assert not {id_ for row in greedy.response_ids for id_ in row} & set(banned)


@pytest.mark.parametrize("chunked", [False, True])
def test_logprobs_and_entropy_are_those_of_the_remaining_tokens(
    make_handle, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against softmax over the remaining logits of transformers' own forward, a token at a time."""
    handle, banned, temperature = make_handle(), [7, 30, 31, 200], 0.7
    if chunked:
        monkeypatch.setattr("pipeline.models.trunk.LOGITS_AT_A_TIME", 2 * 300)
    made = NativeEngine().generate(
        without(handle, banned), PROMPT_IDS[:4], range(4), Sampling(6, temperature)
    )
    batch = TokenBatch.from_ragged(PROMPT_IDS[:4], made.response_ids, 0)
    want = ["logprobs", "entropy"]
    found = infer(handle, batch, want, None, temperature, frozenset(banned))
    rest = [id_ for id_ in range(300) if id_ not in banned]
    for row, (prompt, response) in enumerate(zip(PROMPT_IDS[:4], made.response_ids, strict=True)):
        with torch.no_grad():
            logits = handle.trunk.model(torch.tensor([prompt + response])).logits[0]
        for t, token in enumerate(response):
            p = (logits[len(prompt) + t - 1, rest] / temperature).softmax(-1)
            entropy = float(-(p * p.log()).sum())
            own = float(p[rest.index(token)].log())
            assert float(found["logprobs"][row, t]) == pytest.approx(own, abs=1e-10)
            assert float(found["entropy"][row, t]) == pytest.approx(entropy, abs=1e-10)
            assert made.logprobs[row][t] == pytest.approx(own, abs=1e-10)
            assert made.entropy[row][t] == pytest.approx(entropy, abs=1e-10)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_ratios_are_1_and_gradients_finite(entropy_coef: float) -> None:
    """PPO's first epoch: policy and sampler are one distribution. The KL starts at 0."""
    optim = {"ppo_epochs": 2, "entropy_coef": entropy_coef}
    ppo = TinyPpo(optim=optim, rollout={"max_new_tokens": 12, "temperature": 0.8}, spread=4.0)
    free = ppo.collect()
    seen = free.batch.response_ids[free.mask].bincount(minlength=300)
    seen[list(ppo.start.codec.stop_ids)] = 0
    banned = seen.topk(8).indices.tolist()
    for handle in (ppo.models.policy, ppo.models.reference, ppo.models.value):
        handle.codec.forbidden_ids = frozenset(banned)
    ppo.updater.forbidden = frozenset(banned)
    rollout = ppo.collect()
    assert not set(rollout.batch.response_ids[rollout.mask].tolist()) & set(banned)
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, rtol=0, atol=1e-10)
    for name in ("logprobs", "ref_logprobs", "entropy", "values"):
        assert getattr(rollout, name).isfinite().all()
    first, second = ppo.updater.update(ppo.appraise(rollout), 1)
    assert first.mean("approx_kl") == pytest.approx(0, abs=1e-12)
    assert first.ratio_max == pytest.approx(1, abs=1e-9)
    assert second.mean("approx_kl") > 1e-6
    assert ppo.weights().isfinite().all()
    # Without the mask in the update the ratio would not be 1: the masked tokens had probability.
    ppo.updater.forbidden = frozenset()
    again = ppo.updater.update(ppo.appraise(ppo.collect()), 2)
    assert abs(again[0].mean("ratio_mean") - 1) > 1e-3


def test_vllm_gets_a_bias_and_its_numbers_are_compared(tmp_path: Path) -> None:
    policy = make_policy(tmp_path)
    free = NativeEngine().generate(policy, PROMPTS, range(5), GREEDY)
    banned = [id_ for id_ in free.response_ids[0] if id_ not in policy.codec.stop_ids][:3]
    policy = without(policy, sorted(set(banned)))
    expected = NativeEngine().generate(policy, PROMPTS, range(5), GREEDY)
    base = Path(policy.trunk.origin.path)
    with StandIn(base, logprobs_mode="processed_logprobs") as server:
        made = engine_of(server, tmp_path).generate(policy, PROMPTS, range(5), GREEDY)
    assert made.response_ids == expected.response_ids != free.response_ids
    for ours, theirs in zip(made.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


# --- which tokens they are ---


def test_texts_are_single_tokens_and_stop_tokens_are_refused() -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 4, 300)
    codec = Codec(tokenizer)

    def forbid(*tokens: int | str) -> frozenset[int]:
        return codec.sampling_by(GenerationSection(forbidden_tokens=tokens)).forbidden_ids

    (cat,) = tokenizer.encode(" cat", add_special_tokens=False)
    assert forbid(" cat", 7) == {cat, 7}
    assert codec.forbidden_ids == frozenset()  # the codec itself stays as it is
    with pytest.raises(ConfigError, match=r"'zebra', which is 5 tokens of .* \('z', 'e', 'b'"):
        forbid("zebra")
    with pytest.raises(ConfigError, match=r"has 5000, but .* has the ids 0 to \d+"):
        forbid(5000)
    with pytest.raises(ConfigError, match="is a stop token"):
        forbid(next(iter(codec.stop_ids)))
    with pytest.raises(ConfigError, match="is a stop token"):
        forbid(tokenizer.eos_token)
    with pytest.raises(ValidationError, match="names 7 twice"):
        GenerationSection(forbidden_tokens=(7, 7))


def test_a_policy_takes_its_forbidden_tokens_along(make_store, tmp_path: Path) -> None:
    store = make_store()
    handle = without(store.build(["the cat"] * 4).with_role("sft"), [9, 40])
    store.save(handle, tmp_path)
    store._live.clear()
    assert store.open(tmp_path).codec.forbidden_ids == {9, 40}
