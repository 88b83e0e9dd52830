"""PPO-ptx: language-model losses mixed into PPO's, against forgetting (InstructGPT, eq. 2).

InstructGPT (arXiv:2203.02155, app. C.4) adds 27.8 times the log-likelihood of pretraining text,
with 8 times as many texts a step as rollouts. Here a term is its coefficient times the *mean*
negative log-likelihood a token, as PPO's own loss is a mean a token: the two are of one scale
whatever the lengths and numbers of rows. Rows are drawn anew for every optimiser step, those of
further epochs included, so that `ppo_epochs` does not repeat them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.codec import Codec
from pipeline.data import Corpus
from pipeline.distributed import Runtime
from pipeline.errors import DataError
from stages.ppo.learning_config import PpoOptimSection

Ragged = tuple[list[int], list[int]]  # ids of what is given, ids of what is predicted


@dataclass(frozen=True)
class LanguageModelTerm:
    """One language-model loss: the rows that it draws from, how many a step, and its weight."""

    name: str  # of its metric, its settings and its stream of random numbers
    data: str  # what its rows are, for messages
    coef: float
    rows: int | None  # of one optimiser step, over all processes; None: as many as it has rollouts
    pairs: Sequence[Ragged]

    def draw(
        self, rollouts: int, runtime: Runtime, iteration: int, epoch: int, number: int
    ) -> list[Ragged]:
        """This process's share of what a step draws, with replacement; it may be none."""
        count = rollouts if self.rows is None else self.rows
        stream = [runtime.seed(self.name), iteration, epoch, number]
        drawn = np.random.default_rng(stream).integers(len(self.pairs), size=count)
        return [self.pairs[drawn[i]] for i in runtime.share(count)]


def language_model_terms(
    section: PpoOptimSection, corpus: Corpus, codec: Codec
) -> list[LanguageModelTerm]:
    """The terms that the section gives a weight, with all their rows as tokens.

    Raises:
        DataError: a term has no rows to train on.
    """
    terms = []
    if section.ptx_coef:
        pairs = [codec.pair_ids(row.prompt, row.response) for row in corpus.demonstrations.train]
        rows = section.ptx_rows
        terms.append(LanguageModelTerm("ptx", "demonstrations", section.ptx_coef, rows, pairs))
    if section.pretraining_coef:
        pairs = [pair for row in corpus.pretraining.train for pair in codec.chunks(row.text)]
        coef, rows = section.pretraining_coef, section.pretraining_rows
        terms.append(LanguageModelTerm("pretraining", "pretraining", coef, rows, pairs))
    for term in terms:
        if not term.pairs:
            raise DataError(
                f"ppo.optim.{term.name}_coef is {term.coef:g} but data.{term.data} has no training "
                f"rows: name {term.data} or set ppo.optim.{term.name}_coef to 0"
            )
    return terms
