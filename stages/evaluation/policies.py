"""The responses of the policies to the held-out prompts, and everything measured on them."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.distributed import Runtime
from pipeline.errors import ConfigError
from pipeline.generation import Engine, Sampling
from pipeline.inference import infer
from pipeline.models.trunk import Handle
from pipeline.records import Prompt
from pipeline.rewards import Completions, RewardSource, Scores, measured
from pipeline.rouge import f_measures, require_rouge
from stages.evaluation import metrics
from stages.evaluation.config import EvaluationSection


@dataclass(frozen=True)
class Answers:
    """One policy's responses to the N held-out prompts, with their scores.

    `kl` is the policy's KL from the SFT policy in nats a response; where the responses are not
    drawn from the whole distribution, it is no more than their mean log-ratio.
    """

    response_ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    scores: list[float]
    by_source: Mapping[str, list[float]]  # of several reward sources, each one's; NaN for none
    gold: list[float] | None
    rouge_l: list[float] | None
    kl: float

    def numbers(self) -> dict[str, Any]:
        """The policy's entry of metrics.json; `length` counts tokens, the end's included."""
        bodies = [
            ids[:-1] if ended else ids
            for ids, ended in zip(self.response_ids, self.ended, strict=True)
        ]
        numbers = {
            "score": statistics.fmean(self.scores),
            "score_std": statistics.pstdev(self.scores),
            "scores": {n: _mean_of_known(x) for n, x in self.by_source.items()} or None,
            "gold": None if self.gold is None else statistics.fmean(self.gold),
            "kl": self.kl,
            "length": statistics.fmean(map(len, self.response_ids)),
            "eos_rate": statistics.fmean(self.ended),
            "distinct_2": metrics.distinct_n(bodies, 2),
            "rouge_l": None if self.rouge_l is None else statistics.fmean(self.rouge_l),
            "n": len(self.texts),
        }
        return {key: value for key, value in numbers.items() if value is not None}

    def row(self, index: int) -> dict[str, Any]:
        """The policy's part of a row of samples.jsonl."""
        found = {
            "text": self.texts[index],
            "score": self.scores[index],
            "scores": {n: x[index] for n, x in self.by_source.items()} or None,
            "gold": None if self.gold is None else self.gold[index],
            "rouge_l": None if self.rouge_l is None else self.rouge_l[index],
            "tokens": len(self.response_ids[index]),
            "ended": self.ended[index],
        }
        return {key: value for key, value in found.items() if value is not None}


