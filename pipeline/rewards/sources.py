"""Reward sources: our reward model, any sequence classifier, a Python function."""

import hashlib
import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.config import ModelSection, function_reference
from pipeline.errors import ConfigError, ModelError, TrainingError
from pipeline.inference import infer
from pipeline.models.loading import explain_load_errors, torch_dtype
from pipeline.models.store import ModelStore, find_artifact
from pipeline.models.trunk import Handle
from pipeline.not_finite import NotFinite
from pipeline.records import Prompt
from pipeline.rewards.source import Completions, RewardSource


class ModelReward:
    """A reward model of ours: reads the sampled ids, so that nothing is decoded and encoded.

    Ids of a codec that is not its own (`Codec.same_ids`) it leaves: it reads the text, with its own
    tokenizer, template and limits.
    """

    def __init__(self, handle: Handle, token_budget: int | None = None) -> None:
        self.handle = handle
        self.name = handle.role.name
        self.token_budget = token_budget
        self._known: tuple[Codec | None, bool] = (None, True)  # whose ids were last compared

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        if self._reads_ids_of(completions.codec):
            prompt_ids, response_ids = completions.prompt_ids, completions.completion_ids
        else:
            prompt_ids, response_ids = self._own_ids(completions)
        batch = TokenBatch.from_ragged(prompt_ids, response_ids, self.handle.codec.pad_id)
        scores = infer(self.handle, batch, ["scores"], self.token_budget)["scores"].tolist()
        return checked(self.name, scores, completions)

    def _reads_ids_of(self, codec: Codec | None) -> bool:
        if codec is not self._known[0]:
            self._known = codec, codec is None or self.handle.codec.same_ids(codec)
        return self._known[1]

    def _own_ids(self, completions: Completions) -> tuple[list[list[int]], list[list[int]]]:
        prompt_ids, response_ids = [], []
        for prompt, text, ended in zip(
            completions.prompts, completions.texts, completions.ended, strict=True
        ):
            ids, (response,) = self.handle.codec.ranked_ids(prompt.prompt, [text], [ended])
            prompt_ids.append(ids)
            response_ids.append(response)
        return prompt_ids, response_ids


class SequenceClassificationReward:
    """Any sequence classifier of transformers with one label; reads text with its own tokenizer."""

    def __init__(
        self, path: str, section: ModelSection, device: torch.device, batch_rows: int = 16
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.name = Path(path).name
        self.batch_rows = batch_rows
        self.device = device
        with explain_load_errors(path, None):
            code = section.trust_remote_code
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=code)
            self.model = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=torch_dtype(section.dtype),
                use_safetensors=True,
                trust_remote_code=code,
            )
        if self.model.config.num_labels != 1:
            raise ModelError(
                f"{path} has {self.model.config.num_labels} labels; a reward model has one "
                "(num_labels: 1 in its config.json)"
            )
        if self.tokenizer.pad_token is None:
            raise ModelError(
                f"the tokenizer of {path} has no pad token, so batches would be scored at the "
                "wrong token: set pad_token in its tokenizer_config.json and pad_token_id in its "
                "config.json"
            )
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.padding_side = "right"
        self.tokenizer.truncation_side = "left"  # too long together: the response is what counts
        self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        texts = [
            self._render(prompt, text)
            for prompt, text in zip(completions.prompts, completions.texts, strict=True)
        ]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_rows):
            batch = self.tokenizer(
                texts[start : start + self.batch_rows],
                padding=True,
                truncation=True,
                add_special_tokens=not self.tokenizer.chat_template,
                return_tensors="pt",
            ).to(self.device)
            scores += self.model(**batch).logits[:, 0].float().tolist()
        return checked(self.name, scores, completions)

    def _render(self, prompt: Prompt, text: str) -> str:
        if self.tokenizer.chat_template:
            messages = [*_messages(prompt), {"role": "assistant", "content": text}]
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        if isinstance(prompt.prompt, str):
            return prompt.prompt + text
        turns = [f"{turn.role}: {turn.content}" for turn in prompt.prompt]
        return "\n\n".join([*turns, f"assistant: {text}"])


