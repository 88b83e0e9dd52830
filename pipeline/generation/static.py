"""Decoding for people, and for models with unusual caches: `model.generate` on static batches.

Greedy text, sampling with temperature, top-k and top-p, and beam search are transformers' own. Only
the draw is not: `generate` takes the likeliest token, after hashed Gumbel noise is added to the
warped logits (see `noise`), which is a sample of their softmax whatever the batch. A batch runs
until its last row has ended, so this is not the engine for rollouts of ordinary decoders.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipeline.codec import Codec
from pipeline.generation.caches import takes_padding
from pipeline.generation.engine import Generations, Listener, Sampling, logits_not_finite
from pipeline.generation.noise import gumbel, row_keys
from pipeline.models.trunk import Handle


class StaticEngine:
    """Prompts sorted by length, in padded batches of `max_rows` rows, beams included.

    Prompts of unequal length share no batch on models that do not heed padding (`takes_padding`).
    It tells no log-probs: transformers' are float32 and of warped logits.
    """

    name = "static"
    deterministic = True

    def __init__(self, max_rows: int = 128) -> None:
        self.max_rows = max_rows

    @torch.no_grad()
    def generate(
        self,
        handle: Handle,
        prompt_ids: Sequence[Sequence[int]],
        sample_indices: Sequence[int],
        sampling: Sampling,
        listener: Listener | None = None,
    ) -> Generations:
        """See `Engine`. Beams draw nothing and use log-probs at temperature 1.

        Of a beam search a listener hears nothing: no token is certain before the end.

        Raises:
            TrainingError: the model's logits are not finite.
        """
        assert len(prompt_ids) == len(sample_indices)
        count = len(prompt_ids)
        out = Generations([[] for _ in range(count)], [False] * count)
        model = handle.trunk.model
        size = max(1, self.max_rows // sampling.num_beams)
        with _defaults_aside(model):
            lengths = [len(prompt) for prompt in prompt_ids]
            for rows in _batches(lengths, size, takes_padding(model.config)):
                responses = _generate_batch(
                    handle,
                    [prompt_ids[row] for row in rows],
                    [sample_indices[row] for row in rows],
                    rows,
                    sampling,
                    listener,
                )
                for row, response in zip(rows, responses, strict=True):
                    out.response_ids[row] = response
                    out.ended[row] = handle.codec.ends(response)
        return out


def _batches(lengths: Sequence[int], size: int, mixed: bool) -> Iterator[list[int]]:
    """Rows in batches of at most `size`, longest first; of one length each unless `mixed`."""
    rows = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for _, group in groupby(rows, key=lambda row: None if mixed else lengths[row]):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _generate_batch(
    handle: Handle,
    prompts: Sequence[Sequence[int]],
    sample_indices: Sequence[int],
    rows: Sequence[int],
    sampling: Sampling,
    listener: Listener | None,
) -> list[list[int]]:
    """The responses, stop tokens included; `rows` name the prompts in errors."""
    from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

    codec, architecture = handle.codec, handle.trunk.model.config
    device = handle.trunk.device
    two_sides = architecture.is_encoder_decoder
    ids, mask = _padded(prompts, codec.pad_id, on_the_right=two_sides)
    # Columns before the response: the prompt's, or the token that a decoder behind an encoder
    # begins with.
    width = 1 if two_sides else len(ids[0])
    watch = _Watch(len(prompts), width, sampling.num_beams, device)
    more: dict[str, Any] = {}
    if listener is not None and sampling.num_beams == 1:
        more["streamer"] = _Relay(listener, rows, codec)
    if two_sides:  # transformers would make a cache of as many layers as the encoder has
        more["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    written = handle.write(
        torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            num_beams=sampling.num_beams,
            do_sample=False,  # the noise draws, see `_Noise`
            eos_token_id=sorted(codec.stop_ids),
            pad_token_id=codec.pad_id,
            decoder_start_token_id=architecture.decoder_start_token_id if two_sides else None,
            suppress_tokens=sorted(codec.forbidden_ids) or None,
        ),
        stopping_criteria=[_StopStringEnds(codec, width)] if codec.stop_strings else [],
        logits_processor=[watch, *_warpers(handle, sample_indices, width, sampling)],
        **more,
    )
    # What stands behind the end is filler. Whether it is a pad id does not matter: a pad
    # id inside the text is a token like another.
    responses = [codec.until_end(row) for row in written[:, width:].tolist()]
    faults = zip(rows, responses, watch.first_fault.tolist(), strict=True)
    bad = {row: response[:fault] for row, response, fault in faults if fault < len(response)}
    if bad:
        raise logits_not_finite(bad, handle)
    return responses


def _padded(
    prompts: Sequence[Sequence[int]], pad_id: int, *, on_the_right: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and mask of prompts, (B, P) each; a decoder goes on from the last column."""
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        rest, real = width - len(prompt), list(prompt)
        ids.append(real + [pad_id] * rest if on_the_right else [pad_id] * rest + real)
        mask.append([1] * len(real) + [0] * rest if on_the_right else [0] * rest + [1] * len(real))
    return ids, mask


