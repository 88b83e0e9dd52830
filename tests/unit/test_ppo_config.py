"""The `ppo` section: defaults that follow one another, and refusals that show the arithmetic."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import key_values
from stages.config import RunConfig
from stages.ppo.config import PpoSection


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({}, 3e-5),
        ({"tuning": "full"}, 3e-6),
        ({"tuning": "full", "optim": {"ppo_epochs": 2}}, 3e-6),
        ({"tuning": "full", "optim": {"learning_rate": 1e-5}}, 1e-5),
    ],
)
def test_learning_rate_follows_tuning_unless_it_is_set(given: dict, rate: float) -> None:
    section = PpoSection.model_validate(given)
    assert section.optim.learning_rate == rate
    assert section.optim.ppo_epochs == given.get("optim", {}).get("ppo_epochs", 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {
                "rollout": {"prompts_per_iteration": 10, "responses_per_prompt": 3},
                "optim": {"minibatches": 4},
            },
            r"10 x 3 = 30 rollouts, not divisible by ppo.optim.minibatches = 4 \(30 = 4 x 7 \+ 2\)",
        ),
        (
            {"iterations": 5, "optim": {"value_warmup_iterations": 5}},
            "value_warmup_iterations = 5 leaves none of ppo.iterations = 5",
        ),
        (
            {"value": "shared", "optim": {"value_learning_rate": 1e-4}},
            "ppo.optim.value_learning_rate = 0.0001 has no effect with ppo.value = shared",
        ),
        ({"optim": {"dual_clip": 1.0}}, "greater than 1"),
        (
            {"optim": {"ptx_rows": 8}},
            "ppo.optim.ptx_rows = 8 has no effect with ppo.optim.ptx_coef = 0",
        ),
        (
            {"optim": {"pretraining_rows": 8}},
            "ppo.optim.pretraining_rows = 8 has no effect with ppo.optim.pretraining_coef = 0",
        ),
        ({"ema_decay": 1.0}, "less than 1"),
        ({"advantage": {"value_lambda": 1.1}}, "less than or equal to 1"),
        ({"advantage": {"length_adaptive_alpha": 0}}, "greater than 0"),
        ({"advantage": {"reference_length": 0}}, "greater than 0"),
        ({"kl": {"coefs": {"a": 0.1}}}, "but ppo.kl.column is not set"),
        ({"kl": {"column": "set", "coefs": {"a": -0.1}}}, "greater than or equal to 0"),
        (
            {"kl": {"column": "set", "targets": {"a": 3.0}}},
            "ppo.kl.targets = {'a': 3.0} has no effect with ppo.kl.controller = fixed",
        ),
        (
            {"curriculum": {"order": "descending"}},
            "ppo.curriculum.order = descending has no effect without ppo.curriculum.column",
        ),
        ({"curriculum": {"column": "level", "start_share": 0}}, "greater than 0"),
        (
            {"iterations": 5, "curriculum": {"column": "level", "iterations": 6}},
            "ppo.curriculum.iterations = 6 is after the last of ppo.iterations = 5",
        ),
        ({"kl": {"beta": 1.0}}, "Extra inputs are not permitted"),
    ],
)
def test_refusals_name_the_setting_and_its_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PpoSection.model_validate(given)


def test_knobs_of_memory_and_logging_are_no_part_of_any_key() -> None:
    knobs = {
        "sft": {"micro_batch_tokens": 7, "gradient_checkpointing": True, "log_every": 7},
        "reward": {"micro_batch_tokens": 7, "gradient_checkpointing": True, "log_every": 7},
        "ppo": {
            "rollout": {"generation_rows": 7, "micro_batch_tokens": 7},
            "optim": {"micro_batch_tokens": 7},
            "held_out": {"num_texts": 7},
            "samples": {"enabled": False, "rows_per_file": 7},
        },
        "evaluation": {"generation_rows": 7, "micro_batch_tokens": 7},
    }
    plain, turned = (
        RunConfig.model_validate({"model": {"path": "org/base"}, **sections})
        for sections in ({}, knobs)
    )
    for name in knobs:
        before, after = getattr(plain, name), getattr(turned, name)
        assert before != after
        keys = [key_values(type(section), section.model_dump()) for section in (before, after)]
        assert keys[0] == keys[1] != {}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_types_that_autocast_does_not_cast_are_refused_beside_it(dtype: str) -> None:
    """It leaves float64 as it is, and its range is not float16's."""
    given = {"model": {"path": "org/base", "dtype": dtype}, "run": {"mixed_precision": "bf16"}}
    with pytest.raises(ValidationError, match=f"bf16 but model.dtype is {dtype}: set model.dtype"):
        RunConfig.model_validate(given)
    RunConfig.model_validate(given | {"run": {}})
