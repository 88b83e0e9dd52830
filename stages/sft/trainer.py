"""Cross-entropy on response tokens, through the fence round Trainer.

Not TRL's SFTTrainer: its fused head projects every position to the vocabulary off CUDA (2.5 times
the time of a step on a CPU) and computes in float32 whatever the model's type. A trunk's forward
makes logits at response positions only, and gives SFT the very log-probs that PPO will see.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.batches import TokenBatch
from pipeline.fit_config import FitSection
from pipeline.hf_trainer import PlannedTrainer
from pipeline.models.trunk import Role, Trunk
from pipeline.not_finite import prompt_json
from pipeline.records import Demonstration

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its response


class DemonstrationRows:
    """Demonstrations as token ids; a unit of loss is a response token, its end included."""

    def __init__(
        self, pairs: Sequence[Pair], pad_id: int, records: Sequence[Demonstration] = ()
    ) -> None:
        """`records`: the texts of the pairs, where somebody may ask for them."""
        self.pairs = pairs
        self.records = records
        self.pad_id = pad_id
        self.lengths = [len(prompt) + len(response) for prompt, response in pairs]
        self.units = [len(response) for _, response in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def collate(self, rows: Sequence[int]) -> TokenBatch:
        """These demonstrations as one padded batch."""
        prompts, responses = zip(*(self.pairs[row] for row in rows), strict=True)
        return TokenBatch.from_ragged(prompts, responses, self.pad_id)

    def describe(self, row: int) -> dict[str, Any]:
        """Its number among the training (or held-out) rows, origin and texts."""
        if not self.records:
            return {"row": row}
        record = self.records[row]
        prompt = prompt_json(record.prompt)
        texts = {"origin": record.origin, "prompt": prompt, "response": record.response}
        return {"row": row, **texts}


class SftTrainer(PlannedTrainer):
    """Minimises -log p(response | prompt), summed over tokens, in the role it is given."""

    def __init__(self, role: Role, module: Trunk, section: FitSection, **kwargs: Any) -> None:
        super().__init__(
            module=module,
            section=section.sized(module.token_budget(section.micro_batch_tokens)),
            **kwargs,
        )
        self.role = role

    def loss_sum(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Negative log-likelihood of a micro-batch's response tokens, in nats."""
        logprobs: Tensor = model(batch, self.role, ("logprobs",)).logprobs
        return -logprobs.sum()

    def eval_metrics(self, sums: dict[str, float], units: int) -> dict[str, float]:
        """Mean loss a token and its perplexity, exp(loss)."""
        loss = sums["loss"] / units
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
