"""Text to token ids and back: the one place that tokenises.

A prompt and a response are always tokenised apart, in training as in generation: joined text can
merge across the seam into tokens that a sampling policy never sees. Special tokens inside user text
(`<|im_end|>` typed by a person) become ordinary text.
"""

import copy
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.records import Message, PromptText
from pipeline.runfolder import read_json, write_json_atomic, writing

PROMPTS_CUT = "prompts cut to data.max_prompt_tokens"
RESPONSES_CUT = "responses cut to data.max_response_tokens"
# Of a codec with `max_tokens`: its settings, and what the positions leave to a prompt.
BASE_PROMPTS_CUT = "prompts cut to the limits of reward.base"
BASE_RESPONSES_CUT = "responses cut to the limits of reward.base"

# The transcript format of Anthropic's HH data, for conversations on a tokenizer with no template.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\n\n' + {'user': 'Human', 'assistant': 'Assistant'}.get(message['role'], 'System') "
    "+ ': ' + message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

MOST_TOKENS = 1 << 20  # of a model whose config names no limit

_SENTINEL = "\ue000{}\ue001"  # private-use characters: no template and no real text holds them
_SENTINELS = re.compile("\ue000(\\d+)\ue001")


class Codec:
    """A tokenizer with the run's limits, stop ids and way of rendering prompts.

    `stop_ids` end a response; `end_id` is the one of them that training appends. `pad_id` only
    fills tensors: ends are known by lengths, never by looking for a pad. `counts` tells how many
    prompts and responses were cut to their limits. `max_tokens`, of a model that is not the
    policy's base (`ModelStore.other_base`), are the positions that prompt and response share.
    """

    rows = "joined"  # how a model sees a prompt and a response (`PairCodec`: as a pair)
    max_tokens: int | None = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_ids: frozenset[int] = frozenset(),
        chat_template: str = "auto",
        max_prompt_tokens: int = 512,
        max_response_tokens: int = 512,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = self._stops(stop_ids)
        self.chat_template = chat_template
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.counts: Counter[str] = Counter()
        # Not `all_special_tokens`, which are the named ones: Llama 3's header tokens have no name.
        self._specials = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        self.template_source = "tokenizer" if tokenizer.chat_template else "plain"
        self._string_as_turn = chat_template == "auto" and bool(tokenizer.chat_template)
        self._template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
        self._rendered_turns = False
        self._lead, after = self._probe_template()
        self.end_id = self._end(after)
        self.pad_id: int = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prompt_ids(self, prompt: PromptText, limit: int | None = None) -> list[int]:
        """Token ids of a rendered prompt, BOS included where the tokenizer has one.

        Those longer than `max_prompt_tokens` (or `limit`) keep their end (and BOS): the last turn
        matters.
        """
        turns = self._turns(prompt)
        if turns is None:
            ids = self.tokenizer.encode(prompt, split_special_tokens=True)
            if ids and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]  # some tokenizers close every text; a prompt must stay open
        else:
            ids = self._encode_turns(turns)
        most = self._prompt_limit(len(ids), limit)
        if len(ids) <= most:
            return ids
        keep_bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return keep_bos + ids[len(ids) - most + len(keep_bos) :]

    def _prompt_limit(self, length: int, limit: int | None) -> int:
        """The tokens that a prompt of `length` may have; one that has more is counted as cut."""
        most = self.max_prompt_tokens if limit is None else min(limit, self.max_prompt_tokens)
        if length > most:
            self.counts[PROMPTS_CUT if self.max_tokens is None else BASE_PROMPTS_CUT] += 1
        return most

    def response_ids(
        self, text: str, conversation: bool = False, *, ended: bool = True
    ) -> list[int]:
        """Token ids of a response, closed by `end_id`; cut without it at `max_response_tokens`.

        `conversation` says that the prompt is one, so that the template's lead (a blank after
        `Assistant:`) belongs before the text; prompts rendered as turns imply it. One that no stop
        token `ended` is not closed either.
        """
        ids = self.tokenizer.encode(
            self._lead_of(conversation) + text, add_special_tokens=False, split_special_tokens=True
        )
        if not ended and 0 < len(ids) <= self.max_response_tokens:
            return list(ids)
        if len(ids) < self.max_response_tokens:
            return [*ids, self.end_id]
        self._count_cut_response()
        return ids[: self.max_response_tokens]

    def _count_cut_response(self) -> None:
        self.counts[RESPONSES_CUT if self.max_tokens is None else BASE_RESPONSES_CUT] += 1

    def ranked_ids(
        self, prompt: PromptText, responses: Sequence[str], ended: Sequence[bool] | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt and of several responses to it, each within `max_tokens` with it.

        The prompt is cut once, for the longest of them: they are compared after the same words.
        """
        is_conversation = not isinstance(prompt, str)
        response_ids = [
            self.response_ids(text, is_conversation, ended=end)
            for text, end in zip(responses, ended or [True] * len(responses), strict=True)
        ]
        longest = max(map(len, response_ids))
        room = None if self.max_tokens is None else self.max_tokens - longest
        return self.prompt_ids(prompt, room), response_ids

    def pair_ids(self, prompt: PromptText, response: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of a response to it."""
        return self.prompt_ids(prompt), self.response_ids(response, not isinstance(prompt, str))

    def text(self, response_ids: list[int], conversation: bool = False) -> str:
        """Text of a response without its stop token, special tokens and the template's lead.

        `conversation` as in `response_ids`.
        """
        if response_ids and response_ids[-1] in self.stop_ids:
            response_ids = response_ids[:-1]
        text: str = self.tokenizer.decode(response_ids, skip_special_tokens=True)
        return text.removeprefix(self._lead_of(conversation))

    def prompt_text(self, prompt: PromptText) -> str:
        """The prompt as the model sees it, rendered but not tokenised."""
        turns = self._turns(prompt)
        return str(prompt) if turns is None else self._render(turns)

    @property
    def name(self) -> str:
        """What the tokenizer was loaded from."""
        return str(self.tokenizer.name_or_path)

    def same_ids(self, other: "Codec") -> bool:
        """Whether ids of one codec may be read by a model of the other.

        The vocabulary is the same, and so is the kind of rows: those of a base of its own have
        limits of their own, and an encoder's are pairs.
        """
        if type(self) is not type(other) or self.max_tokens != other.max_tokens:
            return False
        ours, theirs = self.tokenizer, other.tokenizer
        return bool(ours is theirs or ours.get_vocab() == theirs.get_vocab())

    def with_limits(self, max_prompt_tokens: int, max_response_tokens: int) -> "Codec":
        """The same codec with other limits and counts of its own."""
        other = copy.copy(self)
        other.max_prompt_tokens = max_prompt_tokens
        other.max_response_tokens = max_response_tokens
        other.counts = Counter()
        return other

    def with_positions(self, max_tokens: int | None) -> "Codec":
        """The same codec for a model with so many positions; a response gets at most half of them.

        Without a number, none is known to be too many.
        """
        most = MOST_TOKENS if max_tokens is None else max_tokens
        other = self.with_limits(self.max_prompt_tokens, min(self.max_response_tokens, most // 2))
        other.max_tokens = most
        return other

    # --- files ---

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer for plain transformers, with the chat template that was used.

        The plain template goes along only if conversations were rendered with it: a model that
        never saw it must not seem to be a chat model.
        """
        tokenizer = self.tokenizer
        if self.template_source == "plain" and self._rendered_turns:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        with writing(folder):
            tokenizer.save_pretrained(str(folder))

    def save(self, folder: Path) -> None:
        """Write the tokenizer and `codec.json` into `folder`."""
        self.save_tokenizer(folder)
        settings = {
            "stop_ids": sorted(self.stop_ids),
            "chat_template": self.chat_template,
            "template_source": self.template_source,
            "rendered_turns": self._rendered_turns,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_response_tokens": self.max_response_tokens,
            "max_tokens": self.max_tokens,
            "rows": self.rows,
        }
        write_json_atomic(folder / "codec.json", settings)

    @classmethod
    def load(cls, folder: Path) -> "Codec":
        """Rebuild a codec from a folder that `save` wrote."""
        from transformers import AutoTokenizer

        from pipeline.pair_codec import PairCodec

        settings = read_json(folder / "codec.json")
        kind = {"joined": cls, "pair": PairCodec}[settings.get("rows", "joined")]
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if settings["template_source"] == "plain":
            tokenizer.chat_template = None  # plain strings are turns only under a real template
        codec = kind(
            tokenizer,
            stop_ids=frozenset(settings["stop_ids"]),
            chat_template=settings["chat_template"],
            max_prompt_tokens=settings["max_prompt_tokens"],
            max_response_tokens=settings["max_response_tokens"],
        )
        codec._rendered_turns = settings["rendered_turns"]
        codec.max_tokens = settings.get("max_tokens")
        return codec

    # --- chat templates ---

    def _turns(self, prompt: PromptText) -> tuple[Message, ...] | None:
        if not isinstance(prompt, str):
            return prompt
        return (Message("user", prompt),) if self._string_as_turn else None

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
                ids += encode(content, add_special_tokens=False, split_special_tokens=True)
            elif piece:
                ids += encode(piece, add_special_tokens=False)
        return ids

    def _lead_of(self, conversation: bool) -> str:
        return self._lead if conversation or self._string_as_turn else ""

    def _stops(self, stop_ids: frozenset[int]) -> frozenset[int]:
        eos = self.tokenizer.eos_token_id
        if eos is None and not stop_ids:
            raise ModelError(
                f"tokenizer {self.name!r} has no end-of-sequence token: responses could never end. "
                "Set eos_token in its tokenizer_config.json."
            )
        return stop_ids | ({eos} if eos is not None else frozenset())

    def _end(self, after: str) -> int:
        """The stop id in the text that the template puts after a response, or the tokenizer's."""
        eos = self.tokenizer.eos_token_id
        ids = self.tokenizer.encode(after, add_special_tokens=False) if after else []
        default = eos if eos is not None else min(self.stop_ids)
        return next((id_ for id_ in ids if id_ in self.stop_ids), default)

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
