"""What TRL 1.12's PPO is configured by, field for field, and what each becomes here.

The fields of `PPOConfig` itself are all here, with TRL's defaults; of what it inherits
(`TrainingArguments`) and of its scripts' other arguments (`ScriptArguments`, `ModelConfig`) as
well. docs/from-trl.md prints the tables, and `stages/from_trl.py` converts by them.
"""

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["int", "float", "bool", "text", "list"]


@dataclass(frozen=True)
class TrlField:
    """One argument of TRL: its type and default, the fields of ours that it sets, and a remark.

    Where it sets none, the remark says why; otherwise it says what behaves differently.
    """

    kind: Kind
    default: Any
    ours: tuple[str, ...] = ()
    note: str = ""


_COMPUTED = "TRL computes it when it starts; a value that is given is overwritten."

_HUB = (
    "The export uploads, once it is written: `export.push_to_hub: OWNER/NAME`, with `hub_private` "
    "and `hub_revision`."
)
PPO_CONFIG: dict[str, TrlField] = {
    "learning_rate": TrlField("float", 3e-6, ("ppo.optim.learning_rate",)),
    "dataset_num_proc": TrlField(
        "int", None, (), "Prompts are tokenised by the process that uses them."
    ),
    "num_mini_batches": TrlField(
        "int",
        1,
        ("ppo.optim.minibatches",),
        "Each is an optimiser step here. TRL's gradient accumulation spans mini-batches, so that "
        "with it they add no steps.",
    ),
    "total_episodes": TrlField(
        "int", None, ("ppo.iterations",), "total_episodes / batch, rounded up, as TRL does."
    ),
    "local_rollout_forward_batch_size": TrlField(
        "int",
        64,
        ("ppo.rollout.generation_rows",),
        "Memory only. Finished responses leave at once here, and no logits are kept.",
    ),
    "num_sample_generations": TrlField(
        "int",
        10,
        ("ppo.held_out.every",),
        "Held-out prompts are scored as often, at the rollouts' temperature; their texts go to "
        "texts.jsonl.",
    ),
    "response_length": TrlField(
        "int",
        53,
        ("ppo.rollout.max_new_tokens", "evaluation.max_new_tokens", "data.max_response_tokens"),
        "A limit: a response ends at its end token.",
    ),
    "stop_token": TrlField(
        "text",
        None,
        (),
        "A response always ends at the end tokens of the policy's own tokenizer and generation "
        "config. Unset, TRL samples and trains on response_length tokens, whatever they are.",
    ),
    "stop_token_id": TrlField(
        "int",
        None,
        (),
        "A response ends at the end tokens of the policy's own tokenizer and generation config: "
        "add the id to eos_token_id in its generation_config.json.",
    ),
    "temperature": TrlField("float", 0.7, ("ppo.rollout.temperature", "evaluation.temperature")),
    "missing_eos_penalty": TrlField(
        "float",
        None,
        ("ppo.rollout.missing_eos", "ppo.rollout.missing_eos_penalty"),
        "`missing_eos: subtract` with the penalty; `keep` where it is unset.",
    ),
    "sft_model_path": TrlField(
        "text",
        "EleutherAI/pythia-160m",
        ("ppo.policy", "model.path"),
        "The start of the policy, and the reference. It is read with its own tokenizer, not with "
        "that of model_name_or_path.",
    ),
    "world_size": TrlField(
        "int", None, (), "TRL asks accelerate; here it counts for the batch's arithmetic."
    ),
    "num_total_batches": TrlField("int", None, (), _COMPUTED),
    "micro_batch_size": TrlField("int", None, (), _COMPUTED),
    "local_batch_size": TrlField("int", None, (), _COMPUTED),
    "batch_size": TrlField("int", None, (), _COMPUTED),
    "local_mini_batch_size": TrlField("int", None, (), _COMPUTED),
    "mini_batch_size": TrlField("int", None, (), _COMPUTED),
    "push_to_hub": TrlField("bool", False, (), _HUB),
    "reward_model_path": TrlField(
        "text",
        "EleutherAI/pythia-160m",
        ("ppo.rewards",),
        "It reads text through its own tokenizer, where TRL gives it the policy's ids. The value "
        "model starts as the policy with a head of zeros, not as the reward model: for that, train "
        "the reward model here.",
    ),
    "model_adapter_name": TrlField(
        "text", None, (), "Adapters are named by their roles; there is nothing to choose."
    ),
    "ref_adapter_name": TrlField(
        "text",
        None,
        (),
        "The reference is what the policy starts from: of a PEFT adapter in ppo.policy, that one.",
    ),
    "num_ppo_epochs": TrlField("int", 4, ("ppo.optim.ppo_epochs",)),
    "whiten_rewards": TrlField(
        "bool",
        False,
        ("ppo.advantage.whiten_rewards",),
        "By the moments of the whole iteration, not of each process.",
    ),
    "kl_coef": TrlField("float", 0.05, ("ppo.kl_coef",)),
    "kl_estimator": TrlField(
        "text",
        "k1",
        ("ppo.kl.estimator",),
        "Of the logged KL alone: the penalty is always k1. In a reward, as TRL has it, k3 has "
        "another gradient than the KL.",
    ),
    "cliprange": TrlField("float", 0.2, ("ppo.optim.clip_range",)),
    "vf_coef": TrlField("float", 0.1, ("ppo.optim.value_coef",)),
    "cliprange_value": TrlField("float", 0.2, ("ppo.optim.value_clip_range",)),
    "gamma": TrlField("float", 1.0, ("ppo.advantage.gamma",)),
    "lam": TrlField("float", 0.95, ("ppo.advantage.gae_lambda",)),
    "ds3_gather_for_generation": TrlField(
        "bool",
        True,
        (),
        "Sharded weights are always gathered for generation; where they do not fit, vLLM samples "
        "(docs/vllm.md).",
    ),
}

