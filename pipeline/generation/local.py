"""The engines of this process as one: the model and the way of decoding decide which serves."""

from collections.abc import Sequence

from pipeline.generation.caches import needs_static_batches
from pipeline.generation.engine import Generations, Listener, Sampling
from pipeline.generation.native import NativeEngine
from pipeline.generation.static import StaticEngine
from pipeline.models.trunk import Handle
from pipeline.out_of_memory import halving


class LocalEngine:
    """The native engine where it can serve, static batches where it cannot.

    Sampled text does not depend on the choice, but for near-ties in rounding. Where memory runs
    out, fewer rows are generated at a time.
    """

    name = "local"
    deterministic = True

    def __init__(self, rows_at_once: int = 128, *, cuda_graphs: bool = True) -> None:
        self.rows_at_once = rows_at_once
        self.cuda_graphs = cuda_graphs

    def generate(
        self,
        handle: Handle,
        prompt_ids: Sequence[Sequence[int]],
        sample_indices: Sequence[int],
        sampling: Sampling,
        listener: Listener | None = None,
    ) -> Generations:
        """See `Engine`. A listener hears rows again that lack of memory has begin anew.

        Raises:
            TrainingError: the model's logits are not finite, or one row alone does not fit.
        """
        native = serving(handle, sampling) is NativeEngine

        def attempt(rows: int) -> Generations:
            # Gathering's side streams would be captured, too.
            graphs = self.cuda_graphs and handle.trunk.shards is None
            engine = NativeEngine(rows, cuda_graphs=graphs)
            serves = engine if native else StaticEngine(rows)
            return serves.generate(handle, prompt_ids, sample_indices, sampling, listener)

        remedy = "one response does not fit: shorten the prompts or the responses"
        # Processes write responses of their own lengths, and one of them may need another attempt:
        # sharded weights are gathered once, by all.
        with handle.trunk.whole():
            found, self.rows_at_once = halving(
                attempt, self.rows_at_once, 1, remedy, undo=lambda: None
            )
        return found


def serving(handle: Handle, sampling: Sampling) -> type[NativeEngine] | type[StaticEngine]:
    """Which engine serves: native for plain sampling and greedy text of ordinary decoders."""
    if sampling.is_plain and needs_static_batches(handle.trunk.model.config) is None:
        return NativeEngine
    return StaticEngine
