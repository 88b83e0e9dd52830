"""Reward training from rankings, the InstructGPT way (arXiv:2203.02155, section 3.5).

Each of a prompt's K responses is encoded once, and all comparable pairs of the prompt come from
those K scores. Expanding them to K(K-1)/2 rows of pairs instead encodes each response K-1 times and
lets pairs of one prompt be spread over an epoch, which overfits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from pipeline.config import RunSection
from pipeline.hf_trainer import PlannedTrainer
from pipeline.models.trunk import Handle
from pipeline.resume import States
from pipeline.tensors import scatter
from stages.reward.config import RewardSection
from stages.reward.loss import count_correct, pairwise_loss, plackett_luce_loss, rating_margins
from stages.reward.rankings import RankingBatch, RankingRows


class RankingTrainer(PlannedTrainer):
    """Trains a handle's score on rankings; a step's loss is the mean over its rankings.

    Args:
        handle: what is trained: the parameters of its trunk that require gradients.
        section, run: the stage's and the run's settings.
        folder: an existing folder; nothing is written there.
        train, held_out: rankings to train on and to evaluate on.
        log: receives (step, metrics).
        states: where to leave states to go on from; None leaves none.
    """

    def __init__(
        self,
        handle: Handle,
        section: RewardSection,
        run: RunSection,
        folder: Path,
        train: RankingRows,
        held_out: RankingRows | None,
        log: Callable[[int, dict[str, float]], None],
        console: Console | None = None,
        states: States | None = None,
    ) -> None:
        self.role = handle.role
        self.section = section
        super().__init__(
            handle.trunk,
            section.sized(handle.trunk.token_budget(section.micro_batch_tokens)),
            run,
            folder,
            train,
            held_out,
            log,
            console=console,
            title="reward model",
            states=states,
        )

    def loss_sum(self, model: nn.Module, batch: RankingBatch) -> Tensor:
        """Sum of the ranking loss over a micro-batch's prompts."""
        scores = self._scores(model, batch)
        return ranking_losses(scores, batch.to(scores.device), self.section).sum()

    def eval_sums(self, model: nn.Module, batch: RankingBatch) -> dict[str, Tensor]:
        """Sums over prompts of the loss and of the share of a prompt's pairs that are right."""
        scores = self._scores(model, batch)
        batch = batch.to(scores.device)
        correct, pairs = count_correct(scores, batch.ranks, batch.mask)
        return {
            "loss": ranking_losses(scores, batch, self.section).sum(),
            "accuracy": (correct / pairs).sum(),
        }

    def _scores(self, model: Any, batch: RankingBatch) -> Tensor:
        """(P, K), zeros on padding; differentiable."""
        return scatter(model(batch.rows, self.role, {"scores"}).scores, batch.mask)


def ranking_losses(scores: Tensor, batch: RankingBatch, section: RewardSection) -> Tensor:
    """The loss that the settings name, of scores (P, K): one number a prompt, (P,)."""
    if section.loss == "plackett_luce":
        return plackett_luce_loss(scores, batch.ranks, batch.mask)
    margins = None
    if section.margin_coef:
        margins = rating_margins(batch.ratings, section.margin_coef).to(scores.dtype)
    return pairwise_loss(scores, batch.ranks, batch.mask, margins)
