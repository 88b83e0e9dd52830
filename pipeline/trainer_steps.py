"""transformers' Trainer over the optimiser steps of `pipeline.distributed`, in every strategy."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from pipeline.distributed import Runtime
from pipeline.distributed.steps import Steps


class SteppedTrainer(Trainer):
    """Trainer keeps the loop and the schedule; passes, clipping and state are those of `Steps`.

    Its own wrapping serves one process and DDP. Sharded weights and DeepSpeed's engine it is kept
    from: it would wrap once more.
    """

    steps: Steps

    def __init__(
        self, module: nn.Module, args: TrainingArguments, runtime: Runtime, **settings: Any
    ) -> None:
        self.runtime = runtime
        if runtime.in_step:
            # Trainer's word for a module that others have laid over the processes.
            vars(module)["is_distributed_loading_by_transformers"] = True
        args._n_gpu = min(args.n_gpu, 1)  # one process, one device: never nn.DataParallel
        super().__init__(model=module, args=args, **settings)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimiser, without the group that adapters leave empty: DeepSpeed takes it out.

        In every strategy, since states hold a learning rate of each group.
        """
        optimiser = super().create_optimizer(model)
        optimiser.param_groups[:] = [group for group in optimiser.param_groups if group["params"]]
        return optimiser

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        assert isinstance(self.model, nn.Module) and self.optimizer is not None
        if self.runtime.asked.zero_stage:
            prepared: Any = self.optimizer  # accelerate's wrapper, which the schedule holds
            self.steps = self.runtime.prepare(self.model, prepared.optimizer)
            prepared.optimizer = self.steps.optimiser
            self.model_wrapped = self.steps.module
        else:
            self.steps = Steps(model, self.optimizer, self.runtime, self.model)
        return self.steps.module, loader

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Nothing: hooks of Trainer's own would reduce the gradients once more."""

    def _clip_grad_norm(self, model: nn.Module) -> float:
        return self.steps.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        norm: float = self.steps.clip(float("inf")) if grad_norm is None else grad_norm
        return norm

    def close(self) -> None:
        """Let go of optimiser and wrapper; the module lives on."""
        if hasattr(self, "steps"):  # training may have failed before
            self.steps.close()
        self.accelerator.free_memory()
        if isinstance(self.model, nn.Module):
            vars(self.model).pop("is_distributed_loading_by_transformers", None)
