"""Text to token ids and back: the one place that tokenises.

A prompt and a response are always tokenised apart, in training as in generation: joined text can
merge across the seam into tokens that a sampling policy never sees. Special tokens inside user text
(`<|im_end|>` typed by a person) become ordinary text.
"""

import copy
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, ModelError
from pipeline.generation_config import GenerationSection
from pipeline.records import Message, PromptText
from pipeline.runfolder import read_json, write_json_atomic, writing
from pipeline.stop_strings import StopStrings

PROMPTS_CUT = "prompts cut to data.max_prompt_tokens"
RESPONSES_CUT = "responses cut to data.max_response_tokens"

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


class Codec:
    """A tokenizer with the run's limits, stop ids and way of rendering prompts.

    Of an encoder-decoder, a prompt is a whole text of the encoder's: it has all the special tokens
    that the tokenizer puts round one, and a response begins with those that it puts before one.

    `stop_ids` end a response; `end_id` is the one of them that training appends. `pad_id` only
    fills tensors: ends are known by lengths, never by looking for a pad. `counts` tells how many
    prompts and responses were cut to their limits. `system_prompt` is the system turn of
    conversations that have none; `stop_strings` end a response as stop ids do, and `forbidden_ids`
    are never sampled.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_ids: frozenset[int] = frozenset(),
        encoder_decoder: bool = False,
        chat_template: str = "auto",
        max_prompt_tokens: int = 512,
        max_response_tokens: int = 512,
    ) -> None:
        if tokenizer.eos_token_id is None and not stop_ids:
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token: responses "
                "could never end. Set eos_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self._opening, self._closing = _round_a_text(tokenizer)
        self.chat_template = chat_template
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.counts: Counter[str] = Counter()
        # Not `all_special_tokens`, which are the named ones: Llama 3's header tokens have no name.
        special = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._specials = {token.content for token in special.values()}
        self._special_ids = special.keys() - {tokenizer.unk_token_id}
        self.template_source = "tokenizer" if tokenizer.chat_template else "plain"
        self._string_as_turn = chat_template == "auto" and bool(tokenizer.chat_template)
        self._template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
        self._rendered_turns = False
        eos = tokenizer.eos_token_id
        self.stop_ids = stop_ids | ({eos} if eos is not None else frozenset())
        self.stop_strings = StopStrings(tokenizer)
        self.forbidden_ids: frozenset[int] = frozenset()
        self.system_prompt: str | None = None
        self._lead, self.end_id = self._probe_template()
        self.pad_id: int = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prompt_ids(self, prompt: PromptText) -> list[int]:
        """Token ids of a rendered prompt, BOS included where the tokenizer has one.

        Prompts longer than `max_prompt_tokens` keep their end (and BOS): the last turn matters.
        """
        ids = self._rendered_ids(prompt)
        if len(ids) <= self.max_prompt_tokens:
            return ids
        self.counts[PROMPTS_CUT] += 1
        keep_bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return keep_bos + ids[len(ids) - self.max_prompt_tokens + len(keep_bos) :]

    def _rendered_ids(self, prompt: PromptText) -> list[int]:
        """Token ids of a whole prompt, whatever its length."""
        turns = self._turns(prompt)
        # A decoder's template has its own opening, and a decoder goes on from what stays open.
        opening = self._opening if turns is None or self.encoder_decoder else []
        closing = self._closing if self.encoder_decoder else []
        ids = self._plain_ids(str(prompt)) if turns is None else self._encode_turns(turns)
        return [*opening, *ids, *closing]

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of text that people wrote: no special token is among them."""
        ids: list[int] = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        # Unigram tokenizers know their special tokens as pieces of text, too: those are left out.
        return [id_ for id_ in ids if id_ not in self._special_ids]

    def response_ids(self, text: str, conversation: bool = False) -> list[int]:
        """Token ids of a response, closed by `end_id`; cut without it at `max_response_tokens`.

        `conversation` says that the prompt is one, so that the template's lead (a blank after
        `Assistant:`) belongs before the text; prompts rendered as turns imply it.
        """
        ids = self._encode_response(text, conversation)
        if len(ids) < self.max_response_tokens:
            return [*ids, self.end_id]
        self.counts[RESPONSES_CUT] += 1
        return ids[: self.max_response_tokens]

    def _encode_response(self, text: str, conversation: bool) -> list[int]:
        lead = self._lead if conversation or self._string_as_turn else ""
        opening = self._opening if self.encoder_decoder else []
        return [*opening, *self._plain_ids(lead + text)]

    def pair_ids(self, prompt: PromptText, response: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of a response to it."""
        return self.prompt_ids(prompt), self.response_ids(response, not isinstance(prompt, str))

    def chunks(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Plain text as pairs of one token and those after it, that many at most as limits allow.

        A pair begins with the token that the one before it ends with: every token but the text's
        first (BOS, where the tokenizer has one) is predicted once. None of a text of one token. The
        end of a text is no end of a response: `end_id` is not appended.
        """
        ids = [*self._opening, *self._plain_ids(text)]
        size = self.max_prompt_tokens + self.max_response_tokens - 1
        starts = range(0, len(ids) - 1, size)
        return [(ids[start : start + 1], ids[start + 1 : start + 1 + size]) for start in starts]

    def text(self, response_ids: list[int], conversation: bool = False) -> str:
        """Text of a response without its stop token, special tokens and the template's lead.

        `conversation` as in `response_ids`. A stop string, and what its last token says beyond it,
        are no part of the text.
        """
        if response_ids and response_ids[-1] in self.stop_ids:
            response_ids = response_ids[:-1]
        text = self.tokenizer.decode(response_ids, skip_special_tokens=True)
        text = self.stop_strings.before(text)
        return text.removeprefix(self._lead) if conversation or self._string_as_turn else text

    def ends(self, response_ids: Sequence[int]) -> bool:
        """Whether a response ends with its last token: a stop id, or one that completes a string.

        It has not ended before.
        """
        last = response_ids[-1] if response_ids else None
        return last in self.stop_ids or self.stop_strings.completed(response_ids)

    def until_end(self, response_ids: list[int]) -> list[int]:
        """The tokens up to the first that ends the response, it included."""
        for length in range(1, len(response_ids) + 1):
            token = response_ids[length - 1]
            if token in self.stop_ids or self.stop_strings.completed(response_ids[:length]):
                return response_ids[:length]
        return response_ids

    def closed_ids(self, response_ids: Sequence[int], conversation: bool = False) -> list[int]:
        """A response as training would have it: one that a stop string ended is its text, closed.

        Any other stays as it was sampled.
        """
        if not self.stop_strings.completed(response_ids):
            return list(response_ids)
        text = self.text(list(response_ids), conversation)
        return [*self._encode_response(text, conversation), self.end_id]

    def prompt_text(self, prompt: PromptText) -> str:
        """The prompt as the model sees it, rendered but not tokenised."""
        turns = self._turns(prompt)
        return str(prompt) if turns is None else self._render(turns)

    def is_lead(self, text: str, conversation: bool = False) -> bool:
        """Whether the start of a response is a part of the template's lead, which `text` cuts."""
        leads = conversation or self._string_as_turn
        return leads and text != "" and text != self._lead and self._lead.startswith(text)

    @property
    def answers_turns(self) -> bool:
        """Whether the model was trained on turns of a conversation, not on plain text alone."""
        return self._string_as_turn or self._rendered_turns

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

    def same_ids(self, other: "Codec") -> bool:
        """Whether ids of one codec may be read by a model of the other (same vocabulary)."""
        ours, theirs = self.tokenizer, other.tokenizer
        return ours is theirs or ours.get_vocab() == theirs.get_vocab()

    def with_limits(self, max_prompt_tokens: int, max_response_tokens: int) -> "Codec":
        """The same codec with other limits and counts of its own."""
        other = copy.copy(self)
        other.max_prompt_tokens = max_prompt_tokens
        other.max_response_tokens = max_response_tokens
        other.counts = Counter()
        return other

    def of_run(self, system_prompt: str | None, generation: GenerationSection | None) -> "Codec":
        """The codec as a run speaks and samples; what the run leaves open stays as it is.

        Raises:
            ConfigError, ModelError: see `sampling_by` and `with_system_prompt`.
        """
        codec = self if system_prompt is None else self.with_system_prompt(system_prompt)
        return codec if generation is None else codec.sampling_by(generation)

    def with_system_prompt(self, text: str) -> "Codec":
        """The same codec with a system turn before conversations that have none.

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

    def sampling_by(self, section: GenerationSection) -> "Codec":
        """The same codec with a run's stop strings and forbidden tokens.

        Raises:
            ConfigError: a forbidden token is not one token of this vocabulary, or ends responses.
        """
        other = copy.copy(self)
        other.stop_strings = StopStrings(self.tokenizer, section.stop_strings)
        other.forbidden_ids = frozenset(map(self._forbidden_id, section.forbidden_tokens))
        return other

    def _forbidden_id(self, token: int | str) -> int:
        if isinstance(token, int):
            ids = [token]
        else:
            ids = self.tokenizer.encode(token, add_special_tokens=False)
        setting = f"generation.forbidden_tokens has {token!r}"
        if len(ids) != 1:
            parts = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(ids)))
            raise ConfigError(
                f"{setting}, which is {len(ids)} tokens of {self.name!r} ({parts}): forbidding "
                "them all would forbid more than this text. Name single tokens, by text or by id"
            )
        (found,) = ids
        if found >= len(self.tokenizer):
            raise ConfigError(
                f"{setting}, but {self.name!r} has the ids 0 to {len(self.tokenizer) - 1}"
            )
        if found in self.stop_ids:
            raise ConfigError(
                f"{setting}, which is a stop token of {self.name!r}: no response could end by it. "
                "Leave it out"
            )
        return found

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
            "encoder_decoder": self.encoder_decoder,
            "chat_template": self.chat_template,
            "template_source": self.template_source,
            "rendered_turns": self._rendered_turns,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_response_tokens": self.max_response_tokens,
            "system_prompt": self.system_prompt,
            "stop_strings": list(self.stop_strings.strings),
            "forbidden_ids": sorted(self.forbidden_ids),
        }
        write_json_atomic(folder / "codec.json", settings)

    @classmethod
    def load(cls, folder: Path) -> "Codec":
        """Rebuild a codec from a folder that `save` wrote."""
        from transformers import AutoTokenizer

        settings = read_json(folder / "codec.json")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if settings["template_source"] == "plain":
            tokenizer.chat_template = None  # plain strings are turns only under a real template
        codec = cls(
            tokenizer,
            stop_ids=frozenset(settings["stop_ids"]),
            encoder_decoder=settings.get("encoder_decoder", False),
            chat_template=settings["chat_template"],
            max_prompt_tokens=settings["max_prompt_tokens"],
            max_response_tokens=settings["max_response_tokens"],
        )
        # Artifacts of earlier versions have none of the three.
        codec.system_prompt = settings.get("system_prompt")
        codec.stop_strings = StopStrings(tokenizer, settings.get("stop_strings", ()))
        codec.forbidden_ids = frozenset(settings.get("forbidden_ids", ()))
        codec._rendered_turns = settings["rendered_turns"]
        return codec

    # --- chat templates ---

    def _turns(self, prompt: PromptText) -> tuple[Message, ...] | None:
        if isinstance(prompt, str) and not self._string_as_turn:
            if self.system_prompt is not None:
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
        encode = self.tokenizer.encode
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

    def _probe_template(self) -> tuple[str, int]:
        """The text that the template puts before a response, and the stop id it puts after."""
        eos = self.tokenizer.eos_token_id
        default_end = eos if eos is not None else min(self.stop_ids)
        question = (Message("user", "?"),)
        answer = _SENTINEL.format(0)
        try:
            before = self._render(question)
            whole = self._render((*question, Message("assistant", answer)), False)
        except ModelError:
            return "", default_end
        head, _, tail = whole.partition(answer)
        lead = head.removeprefix(before) if head.startswith(before) else ""
        after = self.tokenizer.encode(tail, add_special_tokens=False) if tail else []
        return lead, next((id_ for id_ in after if id_ in self.stop_ids), default_end)


def _round_a_text(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and those that it puts after."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    before = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:before], whole[before + len(bare) :]
