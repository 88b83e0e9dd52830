"""Strings that end a response: which token completes one, and the text before it.

A response ends with the first token after which its decoded text contains a stop string. Tokens
need not begin or end where the string does, and a character may take several of them. It follows
from the response alone, so that it is the same in every batch and engine.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

# Tokens decoded beyond the longest stop string: what is decoded of the first ones may be wrong, for
# they may begin within a character, and some tokenizers drop a blank there.
MARGIN = 8
# What tokenizers show of bytes that are no whole character.
_PART_OF_A_CHARACTER = "\ufffd"


class StopStrings:
    """The stop strings of one tokenizer; false where there are none."""

    def __init__(self, tokenizer: Any, strings: Sequence[str] = ()) -> None:
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._hidden = frozenset(id_ for id_, token in added if token.special)  # not in the text
        # A token has at least a byte of text.
        self._tail = max((len(text.encode()) for text in self.strings), default=0) + MARGIN
        self._may_complete: dict[int, bool] = {}  # by token

    def __bool__(self) -> bool:
        return bool(self.strings)

    def completed(self, response_ids: Sequence[int]) -> bool:
        """Whether the last token completes a stop string, the tokens before it holding none."""
        if not (self.strings and response_ids) or not self._may(response_ids[-1]):
            return False
        shown = (token for token in reversed(response_ids) if token not in self._hidden)
        tail = list(islice(shown, self._tail))[::-1]
        return self._holds_one(self._tokenizer.decode(tail, skip_special_tokens=True))

    def before(self, text: str) -> str:
        """The text up to the first stop string in it, or all of it."""
        found = [place for stop in self.strings if (place := text.find(stop)) >= 0]
        return text[: min(found)] if found else text

    def begun(self, text: str) -> int:
        """How many letters at the end of a text may be the beginning of a stop string."""
        lengths = range(max(map(len, self.strings), default=1) - 1, 0, -1)
        starts = {stop[:n] for stop in self.strings for n in lengths if n < len(stop)}
        return next((n for n in lengths if text[-n:] in starts), 0)

    def _may(self, token: int) -> bool:
        """Whether a token can hold the end of a stop string: most cannot, and cost no decoding."""
        known = self._may_complete.get(token)
        if known is None:
            # Twice: alone, a token may lose its blank.
            text = self._tokenizer.decode([token, token], skip_special_tokens=True)
            ends = (stop[-1] for stop in self.strings)
            known = _PART_OF_A_CHARACTER in text or any(end in text for end in ends)
            self._may_complete[token] = known
        return known

    def _holds_one(self, text: str) -> bool:
        return any(stop in text for stop in self.strings)
