"""Any sequence classifier of transformers as a reward source."""

from pathlib import Path
from typing import Literal

import torch

from pipeline.config import ModelSection
from pipeline.errors import ModelError
from pipeline.models.loading import explain_load_errors, torch_dtype
from pipeline.records import Prompt
from pipeline.rewards.source import Completions, as_messages, checked


class SequenceClassificationReward:
    """Any sequence classifier of transformers with one label; reads text with its own tokenizer.

    By its chat template if it has one. Otherwise `reads` says how prompt and response go in: as one
    `text`, or as a `pair` that the tokenizer puts a separator between, as encoders are trained
    (`auto`: where it has the tokens of BERT's kind for that).
    """

    def __init__(
        self,
        path: str,
        section: ModelSection,
        device: torch.device,
        batch_rows: int = 16,
        reads: Literal["auto", "text", "pair"] = "auto",
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
        if reads == "auto":
            marks = (self.tokenizer.cls_token, self.tokenizer.sep_token)
            reads = "pair" if None not in marks else "text"
        self.reads_pairs = reads == "pair" and not self.tokenizer.chat_template
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
                *map(list, zip(*texts[start : start + self.batch_rows], strict=True)),
                padding=True,
                truncation=True,
                add_special_tokens=not self.tokenizer.chat_template,
                return_tensors="pt",
            ).to(self.device)
            scores += self.model(**batch).logits[:, 0].float().tolist()
        return checked(self.name, scores, completions)

    def _render(self, prompt: Prompt, text: str) -> tuple[str, ...]:
        """What the tokenizer is given: one text, or a pair."""
        if self.tokenizer.chat_template:
            messages = [*as_messages(prompt), {"role": "assistant", "content": text}]
            return (str(self.tokenizer.apply_chat_template(messages, tokenize=False)),)
        if isinstance(prompt.prompt, str):
            return (prompt.prompt, text) if self.reads_pairs else (prompt.prompt + text,)
        turns = [f"{turn.role}: {turn.content}" for turn in prompt.prompt]
        if self.reads_pairs:
            only = prompt.prompt[0].content if len(turns) == 1 else "\n\n".join(turns)
            return (only, text)
        return ("\n\n".join([*turns, f"assistant: {text}"]),)
