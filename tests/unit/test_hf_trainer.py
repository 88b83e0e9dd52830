"""The fence round Trainer, on a model small enough to be trained by hand: y = w . x + b.

Row i has `units[i]` observations, so that rows weigh unequally in the sums.
"""

import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import RunSection
from pipeline.errors import TrainingError
from pipeline.fence import fenced
from pipeline.fit_config import FitSection, OptimSection
from pipeline.hf_trainer import FitSummary, PlannedTrainer
from pipeline.row_order import plan_steps

RUN = RunSection(device="cpu", seed=3)
UNITS = [1, 5, 2, 4, 3, 1, 2, 6, 2, 3, 5, 1]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    gc.freeze()  # accelerate collects garbage twice a training; not through all of torch
    yield
    gc.unfreeze()


OPTIM = OptimSection(learning_rate=0.05, schedule="constant", max_grad_norm=1e9)


class Settings(FitSection):
    optim: OptimSection = OPTIM
    epochs: float = 2
    batch_size: int = 5
    micro_batch_tokens: int = 10**9
    eval_every: float = 1
    keep: Literal["best", "last"] = "last"
    log_every: int = 1


@dataclass(frozen=True)
class Points:
    x: Tensor  # (N, 3)
    y: Tensor  # (N,)

    def to(self, device: torch.device | str) -> "Points":
        return Points(self.x.to(device), self.y.to(device))


class PointRows:
    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.units = UNITS
        self.lengths = [10 * units for units in UNITS]
        self.x = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in UNITS]
        self.y = [x.sum(1) + 0.3 for x in self.x]

    def collate(self, rows: Sequence[int]) -> Points:
        return Points(torch.cat([self.x[r] for r in rows]), torch.cat([self.y[r] for r in rows]))

    def describe(self, row: int) -> dict[str, int]:
        return {"row": row}


class SquaredError(PlannedTrainer):
    def loss_sum(self, model: nn.Module, batch: Points) -> Tensor:
        return ((model(batch.x).squeeze(-1) - batch.y) ** 2).sum()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1, dtype=torch.float64)


def fit(
    module: nn.Module,
    folder: Path,
    settings: Settings,
    held_out: PointRows | None = None,
    trainer: Callable[..., PlannedTrainer] = SquaredError,
) -> tuple[FitSummary, list[tuple[int, dict[str, float]]]]:
    written: list[tuple[int, dict[str, float]]] = []
    made = trainer(
        module=module,
        section=settings,
        run=RUN,
        folder=folder,
        train=PointRows(),
        held_out=held_out,
        log=lambda step, metrics: written.append((step, metrics)),
    )
    return made.fit(), written


def by_hand(settings: Settings, schedule: Callable[[int], float] = lambda step: 1.0) -> nn.Linear:
    """The same training as a plain torch loop: the mean over all observations of each step."""
    module, rows = linear(), PointRows()
    optim = settings.optim
    adam = torch.optim.AdamW(
        module.parameters(),
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_eps,
        weight_decay=0.0,
    )
    plan = plan_steps(rows.lengths, settings.batch_size, settings.epochs, RUN.seed)
    for number, step in enumerate(plan.steps):
        adam.param_groups[0]["lr"] = optim.learning_rate * schedule(number)
        batch = rows.collate(step)
        adam.zero_grad()
        ((module(batch.x).squeeze(-1) - batch.y) ** 2).mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), optim.max_grad_norm)
        adam.step()
    return module


