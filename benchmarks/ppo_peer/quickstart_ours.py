"""W4, in our environment: what TRL starts from, and the judgement of the final policies.

    python -m benchmarks.ppo_peer.quickstart_ours SPEC.json RESULT.json

Without `policies` in the spec it writes the prompts' ids and a few scored sequences for TRL's side
and returns the settings of PPO; with them it scores each policy on the held-out prompts.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROBES = 16


class Run:
    """A run of the quickstart: its configuration, data and models."""

    def __init__(self, folder: Path) -> None:
        from pipeline.data import load_corpus
        from pipeline.models.store import ModelStore
        from pipeline.yaml_config import read_config
        from stages.config import RunConfig

        self.config = read_config(folder / "config.yaml", [], RunConfig)
        self.folder = folder
        self.store = ModelStore(self.config.model, self.config.data)
        self.prompts = load_corpus(self.config.data, ["prompts"]).prompts
        self.start = self.store.resolve(str(folder), "sft").with_role("policy", head=None)
        self.reward = self.store.resolve(str(folder), "reward")

    def export(self, folder: Path) -> dict[str, Any]:
        """Prompts and probes into `folder`; the settings of PPO."""
        from pipeline.batches import TokenBatch
        from pipeline.inference import infer

        codec, ppo = self.start.codec, self.config.ppo
        prompts = [codec.prompt_ids(prompt.prompt) for prompt in self.prompts.train]
        # A prompt's tail serves as a response: the score does not ask where it came from.
        chosen = [ids for ids in prompts if len(ids) > 12][:PROBES]
        probes = [(ids[:-6], ids[-6:]) for ids in chosen]
        batch = TokenBatch.from_ragged(
            [prompt for prompt, _ in probes], [response for _, response in probes], codec.pad_id
        )
        scores = infer(self.reward, batch, ["scores"], 4096)["scores"].tolist()
        written = {"prompts": prompts, "probes": probes, "scores": scores}
        (folder / "prompts.json").write_text(json.dumps(written), encoding="utf-8")
        return {
            "iterations": ppo.iterations,
            "prompts_per_iteration": ppo.rollout.prompts_per_iteration,
            "max_new_tokens": ppo.rollout.max_new_tokens,
            "temperature": ppo.rollout.temperature,
            "missing_eos_penalty": ppo.rollout.missing_eos_penalty,
            "kl_coef": ppo.kl_coef,
            "gamma": ppo.advantage.gamma,
            "gae_lambda": ppo.advantage.gae_lambda,
            "rank": self.config.lora.rank,
            "alpha": self.config.lora.alpha,
            **{name: getattr(ppo.optim, name) for name in OPTIM_FIELDS},
        }

    def judge(self, policies: dict[str, str]) -> dict[str, dict[str, float]]:
        """Held-out reward, its standard error, KL and EOS rate of the SFT policy and of each."""
        found = {"sft": self.start}
        for name, folder in policies.items():
            found[name] = self.store.resolve(folder, "ppo").with_role("policy", head=None)
        return {name: self._score(policy) for name, policy in found.items()}

    def _score(self, policy: Any) -> dict[str, float]:
        from pipeline.config import RunSection
        from pipeline.distributed import Runtime
        from pipeline.generation import NativeEngine
        from pipeline.rewards import ModelReward
        from stages.ppo.experience import rollout_metrics
        from stages.ppo.rollout import HELD_OUT_STREAM, collect

        assert policy.trunk is self.start.trunk, "a policy on another base"
        prompts, section = list(self.prompts.held_out), self.config.ppo.rollout
        rollout = collect(
            policy,
            self.start,
            None,
            NativeEngine(section.generation_rows),
            ModelReward(self.reward),
            prompts,
            [self.start.codec.prompt_ids(prompt.prompt) for prompt in prompts],
            range(len(prompts)),
            section,
            seed=1,
            stream=HELD_OUT_STREAM,
        )
        runtime = Runtime(RunSection(device="cpu"))
        metrics = rollout_metrics(rollout, self.config.ppo.kl, runtime.all_sum)
        error = float(rollout.rewards.std()) / len(prompts) ** 0.5
        names = ("reward", "score", "kl", "eos_rate", "response_tokens")
        return {name: metrics[name] for name in names} | {"standard_error": error}


OPTIM_FIELDS = (
    *("learning_rate", "schedule", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay"),
    *("ppo_epochs", "minibatches", "clip_range", "value_clip_range", "value_coef"),
)


def main(argv: Sequence[str]) -> None:
    """Read the task, write the numbers."""
    spec = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    run = Run(Path(spec["run"]))
    if "policies" in spec:
        result: dict[str, Any] = run.judge(spec["policies"])
    else:
        result = {"ppo": run.export(Path(spec["folder"]))}
    Path(argv[1]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
