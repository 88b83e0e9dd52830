"""Text to ids for encoders: a prompt and a response in the tokenizer's own pair template."""

from typing import Any

from pipeline.codec import Codec
from pipeline.errors import ModelError
from pipeline.records import PromptText


class PairCodec(Codec):
    """A codec of models that read and do not write: `[CLS] prompt [SEP] response [SEP]`, no end.

    The template's tokens before and between the two texts belong to the prompt's ids, those after
    them to the response's. They count in the limits, and are never cut. A response that is cut is
    closed like a whole one: the template says where a text ends, not whether it was finished.
    """

    rows = "pair"

    def __init__(self, tokenizer: Any, **settings: Any) -> None:
        self._before, self._between, self._after = pair_template(tokenizer)
        super().__init__(tokenizer, **settings)

    def prompt_ids(self, prompt: PromptText, limit: int | None = None) -> list[int]:
        """Token ids of a rendered prompt with what the template puts before and after it.

        Those longer than `max_prompt_tokens` (or `limit`) keep their end: the last turn matters.
        """
        turns = self._turns(prompt)
        ids = self._plain_ids(str(prompt)) if turns is None else self._encode_turns(turns)
        beside = len(self._before) + len(self._between)
        room = max(self._prompt_limit(len(ids) + beside, limit) - beside, 0)
        return [*self._before, *ids[max(len(ids) - room, 0) :], *self._between]

    def response_ids(
        self, text: str, conversation: bool = False, *, ended: bool = True
    ) -> list[int]:
        """Token ids of a response and what the template puts after it, in `max_response_tokens`."""
        ids = self._plain_ids(self._lead_of(conversation) + text)
        room = max(self.max_response_tokens - len(self._after), 0)
        if len(ids) > room:
            self._count_cut_response()
        return [*ids[:room], *self._after]

    def _stops(self, stop_ids: frozenset[int]) -> frozenset[int]:
        return frozenset()

    def _end(self, after: str) -> int:
        return self._after[-1]


def pair_template(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """The special tokens that a tokenizer puts before, between and after the texts of a pair.

    Raises:
        ModelError: it closes no pair, or cannot say which text a token is of.
    """
    pair = tokenizer("a", "b")
    if not tokenizer.is_fast:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} has no tokenizer.json, by which the special "
            "tokens of a pair are known: save it once with transformers' fast tokenizer"
        )
    ids, texts = pair["input_ids"], pair.sequence_ids(0)
    first, second = [[at for at, text in enumerate(texts) if text == n] for n in (0, 1)]
    after = ids[second[-1] + 1 :]
    if not after:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} puts no token after a pair of texts, so an "
            "encoder could not tell where they end: give its tokenizer.json a post-processor "
            "([CLS] $A [SEP] $B [SEP])"
        )
    return ids[: first[0]], ids[first[-1] + 1 : second[0]], after