def assert_same_weights(one: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("budget", [10**9, 100, 60, 1])
def test_unequal_micro_batches_train_like_one_batch(budget: int, tmp_path: Path) -> None:
    settings = Settings(micro_batch_tokens=budget)
    module = linear()
    fit(module, tmp_path, settings)
    expected = by_hand(settings)
    assert_same_weights(module, expected)
    assert not torch.allclose(module.weight, linear().weight)


def test_linear_schedule_with_warm_up_and_clipping(tmp_path: Path) -> None:
    # 12 rows, 5 a step, 2 passes: 6 steps, a third of them (2) warm up: 0, 1/2, 1, 3/4, 1/2, 1/4.
    optim = OptimSection(
        learning_rate=0.05, schedule="linear", warmup_fraction=1 / 3, max_grad_norm=0.1
    )
    settings = Settings(optim=optim)
    module = linear()
    _, written = fit(module, tmp_path, settings)
    factors = [0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]
    assert_same_weights(module, by_hand(settings, lambda step: factors[step]))
    assert [row["learning_rate"] for _, row in written] == pytest.approx(
        [0.05 * factor for factor in factors]
    )


def test_metrics_are_sums_over_steps(tmp_path: Path) -> None:
    # With a learning rate near 0 the weights stand still: each row of metrics is the mean squared
    # error over the observations of the steps since the row before.
    optim = OptimSection(learning_rate=1e-300, schedule="constant")
    module, rows = linear(), PointRows()
    settings = Settings(optim=optim, log_every=2, micro_batch_tokens=60)
    summary, written = fit(module, tmp_path, settings)
    plan = plan_steps(rows.lengths, 5, 2, RUN.seed)
    windows = {1: plan.steps[:1], 2: plan.steps[1:2], 4: plan.steps[2:4], 6: plan.steps[4:6]}
    assert [step for step, _ in written] == list(windows)
    for step, metrics in written:
        batch = rows.collate([row for chosen in windows[step] for row in chosen])
        expected = ((module(batch.x).squeeze(-1) - batch.y) ** 2).mean().item()
        assert metrics["loss"] == pytest.approx(expected, abs=1e-12)
    assert (summary.steps, summary.kept_step, summary.rows) == (6, 6, 24)


def test_evaluation_weighs_units_not_rows(tmp_path: Path) -> None:
    module, held_out = linear(), PointRows(seed=7)
    settings = Settings(micro_batch_tokens=60, eval_every=0.5)
    summary, written = fit(module, tmp_path, settings, held_out)
    everything = held_out.collate(range(len(UNITS)))
    expected = ((module(everything.x).squeeze(-1) - everything.y) ** 2).mean().item()
    assert summary.held_out["loss"] == pytest.approx(expected, abs=1e-12)
    assert [step for step, row in written if "eval_loss" in row] == [3, 6]


class Scripted(SquaredError):
    """Held-out losses by script: step n has loss SCRIPT[n]."""

    script: Mapping[int, float]

    def eval_metrics(self, sums: dict[str, float], units: int) -> dict[str, float]:
        return {"loss": self.script[self.state.global_step]}


def test_best_weights_are_restored(tmp_path: Path) -> None:
    class Trainer(Scripted):
        script: ClassVar = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 4.0, 6: 5.0}

    module = linear()
    summary, _ = fit(module, tmp_path, Settings(keep="best"), PointRows(7), Trainer)
    assert (summary.steps, summary.kept_step, summary.held_out) == (6, 2, {"loss": 1.0})
    two_steps = linear()
    fit(two_steps, tmp_path, Settings(max_steps=2), None)
    # Both trainings see the same first steps but for the heaviest, which the plan puts first.
    first = plan_steps(PointRows().lengths, 5, 2, RUN.seed).steps
    assert first[:2] == plan_steps(PointRows().lengths, 5, 2, RUN.seed, max_steps=2).steps
    assert_same_weights(module, two_steps)


@pytest.mark.parametrize(("keep", "kept_step"), [("best", 1), ("last", 3)])
def test_patience_stops(keep: str, kept_step: int, tmp_path: Path) -> None:
    class Trainer(Scripted):
        script: ClassVar = {1: 1.0, 2: 2.0, 3: 3.0, 4: 0.5}

    summary, _ = fit(linear(), tmp_path, Settings(keep=keep, patience=2), PointRows(7), Trainer)
    assert (summary.steps, summary.kept_step) == (3, kept_step)
    assert summary.held_out == {"loss": Trainer.script[kept_step]}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_loss_stops_before_the_step(value: float, tmp_path: Path) -> None:
    class Trainer(SquaredError):
        def loss_sum(self, model: nn.Module, batch: Points) -> Tensor:
            bad = self.state.global_step == 2
            return super().loss_sum(model, batch) * (value if bad else 1.0)

    module = linear()
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step 3 of 6.*learning_rate"):
        fit(module, tmp_path, Settings(), trainer=Trainer)
    two_steps = linear()
    fit(two_steps, tmp_path, Settings(max_steps=2))
    assert_same_weights(module, two_steps)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_bad_gradient_stops_before_the_step(tmp_path: Path) -> None:
    class Trainer(SquaredError):
        def loss_sum(self, model: nn.Module, batch: Points) -> Tensor:
            root = model.weight[0, 0] - model.weight[0, 0].detach()
            return super().loss_sum(model, batch) + root.sqrt()  # value 0, derivative infinite

    module = linear()
    with pytest.raises(TrainingError, match="gradient norm is inf at step 1"):
        fit(module, tmp_path, Settings(), trainer=Trainer)
    assert_same_weights(module, linear(), 0.0)


def test_module_comes_back_unpatched(tmp_path: Path) -> None:
    module = linear()
    original = module.forward
    with pytest.raises(RuntimeError, match="boom"), fenced(module):
        # What SFTTrainer and accelerate do: bind a forward that closes over the original.
        module.forward = MethodType(lambda self, x: original(x), module)  # type: ignore[method-assign]
        raise RuntimeError("boom")
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.weight.zero_()
        copied.bias.fill_(7.0)
    assert copied(torch.ones(1, 3, dtype=torch.float64)).item() == 7.0
    fit(module, tmp_path, Settings())
    assert "forward" not in vars(module)


def test_own_forward_on_an_instance_is_kept() -> None:
    module = linear()

    def zero(x: Tensor) -> Tensor:
        return x * 0

    module.forward = zero  # type: ignore[method-assign]
    with fenced(module):
        pass
    assert vars(module)["forward"] is zero


def test_only_what_requires_gradients_is_trained(tmp_path: Path) -> None:
    module = linear()
    module.weight.requires_grad_(False)
    before = module.weight.clone()
    fit(module, tmp_path, Settings(keep="best"), PointRows(7))
    assert torch.equal(module.weight, before) and module.bias.item() != linear().bias.item()


def test_nothing_is_written(tmp_path: Path) -> None:
    fit(linear(), tmp_path, Settings(), PointRows(7))
    assert list(tmp_path.iterdir()) == []
