"""`rlhf` with PPO's collectives counted and its memory watched, in each of its processes.

    accelerate launch ... -m benchmarks.ppo_scaling.counted_run FOLDER ppo c.yaml ppo.iterations=3

leaves FOLDER/rankR.json. The first iteration makes AdamW's state and DDP's buckets, the second is
counted, the third is watched: counting passes through Python at every operation.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.ppo_peer.meter import MB, PHASES, Meter, resident_bytes
from benchmarks.ppo_scaling.communication import SUMS, Collectives
from benchmarks.ppo_scaling.measure import M_MMAP_THRESHOLD, give_back

COUNTED, WATCHED = 2, 3  # iterations
REST = "rest"  # metrics, checkpoints, whether to stop


class Watch:
    """What the PPO stage is doing, as its methods are called."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.collectives = Collectives()
        self.counting = ExitStack()
        self.iteration = 0
        self.report: dict[str, Any] = {}

    def switch(self, phase: str) -> None:
        """Another phase begins."""
        self.collectives.phase = phase
        if self.iteration == WATCHED:
            give_back()
            self.meter.switch(phase if phase in PHASES else None)

    def begin(self, iteration: int) -> None:
        """An iteration begins, with sampling's preparations."""
        self.counting.close()
        self.iteration = iteration
        if iteration == COUNTED:
            from pipeline.distributed import Runtime

            self.counting.enter_context(self.collectives.telling_objects())
            own = Runtime.all_sum
            Runtime.all_sum = self.collectives.as_label(SUMS, own)
            self.counting.callback(setattr, Runtime, "all_sum", own)
            self.counting.enter_context(self.collectives)
        self.switch("scoring")


def watched(watch: Watch) -> None:
    """Have the PPO stage tell what it does."""
    from pipeline.models.footprint import at_first_step, measured
    from stages.ppo.run import Training

    make, collect, update, log = (
        getattr(Training, name) for name in ("__init__", "collect", "update", "log")
    )

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        give_back()
        watch.meter.baseline = resident_bytes()  # libraries and data; models come now
        make(self, *args, **kwargs)
        engine = self.interviewer.engine
        engine.generate = _between(watch, "rollout", engine.generate, "scoring")
        roles = self.models.roles(self.rewards)
        groups = self.updater.groups.values()
        watch.report |= {
            "strategy": self.runtime.strategy,
            "rank": self.runtime.rank,
            "processes": self.runtime.world_size,
            "trained": sum(p.numel() for group in groups for p in group),
        }

        def hold(optimiser: Any) -> None:
            costs = measured(roles, optimiser).values()
            for part in ("weights", "gradients", "optimiser"):
                watch.report[f"{part}_mb"] = sum(getattr(cost, part) for cost in costs) / MB

        at_first_step(self.updater.steps.optimiser, hold)

    def collected(self: Any, iteration: int) -> Any:
        watch.begin(iteration)
        rollout = collect(self, iteration)
        watch.switch("update")  # advantages are the update's
        return rollout

    def updated(self: Any, *args: Any, **kwargs: Any) -> Any:
        metrics = update(self, *args, **kwargs)
        watch.report["optimiser_steps"] = round(metrics["optimiser_steps"])
        return metrics

    def logged(self: Any, *args: Any, **kwargs: Any) -> None:
        watch.switch(REST)
        log(self, *args, **kwargs)

    Training.__init__, Training.collect = made, collected  # type: ignore[method-assign]
    Training.update, Training.log = updated, logged  # type: ignore[method-assign]


def _between(watch: Watch, phase: str, call: Callable[..., Any], after: str) -> Callable[..., Any]:
    def phased(*args: Any, **kwargs: Any) -> Any:
        before = watch.collectives.phase
        if before == REST:  # held-out prompts
            return call(*args, **kwargs)
        watch.switch(phase)
        result = call(*args, **kwargs)
        watch.switch(after)
        return result

    return phased


def main() -> None:
    """Run `rlhf`, write the report."""
    folder, sys.argv = Path(sys.argv[1]), ["rlhf", *sys.argv[2:]]
    with suppress(OSError, AttributeError):  # every tensor has pages of its own
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    import peft  # noqa: F401  # what is imported later would count as memory of the models
    import transformers.generation.utils
    import transformers.models.llama.modeling_llama  # noqa: F401

    import stages.ppo.run  # noqa: F401
    from stages.cli import main as rlhf

    meter = Meter("cpu")
    watch = Watch(meter)
    watched(watch)
    with meter:
        try:
            rlhf()
        except SystemExit as end:
            if end.code:
                raise
    meter.switch(None)
    watch.report |= {
        "collectives": watch.collectives.counts(),
        "resident_mb": {phase: (meter.peaks[phase] - meter.baseline) / MB for phase in PHASES},
    }
    path = folder / f"rank{watch.report['rank']}.json"
    path.write_text(json.dumps(watch.report), encoding="utf-8")


if __name__ == "__main__":
    main()
