"""What changes from iteration to iteration: KL coefficient, learning rate, and when to stop.

Plain numbers in and out. The dataclasses hold their whole state in fields that JSON can keep.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol


class KlController(Protocol):
    """Owns the coefficient of the KL penalty."""

    coef: float

    def update(self, kl: float, num_responses: int) -> None:
        """Take note of an iteration's mean KL, in nats a response, over `num_responses`."""


@dataclass
class FixedKl:
    """The coefficient stays as it is."""

    coef: float

    def update(self, kl: float, num_responses: int) -> None:
        """Nothing to do."""


@dataclass
class AdaptiveKl:
    """Proportional control towards a target KL (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2).

    e = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + e n / horizon, for n responses.
    """

    coef: float
    target: float
    horizon: float

    def update(self, kl: float, num_responses: int) -> None:
        """Raise the coefficient where the KL is above the target, lower it where it is below."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        # With n > 5 horizon the factor would turn negative: one iteration cannot undo that much.
        self.coef *= max(1.0 + error * num_responses / self.horizon, 0.0)


def schedule_factor(
    schedule: Literal["constant", "linear", "cosine"], step: int, total: int, warmup: int = 0
) -> float:
    """Share of the peak learning rate at `step` (from 0) of `total`.

    Rises linearly over `warmup` steps, reaching 1 at step `warmup - 1`; then stays, or falls
    towards the 0 of step `total`, so that the last step still learns.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(total - warmup, 1)
    return 1.0 - done if schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2


@dataclass
class StopRules:
    """Ends a run that has diverged: a rule broken for `patience` iterations in a row.

    Score and EOS rate are compared with the first iteration's, which shows the starting policy.
    `None` switches a rule off.
    """

    max_kl: float | None
    max_score_drop: float | None
    min_eos_share: float | None
    patience: int
    first: dict[str, float] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)

    def check(self, kl: float, score: float, score_std: float, eos_rate: float) -> str | None:
        """Why to stop now, naming the setting and the numbers, or None to go on.

        `kl` in nats a response; `score` and `score_std` over the iteration's responses.
        """
        if not self.first:
            self.first = {"score": score, "score_std": score_std, "eos_rate": eos_rate}
        reasons = self._reasons(kl, score, eos_rate)
        self.broken = {rule: self.broken.get(rule, 0) + 1 for rule in reasons}
        for rule, count in self.broken.items():
            if count >= self.patience:
                return f"{reasons[rule]}, in {count} iterations in a row"
        return None

    def _reasons(self, kl: float, score: float, eos_rate: float) -> dict[str, str]:
        reasons = {}
        if self.max_kl is not None and kl > self.max_kl:
            reasons["max_kl"] = f"KL {kl:.4g} nats a response > ppo.stop.max_kl = {self.max_kl:g}"
        if self.max_score_drop is not None:
            start, spread = self.first["score"], self.first["score_std"]
            floor = start - self.max_score_drop * spread
            # Scores without spread (all equal) give no unit to measure a fall in.
            if spread > 0 and score < floor:
                reasons["max_score_drop"] = (
                    f"score {score:.4g} < {floor:.4g} = first score {start:.4g} - "
                    f"ppo.stop.max_score_drop {self.max_score_drop:g} x std {spread:.4g}"
                )
        if self.min_eos_share is not None:
            floor = self.min_eos_share * self.first["eos_rate"]
            # A start that hardly ever ends its responses has no habit to lose.
            if self.first["eos_rate"] >= 0.1 and eos_rate < floor:
                reasons["min_eos_share"] = (
                    f"EOS rate {eos_rate:.4g} < {floor:.4g} = ppo.stop.min_eos_share "
                    f"{self.min_eos_share:g} x first rate {self.first['eos_rate']:.4g}"
                )
        return reasons
