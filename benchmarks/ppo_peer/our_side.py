"""Our PPO on a workload, from the parts that the PPO stage is made of.

    python -m benchmarks.ppo_peer.our_side SPEC.json RESULT.json

Phases: `rollout` is the engine; `scoring` the rest of `collect` (reference, reward and value
passes, and decoding the responses); `update` is advantages, metrics and the optimiser steps.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.ppo_peer.meter import Meter
from benchmarks.ppo_peer.workloads import SEED, Workload


class MeteredEngine:
    """An engine whose work is the phase `rollout`."""

    def __init__(self, engine: Any, meter: Meter) -> None:
        self.engine, self.meter = engine, meter
        self.name, self.deterministic = engine.name, engine.deterministic

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See `Engine`."""
        self.meter.switch("rollout")
        generations = self.engine.generate(*args, **kwargs)
        self.meter.switch("scoring")
        return generations


class Program:
    """The models, engine and updater of one PPO run on a workload."""

    def __init__(self, workload: Workload, folder: Path, value: str, device: str) -> None:
        from pipeline.config import DataSection, LoraSection, ModelSection, RunSection
        from pipeline.distributed import Runtime
        from pipeline.generation import NativeEngine
        from pipeline.models.store import ModelStore
        from pipeline.records import Prompt
        from stages.ppo.actor_critic import ActorCritic
        from stages.ppo.models import build_models
        from stages.ppo.update import Updater

        given = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        self.prompt_ids, self.probes = given["prompts"], given["probes"]
        self.prompts = [Prompt("", origin=f"benchmark:{i}") for i in range(workload.prompts)]
        self.section = section = ppo_section(workload, value)
        run = RunSection(device="auto" if device == "cuda" else "cpu", seed=SEED)
        self.runtime = Runtime(run)
        self.runtime.seed_all("benchmark")
        model = ModelSection(path=str(folder / "policy"), dtype=workload.dtype)
        store = ModelStore(model, DataSection(), self.runtime.device)
        start = store.pretrained().with_role("policy")
        lora = LoraSection(rank=workload.rank, alpha=workload.alpha)
        self.rewards = reward_model(workload, folder, start, store, lora)
        config = SimpleNamespace(ppo=section, lora=lora)
        self.models = build_models(start, self.rewards, config, store)
        self.engine: Any = NativeEngine(section.rollout.generation_rows)
        self.updater = Updater(
            ActorCritic(self.models.policy, self.models.value),
            section.optim,
            self.runtime,
            iterations=section.iterations,
            temperature=section.rollout.temperature,
        )

    def iterate(self, iteration: int, seed: int, meter: Meter) -> list[int]:
        """One iteration, metered; returns the lengths of the responses."""
        from stages.ppo.experience import appraise, rollout_metrics
        from stages.ppo.rollout import collect

        models, section, all_sum = self.models, self.section, self.runtime.all_sum
        first = (iteration - 1) * len(self.prompts)
        meter.switch("scoring")
        with self.runtime.autocast():
            rollout = collect(
                models.policy,
                models.reference,
                models.value,
                MeteredEngine(self.engine, meter),
                self.rewards,
                self.prompts,
                self.prompt_ids,
                range(first, first + len(self.prompts)),
                section.rollout,
                seed=seed,
            )
        meter.switch("update")
        experience = appraise(rollout, section.kl_coef, section.advantage, all_sum)
        rollout_metrics(rollout, section.kl, all_sum)
        self.updater.update(experience, iteration)
        meter.switch(None)
        lengths: list[int] = rollout.batch.response_lengths.tolist()
        return lengths

    def probe(self) -> dict[str, list[float]]:
        """Score and log-probability of each probe, which TRL's side must give too."""
        from pipeline.batches import TokenBatch
        from pipeline.inference import infer

        models = self.models
        prompts, responses = zip(*self.probes, strict=True)
        batch = TokenBatch.from_ragged(prompts, responses, models.policy.codec.pad_id)
        logprobs = infer(models.policy, batch, ["logprobs"], 1024)["logprobs"].sum(1)
        scores = infer(self.rewards.handle, batch, ["scores"], 1024)["scores"]
        return {"scores": scores.tolist(), "logprobs": logprobs.tolist()}


def ppo_section(workload: Workload, value: str) -> Any:
    """The `ppo:` section of a workload."""
    from stages.ppo.config import PpoSection

    fields: dict[str, Any] = {
        "tuning": workload.tuning,
        "value": value,
        "kl_coef": workload.kl_coef,
        "rollout": {
            "prompts_per_iteration": workload.prompts,
            "max_new_tokens": workload.response_tokens,
            "missing_eos_penalty": workload.missing_eos_penalty,
        },
        "optim": {
            "learning_rate": workload.learning_rate,
            "ppo_epochs": workload.ppo_epochs,
        },
    }
    for path, setting in workload.ours.items():
        *parents, name = path.split(".")
        place = fields
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = setting
    return PpoSection.model_validate(fields)


def reward_model(workload: Workload, folder: Path, start: Any, store: Any, lora: Any) -> Any:
    """A reward model in memory as its training leaves it.

    Full fine-tuning has weights of its own, LoRA an adapter (whose B is zero here: the same
    function, at the same cost) on the shared base.
    """
    from safetensors.torch import load_file

    from pipeline.models.adapters import add_adapter, lora_config
    from pipeline.rewards import ModelReward

    if workload.critic is not None:
        handle = store.pretrained(str(folder / "critic"))
    elif workload.tuning == "full":
        handle = store.fork(start, "reward")
    else:
        add_adapter(start.trunk.model, "reward", lora_config(lora))
        handle = start.with_role("reward", adapter="reward")
    head = handle.trunk.add_head("reward")
    head.weight.data.copy_(load_file(folder / "head.safetensors")["weight"])
    handle.trunk.freeze()
    budget = ppo_section(workload, "separate").rollout.micro_batch_tokens
    return ModelReward(handle.with_role("reward", head="reward"), budget)


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """One run: the warm-up iterations, then the timed ones."""
    import accelerate  # noqa: F401  # whatever is imported later would count as memory of the run
    import peft  # noqa: F401
    import torch
    import transformers.generation.utils
    import transformers.models.auto.modeling_auto  # noqa: F401

    import stages.ppo.models
    import stages.ppo.update  # noqa: F401

    workload = Workload.from_dict(spec["workload"])
    lengths: list[list[int]] = []
    with Meter(spec["device"]) as meter:
        program = Program(workload, Path(spec["folder"]), spec["value"], spec["device"])
        probe = program.probe()
        for number in range(spec["warmup"] + spec["iterations"]):
            lengths.append(program.iterate(number + 1, spec["seed"], meter))
            meter.end_iteration(timed=number >= spec["warmup"])
        report = meter.report()
    return report | {"lengths": lengths, "probe": probe, "threads": torch.get_num_threads()}


def main(argv: Sequence[str]) -> None:
    """Read the task, write the numbers."""
    spec = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    Path(argv[1]).write_text(json.dumps(work(spec)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