def _warpers(
    handle: Handle, sample_indices: Sequence[int], width: int, sampling: Sampling
) -> list[Any]:
    """transformers' warpers, which a `generate` that does not sample would not apply; the noise."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sampling.num_beams > 1 or sampling.temperature == 0:
        return []
    found: list[Any] = []
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(float(sampling.top_p)))
    indices = torch.tensor(sample_indices, device=handle.trunk.device)
    keys = row_keys(sampling.seed, sampling.stream, indices)
    return [*found, _Noise(keys, width, handle.trunk.number_dtype)]


class _StopStringEnds:
    """A stopping criterion: the rows (beams, of a beam search) whose last token completes one."""

    def __init__(self, codec: Codec, prompt_width: int) -> None:
        self.stop_strings = codec.stop_strings
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows of input_ids (B, T) end here (B,)."""
        responses = input_ids[:, self.prompt_width :].tolist()
        ends = [self.stop_strings.completed(response) for response in responses]
        return torch.tensor(ends, device=input_ids.device)


class _Noise:
    """A logits processor that turns the choice of the likeliest token into a draw."""

    def __init__(self, keys: Tensor, prompt_width: int, dtype: torch.dtype) -> None:
        self.keys = keys  # (B,)
        self.prompt_width = prompt_width
        self.dtype = dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with noise for the position that input_ids (B, T) have reached."""
        positions = torch.full_like(self.keys, input_ids.shape[1] - self.prompt_width)
        return scores + gumbel(self.keys, positions, scores.shape[1], self.dtype)


class _Watch:
    """A logits processor that notes, without synchronising, where logits stop being finite."""

    def __init__(self, rows: int, prompt_width: int, beams: int, device: torch.device) -> None:
        self.prompt_width = prompt_width
        self.beams = beams
        # (B,): the first response token with such logits; larger than any position if none.
        self.first_fault = torch.full((rows,), torch.iinfo(torch.int64).max, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (B * beams, V), untouched."""
        # Single logits of minus infinity are a model's way to exclude tokens.
        fault = ~scores.logsumexp(-1).isfinite().view(-1, self.beams).all(-1)  # of any beam
        position = input_ids.shape[1] - self.prompt_width
        here = torch.full_like(self.first_fault, position)
        self.first_fault = torch.where(fault & (here < self.first_fault), here, self.first_fault)
        return scores


class _Relay:
    """A streamer of transformers' `generate` that tells a listener the tokens of each row."""

    def __init__(self, listener: Listener, rows: Sequence[int], codec: Codec) -> None:
        self.listener = listener
        self.codec = codec
        self.written: dict[int, list[int]] = {row: [] for row in rows}
        self.begun = False

    def put(self, value: Tensor) -> None:
        """The next token of every row (B,); what comes first is the prompts (B, P)."""
        if not self.begun:
            self.begun = True
            return
        for (row, written), token in zip(self.written.items(), value.tolist(), strict=True):
            if not self.codec.ends(written):  # else it is filler
                written.append(token)
                self.listener(row, token)

    def end(self) -> None:
        """All is written."""


@contextmanager
def _defaults_aside(model: Any) -> Iterator[None]:
    """Put the model's own generation defaults aside.

    `generate` fills whatever a given GenerationConfig leaves open from the model's, so that a
    checkpoint's temperature or repetition penalty would leak into every decoding.
    """
    from transformers import GenerationConfig

    theirs = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs
