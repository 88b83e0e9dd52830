"""Out of memory halves the micro-batch and repeats the step: the same step, or a clear end."""

import subprocess
import sys

import pytest
import torch

from pipeline.errors import TrainingError
from pipeline.generation import LocalEngine, NativeEngine, Sampling
from pipeline.inference import infer
from pipeline.models.trunk import Trunk
from pipeline.out_of_memory import halving, is_out_of_memory
from tests.tiny_ppo import TinyPpo

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError(CPU_MESSAGE))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError) as real:  # 8 PiB: refused by any machine
        torch.empty(1 << 50, dtype=torch.float64)
    assert is_out_of_memory(real.value)


LIMITED = """
import resource, torch
from pipeline.out_of_memory import halving
torch.ones(1).sum()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(*halving(lambda mib: float(torch.ones(mib, 2**18).sum()), 1024, 1, "-", undo=lambda: None))
"""


def test_halving_ends_where_memory_is_enough():
    """Memory itself: 400 MiB more than the process has, so that 1024 and 512 MiB do not fit."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.stdout.split() == [str(float(256 * 2**18)), "256"], done.stderr


def test_halving_tries_smaller_parts_and_undoes_failed_ones():
    tried, undone = [], []

    def work(size: int) -> str:
        tried.append(size)
        if size > 13:
            raise torch.OutOfMemoryError("full")
        return "done"

    found = halving(work, 100, 5, "buy memory", undo=lambda: undone.append(1))
    assert found == ("done", 12)
    assert tried == [100, 50, 25, 12] and len(undone) == 3
    with pytest.raises(TrainingError, match=r"out of memory \(full\): buy memory"):
        halving(work, 100, 20, "buy memory", undo=lambda: None)
    with pytest.raises(ValueError):
        halving(lambda _: int("x"), 100, 5, "", undo=lambda: None)


@pytest.fixture
def limited(monkeypatch):
    """Passes of more tokens than `limit` run out of memory, the backward pass included."""

    def limit(tokens: int) -> list[int]:
        plain, seen = Trunk.forward, []

        def forward(self, batch, *args, **kwargs):
            ids = getattr(batch, "input_ids", None)
            size = ids.numel() if ids is not None else len(batch) * max(batch.lengths)
            seen.append(size)
            if size > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
            return plain(self, batch, *args, **kwargs)

        monkeypatch.setattr(Trunk, "forward", forward)
        return seen

    return limit


def test_an_update_that_runs_out_of_memory_takes_the_same_step(limited):
    optim = {"minibatches": 2, "ptx_coef": 0.3}
    demonstrations = [([5, 6, 7], [8, 9]), ([5, 6], [9, 10, 11])] * 3

    def updated(make_short: bool) -> tuple[torch.Tensor, list, TinyPpo]:
        ppo = TinyPpo(optim=optim, demonstrations=demonstrations)
        experience = ppo.appraise(ppo.collect())
        if make_short:
            seen = limited(45)
        steps = ppo.updater.update(experience, 1)
        if make_short:
            assert max(seen) > 45 and min(seen[-8:]) <= 45
        return ppo.weights(), steps, ppo

    whole, steps, _ = updated(make_short=False)
    parts, part_steps, ppo = updated(make_short=True)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
    assert [s.sums for s in part_steps] == [pytest.approx(s.sums, abs=1e-9) for s in steps]
    assert ppo.updater.micro_batch_tokens < 4096  # and stays small for the steps to come


def test_a_row_that_does_not_fit_ends_with_advice_and_no_step(limited):
    ppo = TinyPpo()
    experience = ppo.appraise(ppo.collect())
    before = ppo.weights()
    limited(5)
    with pytest.raises(TrainingError, match=r"iteration 1, epoch 0.*ppo.optim.micro_batch_tokens"):
        ppo.updater.update(experience, 1)
    assert torch.equal(ppo.weights(), before)
    assert all(p.grad is None for p in ppo.actor_critic.parameters())


def test_gradients_that_do_not_fit_end_with_advice_and_no_step(monkeypatch):
    ppo = TinyPpo()
    experience = ppo.appraise(ppo.collect())
    before = ppo.weights()

    def full(_parameter: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("pipeline.distributed.steps.torch.zeros_like", full)
    with pytest.raises(TrainingError, match=r"out of memory.*ppo.optim.micro_batch_tokens"):
        ppo.updater.update(experience, 1)
    assert torch.equal(ppo.weights(), before)
    assert all(p.grad is None for p in ppo.actor_critic.parameters())


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_all_steps_of_an_update_share_the_memory_of_gradients(value):
    ppo = TinyPpo(value=value, optim={"minibatches": 2, "ppo_epochs": 3})
    experience = ppo.appraise(ppo.collect())
    trained = [*ppo.actor_critic.policy_parameters(), *ppo.actor_critic.value_parameters()]
    seen: list[list[torch.Tensor]] = []  # kept, so that new ones could not lie in their place
    ppo.updater.steps.optimiser.optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad for p in trained])
    )
    ppo.updater.update(experience, 1)
    assert len(seen) == 6
    assert all(x is first for found in seen for x, first in zip(found, seen[0], strict=True))
    assert all(parameter.grad is None for parameter in trained)


def test_scoring_and_generation_get_smaller(limited):
    ppo = TinyPpo()
    policy = ppo.models.policy
    batch = ppo.collect().batch
    scored = infer(policy, batch, ["logprobs"], 10_000)["logprobs"]
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]] * 2
    sampling = Sampling(6, seed=3)
    text = NativeEngine(6).generate(policy, prompts, range(6), sampling)
    limited(max(batch.lengths) * 2)
    again = infer(policy, batch, ["logprobs"], 10_000)["logprobs"]
    torch.testing.assert_close(again, scored, rtol=0, atol=1e-9)
    limited(4)  # one prompt of four tokens at a time
    engine = LocalEngine(6)
    assert engine.generate(policy, prompts, range(6), sampling).response_ids == text.response_ids
    assert engine.rows_at_once == 1
