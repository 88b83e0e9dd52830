"""The models of PPO on as few base weights as their tuning allows.

| tuning | policy | reference | value |
|---|---|---|---|
| lora | adapter, copied from the start's | the start, frozen | adapter, copied from the reward's |
| full | own weights, from the start's | the start, frozen | own weights, from the reward's |

With `ppo.value: shared` the value is a head on the policy's hidden states. Without a reward model
of ours the value model starts from the policy's start with a zero head.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.errors import ModelError
from pipeline.models import adapters
from pipeline.models.heads import ScalarHead
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from pipeline.rewards import ModelReward, RewardSource, open_reward
from pipeline.stage import Context


@dataclass(frozen=True)
class Models:
    """Handles of one PPO run; only policy and value are trained."""

    policy: Handle
    reference: Handle
    value: Handle
    value_from_reward: bool  # otherwise its head is zero and wants a warm-up

    def release_value(self) -> None:
        """Take the value model off trunks that live on."""
        trunk, role = self.value.trunk, self.value.role
        assert role.head is not None
        del trunk.heads[role.head]
        if role.adapter is not None and role.adapter != self.policy.role.adapter:
            adapters.remove_adapter(trunk.model, role.adapter)


def open_start(context: Context) -> Handle:
    """The policy that PPO starts from: `ppo.policy`, or the run's SFT.

    Raises:
        ModelError: it cannot be loaded, or has too few positions.
    """
    resource = context.config.ppo.policy
    if resource is None:
        start = context.store.open(context.parents["sft"])
    else:
        start = context.store.resolve(resource, "sft")
    name = f"ppo.policy {resource}" if resource else "the SFT model"
    context.config.check_positions(name, start.trunk.model.config)
    return start.with_role("policy", head=None)


def open_rewards(context: Context, start: Handle) -> RewardSource:
    """What scores the responses: `ppo.rewards`, or the run's reward model.

    Raises:
        ModelError: a reward model of ours that reads another vocabulary than the policy's.
    """
    resource = context.config.ppo.rewards
    budget = context.config.ppo.rollout.micro_batch_tokens
    if resource is None:
        source: RewardSource = ModelReward(context.store.open(context.parents["reward"]), budget)
    else:
        source = open_reward(resource, context.store, context.config.model, budget)
    if isinstance(source, ModelReward) and not source.handle.codec.same_ids(start.codec):
        raise ModelError(
            f"ppo.rewards is {resource or 'the reward model of this run'}, with the vocabulary of "
            f"{source.handle.codec.name!r}, but the policy ({context.config.ppo.policy or 'SFT'}) "
            f"has that of {start.codec.name!r}: it would read other tokens than were sampled. "
            "Train the reward model on the policy's base, or name a sequence-classification model "
            "or a function, which read text."
        )
    return source


def build_models(start: Handle, rewards: RewardSource, config: Any, store: ModelStore) -> Models:
    """Policy, reference and value from the start policy and, where it is one, our reward model.

    Raises:
        ModelError: the adapters do not fit the base.
    """
    section, lora = config.ppo, config.lora
    policy = store.trainable_copy(start, "policy", section.tuning, lora)
    reference = start.with_role("reference")
    if section.value == "shared":
        return Models(policy, reference, _with_head(policy, None), value_from_reward=False)
    source = rewards.handle if isinstance(rewards, ModelReward) else None
    value = store.trainable_copy(source or start, "value", section.tuning, lora)
    return Models(policy, reference, _with_head(value, source), value_from_reward=bool(source))


def _with_head(handle: Handle, reward: Handle | None) -> Handle:
    """The handle with a value head: the reward's with shift and scale folded in, or zeros."""
    trunk = handle.trunk
    # An adapter's name is unique on its trunk; weights of its own are a trunk of its own.
    name = handle.role.adapter or "value"
    if reward is None:
        trunk.add_head(name)
    else:
        assert reward.role.head is not None
        head = reward.trunk.heads[reward.role.head]
        assert isinstance(head, ScalarHead)
        trunk.add_head(name, head.folded())
    return handle.with_role(handle.role.name, head=name)
