"""The policies kept of a run: the best so far and the last, as artifacts of their own."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.models.trunk import Handle
from pipeline.resume import KEPT_STATES
from pipeline.runfolder import verify, write_manifest
from pipeline.stage import Context


class Checkpoints:
    """`checkpoints/step-N/`: the best policy by held-out reward, and the last."""

    def __init__(self, context: Context, policy: Handle) -> None:
        self.context = context
        self.policy = policy
        self.best: tuple[int, float] | None = None  # iteration, held-out reward
        self.last = -1
        # The best policies of the states that a run may go on from stay until those go.
        self.bests_of_states: list[int] = []

    def offer(self, iteration: int, held_out_reward: float) -> None:
        """Save the policy if it is the best so far; ties go to the earlier, nearer the start."""
        if self.best is None or held_out_reward > self.best[1]:
            self._save(iteration, held_out_reward)
            replaced, self.best = self.best, (iteration, held_out_reward)
            if replaced is not None and replaced[0] not in self.bests_of_states:
                self._drop(replaced[0])

    def belong_to_state(self) -> None:
        """A state of the run was saved, and the oldest went."""
        assert self.best is not None
        before = set(self.bests_of_states)
        self.bests_of_states = [*self.bests_of_states, self.best[0]][-self._kept :]
        for iteration in before - {*self.bests_of_states, self.best[0]}:
            self._drop(iteration)

    def restore(self, best: tuple[int, float], bests_of_states: Iterable[int]) -> None:
        """Go back to the best policy of a state; those of no state go.

        `bests_of_states`: the best iteration of each state there is, oldest first.

        Raises:
            CheckpointError: its folder is missing or damaged.
        """
        self.context.runtime.from_main(lambda: verify(self._folder(best[0])))
        self.best, self.bests_of_states = best, list(bests_of_states)
        kept = {self._folder(iteration) for iteration in self.bests_of_states}
        for path in self.context.folder.checkpoints.glob("step-*"):
            if path not in kept and self.context.runtime.is_main:
                shutil.rmtree(path, ignore_errors=True)

    def finish(self, iteration: int, *, keep_best: bool) -> int:
        """Save the last policy, leave the chosen one as the artifact; returns its iteration."""
        assert self.best is not None
        self.last = iteration
        if self.best[0] != iteration:
            self._save(iteration, None)
        chosen = self.best[0] if keep_best else iteration
        if chosen != iteration:
            self.context.runtime.barrier()
            self.context.store.reload(self.policy, self._folder(chosen))
        self.context.save(self.policy)
        return chosen

    @property
    def best_so_far(self) -> str:
        """Where the best policy lies, and how to go on from it."""
        assert self.best is not None
        iteration, reward = self.best
        return (
            f"The best policy so far (iteration {iteration}, held-out reward {reward:.3f}) is in "
            f"{self._folder(iteration)}: another run can start from it (ppo.policy)"
        )

    @property
    def _kept(self) -> int:
        """How many states there may be; one that is written in the background replaces none yet."""
        states = self.context.states
        return KEPT_STATES + (states is not None and states.in_background)

    def _folder(self, iteration: int) -> Path:
        return self.context.folder.checkpoints / f"step-{iteration}"

    def _save(self, iteration: int, held_out_reward: float | None) -> None:
        folder = self._folder(iteration)
        self.context.write(self.policy, folder)
        if self.context.runtime.is_main:
            numbers = {"iteration": iteration, "held_out_reward": held_out_reward}
            write_manifest(folder, stage="ppo", key="", material={}, summary=numbers, seconds=0.0)

    def _drop(self, iteration: int) -> None:
        if self.context.runtime.is_main:
            shutil.rmtree(self._folder(iteration), ignore_errors=True)
