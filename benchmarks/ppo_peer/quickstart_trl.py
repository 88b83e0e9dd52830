"""W4, in TRL's environment: PPO from the quickstart's SFT policy with its reward model.

    python -m benchmarks.ppo_peer.quickstart_trl SPEC.json RESULT.json

The reward model is a sequence classifier of transformers with the reward adapter merged into the
SFT weights (in memory) and our head, its shift and scale folded in; its scores are compared with
ours before training, and a difference above 1e-4 ends the run.

Chosen so that TRL learns as well and as fast as it can:
- all rows of an iteration as one `per_device_train_batch_size` and no gradient accumulation, for
  only then do minibatches become optimiser steps; no gradient checkpointing, no samples, no saves;
- the value model starts as the reward model and trains a LoRA adapter and its head, like the
  policy, at the one learning rate that TRL has. (`value: full` trains all its weights, which TRL
  does with a plain model.)
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ppo_peer.meter import Meter
from benchmarks.ppo_peer.trl_side import Phases, ending_callback, probe, quiet

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

TOLERANCE = 1e-4


def scorer(run: Path) -> Any:
    """The quickstart's reward model as transformers has them: a trunk and `score`."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    artifact = run / "reward" / "artifact"
    causal = AutoModelForCausalLM.from_pretrained(run / "sft" / "artifact" / "model")
    causal = PeftModel.from_pretrained(causal, artifact / "adapter").merge_and_unload()
    config = type(causal.config).from_dict(causal.config.to_dict() | {"num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    trunk = getattr(model, model.base_model_prefix)
    trunk.load_state_dict(getattr(causal, causal.base_model_prefix).state_dict())
    head = load_file(artifact / "head.safetensors")
    model.score = torch.nn.Linear(head["weight"].numel(), 1)
    with torch.no_grad():
        model.score.weight.copy_((head["weight"] / head["scale"]).unsqueeze(0))
        model.score.bias.copy_((head["bias"] - head["shift"]).reshape(1) / head["scale"])
    return model


def adapter(ppo: dict[str, Any]) -> Any:
    """The LoRA of policy and value."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=ppo["rank"],
        lora_alpha=ppo["alpha"],
        target_modules="all-linear",
    )


def arguments(ppo: dict[str, Any], seed: int, output: Path) -> Any:
    """The quickstart's settings in TRL's words."""
    from trl.experimental.ppo import PPOConfig

    rows = ppo["prompts_per_iteration"]
    assert ppo["schedule"] in ("linear", "constant"), ppo["schedule"]
    return PPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_mini_batches=ppo["minibatches"],
        num_ppo_epochs=ppo["ppo_epochs"],
        total_episodes=rows * ppo["iterations"],
        local_rollout_forward_batch_size=rows,
        response_length=ppo["max_new_tokens"],
        stop_token="eos",
        missing_eos_penalty=ppo["missing_eos_penalty"],
        temperature=ppo["temperature"],
        kl_coef=ppo["kl_coef"],
        cliprange=ppo["clip_range"],
        cliprange_value=ppo["value_clip_range"],
        vf_coef=ppo["value_coef"],
        gamma=ppo["gamma"],
        lam=ppo["gae_lambda"],
        learning_rate=ppo["learning_rate"],
        lr_scheduler_type=ppo["schedule"],
        adam_beta1=ppo["adam_beta1"],
        adam_beta2=ppo["adam_beta2"],
        adam_epsilon=ppo["adam_eps"],
        weight_decay=ppo["weight_decay"],
        bf16=False,
        use_cpu=True,
        seed=seed,
        **quiet(),
    )


def build_trainer(spec: dict[str, Any], prompts: list[list[int]], output: Path) -> Any:
    """A PPOTrainer from the run's SFT policy and reward model."""
    from datasets import Dataset
    from peft import inject_adapter_in_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.ppo import PPOTrainer

    run, ppo = Path(spec["run"]), spec["ppo"]
    tokenizer = AutoTokenizer.from_pretrained(run / "sft" / "artifact" / "tokenizer")
    tokenizer.padding_side = "left"
    policy = AutoModelForCausalLM.from_pretrained(run / "sft" / "artifact" / "model")
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    reward, value = scorer(run), scorer(run)
    if spec["value"] == "lora":
        inject_adapter_in_model(adapter(ppo), getattr(value, value.base_model_prefix))
    return PPOTrainer(
        args=arguments(ppo, spec["seed"], output),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
        peft_config=adapter(ppo),
    )


def curve_of(trainer: Any, meter: Meter, rows: int) -> list[dict[str, float]]:
    """A point an iteration: seconds of work, reward after the penalty, KL, EOS rate."""
    logged = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    return [
        {
            "seconds": sum(seconds.values()),
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "reward": entry["objective/scores"],
            "kl": entry["objective/kl"],
            "eos_rate": entry["val/num_eos_tokens"] / rows,
        }
        for seconds, entry in zip(meter.iterations, logged, strict=True)
    ]


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, and leave the policy's adapter."""
    import trl.experimental.ppo.ppo_trainer as module

    folder = Path(spec["folder"])
    given = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    trainer = build_trainer(spec, given["prompts"], folder / "trl-output")
    probed = probe(trainer, given["probes"], module)["scores"]
    apart = max(abs(a - b) for a, b in zip(probed, given["scores"], strict=True))
    if not apart <= TOLERANCE:
        sys.exit(f"TRL's reward model gives other scores than ours, by up to {apart:.2g}")
    policy = folder / "trl-policy"
    with Meter("cpu") as meter:
        phases = Phases(meter, 1, trainer.processing_class.pad_token_id, warmup=0)
        phases.install(module)
        trainer.add_callback(ending_callback(phases.end_step))
        trainer.train()
    trainer.policy_model.save_pretrained(policy)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "curve": curve_of(trainer, meter, spec["ppo"]["prompts_per_iteration"]),
        "policy": str(policy),
        "probe_difference": apart,
        "settings": spec["ppo"] | {"value": spec["value"], "trained_parameters": trained},
    }


def main(argv: Sequence[str]) -> None:
    """Read the task, write the numbers."""
    spec = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    Path(argv[1]).write_text(json.dumps(work(spec)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
