"""The fence round transformers' Trainer, shared by SFT and reward training.

Trainer gives the optimiser, the schedule, clipping, mixed precision and the distributed wrap. What
it does not do right for us is done here:

- Row order is a `Plan` made once from the global batch; one item of the loader is one optimiser
  step, cut into micro-batches within a token budget.
- The loss of a step is the sum over its rows divided by the step's *global* unit count (response
  tokens, or rankings), so that it depends on neither micro-batches nor processes. Trainer's own
  accumulation averages averages.
- A loss or gradient that is not finite stops the run before the optimiser steps.
- Metrics are sums over steps; the best weights are chosen and put back here (Trainer finds
  checkpoints of the adapter `default` only).
- Afterwards every `forward` that a library bound to an instance is removed (`fence.fenced`).

A trainer subclasses `PlannedTrainer`, says what its loss is (`loss_sum`) and calls `fit`.
"""

import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipeline.config import RunSection
from pipeline.distributed import Runtime
from pipeline.fence import BestWeights, fenced
from pipeline.fit_config import FitSection
from pipeline.interruption import Interruption
from pipeline.not_finite import NotFinite, leave
from pipeline.resume import (
    State,
    States,
    random_state,
    restore_random,
)
from pipeline.row_order import plan_steps
from pipeline.rows import Rows, Step, StepDataset, rows_at_fault, share_and_filler
from pipeline.trainer_arguments import training_arguments
from pipeline.trainer_callbacks import ShownProgress
from pipeline.trainer_steps import SteppedTrainer

# What a training carries from step to step besides tensors, in `PlannedTrainer`.
_NUMBERS = ("step_sums", "lowest_loss", "evaluations_since_best", "kept_metrics")
_REMEDY = (
    "Lower optim.learning_rate or optim.max_grad_norm, raise optim.warmup_fraction, or look at the "
    "rows of that step."
)


@dataclass(frozen=True)
class FitSummary:
    """What a training came to."""

    steps: int  # optimiser steps made
    kept_step: int  # step whose weights the module now holds
    rows: int  # rows trained on, passes counted
    train_loss: float  # mean a unit over the last pass (over all steps if there were fewer)
    held_out: dict[str, float]  # metrics of the kept weights; empty without held-out rows
    seconds: float  # wall time of training, evaluations included


