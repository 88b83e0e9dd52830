"""Frozen rows: what the data readers produce and the stages consume.

A *prompt* is either plain text (`str`, used as it stands) or a conversation (a tuple of `Message`,
rendered with the tokenizer's chat template). `origin` is `file:line`, for messages about a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


Conversation = tuple[Message, ...]
PromptText = str | Conversation


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer; `columns` are the row's further fields, kept for rewards and judges."""

    prompt: PromptText
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with the response that a person wrote for it."""

    prompt: PromptText
    response: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text as in pretraining: nobody asks, nobody answers."""

    text: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Ranking:
    """K >= 2 responses to one prompt and the order in which a person prefers them.

    `ranks[k]` is the rank of `responses[k]`: 0 is best, equal numbers are ties.
    `scores[k]`, where the data has them, are the ratings behind the ranks (higher is better).
    """

    prompt: PromptText
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    annotator: str | None = None
    origin: str = ""

    def pairs(self) -> list[tuple[int, int]]:
        """All comparable pairs (index preferred, index rejected); ties are no pairs."""
        return [
            (i, j) if self.ranks[i] < self.ranks[j] else (j, i)
            for i, j in combinations(range(len(self.responses)), 2)
            if self.ranks[i] != self.ranks[j]
        ]


def each_reply(demonstration: Demonstration) -> list[Demonstration]:
    """One demonstration an assistant turn, each with the turns before it as its prompt.

    A plain-text prompt has one reply, the response.
    """
    turns = demonstration.prompt
    if isinstance(turns, str):
        return [demonstration]
    earlier = [
        Demonstration(turns[:place], turn.content, demonstration.origin)
        for place, turn in enumerate(turns)
        if turn.role == "assistant"
    ]
    return [*earlier, demonstration]


def first_user_turn(prompt: PromptText) -> str:
    """The text that identifies a prompt across datasets: the first user turn, or the whole text."""
    if isinstance(prompt, str):
        return prompt
    return next((turn.content for turn in prompt if turn.role == "user"), prompt[0].content)
