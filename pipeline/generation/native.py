"""The built-in engine: continuous batching with a key-value cache of its own.

Prompts are taken longest first, so that rows of a batch are of like length. A response that ends
leaves at once; when enough have left, waiting prompts take their places. Linear layers see no
padding but that between the prompts of one prefill; logits are made where a token is sampled.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.generation.engine import Generations, Listener, Sampling, logits_not_finite
from pipeline.generation.noise import gumbel, row_keys
from pipeline.models.calls import DecodeOutput, DecodeStep
from pipeline.models.trunk import Handle
from pipeline.tensors import entropy, tempered, widen

# Columns beyond the longest row, as a share of it: moving the rows back is rare.
SLACK = 0.5
# Prompts wait until this share of the rows is free: prefills of single prompts are slow.
FREE_SHARE = 0.125


class NativeEngine:
    """Up to `max_rows` responses at a time; prefills of up to `prefill_tokens`, padding counted."""

    name = "native"
    deterministic = True

    def __init__(
        self,
        max_rows: int = 128,
        prefill_tokens: int | None = None,
        *,
        cuda_graphs: bool = True,
        fixed_shapes: bool = False,
    ) -> None:
        """`cuda_graphs`: on CUDA, replay steps as graphs; `fixed_shapes`: their steps, anywhere."""
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.cuda_graphs = cuda_graphs
        self.fixed_shapes = fixed_shapes

    @torch.no_grad()
    def generate(
        self,
        handle: Handle,
        prompt_ids: Sequence[Sequence[int]],
        sample_indices: Sequence[int],
        sampling: Sampling,
        listener: Listener | None = None,
    ) -> Generations:
        """See `Engine`; `values` are given where the handle's role has a head.

        Raises:
            TrainingError: the model's logits are not finite.
        """
        assert len(prompt_ids) == len(sample_indices)
        assert sampling.is_plain, sampling
        budget = handle.trunk.token_budget(self.prefill_tokens)
        graphs = self.cuda_graphs and handle.trunk.device.type == "cuda"
        writing = _Writing(
            handle,
            prompt_ids,
            sample_indices,
            sampling,
            self.max_rows,
            budget,
            self.fixed_shapes or graphs,
            listener,
        )
        try:
            while writing.waiting or writing.rows:
                if writing.has_room:
                    writing.join()
                else:
                    writing.step()
        finally:
            writing.cache.free()
        return writing.out


@dataclass
class _Row:
    """A response that is being written."""

    number: int  # its place in the call
    start: int  # column of its first prompt token
    length: int  # tokens so far, prompt included; the newest has not been through the model


@dataclass
class _Writing:
    """One call: the responses so far, the prompts that wait, and the rows in the cache."""

    handle: Handle
    prompt_ids: Sequence[Sequence[int]]
    sample_indices: Sequence[int]
    sampling: Sampling
    max_rows: int
    prefill_tokens: int
    fixed_shapes: bool
    listener: Listener | None
    rows: list[_Row] = field(default_factory=list)  # in the order of their slots

    def __post_init__(self) -> None:
        from pipeline.generation.graphs import FixedSteps
        from pipeline.generation.slots import SlotCache

        count = len(self.prompt_ids)
        lengths = [len(ids) for ids in self.prompt_ids]
        self.waiting = deque(sorted(range(count), key=lambda row: (-lengths[row], row)))
        self.max_rows = min(self.max_rows, count)
        self.device = self.handle.trunk.device
        model = self.handle.trunk.model
        longest = max(lengths, default=0) + self.sampling.max_new_tokens
        layers: int = model.config.get_text_config().num_hidden_layers
        self.cache = SlotCache(layers, self.max_rows, int(longest * (1 + SLACK)) + 1)
        self.fixed = FixedSteps(self.handle, self.cache) if self.fixed_shapes else None
        # Tokens and noise keys of the rows, in the order of their slots.
        self.tokens = torch.empty(0, dtype=torch.long, device=self.device)
        self.keys = torch.empty(0, dtype=torch.long, device=self.device)
        self.codec = self.handle.codec
        has_head = self.handle.role.head is not None
        self.out = Generations(
            response_ids=[[] for _ in range(count)],
            ended=[False] * count,
            logprobs=[[] for _ in range(count)],
            entropy=[[] for _ in range(count)],
            values=[[] for _ in range(count)] if has_head else None,
            exact=self.handle.trunk.is_exact,
        )

    @property
    def has_room(self) -> bool:
        """Whether prompts wait and enough rows are free for them."""
        free = self.max_rows - len(self.rows)
        return bool(self.waiting) and free >= min(
            len(self.waiting), max(1, int(self.max_rows * FREE_SHARE))
        )

    def join(self) -> None:
        """Read as many waiting prompts as fit and sample the first token of each."""
        cache = self.cache
        width = len(self.prompt_ids[self.waiting[0]])
        count = min(
            self.max_rows - len(self.rows),
            len(self.waiting),
            max(1, self.prefill_tokens // width),
        )
        numbers = [self.waiting.popleft() for _ in range(count)]
        if not self.rows:
            cache.start = cache.stop = width  # nobody is being written: begin afresh
        prompts = [list(self.prompt_ids[number]) for number in numbers]
        ids, mask, positions = _left_pad(prompts, width, self.device)
        cache.joining = count
        result = self.handle.decode(DecodeStep(ids, positions, mask, cache))
        cache.joined()
        indices = torch.tensor([self.sample_indices[n] for n in numbers], device=self.device)
        keys = row_keys(self.sampling.seed, self.sampling.stream, indices)
        new = [
            _Row(number, cache.stop - len(prompt), len(prompt))
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
        tokens = self._choose(new, keys, result)
        self.rows += new
        cache.start = min(row.start for row in self.rows)
        self.tokens, self.keys = torch.cat([self.tokens, tokens]), torch.cat([self.keys, keys])
        self._leave()

    def step(self) -> None:
        """Sample the next token of every row."""
        cache = self.cache
        if cache.stop == cache.capacity:
            distance = cache.shift()
            for row in self.rows:
                row.start -= distance
        starts = [row.start for row in self.rows]
        if self.fixed is not None:
            result = self.fixed(self.tokens, starts, cache.stop)
        else:
            result = self.handle.decode(self._next_step(starts))
        cache.stop += 1
        self.tokens = self._choose(self.rows, self.keys, result)
        self._leave()

    def _next_step(self, starts: list[int]) -> DecodeStep:
        """Every row's newest token, over the columns that a row needs."""
        cache = self.cache
        begin = torch.tensor(starts, device=self.device).unsqueeze(1)
        mask = None
        if any(start != cache.start for start in starts):
            columns = torch.arange(cache.start, cache.stop + 1, device=self.device)
            mask = columns >= begin  # (A, T)
        return DecodeStep(self.tokens.unsqueeze(1), cache.stop - begin, mask, cache)

    def _choose(self, rows: Sequence[_Row], keys: Tensor, result: DecodeOutput) -> Tensor:
        """Next tokens (A,) of `rows`; writes them, and their numbers, into the responses."""
        temperature = self.sampling.temperature
        logits = tempered(widen(result.logits), temperature or 1.0, self.codec.forbidden_ids)
        if temperature > 0:
            written = [len(self.out.response_ids[row.number]) for row in rows]
            places = torch.tensor(written, device=self.device)
            noise = gumbel(keys, places, logits.shape[1], logits.dtype)
            tokens = noise.add_(logits).argmax(-1)
        else:
            tokens = logits.argmax(-1)
        chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
        log_total = logits.logsumexp(-1)
        numbers = [tokens, chosen - log_total, entropy(logits, log_total)]
        if result.values is not None:
            numbers.append(result.values)
        # One transfer a step; a float64 holds every token id.
        self._write(rows, torch.stack([x.double() for x in numbers]).tolist())
        return tokens

    def _write(self, rows: Sequence[_Row], numbers: list[list[float]]) -> None:
        out = self.out
        assert out.logprobs is not None and out.entropy is not None
        bad = [row for row, x in zip(rows, numbers[1], strict=True) if not math.isfinite(x)]
        if bad:
            written = {row.number: out.response_ids[row.number] for row in bad}
            raise logits_not_finite(written, self.handle)
        for place, row in enumerate(rows):
            token, logprob = int(numbers[0][place]), numbers[1][place]
            row.length += 1
            out.response_ids[row.number].append(token)
            if self.listener is not None:
                self.listener(row.number, token)
            out.logprobs[row.number].append(logprob)
            out.entropy[row.number].append(numbers[2][place])
            if out.values is not None:
                out.values[row.number].append(numbers[3][place])
            out.ended[row.number] = self.codec.ends(out.response_ids[row.number])

    def _leave(self) -> None:
        """Let finished rows go, and drop the columns that no row needs any more."""
        limit, out = self.sampling.max_new_tokens, self.out
        alive = [
            slot
            for slot, row in enumerate(self.rows)
            if not out.ended[row.number] and len(out.response_ids[row.number]) < limit
        ]
        if len(alive) < len(self.rows):
            order = self.cache.leave(alive)
            self.rows = [self.rows[slot] for slot in order]
            self.tokens, self.keys = self.tokens[order], self.keys[order]
        self.cache.start = min((row.start for row in self.rows), default=self.cache.stop)


def _left_pad(
    prompts: Sequence[list[int]], width: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids, mask (None if nothing is padded) and positions of prompts, (B, width) each."""
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device)
    starts = torch.tensor([width - len(ids) for ids in prompts], device=device).unsqueeze(1)
    positions = torch.arange(width, device=device) - starts
    is_even = all(len(ids) == width for ids in prompts)
    return ids, None if is_even else positions >= 0, positions.clamp(min=0)
