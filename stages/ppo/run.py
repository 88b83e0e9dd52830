"""Stage 3: proximal policy optimisation against the reward, with a KL penalty to the start policy.

The InstructGPT recipe (arXiv:2203.02155, sec. 3.5 and app. C.4): sample, score, penalise each token
by its log-ratio to the frozen start policy, GAE with a value model that starts as the reward model,
clipped policy and value losses; InstructGPT's language-model term is `ppo.optim.pretraining_coef`,
its like for demonstrations `ptx_coef`. What else can be added is in docs/ppo-options.md.
Deliberate deviations: losses are divided by the global count of response tokens, not averaged over
sequences; gradients of policy and value model are clipped apart; a step of the learning-rate
schedule is an iteration. With `ppo.algorithm: rejection_sampling` the same stage trains by
cross-entropy on the best responses instead (`rejection.py`).

    rlhf ppo configs/quickstart.yaml ppo.kl_coef=0.1
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from pipeline.config import named_resources
from pipeline.errors import TrainingError
from pipeline.interruption import Interruption
from pipeline.models.footprint import measure_at_first_step
from pipeline.models.store import find_artifact
from pipeline.not_finite import NotFinite, leave
from pipeline.progress import ProgressBar
from pipeline.reward_list import uses_own
from pipeline.rewards import names_of
from pipeline.stage import Context, Summary
from stages.ppo import state
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.checkpoints import Checkpoints
from stages.ppo.controllers import StopRules
from stages.ppo.ema import PolicyAverage
from stages.ppo.experience import Experience, appraise, rollout_metrics
from stages.ppo.faults import with_samples
from stages.ppo.interviewer import Interviewer, check_prompts
from stages.ppo.kl import KlControl, datasets
from stages.ppo.models import build_models, open_rewards, open_start
from stages.ppo.ptx import language_model_terms
from stages.ppo.rejection import RejectionUpdater, best_responses
from stages.ppo.rollout import Rollout
from stages.ppo.samples import FixedTexts, SampleFiles
from stages.ppo.update import Updater

HELD_OUT_METRICS = ("score", "reward", "kl", "response_tokens", "eos_rate")


class PpoStage:
    """From the SFT policy and a reward to a policy that earns more of it."""

    name = "ppo"
    title = "policy optimisation (PPO)"
    samples = True

    def needs(self, config: Any) -> tuple[str, ...]:
        """The run's SFT and reward model, where the config names no others."""
        sft = ("sft",) if config.ppo.policy is None else ()
        return (*sft, "reward") if uses_own(config.ppo.rewards) else sft

    def reads(self, config: Any) -> tuple[str, ...]:
        """Prompts, and what language-model terms draw from."""
        optim = config.ppo.optim
        terms = {"demonstrations": optim.ptx_coef, "pretraining": optim.pretraining_coef}
        return ("prompts", *(kind for kind, coef in terms.items() if coef))

    def resources(self, config: Any) -> Mapping[str, str]:
        """The policy and rewards that the config names."""
        found = {}
        for place, resource in named_resources(config.ppo):
            # Of a run, what is taken counts alone: its other stages may go on.
            artifact = find_artifact(resource, "sft" if place == ("policy",) else "reward")
            found[".".join(map(str, ("ppo", *place)))] = str(artifact or resource)
        return found

    def run(self, context: Context) -> Summary:
        """Train the policy; leave it, samples, texts and metrics.

        Raises:
            DataError: no prompts to train on, or none held out.
            ModelError: policy, rewards and adapters do not fit one another.
            TrainingError: a loss, gradient, score or logit is not finite.
        """
        return Training(context).run()


