"""Who asks the policy: prompts in, scored and measured responses out."""

from collections.abc import Sequence
from functools import cache, partial

from pipeline.errors import DataError
from pipeline.generation import close_engine, open_engine
from pipeline.models.trunk import Handle
from pipeline.not_finite import together
from pipeline.records import Prompt
from pipeline.rewards import RewardSource
from pipeline.stage import Context
from stages.ppo.curriculum import difficulties, open_order
from stages.ppo.faults import refuse_not_finite, with_texts
from stages.ppo.kl import datasets
from stages.ppo.models import Models
from stages.ppo.rollout import HELD_OUT_STREAM, TRAINING_STREAM, Rollout, collect


class Interviewer:
    """Asks the run's prompts: those of an iteration, and the held-out ones."""

    def __init__(self, context: Context, models: Models, rewards: RewardSource) -> None:
        """Opens the engine and encodes every prompt that the run will ask."""
        self.section = section = context.config.ppo
        self.runtime = context.runtime
        self.models, self.rewards = models, rewards
        prompts = context.corpus.prompts
        self.held_out = prompts.held_out[: section.held_out.num_prompts]
        self.order = open_order(prompts.train, context.runtime.seed("prompts"), section)
        self.prompt_ids = cache(models.policy.codec.prompt_ids)
        self.cuts = self._tokenise_prompts(context)
        self.engine = open_engine(
            section.rollout.engine,
            section.rollout.generation_rows,
            section.rollout.vllm,
            context.folder.root,
            context.runtime,
        )

    def rollouts(self, iteration: int) -> Rollout:
        """Sample and score this process's share of the iteration's prompts."""
        rank, world_size = self.runtime.rank, self.runtime.world_size
        prompts, indices = self.order.draw(iteration - 1, self.section.rollout, rank, world_size)
        place = f"rollouts of iteration {iteration}"
        return self._ask(prompts, indices, self.models.value, place, "rollouts", TRAINING_STREAM)

    def held_out_answers(self, iteration: int) -> Rollout:
        """Sample and score this process's share of the held-out prompts, always by one noise."""
        rows = list(self.runtime.share(len(self.held_out)))
        asked = [self.held_out[row] for row in rows]
        place = f"evaluation after iteration {iteration}"
        return self._ask(asked, rows, None, place, "held out", HELD_OUT_STREAM)

    def close(self) -> None:
        """Let go of what the engine holds."""
        close_engine(self.engine)

    def _tokenise_prompts(self, context: Context) -> dict[str, int]:
        """Encode every prompt that the run asks, once; returns how many were cut."""
        codec = self.models.policy.codec
        codec.counts.clear()
        for prompt in (
            *self.order.asked(self.section.iterations, self.section.rollout),
            *self.held_out,
        ):
            self.prompt_ids(prompt.prompt)
        return context.report_cuts(codec)

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
                reference_length=self.section.advantage.reference_length,
                agree=agree,
            )
            agree(lambda: refuse_not_finite(rollout))
            return rollout

        codec = self.models.policy.codec
        with self.runtime.autocast():
            return with_texts(work, place, prompts, indices, codec)


def check_prompts(context: Context) -> None:
    """Hold the run's prompts to what PPO needs of them, before any model is opened.

    Raises:
        DataError: no prompts to train on, none held out, or fewer than processes; a prompt lacks a
            column that the section names.
    """
    section, world_size = context.config.ppo, context.runtime.world_size
    prompts = context.corpus.prompts
    held_out = prompts.held_out[: section.held_out.num_prompts]
    for part, rows in (("train on", prompts.train), ("hold out", held_out)):
        if not rows:
            raise DataError(
                f"ppo: there are no prompts to {part}. Check data.prompts (or the dataset "
                "that prompts are taken from) and data.held_out_fraction"
            )
    asked = section.rollout.prompts_per_iteration
    if min(asked, len(held_out)) < world_size:
        raise DataError(
            f"ppo: {world_size} processes need a prompt each, but there are {asked} an "
            f"iteration and {len(held_out)} held out: raise "
            "ppo.rollout.prompts_per_iteration or ppo.held_out.num_prompts, or start fewer"
        )
    if section.curriculum.column is not None:
        difficulties(prompts.train, section.curriculum.column)
    datasets((*prompts.train, *held_out), section.kl)
