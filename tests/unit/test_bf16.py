"""bfloat16 on a processor: passes in half precision, reductions and what is kept in float32."""

from collections.abc import Iterator
from math import isfinite
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from pipeline.batches import TokenBatch
from pipeline.generation import Generations, NativeEngine, Sampling
from pipeline.inference import infer
from pipeline.models.trunk import Handle
from stages.ppo.rollout import Rollout
from tests.tiny_ppo import TinyPpo, tiny_handle

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13], [14, 15, 16, 17], [18, 19, 20]]
FORMS = [
    {"tuning": "lora", "value": "separate"},
    {"tuning": "lora", "value": "shared"},
    {"tuning": "full", "value": "separate"},
    {"tuning": "full", "value": "shared"},
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))


@pytest.fixture(autouse=True)
def _precision_of_its_own() -> Iterator[None]:
    """accelerate holds a process to one precision; these tests are a process of their own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def half(form: dict[str, Any], **changes: Any) -> TinyPpo:
    """A float32 base under autocast in bfloat16, with ragged responses and a value that speaks."""
    rollout = {"temperature": 0.7, "max_new_tokens": 10} | changes.pop("rollout", {})
    given = {"dtype": torch.float32, "precision": "bf16", "spread": 4.0} | changes
    ppo = TinyPpo(**form, rollout=rollout, stop_ids=frozenset(range(0, 300, 12)), **given)
    head = ppo.models.value.trunk.heads[ppo.models.value.role.head]
    if not head.weight.any():
        head.init_normal(torch.Generator().manual_seed(3))
    return ppo


class Watched(NativeEngine):
    """Keeps what it told; its log-probs are off by more than a tiny model's rounding."""

    def generate(self, *args: Any) -> Generations:
        """See `Engine`."""
        made = self.told = super().generate(*args)
        random = torch.Generator().manual_seed(1)
        assert made.logprobs is not None
        for row in made.logprobs:
            row[:] = (torch.tensor(row) + 0.1 * torch.randn(len(row), generator=random)).tolist()
        return made


# --- which numbers are exact enough ---


def test_only_wide_passes_are_exact() -> None:
    def is_exact(handle: Handle) -> bool:
        made = NativeEngine().generate(handle, PROMPTS, range(5), Sampling(3))
        assert made.logprobs is not None and all(map(len, made.logprobs))
        return made.exact

    for dtype, exact in ((torch.float64, True), (torch.float32, True), (torch.bfloat16, False)):
        handle = tiny_handle(dtype)
        assert is_exact(handle) is exact, dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not is_exact(handle), dtype


def check_recomputed(ppo: TinyPpo, rollout: Rollout, told: Generations, cap: float) -> None:
    """The rollout has a training pass's numbers, and weights from the engine's by hand."""
    shared = ppo.section.value == "shared"
    asked = ppo.models.value if shared else ppo.models.policy
    want = ["logprobs", "entropy", "values"] if shared else ["logprobs", "entropy"]
    with ppo.runtime.autocast():
        again = infer(asked, rollout.batch, want, None, 0.7)
    for name in want:
        assert torch.equal(getattr(rollout, name), again[name]), name
        assert again[name].dtype == torch.float32
    assert not told.exact and told.logprobs is not None and rollout.importance is not None
    weights = []
    for row, theirs in enumerate(told.logprobs):
        ours = rollout.logprobs[row, : len(theirs)].double()
        expected = (ours - torch.tensor(theirs, dtype=torch.float64)).exp().clamp(max=cap)
        found = rollout.importance[row, : len(theirs)].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        weights.append(found)
    every = torch.cat(weights)
    assert 0.6 < every.min() < 0.95 and every.max() == pytest.approx(cap, abs=1e-6)
    assert not rollout.importance[~rollout.mask].any()


@forms
def test_rollouts_under_autocast_are_recomputed_and_weighed(form: dict[str, Any]) -> None:
    cap = 1.1
    ppo, engine = half(form, rollout={"importance_cap": cap}), Watched(3)
    rollout = ppo.collect(engine=engine)
    check_recomputed(ppo, rollout, engine.told, cap)


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_rollouts_of_a_bf16_base_are_recomputed_and_weighed(value: str) -> None:
    cap, form = 1.1, {"tuning": "lora", "value": value}
    changes = {"dtype": torch.bfloat16, "precision": "no", "rollout": {"importance_cap": cap}}
    ppo, engine = half(form, **changes), Watched(3)
    rollout = ppo.collect(engine=engine)
    check_recomputed(ppo, rollout, engine.told, cap)


