"""The PPO update: epochs x minibatches of one optimiser step each, accumulated over micro-batches.

Every loss is a sum over response tokens divided by the *global* token count of the optimiser step,
so neither micro-batches nor processes change the result. Policy and value model sit in one module
with one forward; what is trainable is fixed before it is wrapped. Their gradients are clipped
apart: a large value error never shrinks the policy's step.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.batches import TokenBatch, micro_batches
from pipeline.distributed import Runtime
from pipeline.out_of_memory import halving, release_freed_memory
from pipeline.saved_rows import Saved
from pipeline.tensors import masked_sum
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.controllers import schedule_factor
from stages.ppo.experience import Experience
from stages.ppo.faults import gradient_fault, language_model_fault, loss_fault
from stages.ppo.learning_config import PpoOptimSection
from stages.ppo.losses import SUMS, losses, together
from stages.ppo.ptx import LanguageModelTerm, Ragged

Drawn = list[tuple[LanguageModelTerm, list[Ragged]]]


@dataclass(frozen=True)
class Step:
    """Statistics of one optimiser step over its global response tokens."""

    tokens: float
    sums: dict[str, float]  # SUMS
    ratio_max: float
    # Before clipping; empty where target_kl prevented the step.
    grad_norms: dict[str, float] = field(default_factory=dict)
    # Of each language-model term its negative log-likelihood, in nats, and its global tokens.
    language: dict[str, tuple[float, float]] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """One of SUMS, per token."""
        return self.sums[name] / self.tokens


class Updater:
    """Owns the optimiser and updates the actor-critic from one iteration's experience."""

    def __init__(
        self,
        actor_critic: ActorCritic,
        section: PpoOptimSection,
        runtime: Runtime,
        *,
        iterations: int,
        temperature: float,
        terms: Sequence[LanguageModelTerm] = (),
    ) -> None:
        self.section = section
        self.runtime = runtime
        self.iterations = iterations
        self.temperature = temperature
        self.terms = terms
        self.codec = actor_critic.policy.codec
        self.pad_id, self.forbidden = self.codec.pad_id, self.codec.forbidden_ids
        trunk = actor_critic.policy.trunk
        # Tokens of a micro-batch; halved where memory runs out.
        self.micro_batch_tokens = trunk.token_budget(section.micro_batch_tokens)
        self.packs = all(trunk.packs for trunk in actor_critic.distinct_trunks())
        for trunk in actor_critic.distinct_trunks():
            trunk.recompute = section.gradient_checkpointing
        groups = {
            "policy": actor_critic.policy_parameters(),
            "value": actor_critic.value_parameters(),
        }
        self.groups = {name: parameters for name, parameters in groups.items() if parameters}
        self.peak_rates = {
            "policy": section.learning_rate,
            "value": section.value_learning_rate or section.learning_rate,
        }
        self.rate_scale = 1.0  # of all learning rates, after a roll-back
        optimiser = torch.optim.AdamW(
            [
                {"params": parameters, "lr": self.peak_rates[name], "name": name}
                for name, parameters in self.groups.items()
            ],
            betas=(section.adam_beta1, section.adam_beta2),
            eps=section.adam_eps,
            weight_decay=section.weight_decay,
            fused=True,
        )
        # While the value warms up, and in language-model terms, one of the two models rests.
        skips_some = bool(section.value_warmup_iterations or terms)
        self.steps = runtime.prepare(actor_critic, optimiser, skips_some=skips_some)
        self.takes_one_pass = actor_critic.shared or self.steps.takes_one_pass

    def update(
        self, experience: Experience, iteration: int, *, train_policy: bool = True
    ) -> list[Step]:
        """One iteration: `ppo_epochs` passes over the experience, `minibatches` steps each.

        Iterations count from 1; `train_policy=False` is value warm-up. Stops before the step whose
        approximate KL to the policy that sampled is above `target_kl`; it is last in the list.

        Raises:
            NotFinite: a loss or gradient, in any process; the weights are those before the step.
                All processes raise it, each with its own rows at fault.
        """
        self._set_learning_rates(iteration)
        release_freed_memory()  # what sampling and scoring used, before gradients need more
        try:
            return self._steps(experience, iteration, train_policy)
        finally:
            self.steps.let_go()
            release_freed_memory()  # gradients and activations, before the next rollout

    def _steps(self, experience: Experience, iteration: int, train_policy: bool) -> list[Step]:
        steps: list[Step] = []
        for epoch in range(self.section.ppo_epochs):
            minibatches = self._minibatches(experience, iteration, epoch)
            for number, (rows, count) in enumerate(minibatches):
                place = f"iteration {iteration}, epoch {epoch}, minibatch {number}"
                drawn: Drawn = [
                    (term, term.draw(count, self.runtime, iteration, epoch, number))
                    for term in (self.terms if train_policy else ())
                ]
                step = self._gradients(experience, rows, drawn, train_policy, place)
                target = self.section.target_kl
                if target is not None and step.mean("approx_kl") > target:
                    return [*steps, step]
                norms = self._step(train_policy, place, experience, rows)
                steps.append(replace(step, grad_norms=norms))
        return steps

    def metrics(self, experience: Experience, steps: Sequence[Step]) -> dict[str, float]:
        """What an iteration's update is logged as."""
        found = {"explained_variance": experience.explained_variance}
        if experience.mean_lambda is not None:
            found["gae_lambda"] = experience.mean_lambda
        return found | update_metrics(steps)

    def state(self) -> dict[str, Any]:
        """What training changes: weights, and the optimiser's numbers of each."""
        return self.steps.tensors()

    def restore(self, tensors: Saved) -> None:
        """Go back to a `state`."""
        self.steps.restore(tensors)

    def close(self) -> None:
        """Training is over: the models go on without a wrapper."""
        self.steps.close()

    def learning_rates(self) -> dict[str, float]:
        """The current learning rate of each group, as metrics."""
        return {f"learning_rate_{name}": rate for name, rate in self.steps.rates.items()}

    def _set_learning_rates(self, iteration: int) -> None:
        # A step of the schedule is an iteration: early stopping must not stretch the schedule.
        warmup = round(self.section.warmup_fraction * self.iterations)
        factor = schedule_factor(self.section.schedule, iteration - 1, self.iterations, warmup)
        peaks = self.peak_rates.items()
        self.steps.set_rates({name: rate * factor * self.rate_scale for name, rate in peaks})

    def _minibatches(
        self, experience: Experience, iteration: int, epoch: int
    ) -> Iterator[tuple[list[int], int]]:
        """Local rows of each minibatch, and how many it has in all processes.

        A permutation of the *global* sample indices, cut.
        """
        local = {index: row for row, index in enumerate(experience.rollout.sample_indices)}
        indices = sorted(self.runtime.gather_objects(list(local)))
        random = np.random.default_rng([self.runtime.seed("minibatches"), iteration, epoch])
        for part in np.array_split(random.permutation(indices), self.section.minibatches):
            yield [local[index] for index in part.tolist() if index in local], len(part)

    def _gradients(
        self,
        experience: Experience,
        rows: list[int],
        drawn: Drawn,
        train_policy: bool,
        place: str,
    ) -> Step:
        """Gradients of one step, in smaller micro-batches if memory runs out: the same step."""

        def attempt(tokens: int) -> Step:
            self.micro_batch_tokens = tokens
            self.steps.begin(list(self.groups) if train_policy else ["value"])
            found = self._accumulate(experience, rows, train_policy, place)
            language = {
                term.name: self._accumulate_language(term, pairs, place) for term, pairs in drawn
            }
            return replace(found, language=language)

        remedy = (
            f"ppo: {place} does not fit. Lower ppo.optim.micro_batch_tokens "
            f"({self.micro_batch_tokens}), set ppo.optim.gradient_checkpointing to true, or "
            "shorten data.max_prompt_tokens or ppo.rollout.max_new_tokens"
        )
        # One process of several cannot repeat a step alone: the others would wait for ever.
        smallest = self.micro_batch_tokens
        if self.runtime.world_size == 1:
            # Below its longest row a smaller budget changes nothing.
            lengths = experience.rollout.batch.lengths
            smallest = min(smallest, max(lengths[row] for row in rows))
        found, _ = halving(
            attempt, self.micro_batch_tokens, smallest, remedy, undo=self.steps.let_go
        )
        return found

    def _accumulate(
        self, experience: Experience, rows: list[int], train_policy: bool, place: str
    ) -> Step:
        """Gradients of one minibatch, and its statistics."""
        lengths = experience.rollout.batch.lengths
        local_tokens = experience.rollout.batch.response_lengths[rows].sum()
        tokens = float(self.runtime.all_sum(local_tokens))
        # A process without rows takes its part in the reductions with a row that does not count.
        rows, weight = (rows, 1.0) if rows else ([0], 0.0)
        parts = self._micro_batches([lengths[row] for row in rows])
        passes = self._passes(train_policy)
        measured: list[Tensor] = []
        for part, counts, ends in self._in_step(parts):
            chosen = [rows[position] for position in part]
            sums = []
            for want in passes:
                with self.steps.passing(last=ends and want is passes[-1]):
                    loss, found = self._losses(experience, chosen, want)
                    self.steps.backward(loss * (counts * weight / tokens))
                sums.append(found * weight)
                del loss  # and with it the activations, before those of the next pass
            if counts:
                measured.append(reduce(together, sums))
        stacked = torch.stack(measured)
        totals = self.runtime.all_sum(stacked[:, :-1].sum(0)).tolist()
        ratios = self.runtime.gather_objects([float(stacked[:, -1].max())])
        # Sums over processes: where one number is not finite, every process comes to know it.
        if not all(map(math.isfinite, [*totals, *ratios])):
            indices = [experience.rollout.sample_indices[row] for row in rows]
            raise loss_fault(stacked, parts, indices, place, self.runtime.gather_objects)
        return Step(tokens, dict(zip(SUMS, totals, strict=True)), max(ratios))

    def _micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        return micro_batches(lengths, self.micro_batch_tokens, packed=self.packs)

    def _in_step(self, parts: list[list[int]]) -> Iterator[tuple[list[int], bool, bool]]:
        """Micro-batches, each with whether it counts and whether it is the last.

        A pass gathers sharded weights from all processes: one with fewer micro-batches than another
        passes its last one again, for nothing.
        """
        number = self.runtime.most(len(parts))
        for position in range(number):
            counts = position < len(parts)
            yield parts[position if counts else -1], counts, position == number - 1

    def _passes(self, train_policy: bool) -> list[list[str]]:
        """What each forward and backward pass over a micro-batch wants.

        One for both models where they share their states, and under wrappers for many processes,
        which ask for one; otherwise one each, with the activations of one model at a time.
        """
        policy = ["logprobs", "entropy"] if self.section.entropy_coef else ["logprobs"]
        if not train_policy:
            return [["values"]]
        if self.takes_one_pass:
            return [["values", *policy]]
        return [["values"], policy]

    def _losses(
        self, experience: Experience, rows: list[int], want: Collection[str]
    ) -> tuple[Tensor, Tensor]:
        with self.runtime.autocast():
            out = self.steps.module(
                experience.rollout.batch.take(rows), want, self.temperature, self.forbidden
            )
        return losses(self.section, experience, rows, out)

    def _accumulate_language(
        self, term: LanguageModelTerm, drawn: list[Ragged], place: str
    ) -> tuple[float, float]:
        """Gradients of a term's coef x mean NLL of what it drew; the NLL and its global tokens."""
        local_tokens = sum(len(response) for _, response in drawn)
        tokens = float(self.runtime.all_sum(torch.tensor(local_tokens)))
        weight = term.coef / tokens if drawn else 0.0
        # A process that drew none takes its part in the reductions with a row that does not count.
        pairs = drawn or term.pairs[:1]
        prompts, responses = zip(*pairs, strict=True)
        batch = TokenBatch.from_ragged(prompts, responses, self.pad_id)
        parts = self._micro_batches(batch.lengths)
        losses: list[Tensor] = []
        for rows, counts, ends in self._in_step(parts):
            part = batch.take(rows)
            with self.steps.passing(last=ends):
                with self.runtime.autocast():
                    # A language-model loss: at temperature 1 whatever the policy is sampled with.
                    logprobs = self.steps.module(part, ["logprobs"]).logprobs
                loss = -masked_sum(logprobs, part.response_mask)
                self.steps.backward(loss * (counts * weight))
            if counts:
                losses.append(loss.detach())
        found = torch.stack(losses)
        total = float(self.runtime.all_sum(found.sum() * bool(drawn)))
        if not math.isfinite(total):
            raise language_model_fault(found, parts, pairs, place, term, self.codec)
        return total, tokens

    def _step(
        self, train_policy: bool, place: str, experience: Experience, rows: list[int]
    ) -> dict[str, float]:
        norms = {
            name: self.steps.clip(self.section.max_grad_norm, name)
            for name in self.groups
            if train_policy or name == "value"
        }
        for name, norm in norms.items():
            if not math.isfinite(norm):
                indices = experience.rollout.sample_indices
                raise gradient_fault(name, norm, [indices[row] for row in rows], place)
        self.steps.step()
        return norms