_BATCH = "per_device_train_batch_size x gradient_accumulation_steps x processes."
_NO_OPTION = "There is no such option."

# Of what PPOConfig inherits, what PPOTrainer heeds or a user would miss; the defaults are TRL's.
TRAINING_ARGUMENTS: dict[str, TrlField] = {
    "output_dir": TrlField("text", "trainer_output", ("run.folder", "run.name")),
    "per_device_train_batch_size": TrlField(
        "int", 8, ("ppo.rollout.prompts_per_iteration",), _BATCH
    ),
    "gradient_accumulation_steps": TrlField(
        "int",
        1,
        ("ppo.rollout.prompts_per_iteration",),
        _BATCH + " Micro-batches are cut by ppo.optim.micro_batch_tokens and change no result.",
    ),
    "num_train_epochs": TrlField(
        "float", 3.0, ("ppo.iterations",), "Without total_episodes: passes over the prompts."
    ),
    "max_steps": TrlField("int", -1, (), "PPOTrainer overwrites it, too."),
    "hub_model_id": TrlField("text", None, (), _HUB),
    "hub_private_repo": TrlField("bool", None, (), _HUB),
    "hub_revision": TrlField("text", None, (), _HUB),
    "lr_scheduler_type": TrlField(
        "text", "linear", ("ppo.optim.schedule",), "linear, cosine and constant (with warm-up)."
    ),
    "lr_scheduler_kwargs": TrlField("text", None, (), _NO_OPTION),
    "warmup_steps": TrlField(
        "float", 0, ("ppo.optim.warmup_fraction",), "As a share of the iterations."
    ),
    "warmup_ratio": TrlField("float", 0.0, ("ppo.optim.warmup_fraction",)),
    "weight_decay": TrlField("float", 0.0, ("ppo.optim.weight_decay",)),
    "adam_beta1": TrlField("float", 0.9, ("ppo.optim.adam_beta1",)),
    "adam_beta2": TrlField("float", 0.999, ("ppo.optim.adam_beta2",)),
    "adam_epsilon": TrlField("float", 1e-8, ("ppo.optim.adam_eps",)),
    "max_grad_norm": TrlField(
        "float",
        1.0,
        ("ppo.optim.max_grad_norm",),
        "Gradients are clipped; TRL's PPO never does, whatever it says.",
    ),
    "optim": TrlField("text", "adamw_torch_fused", (), "The optimiser is AdamW."),
    "optim_args": TrlField("text", None, (), "The optimiser is AdamW."),
    "bf16": TrlField(
        "bool", None, ("run.mixed_precision",), "True where it is unset and fp16 is not asked for."
    ),
    "fp16": TrlField(
        "bool", False, ("run.mixed_precision",), "There is no float16 training: bf16, or none."
    ),
    "gradient_checkpointing": TrlField("bool", True, ("ppo.optim.gradient_checkpointing",)),
    "seed": TrlField("int", 42, ("run.seed",), "Of everything; samples are not TRL's."),
    "data_seed": TrlField("int", None, (), "run.seed is the seed of everything."),
    "use_cpu": TrlField("bool", False, ("run.device",)),
    "no_cuda": TrlField("bool", False, ("run.device",)),
    "report_to": TrlField("list", None, ("run.trackers",)),
    "run_name": TrlField("text", None, (), "Trackers get the run's name: the folder's."),
    "logging_steps": TrlField(
        "float", 10, (), "Every iteration has a line in metrics.jsonl, as PPOTrainer logs it."
    ),
    "save_strategy": TrlField(
        "text",
        "steps",
        (),
        "An interrupted run goes on from its states; the best and the last policy are kept.",
    ),
    "save_steps": TrlField("float", 500, ("ppo.checkpoint_every",)),
    "save_total_limit": TrlField("int", None, (), "The best and the last policy are kept."),
    "eval_strategy": TrlField(
        "text", "no", (), "Held-out prompts are always scored; they choose the best policy."
    ),
    "eval_steps": TrlField("float", None, (), "PPOTrainer does not heed it: ppo.held_out.every."),
    "resume_from_checkpoint": TrlField("text", None, (), "The same command goes on by itself."),
    "deepspeed": TrlField("text", None, (), "`--launch deepspeed-zero2` or `deepspeed-zero3`."),
    "fsdp": TrlField("list", None, (), "`--launch fsdp2`."),
    "fsdp_config": TrlField("text", None, (), "`--launch fsdp2`."),
    "neftune_noise_alpha": TrlField("float", None, (), _NO_OPTION),
    "torch_compile": TrlField("bool", False, (), _NO_OPTION),
    "use_liger_kernel": TrlField("bool", False, (), "Logits are made in chunks anyway."),
}

