"""A reward model of ours as a reward source."""

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.inference import infer
from pipeline.models.trunk import Handle
from pipeline.rewards.source import Completions, checked


class ModelReward:
    """A reward model of ours: reads the sampled ids, so that nothing is decoded and encoded.

    But for responses that a stop string ended (`Codec.closed_ids`), and where the ids are those of
    another codec (`Codec.same_ids`): it reads the text then, with its own tokenizer, template and
    limits.
    """

    def __init__(self, handle: Handle, token_budget: int | None = None) -> None:
        self.handle = handle
        self.name = handle.role.name
        self.token_budget = token_budget
        self._known: tuple[Codec | None, bool] = (None, True)  # whose ids were last compared

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        if self._reads_ids_of(completions.codec):
            prompt_ids, response_ids = completions.prompt_ids, completions.read_ids
        else:
            prompt_ids, response_ids = self._own_ids(completions)
        batch = TokenBatch.from_ragged(prompt_ids, response_ids, self.handle.codec.pad_id)
        scores = infer(self.handle, batch, ["scores"], self.token_budget)["scores"].tolist()
        return checked(self.name, scores, completions)

    def _reads_ids_of(self, codec: Codec | None) -> bool:
        if codec is not self._known[0]:
            self._known = codec, codec is None or self.handle.codec.same_ids(codec)
        return self._known[1]

    def _own_ids(self, completions: Completions) -> tuple[list[list[int]], list[list[int]]]:
        prompt_ids, response_ids = [], []
        for prompt, text, ended in zip(
            completions.prompts, completions.texts, completions.ended, strict=True
        ):
            ids, (response,) = self.handle.codec.ranked_ids(prompt.prompt, [text], [ended])
            prompt_ids.append(ids)
            response_ids.append(response)
        return prompt_ids, response_ids
