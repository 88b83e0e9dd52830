"""How an architecture joins a prompt and its response into model inputs.

Nothing else branches on architecture: a joiner turns a `TokenBatch` into inputs and says at which
hidden state each response token is predicted.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.batches import TokenBatch
from pipeline.errors import ModelError
from pipeline.models import sequence_attention


@dataclass(frozen=True)
class Joined:
    """Model inputs with the places of the response in them (T positions a row), on the host."""

    inputs: dict[str, Tensor]  # keyword arguments of `passes.body`, (B, T) or (1, N) each
    rows: Tensor  # (B,): row of the model's input in which a sample lies
    predictors: Tensor  # (B, R): position whose hidden state predicts response token t
    last: Tensor  # (B,): position of the last response token
    lengths: list[int] | None = None  # of a packed row's sequences, if its attention is told them

    @property
    def width(self) -> int:
        """T: positions of which the decoder makes a state, in each row."""
        return self.inputs.get("decoder_input_ids", self.inputs["input_ids"]).shape[1]


class DecoderJoiner:
    """Decoder-only models read the prompt and the response as one sequence."""

    def __init__(self, model: Any, padding_side: Literal["left", "right"] = "right") -> None:
        self.padding_side = padding_side
        # BLOOM and other ALiBi models take no position ids: they count from the mask themselves.
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def __call__(self, batch: TokenBatch) -> Joined:
        """Join B prompts and responses; T is the longest joined row."""
        prompt_width = batch.prompt_ids.shape[1]
        lengths = batch.prompt_lengths + batch.response_lengths  # (B,)
        width = int(lengths.max())
        columns = torch.arange(width).expand(len(batch), width)
        shift = (width - lengths if self.padding_side == "left" else lengths * 0).unsqueeze(1)
        positions = columns - shift  # (B, T), negative on left padding
        mask = (positions >= 0) & (positions < lengths.unsqueeze(1))
        prompt_lengths = batch.prompt_lengths.unsqueeze(1)
        both = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
        source = torch.where(
            positions < prompt_lengths, positions, positions - prompt_lengths + prompt_width
        )
        ids = both.gather(1, source.clamp(0, both.shape[1] - 1)).masked_fill(~mask, 0)
        inputs = {"input_ids": ids}
        # Padding on the right lies behind every real token: causal attention never sees it, and
        # without a mask the kernels that skip half of the work apply.
        if self.padding_side == "left":
            inputs["attention_mask"] = mask.long()
            if self.takes_positions:
                inputs["position_ids"] = positions.clamp(min=0).masked_fill(~mask, 0)
        response_columns = torch.arange(batch.response_ids.shape[1])
        first = prompt_lengths + shift - 1  # (B, 1): the prompt's last token predicts token 0
        predictors = (first + response_columns).clamp(max=width - 1)
        rows = torch.arange(len(batch))
        return Joined(inputs, rows, predictors, (lengths.unsqueeze(1) + shift - 1).squeeze(1))


# Attention that keeps the sequences of a packed row apart without a mask: by their position ids, or
# by their lengths.
PACKING_ATTENTION = {
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    sequence_attention.NAME,
}
# Families whose position ids reach it, each held to it by a test: where they do not (GPT-2, OPT),
# the sequences of a packed row would read one another without a word.
PACKED_FAMILIES = frozenset(
    {
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
# Those of them that hand other arguments on to their attention too.
TELLING_FAMILIES = PACKED_FAMILIES - {"stablelm"}


class PackedJoiner:
    """All prompts and responses of a batch as one row without padding.

    Position ids start again at each sequence. transformers' attention of variable length keeps the
    sequences apart by them; on a processor `sequence_attention` does, which is told their lengths.
    """

    def __init__(self, model: Any) -> None:
        self.takes_positions = True
        self.padded = DecoderJoiner(model)
        self.tells_lengths = model.config._attn_implementation == sequence_attention.NAME

    def __call__(self, batch: TokenBatch) -> Joined:
        """Join B prompts and responses of N tokens in all: inputs are (1, N)."""
        ids = self.padded(batch).inputs["input_ids"]  # (B, T)
        lengths = batch.prompt_lengths + batch.response_lengths
        columns = torch.arange(ids.shape[1]).expand_as(ids)
        mask = columns < lengths.unsqueeze(1)
        starts = lengths.cumsum(0) - lengths  # (B,)
        response_columns = torch.arange(batch.response_ids.shape[1])
        first = (starts + batch.prompt_lengths - 1).unsqueeze(1)
        inputs = {"input_ids": ids[mask].unsqueeze(0), "position_ids": columns[mask].unsqueeze(0)}
        predictors = (first + response_columns).clamp(max=int(lengths.sum()) - 1)
        told = lengths.tolist() if self.tells_lengths else None
        return Joined(inputs, torch.zeros_like(lengths), predictors, starts + lengths - 1, told)


class EncoderDecoderJoiner:
    """The encoder reads the prompt, the decoder the response behind the model's start token.

    The decoder reads all R tokens, so that there is a state at the last one for scores.
    """

    def __init__(self, model: Any) -> None:
        self.takes_positions = False
        start = model.config.decoder_start_token_id
        if start is None:
            raise ModelError(
                f"{type(model).__name__} has no decoder_start_token_id, so its decoder could not "
                "begin: set it in its config.json"
            )
        self.start = int(start)

    def __call__(self, batch: TokenBatch) -> Joined:
        """Join B prompts (B, P) and responses: T = R + 1 positions of the decoder."""
        columns = torch.arange(batch.prompt_ids.shape[1])
        mask = columns < batch.prompt_lengths.unsqueeze(1)
        rows = torch.arange(len(batch))
        start = torch.full((len(batch), 1), self.start)
        inputs = {
            "input_ids": batch.prompt_ids,
            # On the right: BART counts positions from the first column, mask or no mask.
            "attention_mask": mask.long(),
            "decoder_input_ids": torch.cat([start, batch.response_ids], 1),
        }
        predictors = torch.arange(batch.response_ids.shape[1]).expand_as(batch.response_ids)
        return Joined(inputs, rows, predictors, batch.response_lengths)


class EncoderJoiner:
    """Encoders read the prompt and the response as one sequence, in both directions.

    The codec has put the special tokens of the tokenizer's own pair template into both
    (`pipeline.pair_codec`). A token sees those before and behind it, padding included unless a mask
    hides it; where the architecture tells the two texts of a pair apart by type, so do we.
    """

    takes_positions = False

    def __init__(self, model: Any) -> None:
        takes = inspect.signature(model.forward).parameters
        if "attention_mask" not in takes:
            raise ModelError(
                f"{type(model).__name__} takes no attention mask, so that padding would be read as "
                "text: name another encoder"
            )
        self.padded = DecoderJoiner(model)
        self.pad_id: int = model.config.pad_token_id or 0
        types = getattr(model.config, "type_vocab_size", None) or 0
        self.tells_types = "token_type_ids" in takes and types > 1

    def __call__(self, batch: TokenBatch) -> Joined:
        """Join B prompts and responses; T is the longest joined row. Nothing is predicted."""
        joined = self.padded(batch)
        columns = torch.arange(joined.inputs["input_ids"].shape[1])
        mask = columns <= joined.last.unsqueeze(1)  # (B, T)
        inputs = {
            "input_ids": joined.inputs["input_ids"].masked_fill(~mask, self.pad_id),
            "attention_mask": mask.long(),
        }
        if self.tells_types:
            in_response = mask & (columns >= batch.prompt_lengths.unsqueeze(1))
            inputs["token_type_ids"] = in_response.long()
        return Joined(inputs, joined.rows, joined.predictors, joined.last)


Joiner = DecoderJoiner | PackedJoiner | EncoderDecoderJoiner | EncoderJoiner


def make_joiner(model: Any) -> Joiner:
    """The joiner of a model: packed where its attention can keep packed sequences apart.

    A model without an output layer is an encoder: what it reads, it does not go on from.

    On a processor `sdpa` is told the sequences' lengths; elsewhere, and in narrow models, attention
    once a sequence would be many small calls.
    """
    if model.config.is_encoder_decoder:
        return EncoderDecoderJoiner(model)
    if model.get_output_embeddings() is None:
        return EncoderJoiner(model)
    family = model.config.model_type
    if family in TELLING_FAMILIES:
        is_wide = model.config.hidden_size >= sequence_attention.WORTH_IT_FROM
        sequence_attention.install(model, wanted=is_wide and model.device.type == "cpu")
    if family in PACKED_FAMILIES and model.config._attn_implementation in PACKING_ATTENTION:
        return PackedJoiner(model)
    return DecoderJoiner(model)
