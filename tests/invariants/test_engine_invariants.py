"""Whatever samples, and however it is batched: the same rollout, the same update (float64, 1e-9).

Every token is a stop token once in 12 draws, so that responses are ragged and rows are refilled.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear

from pipeline.generation import (
    Engine,
    Generations,
    LocalEngine,
    NativeEngine,
    Sampling,
    StaticEngine,
)
from pipeline.inference import infer
from pipeline.models.heads import ScalarHead
from pipeline.models.joiner import PackedJoiner
from pipeline.models.lean_lora import LeanLoraLinear
from pipeline.models.trunk import Handle
from stages.ppo.rollout import Rollout
from tests.invariants.test_ppo_invariants import OPTIM, TOLERANCE, forms
from tests.tiny_ppo import TinyPpo

STOPS = frozenset(range(0, 300, 12))
ENGINES: dict[str, Callable[[], Engine]] = {
    "native-1": lambda: NativeEngine(1),
    "native-2": lambda: NativeEngine(2),
    "native-7": lambda: NativeEngine(7, prefill_tokens=20),
    "native-64": lambda: NativeEngine(64),
    "native-fixed": lambda: NativeEngine(3, fixed_shapes=True),
    "static-3": lambda: StaticEngine(3),
    "local-4": lambda: LocalEngine(4),
}
engines = pytest.mark.parametrize("engine", ENGINES)
NUMBERS = ("logprobs", "ref_logprobs", "entropy", "values", "scores", "rewards")


def ragged(form: dict[str, Any], **changes: Any) -> TinyPpo:
    """Everything of a run whose responses end early and whose value head is not zero."""
    rollout = {"temperature": 0.7, "max_new_tokens": 10} | changes.pop("rollout", {})
    optim = OPTIM | changes.pop("optim", {})
    ppo = TinyPpo(**form, rollout=rollout, optim=optim, stop_ids=STOPS, **changes)
    value = ppo.models.value
    head = value.trunk.heads[value.role.head]
    assert isinstance(head, ScalarHead)
    if not head.weight.any():
        head.init_normal(torch.Generator().manual_seed(3))
    return ppo


def assert_same(found: Rollout, wanted: Rollout, rows: Sequence[int] | None = None) -> None:
    """Row i of `found` is row `rows[i]` of `wanted`: tokens exactly, numbers to rounding."""
    order = list(range(len(wanted))) if rows is None else list(rows)
    assert found.texts == [wanted.texts[row] for row in order]
    assert torch.equal(found.batch.response_ids, wanted.batch.response_ids[order])
    assert torch.equal(found.batch.response_lengths, wanted.batch.response_lengths[order])
    assert torch.equal(found.ended, wanted.ended[order])
    for name in NUMBERS:
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name)[order], **TOLERANCE, msg=name
        )


@engines
@forms
def test_every_engine_gives_the_same_rollout_update_and_first_ratio(
    form: dict, engine: str
) -> None:
    plain, other = ragged(form), ragged(form)
    wanted, found = plain.collect(), other.collect(engine=ENGINES[engine]())
    lengths = wanted.batch.response_lengths
    assert 0 < wanted.ended.sum() < 8 and len(lengths.unique()) > 2
    assert wanted.values[wanted.mask].std() > 1e-2  # a head of zeros would agree with anything
    assert_same(found, wanted)
    assert found.importance is None  # exact, or computed again from tokens alone
    before = plain.weights()
    steps = [ppo.updater.update(ppo.appraise(x), 1) for ppo, x in ((plain, wanted), (other, found))]
    assert (plain.weights() - before).abs().max() > 1e-3
    torch.testing.assert_close(other.weights(), plain.weights(), **TOLERANCE)
    for one, two in zip(*steps, strict=True):
        assert one.sums == pytest.approx(two.sums, abs=1e-9)
    # The ratio starts at 1, and again with the moved policy.
    again = other.updater.update(other.appraise(other.collect(2, ENGINES[engine]())), 2)
    for first, *_, last in (steps[1], again):
        assert first.mean("ratio_mean") == pytest.approx(1.0, abs=1e-9)
        assert first.ratio_max == pytest.approx(1.0, abs=1e-9)
        assert last.mean("approx_kl") > 1e-6  # the policy did move


@engines
@forms
def test_rows_asked_in_another_order_are_the_same_rows(form: dict, engine: str) -> None:
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    ppo = ragged(form)
    assert_same(ppo.collect(engine=ENGINES[engine](), order=order), ppo.collect(), order)


@forms
def test_generations_numbers_are_a_whole_passes(form: dict) -> None:
    """After an update too: log-probs, entropies and shared values are of the new weights."""
    ppo = ragged(form)
    ppo.updater.update(ppo.appraise(ppo.collect(1)), 1)
    shared = form["value"] == "shared"
    asked = ppo.models.value if shared else ppo.models.policy
    want = ["logprobs", "entropy", "values"] if shared else ["logprobs", "entropy"]
    seen: list[Generations] = []

    class Watched(NativeEngine):
        def generate(self, *args: Any) -> Generations:
            seen.append(super().generate(*args))
            return seen[-1]

    rollout = ppo.collect(2, Watched(3))
    assert seen[0].exact and (seen[0].values is not None) == shared
    for row, length in enumerate(rollout.batch.response_lengths.tolist()):
        alone = infer(asked, rollout.batch.take([row]), want, None, 0.7)
        for name in want:
            told = torch.tensor(getattr(seen[0], name)[row], dtype=torch.float64)
            torch.testing.assert_close(told, alone[name][0], **TOLERANCE)
            torch.testing.assert_close(getattr(rollout, name)[row, :length], told, **TOLERANCE)


class Mismatched(NativeEngine):
    """An engine whose log-probs are of a slightly different policy, as another server's are."""

    def generate(
        self,
        handle: Handle,
        prompt_ids: Sequence[Sequence[int]],
        sample_indices: Sequence[int],
        sampling: Sampling,
    ) -> Generations:
        """See `Engine`."""
        made = super().generate(handle, prompt_ids, sample_indices, sampling)
        assert made.logprobs is not None
        random = torch.Generator().manual_seed(1)
        noisy = [
            (torch.tensor(row) + 0.2 * torch.randn(len(row), generator=random)).tolist()
            for row in made.logprobs
        ]
        return replace(made, logprobs=noisy, exact=False)


