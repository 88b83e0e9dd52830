"""How a tokenizer reads what people write: plain text, and the turns of conversations.

A conversation is rendered with the tokenizer's chat template, or a plain one that is recorded.
Special tokens inside user text (`<|im_end|>` typed by a person) become ordinary text.
"""

import copy
import re
from functools import partial
from typing import Any, Self

from pipeline.errors import ConfigError, ModelError
from pipeline.records import Message, PromptText

# The transcript format of Anthropic's HH data, for conversations on a tokenizer with no template.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\n\n' + {'user': 'Human', 'assistant': 'Assistant'}.get(message['role'], 'System') "
    "+ ': ' + message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

_SENTINEL = "\ue000{}\ue001"  # private-use characters: no template and no real text holds them
_SENTINELS = re.compile("\ue000(\\d+)\ue001")


class Rendering:
    """A tokenizer and its way with text and turns.

    `system_prompt` is the system turn of conversations that have none.
    """

    def __init__(self, tokenizer: Any, chat_template: str) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.system_prompt: str | None = None
        self._opening, self._closing = _round_a_text(tokenizer)
        # Not `all_special_tokens`, which are the named ones: Llama 3's header tokens have no name.
        special = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._specials = {token.content for token in special.values()}
        self._special_ids = special.keys() - {tokenizer.unk_token_id}
        self.template_source = "tokenizer" if tokenizer.chat_template else "plain"
        self._string_as_turn = chat_template == "auto" and bool(tokenizer.chat_template)
        self._template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
        self._rendered_turns = False
        # The texts that the template puts before and after a response.
        self._lead, self._tail = self._probe_template()

    @property
    def name(self) -> str:
        """What the tokenizer was loaded from."""
        return str(self.tokenizer.name_or_path)

    @property
    def lead(self) -> str:
        """The text that the chat template puts before a response."""
        return self._lead

    @property
    def has_template(self) -> bool:
        """Whether a saved tokenizer takes a chat template along."""
        return self.template_source == "tokenizer" or self._rendered_turns

    @property
    def writes(self) -> bool:
        """Whether its model writes responses, and does not only read text to score it."""
        return True

    @property
    def answers_turns(self) -> bool:
        """Whether the model was trained on turns of a conversation, not on plain text alone."""
        return self._string_as_turn or self._rendered_turns

    def prompt_text(self, prompt: PromptText) -> str:
        """The prompt as the model sees it, rendered but not tokenised."""
        turns = self._turns(prompt)
        return str(prompt) if turns is None else self._render(turns)

    def is_lead(self, text: str, conversation: bool = False) -> bool:
        """Whether the start of a response is a part of the template's lead, which `text` cuts."""
        leads = conversation or self._string_as_turn
        return leads and text != "" and text != self._lead and self._lead.startswith(text)

    def with_system_prompt(self, text: str) -> Self:
        """The same with a system turn before conversations that have none.

        Raises:
            ModelError: the template refuses system turns, or leaves them out.
        """
        other = copy.copy(self)
        other.system_prompt = text
        try:
            shown = text.strip() in self._render((Message("system", text), Message("user", "?")))
            reason = "leaves system turns out"
        except ModelError as error:
            shown, reason = False, f"refuses a system turn ({error.__cause__})"
        if not shown:
            raise ModelError(
                f"data.system_prompt is set, but the chat template of {self.name!r} {reason}. "
                "Leave data.system_prompt out and put its text into the first user turn of your "
                "prompts, or give the tokenizer a template that has system turns"
            )
        return other

    def without_system_prompt(self) -> Self:
        """The same with conversations as they come."""
        other = copy.copy(self)
        other.system_prompt = None
        return other

    def of_plain_text(self) -> Self:
        """The same with strings as they stand: no turn of a template, no system turn before it."""
        other = self.without_system_prompt()
        other._string_as_turn = False
        return other

    def _turns(self, prompt: PromptText) -> tuple[Message, ...] | None:
        if isinstance(prompt, str) and not self._string_as_turn:
            if self.system_prompt is not None and self.writes:
                raise ConfigError(
                    f"data.system_prompt is set, but a prompt is plain text ({prompt[:40]!r}), "
                    "which is used as it stands: it has no turns to put a system turn before. "
                    "Write prompts as lists of {role, content}, use a tokenizer with a chat "
                    "template (model.chat_template: auto), or leave data.system_prompt out"
                )
            return None
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        if self.system_prompt is None or turns[0].role == "system":
            return turns
        return (Message("system", self.system_prompt), *turns)

    def _render(self, turns: tuple[Message, ...], add_generation_prompt: bool = True) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except Exception as error:  # templates raise whatever their author wrote
            raise ModelError(
                f"the chat template of {self.name!r} refuses a conversation with the roles "
                f"{[turn.role for turn in turns]}: {error}"
            ) from error

    def _encode_turns(self, turns: tuple[Message, ...]) -> list[int]:
        self._rendered_turns = True
        # Longer texts than the model's are cut afterwards: no warning of them.
        encode = partial(self.tokenizer.encode, verbose=False)
        if not any(token in turn.content for turn in turns for token in self._specials):
            ids: list[int] = encode(self._render(turns), add_special_tokens=False)
            return ids
        # Someone typed a special token: the template's own are parsed, those in the text are not.
        marked = tuple(
            Message(turn.role, _SENTINEL.format(index)) for index, turn in enumerate(turns)
        )
        ids = []
        for position, piece in enumerate(_SENTINELS.split(self._render(marked))):
            if position % 2:
                content = turns[int(piece)].content
                ids += self._plain_ids(content)
            elif piece:
                ids += encode(piece, add_special_tokens=False)
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of text that people wrote: no special token is among them."""
        # Longer texts than the model's are cut afterwards: no warning of them.
        ids: list[int] = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        # Unigram tokenizers know their special tokens as pieces of text, too: those are left out.
        return [id_ for id_ in ids if id_ not in self._special_ids]

    def _lead_of(self, conversation: bool) -> str:
        return self._lead if conversation or self._string_as_turn else ""

    def _probe_template(self) -> tuple[str, str]:
        """The texts that the template puts before and after a response."""
        question = (Message("user", "?"),)
        answer = _SENTINEL.format(0)
        try:
            before = self._render(question)
            whole = self._render((*question, Message("assistant", answer)), False)
        except ModelError:
            return "", ""
        head, _, tail = whole.partition(answer)
        lead = head.removeprefix(before) if head.startswith(before) else ""
        return lead, tail


def _round_a_text(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and those that it puts after."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    before = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:before], whole[before + len(bare) :]
