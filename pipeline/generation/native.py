"""The built-in engine: batched decoding with a key-value cache, on any decoder of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.generation.engine import Generations, Sampling
from pipeline.generation.noise import gumbel, row_keys
from pipeline.models.trunk import DecodeStep, Handle
from pipeline.tensors import widen


@dataclass
class _Active:
    """The rows that are still being written, as tensors of A rows."""

    rows: Tensor  # (A,) places in the call's order
    keys: Tensor  # (A,)
    mask: Tensor  # (A, T)
    positions: Tensor  # (A,) of the next input token
    tokens: Tensor  # (A,) the next input token
    done: Tensor  # (A,)


class NativeEngine:
    """Prompts sorted by length, decoded in batches of `max_rows`; finished rows leave the batch."""

    name = "native"
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
    ) -> Generations:
        """See `Engine`.

        Raises:
            TrainingError: the model's logits are not finite.
        """
        assert len(prompt_ids) == len(sample_indices)
        assert sampling.is_plain, sampling
        count = len(prompt_ids)
        out = Generations([[] for _ in range(count)], [False] * count, [[] for _ in range(count)])
        order = sorted(range(count), key=lambda row: (-len(prompt_ids[row]), row))
        for start in range(0, count, self.max_rows):
            rows = order[start : start + self.max_rows]
            self._generate_batch(handle, prompt_ids, sample_indices, sampling, rows, out)
        return out

    def _generate_batch(
        self,
        handle: Handle,
        prompt_ids: Sequence[Sequence[int]],
        sample_indices: Sequence[int],
        sampling: Sampling,
        rows: list[int],
        out: Generations,
    ) -> None:
        device = handle.trunk.device
        ids, mask = _left_pad([prompt_ids[row] for row in rows], handle.codec.pad_id, device)
        indices = torch.tensor([sample_indices[row] for row in rows], device=device)
        lengths = mask.sum(1)
        stops = torch.tensor(sorted(handle.codec.stop_ids), device=device)
        step = DecodeStep(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        active = _Active(
            rows=torch.tensor(rows, device=device),
            keys=row_keys(sampling.seed, sampling.stream, indices),
            mask=mask,
            positions=lengths,
            tokens=lengths,
            done=torch.zeros(len(rows), dtype=torch.bool, device=device),
        )
        # Tokens stay on the device until the batch is done: no synchronisation a token but one.
        history: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for position in range(sampling.max_new_tokens):
            result = handle.decode(step)
            tokens, logprobs = _sample(result.logits, active.keys, position, sampling)
            history.append((active.rows, tokens, logprobs, ~active.done))
            active.tokens = tokens
            active.done = active.done | torch.isin(tokens, stops)
            left = int((~active.done).sum())
            if left == 0 or position + 1 == sampling.max_new_tokens:
                break
            if left <= 0.75 * len(active.rows):
                keep = (~active.done).nonzero().squeeze(1)
                result.cache.batch_select_indices(keep)
                active = _select(active, keep)
            one = torch.ones(len(active.rows), 1, dtype=active.mask.dtype, device=device)
            active.mask = torch.cat([active.mask, one], dim=1)
            step = DecodeStep(
                active.tokens.unsqueeze(1),
                active.mask,
                active.positions.unsqueeze(1),
                result.cache,
            )
            active.positions = active.positions + 1
        _write(history, handle.codec.stop_ids, out)


def _sample(
    logits: Tensor, keys: Tensor, position: int, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Tokens (A,) and their log-probs (A,) from logits (A, V)."""
    logits = widen(logits)
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
        positions = torch.full_like(keys, position)
        noisy = logits + gumbel(keys, positions, logits.shape[1], logits.dtype)
    else:
        noisy = logits
    tokens = noisy.argmax(-1)
    logprobs = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
    return tokens, logprobs


def _write(
    history: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    stop_ids: frozenset[int],
    out: Generations,
) -> None:
    assert out.logprobs is not None
    for rows, tokens, logprobs, alive in history:
        columns = (rows.tolist(), tokens.tolist(), logprobs.tolist(), alive.tolist())
        for row, token, logprob, was_alive in zip(*columns, strict=True):
            if not was_alive:
                continue
            if logprob != logprob:
                raise TrainingError(
                    f"the model's logits are not finite at response token "
                    f"{len(out.response_ids[row])} of row {row}: its weights have diverged"
                )
            out.response_ids[row].append(token)
            out.logprobs[row].append(logprob)
            out.ended[row] = token in stop_ids


def _select(active: _Active, keep: Tensor) -> _Active:
    return _Active(**{name: value[keep] for name, value in vars(active).items()})


def _left_pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