def update_metrics(steps: Sequence[Step]) -> dict[str, float]:
    """Means over the tokens of all steps (each counted once an epoch), and gradient norms."""
    tokens = sum(step.tokens for step in steps)
    taken = [step for step in steps if step.grad_norms]
    # The entropy that is logged is the rollout's; while the value warms up there is no ratio.
    policy_trained = any("policy" in step.grad_norms for step in taken)
    names = [n for n in SUMS if n.startswith("value") or (policy_trained and n != "entropy")]
    metrics = {name: sum(step.sums[name] for step in steps) / tokens for name in names}
    if policy_trained:
        metrics["ratio_max"] = max(step.ratio_max for step in steps)
    metrics |= language_metrics(steps)
    metrics["optimiser_steps"] = float(len(taken))
    for name in ("policy", "value"):
        norms = [step.grad_norms[name] for step in taken if name in step.grad_norms]
        if norms:
            metrics[f"grad_norm_{name}"] = sum(norms) / len(norms)
    return metrics


def language_metrics(steps: Sequence[Step]) -> dict[str, float]:
    """Mean loss a token of each language-model term, `NAME_loss`, over all steps."""
    found = {}
    for name in steps[0].language:
        sums = [step.language[name] for step in steps]
        found[f"{name}_loss"] = sum(nll for nll, _ in sums) / sum(count for _, count in sums)
    return found