class Panel:
    """The held-out prompts and those who judge the answers to them.

    Response j to prompt i draws noise number i + j * N, whichever policy answers: two policies that
    agree give the same text, and the first candidate of best-of-n is the SFT policy's response.
    """

    def __init__(
        self,
        section: EvaluationSection,
        prompts: Sequence[Prompt],
        codec: Codec,
        engine: Engine,
        seed: int,
        rewards: RewardSource,
        gold: RewardSource | None,
        runtime: Runtime,
    ) -> None:
        self.section = section
        self.runtime = runtime
        self.prompts = list(prompts)
        self.codec = codec
        self.engine = engine
        self.rewards = rewards
        self.gold = gold
        self.prompt_ids = [codec.prompt_ids(prompt.prompt) for prompt in self.prompts]
        self.sampling = Sampling(
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            seed=seed,
            stream=section.seed_stream,
            top_k=section.decoding.top_k,
            top_p=section.decoding.top_p,
            num_beams=section.decoding.num_beams,
        )
        self.references = _references(self.prompts, section.reference_column)

    @property
    def judge(self) -> str:
        """Who decides which of two responses is better."""
        return (self.gold or self.rewards).name

    def answer(self, policy: Handle, sft: Handle) -> Answers:
        """One response of `policy` to each prompt."""
        drawn = self._draw(policy, 1)
        return self._measure(drawn, self._reward(drawn), self._kl(policy, sft, drawn))

    def best_of_n(self, sft: Handle, n: int) -> Answers:
        """The best of n SFT responses to each prompt by the run's rewards."""
        drawn = self._draw(sft, n)
        scores = self._reward(drawn)
        count = len(self.prompts)
        best = metrics.best_indices([scores.total[i::count] for i in range(count)])
        rows = [i + j * count for i, j in enumerate(best)]
        of_row = scores.rows()
        chosen = Scores.of_rows([of_row[row] for row in rows])
        return self._measure(drawn.take(rows), chosen, metrics.best_of_n_kl(n))

    def _draw(self, policy: Handle, n: int) -> Completions:
        """n responses to each prompt; response j to prompt i stands in row i + j * N."""
        prompt_ids = self.prompt_ids * n

        def write(rows: Sequence[int]) -> Iterable[tuple[list[int], bool]]:
            asked = [prompt_ids[row] for row in rows]
            drawn = self.engine.generate(policy, asked, list(rows), self.sampling)
            return zip(drawn.response_ids, drawn.ended, strict=True)

        written = self.runtime.divided(len(prompt_ids), write)
        response_ids, ended = [ids for ids, _ in written], [end for _, end in written]
        return Completions.decode(self.codec, self.prompts * n, prompt_ids, response_ids, ended)

    def _reward(self, drawn: Completions) -> Scores:
        """Scores of the responses by the run's rewards."""
        return Scores.of_rows(
            self.runtime.divided(
                len(drawn), lambda rows: measured(self.rewards, drawn.take(rows)).rows()
            )
        )

    def _judged(self, drawn: Completions, judge: RewardSource) -> list[float]:
        """Scores of the responses by a judge."""
        return self.runtime.divided(len(drawn), lambda rows: judge.score(drawn.take(rows)))

    def _measure(self, drawn: Completions, scores: Scores, kl: float) -> Answers:
        return Answers(
            response_ids=[list(ids) for ids in drawn.completion_ids],
            texts=list(drawn.texts),
            ended=list(drawn.ended),
            scores=scores.total,
            by_source=scores.by_source,
            gold=None if self.gold is None else self._judged(drawn, self.gold),
            rouge_l=None if self.references is None else rouge_l(drawn.texts, self.references),
            kl=kl,
        )

    def _kl(self, policy: Handle, sft: Handle, drawn: Completions) -> float:
        if policy is sft:
            return 0.0
        # Greedy responses have no distribution to divide by: their log-ratio is taken at 1.
        temperature = self.section.temperature or 1.0
        budget = self.section.micro_batch_tokens

        def both(rows: Sequence[int]) -> Iterable[tuple[list[float], list[float]]]:
            own = drawn.take(rows)
            ours, theirs = (logprobs(h, own, temperature, budget) for h in (policy, sft))
            return zip(ours, theirs, strict=True)

        found = self.runtime.divided(len(drawn), both)
        return metrics.sequence_kl(*([pair[i] for pair in found] for i in (0, 1)))


def _mean_of_known(scores: Sequence[float]) -> float | None:
    known = [score for score in scores if not math.isnan(score)]
    return statistics.fmean(known) if known else None


def logprobs(
    handle: Handle, drawn: Completions, temperature: float, token_budget: int | None
) -> list[list[float]]:
    """Log-probability of each token of each response under `handle`, in nats."""
    batch = TokenBatch.from_ragged(drawn.prompt_ids, drawn.completion_ids, handle.codec.pad_id)
    forbidden = handle.codec.forbidden_ids
    found = infer(handle, batch, ["logprobs"], token_budget, temperature, forbidden)["logprobs"]
    ids = drawn.completion_ids
    return [row[: len(own)] for row, own in zip(found.tolist(), ids, strict=True)]


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F-measure of each text."""
    return f_measures(texts, references, "rougeL")


def _references(prompts: Sequence[Prompt], column: str | None) -> list[str] | None:
    if column is None:
        return None
    require_rouge("evaluation.reference_column")  # its absence is said before anything is generated
    for prompt in prompts:
        if not isinstance(prompt.columns.get(column), str):
            raise ConfigError(
                f"evaluation.reference_column is {column!r}, but the prompt at {prompt.origin} has "
                f"no text there (its columns: {', '.join(prompt.columns) or 'none'}): name a "
                "column that every held-out prompt has, or leave the setting out"
            )
    return [prompt.columns[column] for prompt in prompts]
