"""The models of PPO on as few base weights as their tuning allows.

| tuning | policy | reference | value |
|---|---|---|---|
| lora | adapter, copied from the start's | the start, frozen | adapter, copied from the reward's |
| full | own weights, from the start's | the start, frozen | own weights, from the reward's |

With `ppo.algorithm: rejection_sampling` there is no value model.
With `ppo.value: shared` the value is a head on the policy's hidden states. Without a reward model
of ours that reads the policy's ids, or with several, the value model starts from the policy's start
with a zero head. With full fine-tuning the reference may lie on another device or in another type
(`ppo.reference`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.models import adapters
from pipeline.models.footprint import Roles
from pipeline.models.heads import ScalarHead
from pipeline.models.loading import torch_dtype
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle, Trunk
from pipeline.rewards import (
    Opener,
    RewardSource,
    WeightedModel,
    models_of,
    reward_roles,
    weighted_models,
)
from pipeline.stage import Context
from stages.ppo.config import ReferenceSection


@dataclass(frozen=True)
class Models:
    """Handles of one run; only policy and value are trained."""

    policy: Handle
    reference: Handle
    value: Handle | None  # of PPO

    def roles(self, rewards: RewardSource | None) -> Roles:
        """Every model in memory by its role; a function as a reward is none."""
        found: dict[str, Handle | nn.Module] = {
            "policy": self.policy,
            **({} if self.value is None else {"value": self.value}),
            "reference": self.reference,
        }
        return found | reward_roles(models_of(rewards))

    def trunks(self, rewards: RewardSource | None) -> list[Trunk]:
        """The trunks of our models, each once."""
        handles = [role for role in self.roles(rewards).values() if isinstance(role, Handle)]
        return list({id(handle.trunk): handle.trunk for handle in handles}.values())

    def release_value(self) -> None:
        """Take the value model, if there is one, off trunks that live on."""
        if self.value is None:
            return
        trunk, role = self.value.trunk, self.value.role
        if trunk.shards is not None:  # such trunks are let go of
            return
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
    architecture = start.trunk.model.config
    context.config.check_positions(name, architecture)
    if context.config.ppo.rollout.engine == "vllm" and architecture.is_encoder_decoder:
        raise ModelError(
            f"ppo.rollout.engine is vllm, but {name} is an encoder-decoder "
            f"({architecture.model_type}), which vLLM does not serve with adapters: set "
            "ppo.rollout.engine to native"
        )
    return start.with_role("policy", head=None)


def open_rewards(context: Context) -> RewardSource:
    """What scores the responses: `ppo.rewards`, or the run's reward model."""
    store = context.store
    opener = Opener(
        store,
        context.config.model,
        context.config.ppo.rollout.micro_batch_tokens,
        lambda: store.open(context.parents["reward"]),
    )
    return opener.open(context.config.ppo.rewards)


def build_models(
    start: Handle, rewards: RewardSource | None, config: Any, store: ModelStore
) -> Models:
    """Policy, reference and value from the start policy and, where it is one, our reward model.

    Raises:
        ModelError: the adapters do not fit the base.
    """
    section, lora = config.ppo, config.lora
    policy = store.trainable_copy(start, "policy", section.tuning, lora)
    value = None
    if section.algorithm == "ppo":
        value = _value_model(policy, start, value_source(start, rewards), config, store)
    # Last: all that starts from the start's weights has them by now.
    reference = start.with_role("reference")
    if section.reference.is_set:
        if store.shards:
            raise ModelError(
                "ppo.reference puts the reference elsewhere, but here its weights lie over all "
                "processes: remove ppo.reference, or start with --launch ddp"
            )
        models = models_of(rewards).values()
        is_shared = any(isinstance(m, Handle) and m.trunk is start.trunk for m in models)
        reference = _placed(reference, section.reference, store, is_shared=is_shared)
    return Models(policy, reference, value)


def value_source(start: Handle, rewards: RewardSource | None) -> WeightedModel | None:
    """The reward model that the value model starts from: the only one of ours that counts.

    It has to read the policy's ids. Of several, none says what their sum will be.
    """
    found = weighted_models(rewards)
    reads_ids = len(found) == 1 and found[0].handle.codec.same_ids(start.codec)
    return found[0] if reads_ids else None


def _value_model(
    policy: Handle, start: Handle, source: WeightedModel | None, config: Any, store: ModelStore
) -> Handle:
    """A head on the policy, or a copy of the reward model (`source`) or else of the start."""
    section = config.ppo
    if section.value == "shared":
        return _with_head(policy, None)
    origin = start if source is None else source.handle
    copied = store.trainable_copy(origin, "value", section.tuning, config.lora)
    if section.tuning == "full":
        copied.trunk.drop_output_layer()
    return _with_head(copied, source)


def _placed(
    reference: Handle, section: ReferenceSection, store: ModelStore, *, is_shared: bool
) -> Handle:
    """The reference on the device and in the type of `section`.

    A trunk that the reward model stands on too is copied; one of the reference's own moves, and the
    store forgets it, so that a later stage loads the same model as it was.

    Raises:
        ModelError: there is no such device.
    """
    own = reference.trunk.model.dtype
    home = reference.trunk.device
    dtype = torch_dtype(section.dtype) if section.dtype else own
    # A model without memory (`rlhf check`) stays without.
    is_real = home.type != "meta"
    device = _device(section.device) if is_real and section.device != "auto" else home
    if is_real and (device, dtype) == (home, own):
        return reference
    if is_shared:
        reference = store.fork(reference, "reference")
    else:
        store.forget(reference.trunk)
    _move(reference.trunk, device, dtype)
    return reference


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"ppo.reference.device is {name} but this machine has {torch.cuda.device_count()} CUDA "
            "devices: set it to auto, cpu or one that is there"
        )
    return device if device.index is not None else torch.device("cuda:0")


def _move(trunk: Trunk, device: torch.device, dtype: torch.dtype) -> None:
    """Move a trunk. Only its weights change their type: rotary frequencies want float32."""
    for parameter in trunk.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    trunk.place(device)


def _with_head(handle: Handle, source: WeightedModel | None) -> Handle:
    """The handle with a value head: the reward's with shift and scale folded in, or zeros.

    It starts as what the reward model counts for: its scores times its weight.
    """
    trunk = handle.trunk
    # An adapter's name is unique on its trunk; weights of its own are a trunk of its own.
    name = handle.role.adapter or "value"
    if source is None:
        trunk.add_head(name)
    else:
        reward = source.handle
        assert reward.role.head is not None
        head = reward.trunk.heads[reward.role.head]
        assert isinstance(head, ScalarHead)
        if trunk is not reward.trunk:  # a copy of the reward model, head and all
            del trunk.heads[reward.role.head]
        trunk.add_head(name, head.folded(source.weight, source.shift))
    return handle.with_role(handle.role.name, head=name)