SCRIPT_ARGUMENTS: dict[str, TrlField] = {
    "dataset_name": TrlField(
        "text",
        None,
        ("data.prompts.path",),
        "Prompts over data.max_prompt_tokens (512) keep their end; ppo_tldr.py leaves them out.",
    ),
    "dataset_config": TrlField("text", None, ("data.prompts.name",)),
    "dataset_train_split": TrlField("text", "train", ("data.prompts.split",)),
    "dataset_test_split": TrlField(
        "text",
        "test",
        ("data.prompts.held_out_split",),
        "Where it is given. Otherwise a tenth is held out by hash; ppo.py holds out the last 100 "
        "rows of the training split.",
    ),
    "dataset_streaming": TrlField("bool", False, (), "PPOTrainer takes no stream, either."),
    "ignore_bias_buffers": TrlField("bool", False, (), "DDP sends no buffers here."),
}

_WITH_PEFT = "With use_peft."

MODEL_CONFIG: dict[str, TrlField] = {
    "model_name_or_path": TrlField(
        "text",
        None,
        (),
        "TRL's scripts load the tokenizer from it and nothing else: the policy is sft_model_path, "
        "here with its own tokenizer.",
    ),
    "model_revision": TrlField(
        "text", "main", ("model.revision",), "Of the policy alone, not of the reward model, too."
    ),
    "dtype": TrlField("text", "float32", ("model.dtype",), "`auto` becomes float32."),
    "torch_dtype": TrlField("text", "float32", ("model.dtype",), "The older name of dtype."),
    "attn_implementation": TrlField("text", None, ("model.attn_implementation",)),
    "trust_remote_code": TrlField("bool", False, ("model.trust_remote_code",)),
    "use_peft": TrlField(
        "bool",
        False,
        ("ppo.tuning",),
        "The value model is an adapter, too; TRL trains all weights of a second model.",
    ),
    "lora_r": TrlField("int", 16, ("lora.rank",), _WITH_PEFT),
    "lora_alpha": TrlField("int", 32, ("lora.alpha",), _WITH_PEFT),
    "lora_dropout": TrlField(
        "float", 0.05, (), "PPO has no dropout, here and there: TRL switches it off."
    ),
    "lora_target_modules": TrlField(
        "list",
        None,
        ("lora.target_modules",),
        "Unset, all linear layers; TRL leaves it to PEFT, which often takes fewer.",
    ),
    "lora_target_parameters": TrlField("list", None, ("lora.target_parameters",), _WITH_PEFT),
    "lora_modules_to_save": TrlField("list", None, (), "Adapters train no modules as a whole."),
    "lora_task_type": TrlField("text", "CAUSAL_LM", (), "A policy writes text."),
    "use_rslora": TrlField("bool", False, ("lora.use_rslora",), _WITH_PEFT),
    "use_dora": TrlField("bool", False, ("lora.use_dora",), _WITH_PEFT),
    "load_in_8bit": TrlField("bool", False, ("model.quantization",)),
    "load_in_4bit": TrlField("bool", False, ("model.quantization",)),
    "bnb_4bit_quant_type": TrlField("text", "nf4", (), "4 bits are NF4."),
    "use_bnb_nested_quant": TrlField("bool", False, (), "Scales are always quantised, too."),
    "bnb_4bit_quant_storage": TrlField("text", None, (), _NO_OPTION),
}

