"""Conversations and prompts: lists of {role, content} and Human/Assistant transcripts -> turns."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.data.validate import Reason, RowFault, as_list, as_text, excerpt, wrong_type
from pipeline.records import Conversation, Message, PromptText

ROLES = ("system", "user", "assistant")


def read_prompt(value: Any, field: str = "prompt") -> PromptText:
    """A prompt as text, as a list of {role, content}, or as an HH transcript that asks for a reply.

    Text of the form "\\n\\nHuman: ...\\n\\nAssistant:" becomes a conversation, so that the chat
    template applies to its turns and splits go by its first user turn.
    """
    if isinstance(value, list):
        return ends_with_user(as_conversation(value, field), field)
    text = as_text(value, field)
    if is_transcript(text) and text.rstrip().endswith("\n\nAssistant:"):
        opening = text.rstrip().removesuffix("\n\nAssistant:")
        return ends_with_user(check_turns(transcript_turns(opening, field), field), field)
    return text


def ends_with_user(turns: Conversation, field: str) -> Conversation:
    """The conversation, if it asks for a reply."""
    if turns[-1].role != "user":
        raise RowFault(Reason.PROMPT_END, f"the last turn of `{field}` is {turns[-1].role}")
    return turns


def is_transcript(value: Any) -> bool:
    """Whether a value looks like an Anthropic HH transcript (arXiv:2204.05862)."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def transcript_turns(text: str, field: str) -> list[Message]:
    """The turns of an Anthropic HH transcript, without outer whitespace; their order is unchecked.

    Raises:
        RowFault: the text does not start with "Human:", or a turn is empty.
    """
    if not is_transcript(text):
        raise RowFault(Reason.TRANSCRIPT, f"`{field}` starts with {excerpt(text[:40])}")
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    turns = []
    for i, (speaker, content) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        role = "user" if speaker == "Human" else "assistant"
        if not content.strip():
            last = role == "assistant" and i == len(parts) // 2 - 1
            reason = Reason.EMPTY_REPLY if last else Reason.BLANK
            raise RowFault(reason, f"turn {i + 1} of `{field}` ({speaker}) is empty")
        turns.append(Message(role, content.strip()))
    return turns


def as_conversation(value: Any, field: str) -> Conversation:
    """A list of {role, content} as turns: an optional system turn, then user and assistant in turn.

    An empty system turn says nothing and is left out.

    Raises:
        RowFault: unknown role, blank turn, two turns of the same role in a row, or a conversation
            that does not start with a user turn.
    """
    turns = []
    items = as_list(value, field)
    for i, item in enumerate(items):
        where = f"{field}[{i}]"
        if not isinstance(item, Mapping):
            raise wrong_type(where, item, "an object with role and content")
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise RowFault(Reason.UNKNOWN_ROLE, f"`{where}.role` is {excerpt(role)}")
        blank = content is None or (isinstance(content, str) and not content.strip())
        if blank and role == "system":
            continue
        if blank and role == "assistant" and i == len(items) - 1:
            raise RowFault(Reason.EMPTY_REPLY, f"`{where}.content` is {excerpt(content)}")
        turns.append(Message(role, as_text(content, f"{where}.content")))
    return check_turns(turns, field)


def check_turns(turns: list[Message], field: str) -> Conversation:
    """The rules for the order of turns (see `as_conversation`)."""
    if not turns:
        raise RowFault(Reason.BLANK, f"`{field}` holds no turns")
    start = 1 if turns[0].role == "system" else 0
    for i in range(1, len(turns)):
        if turns[i].role == turns[i - 1].role:
            raise RowFault(
                Reason.SAME_ROLE, f"turns {i} and {i + 1} of `{field}` are both {turns[i].role}"
            )
        if turns[i].role == "system":
            raise RowFault(
                Reason.UNKNOWN_ROLE,
                f"turn {i + 1} of `{field}` is a system turn; only the first may be",
            )
    if len(turns) <= start or turns[start].role != "user":
        raise RowFault(Reason.FIRST_TURN, f"`{field}` starts with {turns[-1 if start else 0].role}")
    return tuple(turns)


def as_messages(prompt: PromptText) -> list[dict[str, str]]:
    """A prompt as a list of {role, content}; plain text is one user turn."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def last_reply(turns: Conversation, field: str = "messages") -> tuple[Conversation, str]:
    """A conversation as the prompt and its last assistant turn."""
    if all(turn.role != "assistant" for turn in turns):
        roles = ", ".join(turn.role for turn in turns)
        raise RowFault(Reason.NO_ASSISTANT, f"the turns of `{field}` are {roles}")
    if turns[-1].role != "assistant":
        raise RowFault(Reason.LAST_TURN, f"the last turn of `{field}` is {turns[-1].role}")
    return turns[:-1], turns[-1].content
