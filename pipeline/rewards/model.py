"""A reward model of ours as a reward source."""

from pipeline.batches import TokenBatch
from pipeline.inference import infer
from pipeline.models.trunk import Handle
from pipeline.rewards.source import Completions, checked


class ModelReward:
    """A reward model of ours: reads the sampled ids, so that nothing is decoded and encoded.

    But for responses that a stop string ended (`Codec.closed_ids`).
    """

    def __init__(self, handle: Handle, token_budget: int | None = None) -> None:
        self.handle = handle
        self.name = handle.role.name
        self.token_budget = token_budget

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        batch = TokenBatch.from_ragged(
            completions.prompt_ids, completions.read_ids, self.handle.codec.pad_id
        )
        scores = infer(self.handle, batch, ["scores"], self.token_budget)["scores"].tolist()
        return checked(self.name, scores, completions)
