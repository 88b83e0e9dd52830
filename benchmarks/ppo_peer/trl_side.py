"""TRL 1.12.0's PPOTrainer on a workload; runs in its own virtual environment.

    python -m benchmarks.ppo_peer.trl_side SPEC.json RESULT.json

`PPOTrainer.train` is one function. Two functions that it calls by their global names are wrapped,
and nothing else is changed: `batch_generation` is the phase `rollout`; from its end to the end of
the last `get_reward` (reference, value and reward passes) is `scoring`; the rest, up to the
callback at the end of the step, is `update` (advantages, optimiser steps, metrics), as on our side.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ppo_peer.meter import Meter
from benchmarks.ppo_peer.workloads import SEED, Workload

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class Phases:
    """Tells the meter where a step of PPOTrainer is, and notes how long the responses are."""

    def __init__(self, meter: Meter, chunks: int, pad_id: int, warmup: int) -> None:
        self.meter = meter
        self.rewards_left = 0
        self.rewards_per_step = 2 * chunks  # the value's and the reward's, for each chunk
        self.pad_id = pad_id
        self.warmup = warmup
        self.steps = 0
        self.lengths: list[list[int]] = []
        self._sampled: Any = None

    def install(self, module: Any) -> None:
        """Wrap the functions of TRL's module."""
        module.batch_generation = self._generation(module.batch_generation)
        module.get_reward = self._reward(module.get_reward)

    def end_step(self) -> None:
        """What the callback does at the end of a step."""
        self.meter.end_iteration(timed=self.steps >= self.warmup)
        self.steps += 1
        if self._sampled is not None:
            self.lengths.append((self._sampled != self.pad_id).sum(1).tolist())
            self._sampled = None

    def _generation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def batch_generation(model: Any, queries: Any, *args: Any, **kwargs: Any) -> Any:
            self.meter.switch("rollout")
            result = original(model, queries, *args, **kwargs)
            self.meter.switch("scoring")
            self._sampled = result[0][:, queries.shape[1] :]
            self.rewards_left = self.rewards_per_step
            return result

        return batch_generation

    def _reward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_reward(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.rewards_left -= 1
            if self.rewards_left == 0:
                self.meter.switch("update")
            return result

        return get_reward


def ending_callback(end_step: Callable[[], None]) -> Any:
    """A Trainer callback that calls `end_step` at the end of each step of PPO."""
    from transformers import TrainerCallback

    class AtEnd(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            end_step()

    return AtEnd()


def arguments(workload: Workload, folder: Path, steps: int, device: str) -> Any:
    """TRL's configuration of a workload.

    One minibatch an epoch, accumulated over micro-batches of `trl_rows`: on a CPU as fast as the
    whole minibatch at once, in half the memory. Set for speed: no gradient checkpointing (on by
    default), no sample generations, no saves.
    """
    from trl.experimental.ppo import PPOConfig

    micro_rows = min(workload.trl_rows, workload.prompts)
    return PPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=micro_rows,
        gradient_accumulation_steps=workload.prompts // micro_rows,
        num_mini_batches=1,
        num_ppo_epochs=workload.ppo_epochs,
        total_episodes=workload.prompts * steps,
        local_rollout_forward_batch_size=min(workload.trl_rollout_rows, workload.prompts),
        response_length=workload.response_tokens,
        stop_token=None if workload.never_ends else "eos",
        missing_eos_penalty=workload.missing_eos_penalty,
        temperature=1.0,
        kl_coef=workload.kl_coef,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        gamma=1.0,
        lam=0.95,
        learning_rate=workload.learning_rate,
        lr_scheduler_type="linear",
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        weight_decay=0.0,
        bf16=False,  # the weights have the workload's type; no autocast on either side
        use_cpu=device == "cpu",
        seed=SEED,
        **quiet(),
    )


def quiet() -> dict[str, Any]:
    """Settings of PPOConfig that switch off what costs time and trains nothing."""
    return {
        "gradient_checkpointing": False,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def build_trainer(workload: Workload, folder: Path, output: Path, steps: int, device: str) -> Any:
    """A PPOTrainer on the folder that `weights.py` wrote.

    With LoRA the policy is an adapter and its reference the base below it; reward and value models
    are two more full models, and the value model is trained in full, as TRL has it.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
    )
    from trl.experimental.ppo import PPOTrainer

    dtype = getattr(torch, workload.dtype)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=dtype)
        for _ in range(2)
    )
    adapter = None
    if workload.tuning == "lora":
        adapter = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=workload.rank,
            lora_alpha=workload.alpha,
            target_modules="all-linear",
        )
    given = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    prompts = [{"input_ids": ids} for ids in given[: workload.prompts]]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    pad = DataCollatorWithPadding(tokenizer)
    # Every iteration asks all prompts. Were they the whole dataset, each batch would be its last,
    # which accelerate takes for the end of an accumulation: a step after every micro-batch.
    rows = Dataset.from_list(prompts * (steps + 1))
    return PPOTrainer(
        args=arguments(workload, output, steps, device),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # TRL's own: a copy of the policy, or the base below the adapter
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        data_collator=lambda _: pad(prompts),
        peft_config=adapter,
    )


def probe(trainer: Any, probes: list[tuple[list[int], list[int]]], module: Any) -> Any:
    """Score and log-probability of each probe, which our side must give too."""
    import torch

    pad_id, device = trainer.processing_class.pad_token_id, trainer.accelerator.device
    found: dict[str, list[float]] = {"scores": [], "logprobs": []}
    with torch.no_grad():
        for prompt, response in probes:
            ids = torch.tensor([[*prompt, *response]], device=device)
            _, score, _ = module.get_reward(trainer.reward_model, ids, pad_id, len(prompt))
            logits = module.forward(trainer.policy_model, ids, pad_id).logits
            logprobs = logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
            chosen = logprobs.gather(2, ids[:, len(prompt) :].unsqueeze(2))
            found["scores"].append(float(score))
            found["logprobs"].append(float(chosen.sum()))
    return found


def work(spec: dict[str, Any], output: Path) -> dict[str, Any]:
    """One run: the warm-up iterations, then the timed ones."""
    import datasets  # noqa: F401  # whatever is imported later would count as memory of the run
    import peft  # noqa: F401
    import torch
    import transformers.generation.utils
    import transformers.models.auto.modeling_auto  # noqa: F401
    import trl.experimental.ppo.ppo_trainer as module

    workload, folder = Workload.from_dict(spec["workload"]), Path(spec["folder"])
    steps = spec["warmup"] + spec["iterations"]
    with Meter(spec["device"]) as meter:
        torch.manual_seed(spec["seed"] % 2**31)
        trainer = build_trainer(workload, folder, output, steps, spec["device"])
        torch.manual_seed(spec["seed"] % 2**31)  # TRL has set its own: every round samples anew
        given = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        probed = probe(trainer, given["probes"], module)
        rows = trainer.args.local_rollout_forward_batch_size
        chunks = -(-workload.prompts // rows)
        pad_id = trainer.processing_class.pad_token_id
        phases = Phases(meter, chunks, pad_id, spec["warmup"])
        phases.install(module)
        trainer.add_callback(ending_callback(phases.end_step))
        trainer.train()
        report = meter.report()
    return report | {
        "lengths": phases.lengths,
        "probe": probed,
        "threads": torch.get_num_threads(),
    }


def main(argv: Sequence[str]) -> None:
    """Read the task, write the numbers."""
    import tempfile

    spec = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as output:
        result = work(spec, Path(output))
    Path(argv[1]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