@forms
def test_a_mismatched_engine_is_recomputed_and_corrected(form: dict) -> None:
    """Ratios start at 1 all the same; each token weighs min(pi / mu, cap), shown by hand."""
    cap, plain = 1.1, ragged(form)
    wanted = plain.collect()
    ppo = ragged(form, rollout={"importance_cap": cap})
    engine = Mismatched(3)
    rollout = ppo.collect(engine=engine)
    assert_same(rollout, wanted)
    policy = ppo.models.policy
    prompts = [policy.codec.prompt_ids(prompt.prompt) for prompt in rollout.prompts]
    sampling = Sampling(10, 0.7, seed=7)
    told = engine.generate(policy, prompts, rollout.sample_indices, sampling).logprobs
    weights = rollout.importance
    assert weights is not None and told is not None
    for row, theirs in enumerate(told):
        ours = wanted.logprobs[row, : len(theirs)]
        expected = (ours - torch.tensor(theirs)).exp().clamp(max=cap)
        torch.testing.assert_close(weights[row, : len(theirs)], expected, **TOLERANCE)
        assert not weights[row, len(theirs) :].any()
    real = weights[rollout.mask]
    assert (real == cap).any() and real.min() < 0.9
    first = ppo.updater.update(ppo.appraise(rollout), 1)[0]
    assert first.mean("ratio_mean") == pytest.approx(1.0, abs=1e-9)
    plain.updater.update(plain.appraise(wanted), 1)
    assert (ppo.weights() - plain.weights()).abs().max() > 1e-4  # the weights do weigh
    uncorrected = ragged(form, rollout={"importance_cap": None})
    again = uncorrected.collect(engine=engine)
    assert again.importance is None
    uncorrected.updater.update(uncorrected.appraise(again), 1)
    torch.testing.assert_close(uncorrected.weights(), plain.weights(), **TOLERANCE)


def updated(ppo: TinyPpo) -> torch.Tensor:
    """Trained weights after two iterations."""
    for iteration in (1, 2):
        ppo.updater.update(ppo.appraise(ppo.collect(iteration)), iteration)
    return ppo.weights()


@pytest.mark.parametrize("micro_batch_tokens", [None, 40])
@forms
def test_recomputed_activations_give_the_same_update(form: dict, micro_batch_tokens) -> None:
    plain = updated(ragged(form))
    less = {"gradient_checkpointing": True, "micro_batch_tokens": micro_batch_tokens}
    torch.testing.assert_close(updated(ragged(form, optim=less)), plain, **TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
@forms
def test_logits_in_chunks_give_the_same_update(form: dict, checkpointing: bool, monkeypatch):
    plain = ragged(form)
    wanted = updated(plain)
    rows = 5 * plain.start.trunk.vocabulary_size
    monkeypatch.setattr("pipeline.models.trunk.LOGITS_AT_A_TIME", rows)
    chunked = ragged(form, optim={"gradient_checkpointing": checkpointing})
    torch.testing.assert_close(updated(chunked), wanted, **TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
@forms
def test_packed_batches_give_the_same_update(form: dict, checkpointing: bool) -> None:
    """One row without padding, in rollout and update, whatever the micro-batches."""
    wanted = updated(ragged(form))
    for tokens in (None, 40):
        optim = {"gradient_checkpointing": checkpointing, "micro_batch_tokens": tokens}
        ppo = ragged(form, optim=optim, rollout={"micro_batch_tokens": tokens})
        models = ppo.models
        trunks = {id(h.trunk): h.trunk for h in (models.policy, models.value, models.reference)}
        for trunk in trunks.values():
            trunk.joiner = PackedJoiner(trunk.model)
        torch.testing.assert_close(updated(ppo), wanted, **TOLERANCE)


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_lean_lora_gives_the_update_of_pefts(value: str) -> None:
    form = {"tuning": "lora", "value": value}
    lean, peft = ragged(form), ragged(form)
    layers = [m for m in peft.start.trunk.modules() if isinstance(m, LeanLoraLinear)]
    assert len(layers) == 2 * 7
    for layer in layers:
        layer.__class__ = Linear
    torch.testing.assert_close(updated(peft), updated(lean), **TOLERANCE)