class FunctionReward:
    """A Python function in TRL's convention: `file.py:function`, or `module:function`.

    TRL's own work as they are, for instance `trl.rewards:think_format_reward`.

    `f(prompts, completions, completion_ids, **columns) -> list[float]`; plain prompts and their
    completions come as strings, conversations as lists of messages. The prompts' further columns
    come as lists, and `ended` tells which completions a stop token ended.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference
        self.function = load_function(reference)
        self.name = reference.rpartition(":")[2]

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        names = {name for prompt in completions.prompts for name in prompt.columns}
        names -= {"prompts", "completions", "completion_ids"}  # the sampled ones, not the data's
        columns: dict[str, list[Any]] = {
            name: [prompt.columns.get(name) for prompt in completions.prompts]
            for name in sorted(names)
        }
        columns["ended"] = list(completions.ended)
        texts: list[Any] = [
            text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(completions.prompts, completions.texts, strict=True)
        ]
        prompts = [
            prompt.prompt if isinstance(prompt.prompt, str) else _messages(prompt)
            for prompt in completions.prompts
        ]
        try:
            scores = self.function(
                prompts=prompts,
                completions=texts,
                completion_ids=[list(ids) for ids in completions.completion_ids],
                **columns,
            )
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            line = traceback.extract_tb(error.__traceback__)[-1]
            raise TrainingError(
                f"reward {self.reference} raised {type(error).__name__}: {error} "
                f"({Path(line.filename).name}, line {line.lineno})"
            ) from error
        return checked(self.name, scores, completions)


def open_reward(
    resource: str, store: ModelStore, section: ModelSection, token_budget: int | None
) -> RewardSource:
    """The reward source that a user names: a function, a run or artifact of ours, a classifier.

    `token_budget` is that of a forward pass of a model of ours.
    """
    if resource.endswith(".py"):
        raise ConfigError(f"{resource} names no function: write {resource}:NAME")
    if function_reference(resource):
        return FunctionReward(resource)
    if find_artifact(resource, "reward") or (Path(resource) / "config.yaml").exists():
        handle = store.resolve(resource, "reward")
        if handle.role.head is None:
            raise ModelError(f"{resource} holds a {handle.role.name} model, which gives no scores")
        return ModelReward(handle, token_budget)
    return SequenceClassificationReward(resource, section, store.computes_on)


def load_function(reference: str) -> Callable[..., Any]:
    """The function of a `file.py:function` or `module:function` reference.

    Raises:
        ConfigError: no such file, module or function, or it fails on import.
    """
    parts = function_reference(reference)
    assert parts is not None, reference
    where, name = parts
    if where.endswith(".py") and not Path(where).is_file():
        raise ConfigError(f"{reference}: there is no file {where} (looked up beside the config)")
    try:
        module = _run_file(where) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ConfigError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{where} has no function {name!r}")
    result: Callable[..., Any] = function
    return result


def _run_file(path: str) -> ModuleType:
    # A name that no other module has; known to `sys.modules`, where dataclasses look theirs up.
    name = f"rlhf_file_{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def checked(name: str, scores: Sequence[Any], completions: Completions) -> list[float]:
    """Scores as floats, or a `TrainingError` that names the source and the rows at fault."""
    try:
        values = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise TrainingError(f"reward {name} must return a list of numbers: {error}") from error
    if len(values) != len(completions):
        raise TrainingError(
            f"reward {name} returned {len(values)} scores for {len(completions)} completions"
        )
    bad = [row for row, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise NotFinite(
            "score",
            f"reward {name} returned {values[bad[0]]} for {len(bad)} of {len(values)} completions; "
            f"the first is row {bad[0]}: {completions.texts[bad[0]]!r}",
            [{"row": n, "response": completions.texts[n], "score": values[n]} for n in bad],
        )
    return values


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    if isinstance(prompt.prompt, str):
        return [{"role": "user", "content": prompt.prompt}]
    return [{"role": turn.role, "content": turn.content} for turn in prompt.prompt]
