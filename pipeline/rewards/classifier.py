"""Any sequence classifier of transformers as a reward source."""

from pathlib import Path

import torch

from pipeline.config import ModelSection
from pipeline.errors import ModelError
from pipeline.models.loading import explain_load_errors, torch_dtype
from pipeline.records import Prompt
from pipeline.rewards.source import Completions, as_messages, checked


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
            messages = [*as_messages(prompt), {"role": "assistant", "content": text}]
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        if isinstance(prompt.prompt, str):
            return prompt.prompt + text
        turns = [f"{turn.role}: {turn.content}" for turn in prompt.prompt]
        return "\n\n".join([*turns, f"assistant: {text}"])
