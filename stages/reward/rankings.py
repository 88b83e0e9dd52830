"""Rankings as token ids: encoded once, batched with all responses of a prompt together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.not_finite import prompt_json
from pipeline.records import Ranking
from pipeline.tensors import send


@dataclass(frozen=True, slots=True)
class EncodedRanking:
    """One ranking in token ids; its K responses share the prompt, cut once for all of them."""

    prompt_ids: list[int]
    response_ids: list[list[int]]
    ranks: tuple[int, ...]
    ratings: tuple[float, ...] | None
    annotator: str | None

    @property
    def longest(self) -> int:
        """Tokens of the longest of its K rows (prompt and response)."""
        return len(self.prompt_ids) + max(map(len, self.response_ids))

    @property
    def response_lengths(self) -> list[int]:
        """Tokens of each response, its end token included."""
        return [len(ids) for ids in self.response_ids]


def encode_rankings(codec: Codec, rankings: Sequence[Ranking]) -> list[EncodedRanking]:
    """Tokenise rankings; what was cut to the limits is counted in `codec.counts`."""
    encoded = []
    for ranking in rankings:
        prompt_ids, response_ids = codec.ranked_ids(ranking.prompt, ranking.responses)
        encoded.append(
            EncodedRanking(
                prompt_ids=prompt_ids,
                response_ids=response_ids,
                ranks=ranking.ranks,
                ratings=ranking.scores,
                annotator=ranking.annotator,
            )
        )
    return encoded


def count_indistinct(rankings: Sequence[EncodedRanking]) -> int:
    """Comparable pairs whose responses are the same tokens, as cutting long ones can make them."""
    return sum(
        first == second and rank_i < rank_j
        for ranking in rankings
        for first, rank_i in zip(ranking.response_ids, ranking.ranks, strict=True)
        for second, rank_j in zip(ranking.response_ids, ranking.ranks, strict=True)
    )


@dataclass(frozen=True)
class RankingBatch:
    """P rankings as N rows of prompt + response, N being the sum of their K; ragged by `mask`."""

    rows: TokenBatch  # N rows, ranking after ranking
    ranks: Tensor  # (P, K)
    mask: Tensor  # (P, K) bool, true on real responses; its order is that of the rows
    ratings: Tensor  # (P, K), NaN where the data has none

    @classmethod
    def collate(cls, rankings: Sequence[EncodedRanking], pad_id: int) -> "RankingBatch":
        """Pad rankings to one batch; each response is encoded once, whatever its pairs."""
        sizes = [len(ranking.ranks) for ranking in rankings]
        rows = TokenBatch.from_ragged(
            [ranking.prompt_ids for ranking in rankings for _ in ranking.ranks],
            [ids for ranking in rankings for ids in ranking.response_ids],
            pad_id,
        )
        width = max(sizes)
        ratings = [
            ranking.ratings or (math.nan,) * k for ranking, k in zip(rankings, sizes, strict=True)
        ]
        ranks = [[*ranking.ranks, *[0] * (width - len(ranking.ranks))] for ranking in rankings]
        return cls(
            rows=rows,
            ranks=torch.tensor(ranks),
            mask=torch.arange(width) < torch.tensor(sizes).unsqueeze(1),
            ratings=torch.tensor(
                [[*row, *[math.nan] * (width - len(row))] for row in ratings], dtype=torch.float64
            ),
        )

    def to(self, device: torch.device) -> "RankingBatch":
        """The same rankings on another device; their rows rest on the host (`TokenBatch`)."""
        ranks, mask, ratings = (send(x, device) for x in (self.ranks, self.mask, self.ratings))
        return RankingBatch(self.rows, ranks, mask, ratings)

    def __len__(self) -> int:
        return len(self.ranks)


class RankingRows:
    """Rankings as rows of a trainer: each is one unit of loss, its responses never parted."""

    def __init__(
        self, rankings: Sequence[EncodedRanking], pad_id: int, records: Sequence[Ranking] = ()
    ) -> None:
        """`records`: the texts of the rankings, where somebody may ask for them."""
        assert all(len(set(ranking.ranks)) > 1 for ranking in rankings), "a ranking without pairs"
        self.rankings = rankings
        self.records = records
        self.pad_id = pad_id
        self.lengths = [len(ranking.ranks) * ranking.longest for ranking in rankings]
        self.units = [1] * len(rankings)

    def collate(self, rows: Sequence[int]) -> RankingBatch:
        """These rankings as one micro-batch."""
        return RankingBatch.collate([self.rankings[row] for row in rows], self.pad_id)

    def describe(self, row: int) -> dict[str, Any]:
        """Its number among the training (or held-out) rows, origin, texts and ranks."""
        if not self.records:
            return {"row": row}
        record = self.records[row]
        return {
            "row": row,
            "origin": record.origin,
            "prompt": prompt_json(record.prompt),
            "responses": list(record.responses),
            "ranks": list(record.ranks),
        }

    def __len__(self) -> int:
        return len(self.rankings)
