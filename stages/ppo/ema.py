"""An exponential moving average of the policy's weights (Polyak and Juditsky 1992).

WARP (arXiv:2406.16768) has such an average for a better front of reward against KL. One step is an
iteration, not an optimiser step: what is averaged are the policies that sample, however many steps
`target_kl` leaves an iteration. The average lies on the host in float32, where a copy an iteration
costs little; of sharded weights each process averages its own rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.sharding import Part, is_sharded, local
from pipeline.distributed.steps import Steps
from pipeline.saved_rows import Saved

# In a state, apart from the tensors `WHAT/NAME` of training.
PREFIX = "ema:"


class PolicyAverage:
    """average = decay x average + (1 - decay) x policy, from the start policy on."""

    def __init__(self, steps: Steps, decay: float) -> None:
        self.steps, self.decay = steps, decay
        self.rows = {name: _on_host(x, widen=True) for name, x in self._weights().items()}

    def update(self) -> None:
        """Take note of the policy that an iteration left."""
        for name, weight in self._weights().items():
            self.rows[name].lerp_(_on_host(weight, widen=True), 1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the policy computes with the average; afterwards with its own, bit for bit."""
        trained = {name: _on_host(weight) for name, weight in self._weights().items()}
        self.steps.set_weights(self.rows)
        try:
            yield
        finally:
            self.steps.set_weights(trained)

    def become(self) -> None:
        """Make the average the policy, for good."""
        self.steps.set_weights(self.rows)

    def state(self) -> dict[str, Any]:
        """The average: of each weight what is here."""
        weights = self._weights().items()
        rows = ((name, self.rows[name], is_sharded(weight)) for name, weight in weights)
        return {PREFIX + name: Part(x) if sharded else x for name, x, sharded in rows}

    def restore(self, tensors: Saved) -> None:
        """Go back to a `state`."""
        for name, row in self.rows.items():
            row.copy_(self.steps.own_rows(name, tensors[PREFIX + name]))

    def _weights(self) -> dict[str, Any]:
        return self.steps.weights("policy")


@torch.no_grad()
def _on_host(x: Any, *, widen: bool = False) -> Tensor:
    """A copy of what is here of a weight; wide enough for an average if asked."""
    rows = local(x)
    dtype = torch.promote_types(rows.dtype, torch.float32) if widen else rows.dtype
    return rows.detach().to("cpu", dtype, copy=True)