class Training:
    """One PPO run: its models, what it keeps from iteration to iteration, and the loop."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.section = section = context.config.ppo
        self.runtime = runtime = context.runtime
        check_prompts(context)
        start = open_start(context)
        self.rewards = open_rewards(context)
        # New adapters start at random. Opening may draw numbers too (from files) or not (live).
        runtime.seed_all("ppo")
        self.models = build_models(start, self.rewards, context.config, context.store)
        self.interviewer = Interviewer(context, self.models, self.rewards)
        actor_critic = ActorCritic(self.models.policy, self.models.value)
        runtime.shard(*self.models.trunks(self.rewards))
        updater = RejectionUpdater if section.algorithm == "rejection_sampling" else Updater
        self.updater = updater(
            actor_critic,
            section.optim,
            runtime,
            iterations=section.iterations,
            temperature=section.rollout.temperature,
            terms=language_model_terms(section.optim, context.corpus, self.models.policy.codec),
        )
        self.average: PolicyAverage | None = None
        if section.ema_decay is not None:
            self.average = PolicyAverage(self.updater.steps, section.ema_decay)
        if runtime.is_main:
            roles = self.models.roles(self.rewards)
            optimiser = self.updater.steps.optimiser
            measure_at_first_step(optimiser, roles, context.folder.memory_json)
        prompts = (*context.corpus.prompts.train, *self.interviewer.held_out)
        self.kl = KlControl(section, datasets(prompts, section.kl))
        self.stop_rules = StopRules(**section.stop.rules)
        self.set_rollbacks(0)
        self.sampled = 0  # the last iteration whose rollouts are made
        self.checkpoints = Checkpoints(context, self.models.policy)
        codec, root = self.models.policy.codec, context.folder.root
        self.texts = FixedTexts(root / "texts.jsonl", codec, section.held_out.num_texts)
        self.samples: SampleFiles | None = None
        if section.samples.enabled:
            rows, prefix = section.samples.rows_per_file, f"rank{runtime.rank}"
            sources = names_of(self.rewards)
            self.samples = SampleFiles(root / "samples", codec, rows, prefix, sources)

    # --- the loop ---

    def run(self) -> Summary:
        """Train, and leave the artifact.

        Raises:
            TrainingError: numbers are not finite; says where the best policy so far lies.
        """
        try:
            return self.iterate()
        except TrainingError as error:
            found: TrainingError = error
            if isinstance(error, NotFinite):
                found = leave(error, self.context.folder.root, self.runtime)
            if self.checkpoints.best is None:
                raise found from error
            message = f"{str(found).rstrip('.')}. {self.checkpoints.best_so_far}"
            last = TrainingError(message)
            last.everywhere = found.everywhere
            raise last from error
        finally:
            self.interviewer.close()

    def iterate(self) -> Summary:
        """Iterate to the end, or until the policy diverges once more than it may be rolled back."""
        reached, stopped = state.restore(self) or self.start(), None
        shown = self.context.console if self.runtime.is_main else None
        with (
            Interruption(shown, self.runtime.any_of) as interruption,
            ProgressBar(shown, "PPO", self.section.iterations) as bar,
        ):
            while reached.iteration < self.section.iterations and not stopped:
                try:
                    reached, stopped = self.iteration(reached)
                except NotFinite as error:
                    if not self.may_roll_back:
                        raise
                    found = leave(error, self.context.folder.root, self.runtime)
                    # In sampling, it is the policy that the last iteration left.
                    in_update = self.sampled > reached.iteration
                    good = reached.iteration - (0 if in_update else 1)
                    reached = state.roll_back(self, str(found), good)
                    continue
                bar.step(reached.iteration, _bar_numbers(reached.ended))
                if stopped and self.may_roll_back:
                    broken = max(self.stop_rules.broken.values())
                    # The first iteration that broke a rule sampled from the policy before it.
                    good = reached.iteration - broken - 1
                    reached, stopped = state.roll_back(self, stopped, good), None
                elif not stopped:
                    self.save_or_stop(reached, interruption)
        if stopped:
            self.context.console.print(
                f"[yellow]ppo stopped after iteration {reached.iteration}: {stopped}. The best "
                f"policy is kept. Raise ppo.kl_coef or lower ppo.optim.learning_rate.[/]"
            )
        return self.finish(reached, stopped)

    def iteration(self, reached: state.Reached) -> tuple[state.Reached, str | None]:
        """Collect, appraise, update, log; evaluate now and then; why to stop, if the run must."""
        iteration = reached.iteration + 1
        clock = [time.perf_counter()]
        rollout = self.collect(iteration)
        self.sampled = iteration
        clock.append(time.perf_counter())
        experience = self.appraise(rollout)
        metrics = self.update(experience, iteration)
        clock.append(time.perf_counter())
        metrics |= {"seconds_collect": clock[1] - clock[0], "seconds_update": clock[2] - clock[1]}
        stopped = self.stop_reason(metrics)
        last = stopped is not None and not self.may_roll_back
        self.log(experience, metrics, iteration, last=last)
        return state.Reached(iteration, reached.started, metrics), stopped

    def save_or_stop(self, reached: state.Reached, interruption: Interruption) -> None:
        """Save the state when it is due or the run was asked to stop; then raise `Interrupted`."""
        iteration, ends = reached.iteration, reached.iteration == self.section.iterations
        asked = not ends and interruption.asked()
        due = iteration % self.section.checkpoint_every == 0
        # A policy that may be diverging is none to go back to.
        suspect = self.section.stop.action == "roll_back" and bool(self.stop_rules.broken)
        if asked or (due and not suspect):
            state.save(self, reached)
        if asked:
            raise interruption.stop("ppo", iteration)

    @property
    def may_roll_back(self) -> bool:
        """Whether a divergence leads back to a state, not to the end."""
        stop, has_states = self.section.stop, self.context.states is not None
        return has_states and stop.action == "roll_back" and self.rollbacks < stop.max_rollbacks

    def set_rollbacks(self, count: int) -> None:
        """So many roll-backs there have been; learning rates follow."""
        self.rollbacks = count
        self.updater.rate_scale = self.section.stop.rollback_factor**count

    def start(self) -> state.Reached:
        """Evaluate and log the policy that the run starts from."""
        started = self.evaluate(0)
        self.context.tracker.log(0, started)
        reached = state.Reached(0, started, started)
        if self.section.stop.action == "roll_back":
            state.save(self, reached)  # so that there is something to go back to
        return reached

    def collect(self, iteration: int) -> Rollout:
        """Sample and score this process's share of the iteration's prompts."""
        return self.interviewer.rollouts(iteration)

    def appraise(self, rollout: Rollout) -> Experience:
        """What the update learns from a rollout."""
        section, coefs = self.section, self.kl.coefs(rollout.prompts)
        if section.algorithm == "rejection_sampling":
            each = section.rollout.responses_per_prompt
            return best_responses(rollout, coefs, section.rejection.keep, each)
        return appraise(rollout, coefs, section.advantage, self.runtime.all_sum)

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        """One update of policy and value, or of the value alone while it warms up."""
        warm = iteration > self.section.optim.value_warmup_iterations
        metrics = rollout_metrics(
            experience.rollout,
            self.section.kl,
            self.runtime.all_sum,
            self.section.rollout.importance_cap,
        )
        metrics |= self.kl.measured(experience.rollout, self.runtime.all_sum)
        metrics |= self.kl.metrics(metrics)
        metrics |= self.interviewer.order.metrics(iteration - 1)
        if self.section.stop.action == "roll_back":
            metrics["rollbacks"] = float(self.rollbacks)
        try:
            steps = self.updater.update(experience, iteration, train_policy=warm)
        except NotFinite as error:
            codec = self.models.policy.codec
            raise with_samples(error, experience, iteration, codec) from error
        if warm:
            self.kl.update(metrics, self.section.rollout.num_rollouts)
            if self.average is not None:
                self.average.update()
        found = self.updater.metrics(experience, steps)
        return metrics | found | self.updater.learning_rates()

    def stop_reason(self, metrics: Mapping[str, float]) -> str | None:
        """Which rule of `ppo.stop` the run has broken for too long, if any."""
        names = ("kl", "score", "score_std", "eos_rate")
        return self.stop_rules.check(**{name: metrics[name] for name in names})

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Score held-out prompts with the same noise each time; keep the policy if it is best.

        With `ppo.ema_decay` the policy that is scored and kept is the average.
        """
        all_sum = self.runtime.all_sum
        with nullcontext() if self.average is None else self.average.in_place():
            rollout = self.interviewer.held_out_answers(iteration)
            metrics = rollout_metrics(rollout, self.section.kl, all_sum)
            self.checkpoints.offer(iteration, metrics["reward"])
        if self.runtime.is_main:
            self.texts.write(rollout, iteration)
        names = [name for name in metrics if name in HELD_OUT_METRICS or name.startswith("scores/")]
        found = {name: metrics[name] for name in names} | self.kl.measured(rollout, all_sum)
        return {f"held_out_{name}": value for name, value in found.items()}

    def log(
        self, experience: Experience, metrics: dict[str, float], iteration: int, *, last: bool
    ) -> None:
        """Samples and metrics of an iteration, with held-out metrics when they are due."""
        if self.samples is not None:
            self.samples.write(experience, iteration)
        if (
            last
            or iteration % self.section.held_out.every == 0
            or (iteration == self.section.iterations)
        ):
            metrics |= self.evaluate(iteration)
        self.context.tracker.log(iteration, metrics)

    def finish(self, reached: state.Reached, stopped: str | None) -> Summary:
        """Leave the chosen policy as the artifact, hand the trunk on, return key numbers."""
        iteration, started, ended = reached
        if self.average is not None:
            self.average.become()
        self.updater.close()
        self.models.policy.trunk.freeze()
        self.models.release_value()
        keep_best = self.section.keep == "best" or stopped is not None
        chosen = self.checkpoints.finish(iteration, keep_best=keep_best)
        assert self.checkpoints.best is not None
        return {
            "iterations": iteration,
            "kept_iteration": chosen,
            "best_iteration": self.checkpoints.best[0],
            "held_out_reward_start": started["held_out_reward"],
            "held_out_reward_best": self.checkpoints.best[1],
            **{name: ended[name] for name in ended if name.startswith("held_out_")},
            **{name: ended[name] for name in ("kl", "eos_rate", "kl_coef") if name in ended},
            **({"rollbacks": self.rollbacks} if self.rollbacks else {}),
            **({"stopped": stopped} if stopped else {}),
            **self.interviewer.cuts,
        }


def _bar_numbers(metrics: Mapping[str, float]) -> str:
    return (
        f"score {metrics['score']:.3f}  KL {metrics['kl']:.2f}  "
        f"length {metrics['response_tokens']:.1f}  EOS {metrics['eos_rate']:.0%}"
    )
