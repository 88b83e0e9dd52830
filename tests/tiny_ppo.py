"""A tiny decoder with a tokenizer, and the parts of PPO round it, for PPO's tests."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch

from pipeline.codec import Codec
from pipeline.config import (
    ArchitectureSection,
    DataSection,
    LoraSection,
    ModelSection,
    RunSection,
)
from pipeline.distributed import Runtime
from pipeline.generation import Engine, NativeEngine
from pipeline.models.adapters import add_adapter, lora_config
from pipeline.models.loading import build_from_config, train_tokenizer
from pipeline.models.origin import BaseOrigin
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle, Role, Trunk
from pipeline.records import Prompt
from pipeline.rewards import Completions, ModelReward, RewardSource
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.config import PpoSection
from stages.ppo.experience import Experience, appraise
from stages.ppo.models import Models, build_models
from stages.ppo.ptx import LanguageModelTerm
from stages.ppo.rejection import RejectionUpdater
from stages.ppo.rollout import PromptOrder, Rollout, collect
from stages.ppo.update import Updater

TEXTS = [f"the {a} {b} went to the {c}" for a in ("old", "red") for b in ("cat", "dog")
         for c in ("sea", "hill", "town")]  # fmt: skip
PROMPTS = tuple(
    Prompt(text[: 6 + 3 * (i % 5)], origin=f"tiny:{i + 1}") for i, text in enumerate(TEXTS)
)
LORA = LoraSection(rank=4, alpha=8)


class CountsE:
    """Reward: how many letters e a response has, less a half of its length in characters."""

    name = "counts e"

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        return [text.count("e") - 0.05 * len(text) for text in completions.texts]


def tiny_handle(
    dtype: torch.dtype = torch.float64, *, adapter: bool = True, spread: float = 1.0
) -> Handle:
    """A random 2-layer Llama; with `adapter`, in the role of an adapter that is not zero.

    `spread` multiplies the matrices: at 4, logits are as far from uniform as a trained model's.
    """
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300)
    architecture = ArchitectureSection(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    trunk = Trunk(build_from_config(architecture, tokenizer, dtype), BaseOrigin("tiny", "tiny"))
    for parameter in trunk.model.parameters():
        parameter.data *= spread if parameter.dim() > 1 else 1
    role = Role("policy")
    if adapter:
        add_adapter(trunk.model, "sft", lora_config(LORA))
        role = Role("policy", adapter="sft")
        for parameter in trunk.role_parameters(role):
            parameter.data = torch.randn_like(parameter, dtype=dtype) * 0.1
    trunk.freeze()
    codec = Codec(tokenizer, max_prompt_tokens=64, max_response_tokens=64)
    return Handle(trunk, role, codec)


def tiny_reward(start: Handle) -> ModelReward:
    """A random reward model on the start's trunk, with a shift and a scale."""
    adapter = None
    if start.role.adapter is not None:
        adapter = "reward"
        add_adapter(start.trunk.model, adapter, lora_config(LORA))
    head = start.trunk.add_head("reward")
    handle = start.with_role("reward", adapter=adapter, head="reward")
    for parameter in handle.parameters() if adapter else head.parameters():
        parameter.data = torch.randn_like(parameter, dtype=start.trunk.model.dtype) * 0.2
    head.normalise(mean=0.7, std=2.0)
    start.trunk.freeze()
    return ModelReward(handle)


def store() -> ModelStore:
    """A store for copies; nothing is loaded."""
    return ModelStore(ModelSection(init="config"), DataSection())


class TinyPpo:
    """Everything of a PPO run but its stage: models, engine, rewards, updater."""

    def __init__(
        self,
        *,
        reward_model: bool = True,
        iterations: int = 4,
        optim: dict[str, Any] | None = None,
        rollout: dict[str, Any] | None = None,
        demonstrations: Sequence[tuple[list[int], list[int]]] = (),
        dtype: torch.dtype = torch.float64,
        precision: Literal["no", "bf16"] = "no",
        stop_ids: frozenset[int] | None = None,
        spread: float = 1.0,
        **section: Any,
    ) -> None:
        self.section = PpoSection.model_validate(
            {
                "iterations": iterations,
                "rollout": {"prompts_per_iteration": 8, "max_new_tokens": 7} | (rollout or {}),
                "optim": {"learning_rate": 1e-2, "ppo_epochs": 2} | (optim or {}),
                **section,
            }
        )
        self.start = tiny_handle(dtype, adapter=self.section.tuning == "lora", spread=spread)
        if stop_ids is not None:
            self.start.codec.stop_ids = stop_ids
        self.rewards: RewardSource = tiny_reward(self.start) if reward_model else CountsE()
        config = SimpleNamespace(ppo=self.section, lora=LORA)
        self.models: Models = build_models(self.start, self.rewards, config, store())
        if self.section.tuning == "lora":
            for handle in filter(None, (self.models.policy, self.models.value)):
                for parameter in handle.parameters():
                    parameter.data = parameter.data.to(self.start.trunk.number_dtype)
        self.runtime = Runtime(RunSection(device="cpu", mixed_precision=precision))
        self.actor_critic = ActorCritic(self.models.policy, self.models.value)
        optim_section = self.section.optim
        rejects = self.section.algorithm == "rejection_sampling"
        self.updater = (RejectionUpdater if rejects else Updater)(
            self.actor_critic,
            self.section.optim,
            self.runtime,
            iterations=iterations,
            temperature=self.section.rollout.temperature,
            terms=[
                LanguageModelTerm("ptx", "demonstrations", coef, optim_section.ptx_rows, pairs)
                for coef, pairs in [(optim_section.ptx_coef, demonstrations)]
                if pairs
            ],
        )
        self.order = PromptOrder(PROMPTS, 3)

    def collect(
        self, iteration: int = 1, engine: Engine | None = None, order: Sequence[int] | None = None
    ) -> Rollout:
        """One iteration's rollout; `order` asks its rows in another one."""
        prompts, indices = self.order.draw(iteration - 1, self.section.rollout)
        if order is not None:
            prompts, indices = [prompts[row] for row in order], [indices[row] for row in order]
        models = self.models
        with self.runtime.autocast():
            return collect(
                models.policy, models.reference, models.value, engine or NativeEngine(5),
                self.rewards, prompts, [models.policy.codec.prompt_ids(p.prompt) for p in prompts],
                indices, self.section.rollout, seed=7,
                reference_length=self.section.advantage.reference_length,
            )  # fmt: skip

    def appraise(self, rollout: Rollout) -> Experience:
        """Its advantages."""
        all_sum = self.runtime.all_sum
        return appraise(rollout, self.section.kl_coef, self.section.advantage, all_sum)

    def weights(self) -> torch.Tensor:
        """All trained weights, policy first, as one vector."""
        parts = [*self.actor_critic.policy_parameters(), *self.actor_critic.value_parameters()]
        return torch.cat([p.detach().flatten().clone() for p in parts])

    def policy_weights(self) -> torch.Tensor:
        """The policy's trained weights as one vector."""
        return torch.cat([p.detach().flatten() for p in self.actor_critic.policy_parameters()])
