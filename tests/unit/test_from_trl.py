"""TRL's PPO configuration as ours: nothing is dropped, arithmetic is TRL's, the result is valid."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments
from typer.testing import CliRunner

from docs.generate import FROM_TRL, with_trl_tables
from pipeline.errors import ConfigError
from pipeline.yaml_config import read_config, walk_fields
from stages.cli import app
from stages.config import RunConfig
from stages.from_trl import Given, convert_trl
from stages.trl_fields import (
    FIELDS,
    IGNORED_ARGUMENTS,
    MODEL_CONFIG,
    PPO_CONFIG,
    SCRIPT_ARGUMENTS,
    TABLES,
    TRAINING_ARGUMENTS,
)

# The fields of trl.experimental.ppo.PPOConfig in the wheel of 1.12.0, in its order.
FIELDS_OF_1_12 = {
    "learning_rate": 3e-6, "dataset_num_proc": None, "num_mini_batches": 1, "total_episodes": None,
    "local_rollout_forward_batch_size": 64, "num_sample_generations": 10, "response_length": 53,
    "stop_token": None, "stop_token_id": None, "temperature": 0.7, "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m", "world_size": None, "num_total_batches": None,
    "micro_batch_size": None, "local_batch_size": None, "batch_size": None,
    "local_mini_batch_size": None, "mini_batch_size": None, "push_to_hub": False,
    "reward_model_path": "EleutherAI/pythia-160m", "model_adapter_name": None,
    "ref_adapter_name": None, "num_ppo_epochs": 4, "whiten_rewards": False, "kl_coef": 0.05,
    "kl_estimator": "k1", "cliprange": 0.2, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 1.0,
    "lam": 0.95, "ds3_gather_for_generation": True,
}  # fmt: skip

TLDR = r"""
# the recipe of ppo_tldr.py
CUDA_VISIBLE_DEVICES=0,1 accelerate launch --config_file zero2.yaml --num_processes 8 \
    examples/scripts/ppo/ppo_tldr.py \
    --dataset_name trl-lib/tldr \
    --dataset_test_split validation \
    --output_dir models/tldr-ppo \
    --learning_rate 3e-6 --per-device-train-batch-size=16 \
    --gradient_accumulation_steps 4 \
    --total_episodes 1000000 \
    --model_name_or_path EleutherAI/pythia-1b-deduped \
    --sft_model_path cleanrl/sft --reward_model_path cleanrl/reward \
    --missing_eos_penalty 1.0 --stop_token eos \
    --no_gradient_checkpointing --use_peft --lora_target_modules q_proj v_proj --push_to_hub
"""


def convert(tmp_path: Path, text: str, name: str = "ppo.sh") -> tuple[dict[str, Any], str]:
    """The result as data and as text; it is a valid configuration."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    written = convert_trl(tmp_path / name)
    (tmp_path / "ours.yaml").write_text(written, encoding="utf-8")
    read_config(tmp_path / "ours.yaml", [], RunConfig)
    return yaml.safe_load(written), " ".join(re.sub(r"\n *#", "", written).split())


# --- the tables -----------------------------------------------------------------------------------


def test_every_field_of_ppo_config_is_there_with_its_default() -> None:
    assert {name: field.default for name, field in PPO_CONFIG.items()} == FIELDS_OF_1_12


def test_every_inherited_field_and_every_argument_of_the_scripts_is_known() -> None:
    def names(kind: Any) -> set[str]:
        return {field.name for field in dataclasses.fields(kind) if field.init}

    known = PPO_CONFIG.keys() | TRAINING_ARGUMENTS.keys() | IGNORED_ARGUMENTS
    assert names(TrainingArguments) - known == set()
    assert names(ScriptArguments) - SCRIPT_ARGUMENTS.keys() == set()
    assert names(ModelConfig) - MODEL_CONFIG.keys() == set()
    assert not IGNORED_ARGUMENTS & {name for table in TABLES.values() for name in table}


def test_every_field_is_mapped_or_has_a_reason_and_maps_to_fields_that_exist() -> None:
    ours = {".".join(entry.path) for entry in walk_fields(RunConfig)}
    for name, field in FIELDS.items():
        assert field.ours or field.note, name
        assert set(field.ours) <= ours, name
        assert not field.note or field.note.rstrip("`").endswith("."), name


def test_the_page_has_these_tables() -> None:
    """If this fails: run `make docs` and commit docs/from-trl.md."""
    page = FROM_TRL.read_text(encoding="utf-8")
    assert with_trl_tables(page) == page
    assert all(f"| `{name}` |" in page for table in TABLES.values() for name in table)


# --- conversion -----------------------------------------------------------------------------------


