"""Text to token ids and back: the one place that tokenises.

A prompt and a response are always tokenised apart, in training as in generation: joined text can
merge across the seam into tokens that a sampling policy never sees.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, ModelError
from pipeline.generation_config import GenerationSection
from pipeline.records import PromptText
from pipeline.rendering import PLAIN_CHAT_TEMPLATE, Rendering
from pipeline.runfolder import read_json, write_json_atomic, writing
from pipeline.stop_strings import StopStrings

PROMPTS_CUT = "prompts cut to data.max_prompt_tokens"
RESPONSES_CUT = "responses cut to data.max_response_tokens"
# Of a codec with `max_tokens`: its settings, and what the positions leave to a prompt.
BASE_PROMPTS_CUT = "prompts cut to the limits of reward.base"
BASE_RESPONSES_CUT = "responses cut to the limits of reward.base"

MOST_TOKENS = 1 << 20  # of a model whose config names no limit


class Codec(Rendering):
    """A tokenizer with the run's limits, stop ids and way of rendering prompts.

    Of an encoder-decoder, a prompt is a whole text of the encoder's: it has all the special tokens
    that the tokenizer puts round one, and a response begins with those that it puts before one.

    `stop_ids` end a response; `end_id` is the one of them that training appends. `pad_id` only
    fills tensors: ends are known by lengths, never by looking for a pad. `counts` tells how many
    prompts and responses were cut to their limits. `stop_strings` end a response as stop ids do,
    and `forbidden_ids` are never sampled. `max_tokens`, of a model that is not the policy's base
    (`ModelStore.other_base`), are the positions that prompt and response share.
    """

    rows = "joined"  # how a model sees a prompt and a response (`PairCodec`: as a pair)
    max_tokens: int | None = None

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
        super().__init__(tokenizer, chat_template)
        self.encoder_decoder = encoder_decoder
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.counts: Counter[str] = Counter()
        self.stop_ids = self._stops(stop_ids)
        self.stop_strings = StopStrings(tokenizer)
        self.forbidden_ids: frozenset[int] = frozenset()
        self.end_id = self._end(self._tail)
        self.pad_id: int = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prompt_ids(self, prompt: PromptText, limit: int | None = None) -> list[int]:
        """Token ids of a rendered prompt, BOS included where the tokenizer has one.

        Those longer than `max_prompt_tokens` (or `limit`) keep their end (and BOS): the last turn
        matters.
        """
        ids = self._rendered_ids(prompt)
        most = self._prompt_limit(len(ids), limit)
        if len(ids) <= most:
            return ids
        keep_bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return keep_bos + ids[len(ids) - most + len(keep_bos) :]

    def _rendered_ids(self, prompt: PromptText) -> list[int]:
        """Token ids of a whole prompt, whatever its length."""
        turns = self._turns(prompt)
        # A decoder's template has its own opening, and a decoder goes on from what stays open.
        opening = self._opening if turns is None or self.encoder_decoder else []
        closing = self._closing if self.encoder_decoder else []
        ids = self._plain_ids(str(prompt)) if turns is None else self._encode_turns(turns)
        return [*opening, *ids, *closing]

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
        ids = self._encode_response(text, conversation)
        if not ended and 0 < len(ids) <= self.max_response_tokens:
            return ids
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

    def _encode_response(self, text: str, conversation: bool) -> list[int]:
        opening = self._opening if self.encoder_decoder else []
        return [*opening, *self._plain_ids(self._lead_of(conversation) + text)]

    def pair_ids(self, prompt: PromptText, response: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of a response to it."""
        return self.prompt_ids(prompt), self.response_ids(response, not isinstance(prompt, str))

    def chunks(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Plain text as pairs of one token and those after it, that many at most as limits allow.

        A pair begins with the token that the one before it ends with: every token but the text's
        first (BOS, where the tokenizer has one) is predicted once. None of a text of one token. The
        end of a text is no end of a response: `end_id` is not appended. Of an encoder-decoder the
        one token is a whole text of the encoder's, and the decoder has its own limit.
        """
        ids = self._plain_ids(text)
        opening, closing, size = self._opening, self._closing, self.max_response_tokens
        if not self.encoder_decoder:
            ids = [*opening, *ids]
            opening, closing, size = [], [], self.max_prompt_tokens + size - 1
        return [
            ([*opening, ids[start], *closing], ids[start + 1 : start + 1 + size])
            for start in range(0, len(ids) - 1, size)
        ]

    def text(self, response_ids: list[int], conversation: bool = False) -> str:
        """Text of a response without its stop token, special tokens and the template's lead.

        `conversation` as in `response_ids`. A stop string, and what its last token says beyond it,
        are no part of the text.
        """
        if response_ids and response_ids[-1] in self.stop_ids:
            response_ids = response_ids[:-1]
        text: str = self.tokenizer.decode(response_ids, skip_special_tokens=True)
        text = self.stop_strings.before(text)
        return text.removeprefix(self._lead_of(conversation))

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

    @property
    def writes(self) -> bool:
        """See `Rendering`: what reads text has rows, or limits, of its own."""
        return self.rows == "joined" and self.max_tokens is None

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

    def of_run(self, system_prompt: str | None, generation: GenerationSection | None) -> "Codec":
        """The codec as a run speaks and samples; what the run leaves open stays as it is.

        One that only reads has nothing to sample, and the system turn where its template has one.

        Raises:
            ConfigError, ModelError: see `sampling_by` and `with_system_prompt`.
        """
        codec = self
        if system_prompt is not None:
            with nullcontext() if self.writes else suppress(ModelError):
                codec = self.with_system_prompt(system_prompt)
        if generation is None or not self.writes:
            return codec
        return codec.sampling_by(generation)

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
            "encoder_decoder": self.encoder_decoder,
            "chat_template": self.chat_template,
            "template_source": self.template_source,
            "rendered_turns": self._rendered_turns,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_response_tokens": self.max_response_tokens,
            "system_prompt": self.system_prompt,
            "stop_strings": list(self.stop_strings.strings),
            "forbidden_ids": sorted(self.forbidden_ids),
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
        codec.max_tokens = settings.get("max_tokens")
        return codec

    # --- ends ---

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