# --- reductions in float32 ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [10**6, 4])
def test_reductions_are_made_in_float32(temperature: float, rows: int, monkeypatch) -> None:
    """Against float64 on the very logits of the pass, which are bfloat16."""
    handle = tiny_handle(torch.float32)
    model = handle.trunk.model
    model.get_output_embeddings().weight.data.mul_(40)  # logits of a trained model's spread
    handle.trunk.add_head("value").init_normal(torch.Generator().manual_seed(3))
    handle = handle.with_role("value", head="value")
    limit = rows * handle.trunk.vocabulary_size
    monkeypatch.setattr("pipeline.models.trunk.LOGITS_AT_A_TIME", limit)
    logits, states = [], []
    layer = model.get_output_embeddings()
    layer.register_forward_hook(lambda _module, _args, out: logits.append(out[0]))
    head = handle.trunk.heads["value"]
    head.register_forward_pre_hook(lambda _module, args: states.append(args[0]))
    responses = [[7, 8, 9], [10], [11, 12, 13, 14], [15], [16, 17]]
    batch = TokenBatch.from_ragged(PROMPTS, responses, pad_id=0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = handle(batch, {"logprobs", "entropy", "values", "scores"}, temperature)
    assert all(x.dtype == torch.bfloat16 for x in logits)
    assert len(logits) == (1 if rows > 11 else 3)  # 3 + 1 + 4 + 1 + 2 = 11 tokens
    exact = (torch.cat(logits).double() / temperature).log_softmax(-1)
    assert exact.max() - exact.min() > 10
    mask, ids = batch.response_mask, [token for response in responses for token in response]
    found = {name: getattr(out, name) for name in ("logprobs", "entropy", "values", "scores")}
    assert {x.dtype for x in found.values()} == {torch.float32}
    wanted = exact[range(11), ids]
    torch.testing.assert_close(out.logprobs[mask].double(), wanted, rtol=0, atol=2e-5)
    wanted = -(exact.exp() * exact).sum(-1)
    torch.testing.assert_close(out.entropy[mask].double(), wanted, rtol=0, atol=2e-5)
    # Heads read the states as they are, in float32.
    for states_nd, found_n in zip(states, (out.scores, out.values[mask]), strict=True):
        wanted = states_nd.double() @ head.weight.double() + head.bias
        torch.testing.assert_close(found_n.double(), wanted, rtol=0, atol=1e-5)
    # And at the right places: against the states of a pass that makes them all.
    handle.trunk.last_layer = (None,)
    states.clear()
    model.get_decoder().register_forward_hook(
        lambda _module, _args, out: states.append(out.last_hidden_state)
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = handle(batch, {"scores"})
    last = [len(p) + len(r) - 1 for p, r in zip(PROMPTS, responses, strict=True)]
    wanted = states[0][range(5), last].double() @ head.weight.double() + head.bias
    torch.testing.assert_close(out.scores.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_engines_numbers_are_reduced_in_float32_too(temperature: float) -> None:
    handle = tiny_handle(torch.float32)
    handle.trunk.model.get_output_embeddings().weight.data.mul_(40)
    logits = []
    layer = handle.trunk.model.get_output_embeddings()
    layer.register_forward_hook(lambda _module, _args, out: logits.append(out[0, -1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = NativeEngine().generate(handle, PROMPTS[:1], [0], Sampling(6, temperature))
    exact = (torch.stack(logits).double() / temperature).log_softmax(-1)
    assert logits[0].dtype == torch.bfloat16
    assert made.logprobs is not None and made.entropy is not None
    tokens = made.response_ids[0]
    wanted = exact[range(len(tokens)), tokens].tolist()
    assert made.logprobs[0] == pytest.approx(wanted, abs=2e-5)
    assert made.entropy[0] == pytest.approx((-(exact.exp() * exact).sum(-1)).tolist(), abs=2e-5)


# --- whole iterations ---


@forms
def test_iterations_under_autocast(form: dict[str, Any]) -> None:
    """Finite float32 numbers throughout, ratios that start at 1, and float32's gradient, nearly."""
    optim = {"minibatches": 2, "gradient_checkpointing": True, "learning_rate": 1e-3}
    ppo = half(form, optim=optim)
    before, experiences, steps = ppo.weights(), [], []
    for iteration in (1, 2):
        experiences.append(ppo.appraise(ppo.collect(iteration)))
        rollout = experiences[-1].rollout
        for name in ("logprobs", "ref_logprobs", "entropy", "values", "importance", "rewards"):
            tensor = getattr(rollout, name)
            assert tensor.dtype == torch.float32 and tensor.isfinite().all(), name
        steps.append(ppo.updater.update(experiences[-1], iteration))
        # Micro-batches have other widths than the rollout's passes, and round differently.
        assert steps[-1][0].mean("ratio_mean") == pytest.approx(1.0, abs=0.01)
        assert all(isfinite(norm) for step in steps[-1] for norm in step.grad_norms.values())
    after = ppo.weights()
    assert after.dtype == torch.float32 and after.isfinite().all()
    assert (after - before).abs().max() > 1e-3
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = half(form, precision="no", optim=optim)
    assert torch.equal(plain.weights(), before)
    wanted, found = plain.updater.update(experiences[0], 1)[0], steps[0][0]
    assert wanted.grad_norms.keys() == found.grad_norms.keys() == {"policy", "value"}
    # bfloat16 keeps 8 bits: passes are good to a few parts in a thousand.
    assert found.grad_norms == pytest.approx(wanted.grad_norms, rel=0.05)
    assert found.mean("value_loss") == pytest.approx(wanted.mean("value_loss"), rel=0.02)