def test_a_command_line_of_the_tldr_script(tmp_path: Path) -> None:
    ours, text = convert(tmp_path, TLDR)
    assert ours["run"] == {
        "name": "tldr-ppo", "folder": "models", "mixed_precision": "bf16", "seed": 42,
    }  # fmt: skip
    assert ours["model"]["path"] == ours["ppo"]["policy"] == "cleanrl/sft"
    assert ours["ppo"]["rewards"] == "cleanrl/reward"
    assert ours["data"]["prompts"] == {
        "path": "trl-lib/tldr", "split": "train", "held_out_split": "validation",
    }  # fmt: skip
    # 16 rows x 4 accumulated x 8 processes = 512; 1,000,000 / 512 = 1953.1.
    assert ours["ppo"]["rollout"]["prompts_per_iteration"] == 512
    assert ours["ppo"]["iterations"] == 1954
    # TRL samples each max(1, 1954 // 10) iterations.
    assert ours["ppo"]["held_out"]["every"] == 195
    assert ours["ppo"]["optim"]["adam_beta2"] == 0.999
    assert ours["ppo"]["optim"]["adam_eps"] == 1e-8
    assert ours["ppo"]["optim"]["gradient_checkpointing"] is False
    assert ours["ppo"]["rollout"]["missing_eos"] == "subtract"
    assert ours["ppo"]["tuning"] == "lora"
    assert ours["lora"]["target_modules"] == ["q_proj", "v_proj"]
    assert "push_to_hub: true: The export uploads" in text
    assert "model_name_or_path: 'EleutherAI/pythia-1b-deduped': TRL's scripts load the" in text
    assert "--launch ddp --processes 8" in text
    assert "Gradients are clipped; TRL's PPO never does" in text  # though it was not asked about


def test_experts_that_are_named_are_adapted(tmp_path: Path) -> None:
    named = "ppo.py --dataset_name d --lora_target_parameters experts.down_proj"
    ours, _ = convert(tmp_path, f"python {named} --use_peft")
    assert ours["lora"]["target_parameters"] == ["experts.down_proj"]
    ours, text = convert(tmp_path, f"python {named}")
    assert "target_parameters" not in ours.get("lora", {})
    assert "lora_target_parameters: it does nothing without use_peft" in text


def test_nothing_that_is_given_goes_without_a_value_or_a_word(tmp_path: Path) -> None:
    """Every argument that TRL knows, given alone: it sets a field or is named in a comment."""
    example = {"int": 1, "float": 0.5, "bool": True, "text": "x", "list": ["tensorboard"]}
    fitting = {
        "kl_estimator": "k3", "stop_token": "eos", "lr_scheduler_type": "cosine",
        "dtype": "bfloat16", "torch_dtype": "bfloat16", "use_rslora": True,
        "load_in_8bit": True, "load_in_4bit": True, "lora_r": 4,
    }  # fmt: skip
    needs_peft = [name for name in MODEL_CONFIG if name.startswith(("lora_", "use_", "load_"))]
    plain, _ = convert(tmp_path, "use_peft: true\nbf16: false\nseed: 7\n", "a.yaml")
    for name, field in FIELDS.items():
        arguments = {"bf16": False, name: fitting.get(name, example[field.kind])}
        if name == "bf16":
            arguments = {"bf16": True}
        if name in needs_peft:
            arguments["use_peft"] = True
        ours, text = convert(tmp_path, yaml.safe_dump(arguments), "a.yaml")
        sets = any(_at(ours, path) is not None for path in field.ours)
        assert sets or f"- {name}:" in text.replace("# -", "-"), (name, text)
    assert plain["run"]["seed"] == 7


