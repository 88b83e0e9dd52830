"""What a PPO run goes on from: the state of everything that an iteration leaves to the next.

What is drawn at random follows from the seed and the iteration's number, and needs no state; the
global generators are kept for rewards that users write.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.markup import escape

from pipeline.errors import CheckpointError
from pipeline.resume import State, random_state, restore_random

if TYPE_CHECKING:
    from stages.ppo.run import Training

Metrics = Mapping[str, float]


class Reached(NamedTuple):
    """Where a run stands: iterations done, and the metrics of its start and of the last."""

    iteration: int
    started: Metrics
    ended: Metrics


def save(training: "Training", reached: Reached) -> None:
    """Save the state after an iteration, its metrics and samples written."""
    states = training.context.states
    if states is None:
        return
    numbers = {
        "started": dict(reached.started),
        "ended": dict(reached.ended),
        "kl_coef": training.kl.state(),
        "stop_rules": {name: asdict(training.stop_rules)[name] for name in ("first", "broken")},
        "rollbacks": training.rollbacks,
        "best": training.checkpoints.best,
        "texts": len(training.texts.lines),
    }
    random = random_state()
    own: dict[str, Any] = {**random.numbers}
    if training.samples is not None:
        own["samples"] = training.samples.state()
    tensors = training.updater.state()
    if training.average is not None:
        tensors |= training.average.state()
    run = State(tensors, numbers)
    states.save(reached.iteration, run, State(random.tensors, own))
    training.checkpoints.belong_to_state()


def restore(training: "Training") -> Reached | None:
    """Go back to the newest state, if there is one.

    Raises:
        CheckpointError: the best policy of that state is damaged.
    """
    context = training.context
    if context.states is None:
        return None
    found = context.states.newest(context.console)
    if found is None:
        return None
    numbers = found.run.numbers
    training.updater.restore(found.run.tensors)
    if training.average is not None:
        training.average.restore(found.run.tensors)
    training.kl.restore(numbers["kl_coef"])
    for name, value in numbers["stop_rules"].items():
        setattr(training.stop_rules, name, value)
    training.set_rollbacks(numbers["rollbacks"])
    iteration, reward = numbers["best"]
    bests = [kept["best"][0] for kept in reversed(context.states.numbers_of_kept())]
    training.checkpoints.restore((iteration, reward), bests)
    if training.runtime.is_main:
        training.texts.restore(numbers["texts"])
    if found.own is None:
        context.console.print(
            "[yellow]the state is of another number of processes: the run goes on from it, but not "
            "bit for bit as it would have[/]"
        )
    else:
        restore_random(found.own)
        if training.samples is not None:
            training.samples.restore(**found.own.numbers["samples"])
    training.sampled = found.step
    return Reached(found.step, numbers["started"], numbers["ended"])


def roll_back(training: "Training", reason: str, good: int) -> Reached:
    """Go back to the newest good state, with smaller learning rates from there on.

    `good`: the last iteration whose policy gave no sign of what is wrong now. A policy is seen by
    what it samples in the iteration after it, so that a state may be bad when it is saved.

    Raises:
        CheckpointError: no state is whole.
    """
    stop, count = training.section.stop, training.rollbacks + 1
    states = training.context.states
    assert states is not None
    states.forget_after(good)
    reached = restore(training)
    if reached is None:
        raise CheckpointError(f"{reason}. No state is left to roll back to")
    training.set_rollbacks(count)
    training.stop_rules.broken = {}  # smaller steps have all of `patience` to prove themselves
    training.context.console.print(
        f"[yellow]ppo goes back to iteration {reached.iteration}, with learning rates times "
        f"{stop.rollback_factor:g} (roll-back {count} of {stop.max_rollbacks}): {escape(reason)}[/]"
    )
    return reached