# What else PPOConfig inherits: logging, evaluation, the Hub and the data loader of a Trainer whose
# own loop PPOTrainer does not run, and switches of speed. Names of transformers 4 and 5.
IGNORED = "It is about Trainer's own loop or its speed, and changes no result of PPOTrainer."
IGNORED_ARGUMENTS = frozenset(
    """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16_full_eval
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict
    do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches
    eval_on_start eval_use_gather_object fp16_backend fp16_full_eval fp16_opt_level
    full_determinism gradient_checkpointing_kwargs greater_is_better group_by_length
    half_precision_backend hub_always_push hub_strategy
    hub_token ignore_data_skip include_for_metrics include_inputs_for_metrics
    include_num_input_tokens_seen include_tokens_per_second jit_mode_eval label_names
    label_smoothing_factor length_column_name liger_kernel_config load_best_model_at_end local_rank
    log_level log_level_replica log_on_each_node logging_dir logging_first_step
    logging_nan_inf_filter logging_strategy metric_for_best_model optim_target_modules
    overwrite_output_dir parallelism_config past_index per_device_eval_batch_size
    prediction_loss_only project remove_unused_columns restore_callback_states_from_checkpoint
    save_on_each_node save_only_model save_safetensors skip_memory_metrics tf32
    torch_compile_backend torch_compile_mode torch_empty_cache_steps torchdynamo tpu_metrics_debug
    tpu_num_cores trackio_bucket_id trackio_space_id trackio_static_space_id
    train_sampling_strategy use_cache use_ipex use_legacy_prediction_loop use_mps_device
    """.split()
)

TABLES = {
    "PPOConfig": PPO_CONFIG,
    "TrainingArguments": TRAINING_ARGUMENTS,
    "ScriptArguments": SCRIPT_ARGUMENTS,
    "ModelConfig": MODEL_CONFIG,
}
FIELDS: dict[str, TrlField] = {
    **{name: TrlField("text", None, (), IGNORED) for name in sorted(IGNORED_ARGUMENTS)},
    **{name: field for table in TABLES.values() for name, field in table.items()},
}


def render_table(fields: dict[str, TrlField]) -> str:
    """The fields of one class as a Markdown table, for docs/from-trl.md."""
    lines = ["| TRL | default | here | remark |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        ours = ", ".join(f"`{path}`" for path in field.ours) or "none"
        lines.append(f"| `{name}` | `{field.default}` | {ours} | {field.note} |")
    return "\n".join(lines) + "\n"
