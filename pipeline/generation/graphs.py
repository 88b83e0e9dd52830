"""Decoding steps of fixed shape, replayed as CUDA graphs: no launch of hundreds of kernels a token.

A step decodes all slots, used or not, over the first `width` columns of the cache; a mask says what
each row may see. Inputs lie in buffers that a graph reads where it was captured, so a graph fits
one width: widths are multiples of `COLUMNS`, and there are few. Off CUDA the same steps run without
capture, which is how the tests reach them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.generation.slots import SlotCache
from pipeline.models.calls import DecodeOutput, DecodeStep
from pipeline.models.trunk import Handle
from pipeline.out_of_memory import is_out_of_memory

COLUMNS = 128
# Passes before a capture, on a side stream: libraries allocate and choose kernels in them.
WARM_UP_PASSES = 2


class FixedSteps:
    """The decoding step of one call of the engine, in its cache."""

    def __init__(self, handle: Handle, cache: SlotCache) -> None:
        self.handle, self.cache = handle, cache
        rows, device = cache.max_rows, handle.trunk.device
        self.device = device
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.starts = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.columns = torch.arange(cache.capacity, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        cache.column = self.column
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, DecodeOutput]] = {}

    def __call__(self, tokens: Tensor, starts: Sequence[int], column: int) -> DecodeOutput:
        """Decode `tokens` (A,) of the first A slots, whose rows begin at `starts`, at `column`."""
        count, slots = len(tokens), self.cache.max_rows
        assert count <= slots
        # An unused slot sees its own token alone: a row that sees nothing would be NaN.
        begin = [*starts, *([column] * (slots - count))]
        self.starts.copy_(torch.tensor(begin, device=self.device).unsqueeze(1))
        self.column.fill_(column)
        self.tokens[:count, 0] = tokens
        torch.sub(self.column, self.starts, out=self.positions)
        width = min(-(-(column + 1) // COLUMNS) * COLUMNS, self.cache.capacity)
        with self.cache.fixed(width):
            out = self._run(width)
        values = None if out.values is None else out.values[:count]
        return DecodeOutput(out.logits[:count], values, self.cache)

    def _run(self, width: int) -> DecodeOutput:
        if self.device.type != "cuda":
            return self._step(width)
        if width not in self.graphs:
            self.graphs[width] = self._capture(width)
        graph, out = self.graphs[width]
        graph.replay()
        return out

    def _step(self, width: int) -> DecodeOutput:
        columns = self.columns[:width]
        mask = (columns >= self.starts) & (columns <= self.column)  # (rows, width)
        return self.handle.decode(DecodeStep(self.tokens, self.positions, mask, self.cache))

    def _capture(self, width: int) -> tuple[torch.cuda.CUDAGraph, DecodeOutput]:
        # Writing the same token to the same column again changes nothing, so passes may repeat.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast kept outside the graph would go stale
        try:
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_PASSES):
                    self._step(width)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self._step(width)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise TrainingError(
                f"the decoding step of {type(self.handle.trunk.model).__name__} cannot be captured "
                f"as a CUDA graph ({str(error).splitlines()[0]}): set run.cuda_graphs to false"
            ) from error
        finally:
            torch.set_autocast_cache_enabled(cached)
        return graph, out