def _at(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def test_a_yaml_of_arguments_as_trl_reads_it(tmp_path: Path) -> None:
    ours, text = convert(
        tmp_path,
        "learning_rate: 1e-5\nload_in_4bit: yes\nuse_peft: true\nwarmup_steps: 20\n"
        "lr_scheduler_type: constant_with_warmup\ntotal_episodes: 1600\nworld_size: 2\n"
        "hub_token: secret\nreport_to: [tensorboard, trackio]\nfp16: true\nsave_steps: 0.25\n",
        "arguments.yml",
    )
    assert ours["ppo"]["optim"]["learning_rate"] == 1e-5
    assert ours["model"]["quantization"] == "4bit"
    assert ours["sft"]["tuning"] == ours["reward"]["tuning"] == "lora"
    # 8 a device x 1 x 2 processes = 16; 1600 / 16 = 100 iterations; 20 of them warm up.
    assert ours["ppo"]["rollout"]["prompts_per_iteration"] == 16
    assert (ours["ppo"]["iterations"], ours["ppo"]["optim"]["warmup_fraction"]) == (100, 0.2)
    assert ours["ppo"]["optim"]["schedule"] == "constant"
    assert ours["ppo"]["checkpoint_every"] == 25
    assert ours["run"]["trackers"] == ["tensorboard"]
    assert ours["run"]["mixed_precision"] == "no"
    assert "There is no float16 training" in text
    assert "report_to: trackio: trackers are" in text
    assert "secret" not in text


def test_what_the_file_does_not_say_is_said(tmp_path: Path) -> None:
    ours, text = convert(tmp_path, "python ppo.py --dataset_name org/set --temperature 1.0")
    assert "8 x 1 x 1 process (the file does not say how many" in text
    assert "TRL goes 3 times over its prompts: write 3 x their number / 8" in text
    assert "sft_model_path is not given: this is TRL's default" in text
    assert "Without stop_token, TRL samples and trains on this many tokens" in text
    assert ours["ppo"]["policy"] == "EleutherAI/pythia-160m"
    assert ours["ppo"]["rollout"]["missing_eos"] == "keep"
    assert ours["ppo"]["rollout"]["temperature"] == ours["evaluation"]["temperature"] == 1.0


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_optimiser_steps_of_an_epoch_are_those_of_trls_loop(parts: int, accumulated: int) -> None:
    """The loop of PPOTrainer.train, with accelerate's counter of accumulated micro-batches."""
    size = 8
    given = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulated,
        "num_mini_batches": parts,
    }
    local = size * accumulated
    micro_batches = steps = 0
    epochs = 4
    for _ in range(epochs):
        for _mini_batch in range(0, local, local // parts):
            for _micro_batch in range(0, local // parts, size):
                micro_batches += 1
                steps += micro_batches % accumulated == 0
    assert Given(given, None).steps_an_epoch == steps / epochs


def test_minibatches_that_trl_would_not_make_are_said(tmp_path: Path) -> None:
    command = "python ppo.py --num_mini_batches 4 --gradient_accumulation_steps "
    _, text = convert(tmp_path, command + "4")
    # 4 micro-batches of 8 rows an epoch, a step after 4 of them.
    assert "PPOTrainer makes 1 optimiser steps an epoch of these settings" in text
    _, text = convert(tmp_path, command + "1")
    assert "optimiser steps an epoch" not in text


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("python ppo.py --kl_coeff 1", "a.sh",
         "a.sh: --kl_coeff: TRL 1.12's PPO has no argument 'kl_coeff': did you mean kl_coef?"),
        ("lr: 1\nkl_coeff: 1", "a.yaml", "a.yaml:1: TRL 1.12's PPO has no argument 'lr'"),
        ("python ppo.py --num_ppo_epochs four", "a.sh",
         "--num_ppo_epochs: num_ppo_epochs is 'four': must be a whole number"),
        ("python ppo.py --num_ppo_epochs", "a.sh", "--num_ppo_epochs has no value"),
        ("python ppo.py --num_ppo_epochs 1 2", "a.sh", "takes one value, not 1 2"),
        ("python ppo.py x --num_ppo_epochs 1", "a.sh", "'x' stands before any --option"),
        ("python ppo.py --config c.yaml", "a.sh", "names another file: convert that one"),
        ("learning_rate: 3e-6", "a.txt", "there is no script (*.py) in it"),
        ("python ppo.py --output_dir 'x", "a.sh", "not a command line: No closing quotation"),
        ("- a", "a.yaml", "the file holds no arguments"),
        ("env: {A: b}", "a.yaml", "set them in the shell"),
        ("python ppo.py --lr_scheduler_type polynomial", "a.sh", "lr_scheduler_type is 'polyno"),
        ("python ppo.py --temperature 0", "a.sh", "ppo.rollout.temperature is 0.0: must be above"),
        ("python ppo.py --num_mini_batches 3", "a.sh", "8 rollouts, not divisible by ppo.optim"),
        ("python ppo.py --gradient_accumulation_steps 0", "a.sh", "must be at least 1"),
        ("load_in_4bit: true", "a.yaml", "but ppo.tuning is full"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, text: str, name: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        convert_trl(tmp_path / name)
    assert message in str(caught.value)


def test_the_verb_prints_it_and_checks_itself(tmp_path: Path) -> None:
    (tmp_path / "ppo.sh").write_text(TLDR)
    result = CliRunner().invoke(app, ["config", "--from-trl", str(tmp_path / "ppo.sh")])
    assert result.exit_code == 0
    assert result.stdout == convert_trl(tmp_path / "ppo.sh")
    result = CliRunner().invoke(app, ["config", "c.yaml", "--from-trl", "ppo.sh"])
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --from-trl FILE stands alone: it converts that file\n",
    )
