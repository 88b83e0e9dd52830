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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from pipeline.config import FitSection, RunSection
from pipeline.errors import TrainingError
from pipeline.fence import BestWeights, fenced
from pipeline.models.footprint import Roles, measure_at_first_step
from pipeline.progress import ProgressBar
from pipeline.row_order import plan_steps
from pipeline.rows import Rows, Step, StepDataset, share_or_filler

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


def training_arguments(
    section: FitSection, run: RunSection, num_steps: int, evaluates: bool, folder: Path
) -> TrainingArguments:
    """Trainer's arguments for `num_steps` optimiser steps; it writes nothing into `folder`."""
    optim = section.optim
    warmup_steps = round(optim.warmup_fraction * num_steps)
    schedule = optim.schedule
    if schedule == "constant" and warmup_steps:
        schedule = "constant_with_warmup"  # type: ignore[assignment]  # Trainer's own name
    every = section.eval_every
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=warmup_steps,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_epsilon=optim.adam_eps,
        max_grad_norm=optim.max_grad_norm,
        seed=run.seed,
        bf16=run.mixed_precision == "bf16",
        use_cpu=run.device == "cpu",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=int(every) if every >= 1 else max(1, math.ceil(every * num_steps)),
        logging_steps=section.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # its default hides a NaN loss
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        ddp_find_unused_parameters=False,  # what is trainable is fixed before the wrap
    )


class PlannedTrainer(Trainer, ABC):
    """Trainer over a `Plan`, exact in its sums; a subclass says what the loss is.

    Args:
        module: what is trained; its parameters that require gradients, fixed before this call.
        section: the stage's settings.
        run: the run's common settings (seed, precision, device).
        folder: an existing folder; nothing is written there.
        train: rows to train on.
        held_out: rows to evaluate on; none means no evaluation, and the last weights are kept.
        log: receives (step, metrics), for instance `Tracker.log`.
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
    ) -> None:
        self.rows = train
        self.held_out = held_out
        assert section.micro_batch_tokens is not None  # see `FitSection.sized`
        self.token_budget = section.micro_batch_tokens
        self.plan = plan_steps(
            train.lengths, section.batch_size, section.epochs, run.seed, section.max_steps
        )
        args = training_arguments(section, run, len(self.plan), held_out is not None, folder)
        args._n_gpu = min(args.n_gpu, 1)  # one process, one device: never nn.DataParallel
        super().__init__(
            model=module,
            args=args,
            eval_dataset=held_out,  # only whether there is one is read
            callbacks=[_Progress(console, title)],
        )
        self.write_metrics = log
        self.patience = section.patience
        self.best = BestWeights(module) if section.keep == "best" and held_out is not None else None
        self.lowest_loss = math.inf
        self.evaluations_since_best = 0
        self.kept_metrics: dict[str, float] = {}
        self.step_sums: list[tuple[float, int, int]] = []  # (loss, units, rows) of each step
        self._logged = (0, time.perf_counter())  # steps in the log, and when it was written

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
        steps = StepDataset(self.rows, self.plan, self.token_budget, self._rank, self._world_size)
        return DataLoader(steps, batch_size=None, shuffle=False)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one optimiser step; returns its mean loss a unit.

        Raises:
            TrainingError: the loss is NaN or infinite, on whichever process.
        """
        model.train()
        step: Step = inputs["step"]
        losses: list[Tensor] = []
        for index, batch in enumerate(step.batches):
            last = index == len(step.batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                loss = self.loss_sum(model, batch) * step.weight
                # DDP averages gradients over processes; times their number it sums them.
                self.accelerator.backward(loss * (self._world_size / step.units))
            losses.append(loss.detach())
        loss_sum = self._sum_over_processes(torch.stack(losses).sum())
        if not math.isfinite(loss_sum):
            raise self._not_finite("loss", loss_sum)
        self.step_sums.append((loss_sum, step.units, step.rows))
        return torch.tensor(loss_sum / step.units, device=self.args.device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(norm):
            raise self._not_finite("gradient norm", norm)
        return norm

    def _not_finite(self, what: str, value: float) -> TrainingError:
        return TrainingError(
            f"the {what} is {value} at step {self.state.global_step + 1} of {len(self.plan)}; "
            f"training stopped before that step changed the weights. {_REMEDY}"
        )

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
        share, weight = share_or_filler(
            range(len(rows.lengths)), rows, self.token_budget, self._rank, self._world_size
        )
        with torch.no_grad():
            for group in share:
                for name, value in self.eval_sums(module, rows.collate(group)).items():
                    totals[name].append(value * weight)
        sums = {
            name: self._sum_over_processes(torch.stack(values).sum())
            for name, values in sorted(totals.items())
        }
        metrics = self.eval_metrics(sums, sum(rows.units))
        self._judge(metrics)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.write_metrics(self.state.global_step, metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _judge(self, metrics: dict[str, float]) -> None:
        if not math.isfinite(metrics["loss"]):
            raise TrainingError(
                f"the held-out loss is {metrics['loss']} after step {self.state.global_step} of "
                f"{len(self.plan)}. {_REMEDY}"
            )
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

    # --- the whole training ---

    def fit(self) -> FitSummary:
        """Train, put the kept weights in place, and hand the module back unpatched.

        Raises:
            TrainingError: a loss or a gradient is NaN or infinite.
        """
        module = self._module
        begin = time.perf_counter()
        with fenced(module):
            try:
                self.train()
            finally:
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                self.accelerator.free_memory()
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

    @property
    def _rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def _world_size(self) -> int:
        return int(self.accelerator.num_processes)

    def _sum_over_processes(self, value: Tensor) -> float:
        return float(self.accelerator.reduce(value, reduction="sum"))


class MeasuredMemory(TrainerCallback):
    """Writes what a stage's roles cost in memory into its `memory.json`, at the first step."""

    def __init__(self, roles: Roles, memory_json: Path) -> None:
        self.roles, self.memory_json = roles, memory_json

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first step: gradients and optimiser state come with it."""
        if state.is_world_process_zero:
            measure_at_first_step(kwargs["optimizer"], self.roles, self.memory_json)


class _Progress(TrainerCallback):
    """Shows a training's progress; also has the last step logged."""

    def __init__(self, console: Console | None, title: str) -> None:
        self.console, self.title = console, title
        self.numbers = ""
        self.bar: ProgressBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        shown = self.console if state.is_world_process_zero else None
        self.bar = ProgressBar(shown, self.title, state.max_steps).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        assert self.bar is not None
        self.bar.step(state.global_step, self.numbers)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the newest held-out loss."""
        self.numbers = f"held-out loss {kwargs['metrics']['eval_loss']:.4f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar on the screen as it stands; also after an error before it began."""
        if self.bar is not None:
            self.bar.__exit__(None, None, None)


def _mean_loss(steps: Sequence[tuple[float, int, int]]) -> float:
    return sum(loss for loss, _, _ in steps) / sum(units for _, units, _ in steps)
