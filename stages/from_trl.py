"""`rlhf config --from-trl FILE`: a TRL PPO YAML, or a command line of its scripts, as our config.

Nothing is dropped without a word: what has no counterpart, or behaves differently, is a comment in
the result; names that TRL 1.12 does not know are refused. `stages/trl_fields.py` has the fields.

    rlhf config --from-trl ppo.sh > ppo.yaml
"""

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pipeline import yaml_core
from pipeline.config import RunSection
from pipeline.errors import ConfigError
from pipeline.yaml_config import show_value, validated
from stages.config import RunConfig
from stages.trl_arguments import read_arguments
from stages.trl_fields import FIELDS, PPO_CONFIG

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
# Fields that pass their value on as it is.
COMPUTED = {"total_episodes", "num_sample_generations", "reward_model_path"}
DIRECT = (
    *(name for name, entry in PPO_CONFIG.items() if len(entry.ours) == 1 and name not in COMPUTED),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("gradient_checkpointing", "seed"),
)
# Said also where TRL's default is left: it is not what it seems.
ALWAYS_SAID = ("max_grad_norm",)
WIDTH = 96


def convert_trl(path: Path) -> str:
    """The file as YAML of ours, with comments.

    Raises:
        ConfigError: it is neither a mapping nor a command line, a name or value is not TRL's, or
            the result is no valid configuration of ours.
    """
    draft = _Draft(Given(*read_arguments(path)))
    draft.fill()
    written = draft.render(path.name)
    validated(yaml_core.load(written, f"{path}, converted"), RunConfig, Path())
    return written


@dataclass(frozen=True)
class Given:
    """TRL's arguments: what the file gives, TRL's defaults elsewhere."""

    values: Mapping[str, Any]
    launched: int | None

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        value = self.values.get(name)
        return FIELDS[name].default if value is None else value

    @property
    def processes(self) -> int:
        """The launcher's number, else `world_size`, else 1."""
        return int(self.launched or self["world_size"] or 1)

    @property
    def batch(self) -> int:
        """TRL's batch: the responses of one iteration, over all processes."""
        rows = self["per_device_train_batch_size"] * self["gradient_accumulation_steps"]
        return int(rows * self.processes)

    @property
    def iterations(self) -> int | None:
        """TRL's num_total_batches; None where it depends on the number of prompts."""
        episodes = self["total_episodes"]
        return None if episodes is None else max(1, math.ceil(episodes / max(self.batch, 1)))

    @property
    def steps_an_epoch(self) -> float:
        """Optimiser steps that PPOTrainer makes in a PPO epoch.

        Its micro-batches are cut inside of mini-batches, and a step follows each
        `gradient_accumulation_steps` of them, whichever mini-batch they are of.
        """
        size, accumulated = self["per_device_train_batch_size"], self["gradient_accumulation_steps"]
        parts = self["num_mini_batches"]
        return float(parts * math.ceil(size * accumulated // parts / size) / accumulated)


@dataclass
class _Draft:
    """Our values by dotted name, comments above them, and remarks on what is not taken over."""

    given: Given
    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def fill(self) -> None:
        """Convert everything."""
        self._run()
        self._models()
        self._data()
        self._batches()
        for name in DIRECT:
            self._set(FIELDS[name].ours[0], self.given[name])
        self._sampling()
        self._schedule()
        self._remarks()

    def _set(self, path: str, value: Any, comment: str | None = None) -> None:
        self.values[path] = value
        if comment is not None:
            self.comments.setdefault(path, []).append(comment)

    def _run(self) -> None:
        given = self.given
        folder = Path(given["output_dir"])
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).lstrip("._-")[:100] or "ppo"
        self._set("run.name", name)
        if folder.parent != Path():
            self._set("run.folder", str(folder.parent))
        bf16 = not given["fp16"] if given["bf16"] is None else given["bf16"]
        self._set("run.mixed_precision", "bf16" if bf16 else "no")
        if given["use_cpu"] or given["no_cuda"]:
            self._set("run.device", "cpu")
        if "report_to" in given:
            self._trackers(given["report_to"])

    def _trackers(self, asked: Sequence[Any]) -> None:
        annotation = RunSection.model_fields["trackers"].annotation
        ours = get_args(get_args(annotation)[0])
        unknown = [str(name) for name in asked if name not in (*ours, "none")]
        self._set("run.trackers", [name for name in asked if name in ours])
        if unknown:
            self.left.append(f"report_to: {', '.join(unknown)}: trackers are {', '.join(ours)}.")

    def _models(self) -> None:
        given = self.given
        for name, path in (("sft_model_path", "ppo.policy"), ("reward_model_path", "ppo.rewards")):
            unset = f"{name} is not given: this is TRL's default, whatever the other models are."
            self._set(path, given[name], None if name in given else unset)
        self._set("model.path", given["sft_model_path"], "Of the policy: ppo.policy.")
        if given["model_revision"] != "main":
            self._set("model.revision", given["model_revision"])
        dtype = given["torch_dtype"] if "torch_dtype" in given else given["dtype"]
        self._set("model.dtype", "float32" if dtype == "auto" else dtype)
        self._set("model.chat_template", "none", "TRL tokenises prompts as they stand.")
        for name in ("attn_implementation", "trust_remote_code"):
            if name in given:
                self._set(FIELDS[name].ours[0], given[name])
        self._set("ppo.tuning", "lora" if given["use_peft"] else "full")
        bits = [bits for bits in ("8bit", "4bit") if given[f"load_in_{bits}"]]
        if bits:
            self._set("model.quantization", bits[0])
            for stage in ("sft", "reward"):
                self._set(f"{stage}.tuning", "lora", "This run has no such stage.")
        self._lora()

    def _lora(self) -> None:
        given = self.given
        if not given["use_peft"]:
            names = (name for name in given.values if name.startswith("lora_"))
            self.left += [f"{name}: it does nothing without use_peft." for name in names]
            return
        for name in ("lora_r", "lora_alpha", "use_rslora", "use_dora"):
            self._set(FIELDS[name].ours[0], given[name])
        modules = given["lora_target_modules"]
        whole = "TRL leaves lora_target_modules to PEFT, which often takes fewer."
        # As TRL has it, a list of one is a text to PEFT: `all-linear`, or a regular expression.
        asked = modules[0] if modules is not None and len(modules) == 1 else modules
        self._set("lora.target_modules", asked or "all-linear", None if asked else whole)
        if given["lora_target_parameters"] is not None:
            self._set("lora.target_parameters", list(given["lora_target_parameters"]))

    def _data(self) -> None:
        given = self.given
        if "dataset_name" not in given:
            self.left.append("dataset_name is not given: name the prompts in data.prompts.")
            return
        self._set("data.prompts.path", given["dataset_name"])
        if "dataset_config" in given:
            self._set("data.prompts.name", given["dataset_config"])
        self._set("data.prompts.split", given["dataset_train_split"])
        if "dataset_test_split" in given:
            self._set("data.prompts.held_out_split", given["dataset_test_split"])
        else:
            self._set("data.held_out_fraction", 0.1, "ppo.py holds out the last 100 rows instead.")

    def _batches(self) -> None:
        given = self.given
        size, accumulated = (
            given["per_device_train_batch_size"],
            given["gradient_accumulation_steps"],
        )
        if given.processes < 1 or size < 1 or accumulated < 1 or given["num_mini_batches"] < 1:
            raise ConfigError(
                f"per_device_train_batch_size {size}, gradient_accumulation_steps {accumulated}, "
                f"num_mini_batches {given['num_mini_batches']} and processes {given.processes} "
                "must be at least 1"
            )
        count = f"{given.processes} process" + "es" * (given.processes > 1)
        unknown = given.launched is None and "world_size" not in given
        if unknown:
            count += " (the file does not say how many: multiply this by their number)"
        self._set(
            "ppo.rollout.prompts_per_iteration", given.batch, f"{size} x {accumulated} x {count}"
        )
        if given.processes > 1:
            self.left.append(
                f"The number of processes: start with --launch ddp --processes {given.processes}. "
                "Batch sizes are those of all processes together."
            )
        iterations = given.iterations
        if iterations is None:
            epochs = given["num_train_epochs"]
            unset = (
                f"total_episodes is not given. TRL goes {epochs:g} times over its prompts: write "
                f"{epochs:g} x their number / {given.batch}."
            )
            self._set("ppo.iterations", 100, unset)
        else:
            asked = f"{given['total_episodes']} episodes / {given.batch}, rounded up"
            self._set("ppo.iterations", iterations, asked)
        steps, parts = given.steps_an_epoch, given["num_mini_batches"]
        if steps != parts:
            self.comments["ppo.optim.minibatches"] = [
                f"As asked for. PPOTrainer makes {steps:g} optimiser steps an epoch of these "
                "settings, since gradient accumulation spans its mini-batches."
            ]

    def _sampling(self) -> None:
        given = self.given
        for path in FIELDS["response_length"].ours:
            self._set(path, given["response_length"])
        for path in FIELDS["temperature"].ours:
            self._set(path, given["temperature"])
        penalty = given["missing_eos_penalty"]
        self._set("ppo.rollout.missing_eos", "keep" if penalty is None else "subtract")
        if penalty is not None:
            self._set("ppo.rollout.missing_eos_penalty", penalty)
        if "stop_token" not in given and "stop_token_id" not in given:
            self.comments["ppo.rollout.max_new_tokens"] = [
                "A limit: responses end at the policy's end tokens. Without stop_token, TRL "
                "samples and trains on this many tokens, whatever they are."
            ]
        self._set("ppo.keep", "last", "As TRL does; `best` keeps the best by held-out reward.")
        samples, iterations = given["num_sample_generations"], self.values["ppo.iterations"]
        if samples > 0:
            self._set("ppo.held_out.every", max(1, iterations // samples))
        else:
            self._set("ppo.held_out.num_texts", 0)

    def _schedule(self) -> None:
        given = self.given
        asked = str(given["lr_scheduler_type"])
        if asked not in SCHEDULES:
            raise ConfigError(
                f"lr_scheduler_type is {asked!r}, which there is not here: ppo.optim.schedule is "
                "linear, cosine or constant. Choose one of them"
            )
        self._set("ppo.optim.schedule", SCHEDULES[asked])
        iterations = self.values["ppo.iterations"]
        warmup = given["warmup_ratio"]
        if "warmup_steps" in given:  # below 1, transformers 5 takes it for a share
            steps = given["warmup_steps"]
            warmup = steps if steps < 1 else min(1.0, steps / iterations)
        self._set("ppo.optim.warmup_fraction", 0.0 if asked == "constant" else warmup)
        if "save_steps" in given:
            every = given["save_steps"]
            every = int(every) if every >= 1 else math.ceil(every * iterations)
            self._set("ppo.checkpoint_every", max(1, every))

    def _remarks(self) -> None:
        """A comment for every argument that is given and does not simply hold here."""
        said = {text.partition(":")[0] for text in self.left}
        for name in (*self.given.values, *ALWAYS_SAID):
            entry = FIELDS[name]
            if not (name in self.given or name in ALWAYS_SAID):
                continue
            place = next((path for path in entry.ours if path in self.values), None)
            if place is None and name not in said:
                shown = "..." if name == "hub_token" else show_value(self.given[name])
                note = entry.note or "It belongs to an argument that is not given."
                self.left.append(f"{name}: {shown}: {note}")
            elif place is not None and entry.note:
                self.comments.setdefault(place, [entry.note])

    # --- writing ---

    def render(self, source: str) -> str:
        """The YAML, sections in the order of `RunConfig`."""
        head = [
            f"# From {source}, by `rlhf config --from-trl`: docs/from-trl.md says what differs."
        ]
        if self.left:
            head.append("#\n# Not taken over:")
            for text in self.left:
                head += textwrap.wrap(
                    text, WIDTH, initial_indent="# - ", subsequent_indent="#   ",
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
        tree: dict[str, Any] = {name: {} for name in RunConfig.model_fields}
        for path, value in self.values.items():
            *parents, last = path.split(".")
            section = tree
            for part in parents:
                section = section.setdefault(part, {})
            section[last] = value
        return "\n".join([*head, *self._lines({k: v for k, v in tree.items() if v}, ())]) + "\n"

    def _lines(self, section: Mapping[str, Any], parents: tuple[str, ...]) -> Iterator[str]:
        indent = "  " * len(parents)
        for key, value in section.items():
            path = (*parents, key)
            if not parents:
                yield ""
            for comment in self.comments.get(".".join(path), ()):
                yield from textwrap.wrap(
                    comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
            if isinstance(value, dict):
                yield f"{indent}{key}:"
                yield from self._lines(value, path)
            else:
                yield indent + yaml_core.dump({key: value}).rstrip().replace("\n", f"\n{indent}")
