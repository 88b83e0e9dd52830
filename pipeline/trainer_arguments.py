"""transformers' TrainingArguments from a stage's settings."""

from pathlib import Path

from transformers import TrainingArguments

from pipeline.config import RunSection
from pipeline.fit_config import FitSection


def training_arguments(
    section: FitSection, run: RunSection, num_steps: int, evaluates: bool, folder: Path
) -> TrainingArguments:
    """Trainer's arguments for `num_steps` optimiser steps; it writes nothing into `folder`."""
    optim = section.optim
    warmup_steps = round(optim.warmup_fraction * num_steps)
    schedule = optim.schedule
    if schedule == "constant" and warmup_steps:
        schedule = "constant_with_warmup"  # type: ignore[assignment]  # Trainer's own name
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
        eval_steps=section.steps_between("eval_every", num_steps),
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
