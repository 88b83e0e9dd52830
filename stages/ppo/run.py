"""Stage 3: proximal policy optimisation against the reward, with a KL penalty to the start policy.

The InstructGPT recipe (arXiv:2203.02155, sec. 3.5 and app. C.4): sample, score, penalise each token
by its log-ratio to the frozen start policy, GAE with a value model that starts as the reward model,
clipped policy and value losses; InstructGPT's language-model term is `ppo.optim.ptx_coef`.
Deliberate deviations: losses are divided by the global count of response tokens, not averaged over
sequences; gradients of policy and value model are clipped apart; a step of the learning-rate
schedule is an iteration.

    rlhf ppo configs/quickstart.yaml ppo.kl_coef=0.1
"""

import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

from pipeline.errors import DataError, TrainingError
from pipeline.generation import close_engine, open_engine
from pipeline.interruption import Interruption
from pipeline.models.footprint import measure_at_first_step
from pipeline.models.store import find_artifact
from pipeline.models.trunk import Handle
from pipeline.not_finite import NotFinite, leave, together
from pipeline.progress import ProgressBar
from pipeline.records import Prompt
from pipeline.stage import Context, Summary
from stages.ppo import state
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.checkpoints import Checkpoints
from stages.ppo.controllers import AdaptiveKl, FixedKl, KlController, StopRules
from stages.ppo.experience import Experience, appraise, rollout_metrics
from stages.ppo.faults import refuse_not_finite, with_samples, with_texts
from stages.ppo.models import build_models, open_rewards, open_start
from stages.ppo.rollout import HELD_OUT_STREAM, TRAINING_STREAM, PromptOrder, Rollout, collect
from stages.ppo.samples import FixedTexts, SampleFiles
from stages.ppo.update import Ragged, Updater, update_metrics

HELD_OUT_METRICS = ("score", "reward", "kl", "response_tokens", "eos_rate")


