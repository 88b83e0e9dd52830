"""The weight of the KL penalty: one for all prompts, or one for each value of a prompt column.

Mixed prompts drift at different speeds: with `ppo.kl.column` each dataset is measured, weighed and
(with `controller: adaptive`) steered by itself.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.data.validate import nearest
from pipeline.errors import DataError
from pipeline.records import Prompt
from stages.ppo.config import PpoSection
from stages.ppo.controllers import AdaptiveKl, FixedKl, KlController
from stages.ppo.experience import AllSum
from stages.ppo.learning_config import KlSection
from stages.ppo.objective import kl_estimate
from stages.ppo.rollout import Rollout

ALL = "all"  # the one controller without a column
MAX_DATASETS = 64  # each has metrics of its own


def dataset_of(prompt: Prompt, column: str) -> str:
    """The prompt's value of `ppo.kl.column`, as text.

    Raises:
        DataError: it has none, or one that is neither text nor a whole number.
    """
    value = prompt.columns.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = f"is {value!r}" if column in prompt.columns else "is missing"
        raise DataError(
            f"{prompt.origin}: `{column}` (ppo.kl.column) {found}: every prompt needs text or a "
            "whole number there. Add it, or remove ppo.kl.column"
        )
    return str(value)


def datasets(prompts: Iterable[Prompt], section: KlSection) -> list[str]:
    """The values of `ppo.kl.column` among all prompts, sorted; none without a column.

    Raises:
        DataError: a prompt has none, there are too many, or `coefs` or `targets` name another.
    """
    if section.column is None:
        return []
    found = sorted({dataset_of(prompt, section.column) for prompt in prompts})
    if len(found) > MAX_DATASETS:
        raise DataError(
            f"ppo.kl.column = {section.column!r} has {len(found)} values, more than {MAX_DATASETS}:"
            " each is a dataset with metrics of its own. Name a column with fewer"
        )
    for setting in ("coefs", "targets"):
        for name in sorted(getattr(section, setting).keys() - set(found)):
            guess = nearest(name, found)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise DataError(
                f"ppo.kl.{setting} names {name!r}, but the values of ppo.kl.column = "
                f"{section.column!r} are {', '.join(found)}.{hint}"
            )
    return found


class KlControl:
    """One controller for all prompts, or one a dataset."""

    def __init__(self, section: PpoSection, names: Sequence[str]) -> None:
        """`names` are those of the datasets, the same in all processes; none without a column."""
        self.column = section.kl.column
        self.controllers: dict[str, KlController] = {}
        for name in names or (ALL,):
            coef = section.kl.coefs.get(name, section.kl_coef)
            target = section.kl.targets.get(name, section.kl.target)
            self.controllers[name] = FixedKl(coef)
            if section.kl.controller == "adaptive":
                self.controllers[name] = AdaptiveKl(coef, target, section.kl.horizon)

    def coefs(self, prompts: Sequence[Prompt]) -> float | Tensor:
        """The coefficient of all, or of each of these prompts (B,), float64."""
        if self.column is None:
            return self.controllers[ALL].coef
        names = [dataset_of(prompt, self.column) for prompt in prompts]
        return torch.tensor([self.controllers[n].coef for n in names], dtype=torch.float64)

    def measured(self, rollout: Rollout, all_sum: AllSum) -> dict[str, float]:
        """`score/NAME`, `kl/NAME` and `responses/NAME` of each dataset that was asked.

        Means over all processes' responses; the KL is k1, in nats a response.
        """
        if self.column is None:
            return {}
        places = {name: place for place, name in enumerate(self.controllers)}
        rows = torch.tensor([places[dataset_of(p, self.column)] for p in rollout.prompts])
        k1_b = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1").double().sum(1)
        numbers = torch.stack([torch.ones_like(k1_b), rollout.scores.double(), k1_b], dim=1)
        own = torch.zeros(len(places), 3, dtype=torch.float64).index_add(0, rows, numbers)
        found: dict[str, float] = {}
        for name, (responses, score, kl) in zip(places, all_sum(own).tolist(), strict=True):
            if responses:
                found[f"score/{name}"] = score / responses
                found[f"kl/{name}"] = kl / responses
                found[f"responses/{name}"] = responses
        return found

    def metrics(self, measured: Mapping[str, float]) -> dict[str, float]:
        """`kl_coef`, the mean over responses, and of each dataset that was asked its own."""
        if self.column is None:
            return {"kl_coef": self.controllers[ALL].coef}
        asked = {n: measured[f"responses/{n}"] for n in self.controllers if f"kl/{n}" in measured}
        total = sum(self.controllers[name].coef * count for name, count in asked.items())
        return {"kl_coef": total / sum(asked.values())} | {
            f"kl_coef/{name}": self.controllers[name].coef for name in asked
        }

    def update(self, metrics: Mapping[str, float], responses: int) -> None:
        """Steer by an iteration's metrics: those of `measured`, and `kl` over all `responses`."""
        if self.column is None:
            self.controllers[ALL].update(metrics["kl"], responses)
            return
        for name, controller in self.controllers.items():
            if f"kl/{name}" in metrics:
                controller.update(metrics[f"kl/{name}"], int(metrics[f"responses/{name}"]))

    def state(self) -> dict[str, float]:
        """The coefficients that an iteration leaves to the next."""
        return {name: controller.coef for name, controller in self.controllers.items()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go back to a `state`."""
        for name, coef in state.items():
            self.controllers[name].coef = coef