class PlannedTrainer(SteppedTrainer, ABC):
    """Trainer over a `Plan`, exact in its sums; a subclass says what the loss is.

    Args:
        module: what is trained; its parameters that require gradients, fixed before this call.
        section: the stage's settings.
        run: the run's common settings (seed, precision, device).
        folder: an existing folder; only rows of numbers that are not finite are written there.
        train: rows to train on.
        held_out: rows to evaluate on; none means no evaluation, and the last weights are kept.
        log: receives (step, metrics), for instance `Tracker.log`.
        states: where to leave states to go on from, and to look for one; None does neither.
        console: shows the progress.
    """

    def __init__(
        self,
        module: nn.Module,
        section: FitSection,
        run: RunSection,
        folder: Path,
        train: Rows,
        held_out: Rows | None,
        log: Callable[[int, dict[str, float]], None],
        console: Console | None = None,
        title: str = "training",
        states: States | None = None,
    ) -> None:
        self.rows = train
        self.held_out = held_out
        assert section.micro_batch_tokens is not None  # see `FitSection.sized`
        self.token_budget = section.micro_batch_tokens
        self.plan = plan_steps(
            train.lengths, section.batch_size, section.epochs, run.seed, section.max_steps
        )
        super().__init__(
            module,
            training_arguments(section, run, len(self.plan), held_out is not None, folder),
            Runtime(run),
            eval_dataset=held_out,  # only whether there is one is read
            callbacks=[ShownProgress(console, title)],
        )
        self.write_metrics = log
        self.patience = section.patience
        self.best = BestWeights(module) if section.keep == "best" and held_out is not None else None
        self.lowest_loss = math.inf
        self.evaluations_since_best = 0
        self.kept_metrics: dict[str, float] = {}
        self.step_sums: list[tuple[float, int, int]] = []  # (loss, units, rows) of each step
        self._logged = (0, time.perf_counter())  # steps in the log, and when it was written
        self.states = states
        self._saved_step = 0
        self._step_rows: list[int] = []  # this process's rows of the step in hand
        self.title = title
        self.folder = folder
        shown = console if self.runtime.is_main else None
        self.interruption = Interruption(shown, self.runtime.any_of)
        self.state_every = section.steps_between("checkpoint_every", len(self.plan))
        self.resumed = None if states is None else states.newest(console or Console(quiet=True))

    # --- what a subclass says ---

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
        """Sum of the loss over a micro-batch's units, a scalar."""

    def eval_sums(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Sums over a micro-batch's units, each a scalar; `loss` is what the best is chosen by."""
        return {"loss": self.loss_sum(model, batch)}

    def eval_metrics(self, sums: dict[str, float], units: int) -> dict[str, float]:
        """Held-out metrics from the sums over all rows and processes; `loss` must be among them."""
        return {name: total / units for name, total in sums.items()}

    # --- one optimiser step ---

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item an optimiser step, in the plan's order: this process's share of it."""
        plan = self.plan if self.resumed is None else self.plan.after(self.resumed.step)
        steps = StepDataset(
            self.rows,
            plan,
            self.token_budget,
            self.runtime.rank,
            self.runtime.world_size,
            in_step=self.runtime.in_step,
        )
        return DataLoader(steps, batch_size=None, shuffle=False)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one optimiser step; returns its mean loss a unit.

        Raises:
            TrainingError: the loss is NaN or infinite, on whichever process.
        """
        model.train()
        if self.resumed is not None and self.resumed.own is not None:
            restore_random(self.resumed.own)  # the loader has drawn a seed since the training began
        self.resumed = None
        step: Step = inputs["step"]
        self._step_rows = [row for group in step.groups for row in group]
        losses: list[Tensor] = []
        for index, (batch, weight) in enumerate(zip(step.batches, step.weights, strict=True)):
            with self.steps.passing(last=index == len(step.batches) - 1):
                loss = self.loss_sum(model, batch) * weight
                self.steps.backward(loss * (1 / step.units))
            losses.append(loss.detach())
        loss_sum = float(self.runtime.all_sum(torch.stack(losses).sum()))
        if not math.isfinite(loss_sum):
            raise self._not_finite("loss", loss_sum, rows_at_fault(step.groups, losses))
        self.step_sums.append((loss_sum, step.units, step.rows))
        return torch.tensor(loss_sum / step.units, device=self.args.device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(norm):
            raise self._not_finite("gradient norm", norm, self._step_rows)
        return norm

    def _not_finite(self, what: str, value: float, rows: Sequence[int]) -> NotFinite:
        place = f"step {self.state.global_step + 1} of {len(self.plan)}"
        message = f"training stopped before that step changed the weights. {_REMEDY}"
        return self._left(
            what, f"the {what} is {value} at {place}; {message}", place, self.rows, rows
        )

    def _left(
        self, what: str, message: str, place: str, rows: Rows, chosen: Sequence[int]
    ) -> NotFinite:
        described = [rows.describe(row) for row in chosen]
        return leave(NotFinite(what, message, described, place), self.folder, self.runtime)

    # --- evaluation and metrics ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out metrics, each a sum divided by the global unit count; keeps the best weights."""
        rows = self.held_out
        assert rows is not None
        module = self._module
        module.eval()
        totals: dict[str, list[Tensor]] = defaultdict(list)
        share, weights = share_and_filler(
            range(len(rows.lengths)),
            rows,
            self.token_budget,
            self.runtime.rank,
            self.runtime.world_size,
            in_step=self.runtime.shards,
        )
        with torch.no_grad():
            for group, weight in zip(share, weights, strict=True):
                for name, value in self.eval_sums(module, rows.collate(group)).items():
                    totals[name].append(value * weight)
        sums = {
            name: float(self.runtime.all_sum(torch.stack(values).sum()))
            for name, values in sorted(totals.items())
        }
        metrics = self.eval_metrics(sums, sum(rows.units))
        if not math.isfinite(metrics["loss"]):
            place = f"the evaluation after step {self.state.global_step} of {len(self.plan)}"
            message = f"the held-out loss is {metrics['loss']} in {place}. {_REMEDY}"
            at_fault = rows_at_fault(share, totals["loss"])
            raise self._left("held-out loss", message, place, rows, at_fault)
        self._judge(metrics)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.write_metrics(self.state.global_step, metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _judge(self, metrics: dict[str, float]) -> None:
        improved = metrics["loss"] < self.lowest_loss
        if improved and self.best is not None:
            self.best.save(self.state.global_step)
        if improved or self.best is None:
            self.kept_metrics = metrics
        if improved:
            self.lowest_loss = metrics["loss"]
            self.evaluations_since_best = 0
            return
        self.evaluations_since_best += 1
        if self.patience is not None and self.evaluations_since_best >= self.patience:
            self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace Trainer's averages of averages by sums over the steps since the last row."""
        self.control.should_log = False
        first, then = self._logged
        window = self.step_sums[first:]
        if not window:
            return  # Trainer's closing summary
        now = time.perf_counter()
        rows = sum(step_rows for _, _, step_rows in window)
        self.write_metrics(
            self.state.global_step,
            {
                "loss": _mean_loss(window),
                "grad_norm": logs["grad_norm"],
                "learning_rate": logs["learning_rate"],
                "epoch": self.state.global_step / self.plan.steps_per_epoch,
                "rows_per_second": rows / (now - then),
            },
        )
        self._logged = (len(self.step_sums), now)

    # --- going on after an interruption ---

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        found: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if self.resumed is not None:
            self.state.global_step = self.resumed.step
        return found

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.resumed is not None:
            self._restore(self.resumed.run)
        return prepared

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step = self.state.global_step
        ends = step == len(self.plan) or self.control.should_training_stop
        # The end of an epoch calls this once more.
        if self.states is None or ends or step == self._saved_step:
            return
        asked = self.interruption.asked()
        if asked or step % self.state_every == 0:
            self._saved_step = step
            self.states.save(step, self._state(), random_state())
        if asked:
            raise self.interruption.stop(self.title, step)

    def _state(self) -> State:
        tensors = self.steps.tensors()
        if self.best is not None:
            tensors |= self.best.tensors()
        assert self.lr_scheduler is not None and self.optimizer is not None
        schedule = self.lr_scheduler.state_dict()
        numbers = {name: getattr(self, name) for name in _NUMBERS} | {
            "schedule": {name: schedule[name] for name in schedule if name != "lr_lambdas"},
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "best_step": 0 if self.best is None else self.best.step,
            "logged": self._logged[0],
        }
        return State(tensors, numbers)

    def _restore(self, state: State) -> None:
        numbers = state.numbers
        self.steps.restore(state.tensors)
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self.step_sums = [(loss, units, rows) for loss, units, rows in numbers["step_sums"]]
        if self.best is not None:
            self.best.load(state.tensors, numbers["best_step"])
        assert self.lr_scheduler is not None and self.optimizer is not None
        schedule = self.lr_scheduler.state_dict() | numbers["schedule"]
        self.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, numbers["rates"], strict=True):
            group["lr"] = rate
        self._saved_step = self.state.global_step
        self._logged = (numbers["logged"], time.perf_counter())

    # --- the whole training ---

    def fit(self) -> FitSummary:
        """Train, put the kept weights in place, and hand the module back unpatched.

        Raises:
            TrainingError: a loss or a gradient is NaN or infinite.
        """
        module = self._module
        begin = time.perf_counter()
        with fenced(module), self.interruption:
            try:
                self.train()
            finally:
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                self.close()
        if self.best is not None:
            self.best.restore()
        return FitSummary(
            steps=self.state.global_step,
            kept_step=self.best.step if self.best is not None else self.state.global_step,
            rows=sum(rows for _, _, rows in self.step_sums),
            train_loss=_mean_loss(self.step_sums[-self.plan.steps_per_epoch :]),
            held_out=self.kept_metrics,
            seconds=time.perf_counter() - begin,
        )

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model


def _mean_loss(steps: Sequence[tuple[float, int, int]]) -> float:
    return sum(loss for loss, _, _ in steps) / sum(units for _, units, _ in steps)