class PpoStage:
    """From the SFT policy and a reward to a policy that earns more of it."""

    name = "ppo"
    title = "policy optimisation (PPO)"

    def needs(self, config: Any) -> tuple[str, ...]:
        """The run's SFT and reward model, where the config names no others."""
        own = {"sft": config.ppo.policy, "reward": config.ppo.rewards}
        return tuple(stage for stage, resource in own.items() if resource is None)

    def reads(self, config: Any) -> tuple[str, ...]:
        """Prompts, and demonstrations for the language-model term."""
        return ("prompts", "demonstrations") if config.ppo.optim.ptx_coef else ("prompts",)

    def resources(self, config: Any) -> Mapping[str, str]:
        """The policy and rewards that the config names."""
        named = {"policy": (config.ppo.policy, "sft"), "rewards": (config.ppo.rewards, "reward")}
        # Of a run, what is taken counts alone: its other stages may go on.
        return {
            f"ppo.{field}": str(find_artifact(resource, stage) or resource)
            for field, (resource, stage) in named.items()
            if resource is not None
        }

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
        prompts = context.corpus.prompts
        self.held_out = prompts.held_out[: section.held_out.num_prompts]
        for part, rows in (("train on", prompts.train), ("hold out", self.held_out)):
            if not rows:
                raise DataError(
                    f"ppo: there are no prompts to {part}. Check data.prompts (or the dataset "
                    "that prompts are taken from) and data.held_out_fraction"
                )
        asked = section.rollout.prompts_per_iteration
        if min(asked, len(self.held_out)) < runtime.world_size:
            raise DataError(
                f"ppo: {runtime.world_size} processes need a prompt each, but there are {asked} an "
                f"iteration and {len(self.held_out)} held out: raise "
                "ppo.rollout.prompts_per_iteration or ppo.held_out.num_prompts, or start fewer"
            )
        start = open_start(context)
        self.rewards = open_rewards(context)
        # New adapters start at random. Opening may draw numbers too (from files) or not (live).
        runtime.seed_all("ppo")
        self.models = build_models(start, self.rewards, context.config, context.store)
        self.engine = open_engine(
            section.rollout.engine,
            section.rollout.generation_rows,
            section.rollout.vllm,
            context.folder.root,
            runtime,
        )
        self.order = PromptOrder(prompts.train, runtime.seed("prompts"))
        self.prompt_ids = cache(self.models.policy.codec.prompt_ids)
        self.cuts = self._tokenise_prompts()
        actor_critic = ActorCritic(self.models.policy, self.models.value)
        runtime.shard(*self.models.trunks(self.rewards))
        self.updater = Updater(
            actor_critic,
            section.optim,
            runtime,
            iterations=section.iterations,
            temperature=section.rollout.temperature,
            demonstrations=self._demonstrations(),
        )
        if runtime.is_main:
            roles = self.models.roles(self.rewards)
            optimiser = self.updater.steps.optimiser
            measure_at_first_step(optimiser, roles, context.folder.memory_json)
        self.kl: KlController = FixedKl(section.kl_coef)
        if section.kl.controller == "adaptive":
            self.kl = AdaptiveKl(section.kl_coef, section.kl.target, section.kl.horizon)
        self.stop_rules = StopRules(**section.stop.rules)
        self.set_rollbacks(0)
        self.sampled = 0  # the last iteration whose rollouts are made
        self.checkpoints = Checkpoints(context, self.models.policy)
        codec, root = self.models.policy.codec, context.folder.root
        self.texts = FixedTexts(root / "texts.jsonl", codec, section.held_out.num_texts)
        self.samples: SampleFiles | None = None
        if section.samples.enabled:
            rows, prefix = section.samples.rows_per_file, f"rank{runtime.rank}"
            self.samples = SampleFiles(root / "samples", codec, rows, prefix)

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
            close_engine(self.engine)

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
        experience = appraise(rollout, self.kl.coef, self.section.advantage, self.runtime.all_sum)
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
        rank, world_size = self.runtime.rank, self.runtime.world_size
        prompts, indices = self.order.draw(iteration - 1, self.section.rollout, rank, world_size)
        place = f"rollouts of iteration {iteration}"
        return self._ask(prompts, indices, self.models.value, place, "rollouts", TRAINING_STREAM)

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        """One update of policy and value, or of the value alone while it warms up."""
        warm = iteration > self.section.optim.value_warmup_iterations
        metrics = rollout_metrics(
            experience.rollout,
            self.section.kl,
            self.runtime.all_sum,
            self.section.rollout.importance_cap,
        )
        metrics["explained_variance"] = experience.explained_variance
        metrics["kl_coef"] = self.kl.coef
        if self.section.stop.action == "roll_back":
            metrics["rollbacks"] = float(self.rollbacks)
        try:
            steps = self.updater.update(experience, iteration, train_policy=warm)
        except NotFinite as error:
            codec = self.models.policy.codec
            raise with_samples(error, experience, iteration, codec) from error
        if warm:
            self.kl.update(metrics["kl"], self.section.rollout.num_rollouts)
        return metrics | update_metrics(steps) | self.updater.learning_rates()

    def stop_reason(self, metrics: Mapping[str, float]) -> str | None:
        """Which rule of `ppo.stop` the run has broken for too long, if any."""
        names = ("kl", "score", "score_std", "eos_rate")
        return self.stop_rules.check(**{name: metrics[name] for name in names})

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Score held-out prompts with the same noise each time; keep the policy if it is best."""
        rows = list(self.runtime.share(len(self.held_out)))
        asked = [self.held_out[row] for row in rows]
        place = f"evaluation after iteration {iteration}"
        rollout = self._ask(asked, rows, None, place, "held out", HELD_OUT_STREAM)
        if self.runtime.is_main:
            self.texts.write(rollout, iteration)
        metrics = rollout_metrics(rollout, self.section.kl, self.runtime.all_sum)
        self.checkpoints.offer(iteration, metrics["reward"])
        return {f"held_out_{name}": metrics[name] for name in HELD_OUT_METRICS}

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
            **self.cuts,
        }

    # --- parts ---

    def _tokenise_prompts(self) -> dict[str, int]:
        """Encode every prompt that the run asks, once; returns how many were cut."""
        codec = self.models.policy.codec
        codec.counts.clear()
        for prompt in (
            *self.order.asked(self.section.iterations, self.section.rollout),
            *self.held_out,
        ):
            self.prompt_ids(prompt.prompt)
        return self.context.report_cuts(codec)

    def _ask(
        self,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        value: Handle | None,
        place: str,
        seed: str,
        stream: int,
    ) -> Rollout:
        """Sample and score responses to `prompts`; all processes raise if one has to."""

        agree = partial(together, runtime=self.runtime)

        def work() -> Rollout:
            rollout = collect(
                self.models.policy,
                self.models.reference,
                value,
                self.engine,
                self.rewards,
                prompts,
                [self.prompt_ids(prompt.prompt) for prompt in prompts],
                indices,
                self.section.rollout,
                seed=self.runtime.seed(seed),
                stream=stream,
                reward_clip=self.section.advantage.reward_clip,
                agree=agree,
            )
            agree(lambda: refuse_not_finite(rollout))
            return rollout

        codec = self.models.policy.codec
        with self.runtime.autocast():
            return with_texts(work, place, prompts, indices, codec)

    def _demonstrations(self) -> list[Ragged]:
        if not self.section.optim.ptx_coef:
            return []
        rows = self.context.corpus.demonstrations.train
        if not rows:
            raise DataError(
                f"ppo.optim.ptx_coef is {self.section.optim.ptx_coef:g} but data.demonstrations "
                "has no training rows: name demonstrations or set ppo.optim.ptx_coef to 0"
            )
        codec = self.models.policy.codec
        return [codec.pair_ids(row.prompt, row.response) for row in rows]


def _bar_numbers(metrics: Mapping[str, float]) -> str:
    return (
        f"score {metrics['score']:.3f}  KL {metrics['kl']:.2f}  "
        f"length {metrics['response_tokens']:.1f}  EOS {metrics['eos_rate']:.0%}"
    )
