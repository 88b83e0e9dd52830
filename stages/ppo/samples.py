"""What people look at afterwards: every rollout in Parquet files, and texts of fixed prompts."""

import io
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from pipeline.codec import Codec
from pipeline.runfolder import json_line, write_bytes_atomic, write_text_atomic
from stages.ppo.experience import Experience
from stages.ppo.rollout import Rollout

_NUMBERS = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),
        ("sample_index", pa.int64()),
        ("origin", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("ended", pa.bool_()),
        ("score", pa.float32()),  # as the reward source gave it, or the sum of several
        ("reward", pa.float32()),  # after length, missing-EOS rule and clipping
        ("kl", pa.float32()),  # k1 sum of the response, in nats
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("logprobs", _NUMBERS),
        ("ref_logprobs", _NUMBERS),
        ("values", _NUMBERS),
        ("advantages", _NUMBERS),
        ("returns", _NUMBERS),
    ]
)


def sample_schema(sources: Sequence[str]) -> pa.Schema:
    """SCHEMA, with a column `scores/NAME` for each of several reward sources (null: no score)."""
    schema = SCHEMA
    for name in sources:
        schema = schema.append(pa.field(f"scores/{name}", pa.float32()))
    return schema


class SampleFiles:
    """Writes rollouts to `FOLDER/PREFIX-00000.parquet`, ...; readable at every moment.

    The newest file is replaced whole after each iteration until it holds `rows_per_file` rows, so
    a run that dies leaves every finished iteration on disk.
    """

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        rows_per_file: int,
        prefix: str,
        sources: Sequence[str] = (),
    ) -> None:
        """`sources`: the names of the reward sources, where there are several."""
        self.folder = folder
        self.codec = codec
        self.rows_per_file = rows_per_file
        self.prefix = prefix
        self.number = 0
        self.schema = sample_schema(sources)
        self.table = self.schema.empty_table()

    def state(self) -> dict[str, int]:
        """How much has been written: full files, and rows of the newest."""
        return {"number": self.number, "rows": self.table.num_rows}

    def restore(self, number: int, rows: int) -> None:
        """Go back to where `state` was: what was written later goes."""
        self.number, newest = number, self._path(number)
        if rows:
            self.table = pq.read_table(newest, schema=self.schema).slice(0, rows)
        else:
            self.table = self.schema.empty_table()
            newest.unlink(missing_ok=True)
        later = number + 1
        while self._path(later).exists():
            self._path(later).unlink()
            later += 1

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.prefix}-{number:05d}.parquet"

    def write(self, experience: Experience, iteration: int) -> None:
        """Add one iteration's rollouts."""
        rows = pa.Table.from_pylist(sample_rows(experience, iteration, self.codec), self.schema)
        self.table = pa.concat_tables([self.table, rows])
        while self.table.num_rows:
            stream = io.BytesIO()
            pq.write_table(self.table.slice(0, self.rows_per_file), stream, compression="zstd")
            write_bytes_atomic(self._path(self.number), stream.getvalue())
            if self.table.num_rows < self.rows_per_file:
                return
            self.number += 1
            self.table = self.table.slice(self.rows_per_file)


def sample_rows(experience: Experience, iteration: int, codec: Codec) -> list[dict[str, Any]]:
    """One row of `sample_schema` a response, numbers of real tokens only."""
    rollout = experience.rollout
    batch = rollout.batch
    lengths = batch.response_lengths.tolist()
    per_token = {
        "logprobs": rollout.logprobs,
        "ref_logprobs": rollout.ref_logprobs,
        "values": rollout.values,
        "advantages": experience.advantages,
        "returns": experience.returns,
    }
    ragged = {name: _ragged(x_br, lengths) for name, x_br in per_token.items()}
    ragged["response_ids"] = _ragged(batch.response_ids, lengths)
    ragged["prompt_ids"] = _ragged(batch.prompt_ids, batch.prompt_lengths.tolist())
    kl_b = (rollout.logprobs - rollout.ref_logprobs).sum(1).tolist()  # zeros on padding
    scores, rewards = rollout.scores.tolist(), rollout.rewards.tolist()
    ended = rollout.ended.tolist()
    by_source = {f"scores/{name}": x_b.tolist() for name, x_b in rollout.source_scores.items()}
    return [
        {
            "iteration": iteration,
            "sample_index": rollout.sample_indices[row],
            "origin": rollout.prompts[row].origin,
            "prompt": codec.prompt_text(rollout.prompts[row].prompt),
            "response": rollout.texts[row],
            "ended": ended[row],
            "score": scores[row],
            "reward": rewards[row],
            "kl": kl_b[row],
            **{name: rows[row] for name, rows in ragged.items()},
            **{name: None if isnan(x[row]) else x[row] for name, x in by_source.items()},
        }
        for row in range(len(rollout))
    ]


class FixedTexts:
    """`texts.jsonl`: what the policy answers to the same prompts as training goes on."""

    def __init__(self, path: Path, codec: Codec, count: int) -> None:
        self.path = path
        self.codec = codec
        self.count = count
        self.lines: list[str] = []

    def restore(self, count: int) -> None:
        """Go back to the first `count` lines."""
        lines = self.path.read_text(encoding="utf-8").splitlines(True) if count else []
        self.lines = lines[:count]

    def write(self, rollout: Rollout, iteration: int) -> None:
        """Add the answers to the first `count` held-out prompts."""
        for row in range(min(self.count, len(rollout))):
            line = {
                "iteration": iteration,
                "prompt": self.codec.prompt_text(rollout.prompts[row].prompt),
                "response": rollout.texts[row],
                "ended": bool(rollout.ended[row]),
                "score": float(rollout.scores[row]),
            }
            self.lines.append(json_line(line))
        if self.lines:
            write_text_atomic(self.path, "".join(self.lines))


def _ragged(x_br: Tensor, lengths: list[int]) -> list[list[Any]]:
    return [row[:length] for row, length in zip(x_br.tolist(), lengths, strict=True)]
