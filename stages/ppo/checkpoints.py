"""The policies kept of a run: the best so far and the last, as artifacts of their own."""

import shutil
from pathlib import Path

from pipeline.models import adapters
from pipeline.models.trunk import Handle
from pipeline.runfolder import write_manifest
from pipeline.stage import Context


class Checkpoints:
    """`checkpoints/step-N/`: the best policy by held-out reward, and the last."""

    def __init__(self, context: Context, policy: Handle) -> None:
        self.context = context
        self.policy = policy
        self.best: tuple[int, float] | None = None  # iteration, held-out reward
        self.last = -1

    def offer(self, iteration: int, held_out_reward: float) -> None:
        """Save the policy if it is the best so far; ties go to the earlier, nearer the start."""
        if self.best is None or held_out_reward > self.best[1]:
            self._save(iteration, held_out_reward)
            if self.best is not None:
                self._drop(self.best[0])
            self.best = (iteration, held_out_reward)

    def finish(self, iteration: int, *, keep_best: bool) -> int:
        """Save the last policy, leave the chosen one as the artifact; returns its iteration."""
        assert self.best is not None
        self.last = iteration
        if self.best[0] != iteration:
            self._save(iteration, None)
        context, policy = self.context, self.policy
        chosen = self.best[0] if keep_best else iteration
        if chosen != iteration:
            context.runtime.barrier()
            best = context.store.open(self._folder(chosen))
            if policy.role.adapter is not None:
                adapters.remove_adapter(policy.trunk.model, policy.role.adapter)
            policy = best
        context.save(policy)
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

    def _folder(self, iteration: int) -> Path:
        return self.context.folder.checkpoints / f"step-{iteration}"

    def _save(self, iteration: int, held_out_reward: float | None) -> None:
        if not self.context.runtime.is_main:
            return
        folder = self._folder(iteration)
        self.context.store.save(self.policy, folder, live=False)
        numbers = {"iteration": iteration, "held_out_reward": held_out_reward}
        write_manifest(folder, stage="ppo", key="", material={}, summary=numbers, seconds=0.0)

    def _drop(self, iteration: int) -> None:
        if self.context.runtime.is_main:
            shutil.rmtree(self._folder(iteration), ignore_errors=True)
