"""Trunks and handles: one base, its named adapters and its heads behind one `forward`."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.models.adapters import activate, adapter_names, adapter_parameters, is_of
from pipeline.models.heads import ScalarHead
from pipeline.models.joiner import DecoderJoiner, Joined
from pipeline.tensors import entropy, token_logprobs


@dataclass(frozen=True)
class Role:
    """What a forward pass plays: an adapter of the trunk (None: the bare base) and a head."""

    name: str
    adapter: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class BaseOrigin:
    """Where a trunk's base weights can be loaded from, and what identifies them.

    `identity` is the SHA-256 of the weight files, or the commit of a Hub model: adapters trained on
    a base fit this identity, wherever its folder lies.
    """

    path: str
    identity: str
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the base is a folder (known by a hash), not a Hub model (known by its name)."""
        return re.fullmatch("[0-9a-f]{64}", self.identity) is not None


@dataclass
class TrunkOutput:
    """What was asked of a forward pass: (B, R) over response tokens, zeros on padding; (B,)."""

    logprobs: Tensor | None = None  # (B, R) log p(response token t | everything before it)
    entropy: Tensor | None = None  # (B, R) of the distribution token t was drawn from
    values: Tensor | None = None  # (B, R) head at the state before response token t
    scores: Tensor | None = None  # (B,) head at the last response token


@dataclass
class DecodeStep:
    """One step of generation: S new tokens a row, the mask over all T so far, and the cache."""

    input_ids: Tensor  # (B, S)
    attention_mask: Tensor  # (B, T)
    position_ids: Tensor  # (B, S)
    cache: Any = None


@dataclass
class DecodeOutput:
    """Logits of the next token (B, V) and the cache with this step's keys and values in it."""

    logits: Tensor
    cache: Any


class Trunk(nn.Module):
    """A base model, its adapters and heads; everything goes through `forward`.

    DDP, FSDP2 and DeepSpeed hook `forward`; methods that bypass it would miss gathered weights.
    """

    def __init__(self, model: Any, origin: BaseOrigin) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict()
        self.origin = origin
        self.tokenizer: Any = None  # the one that came with the base, if it was loaded
        self.joiner = DecoderJoiner(model)

    # --- computation ---

    def forward(
        self,
        batch: TokenBatch | DecodeStep,
        role: Role,
        want: Collection[str] = (),
        temperature: float = 1.0,
    ) -> TrunkOutput | DecodeOutput:
        """Run the base in a role.

        `want` names fields of `TrunkOutput`; logits are made at response positions only, divided
        by `temperature`. A `DecodeStep` returns a `DecodeOutput`.
        """
        activate(self.model, role.adapter)
        if isinstance(batch, DecodeStep):
            return self._decode(batch)
        joined = self.joiner(batch)
        mask = batch.response_mask
        rows = torch.arange(len(batch), device=mask.device)
        b_n = rows.unsqueeze(1).expand_as(mask)[mask]
        t_n = joined.predictors[mask]
        wants_logits = "logprobs" in want or "entropy" in want
        picked = (b_n, t_n) if wants_logits else (b_n[:0], t_n[:0])
        hidden, logits_nv = self._hidden_and_logits(joined, picked)
        out = TrunkOutput()
        if wants_logits and temperature != 1.0:
            logits_nv = logits_nv / temperature
        if "logprobs" in want:
            out.logprobs = _scatter(token_logprobs(logits_nv, batch.response_ids[mask]), mask)
        if "entropy" in want:
            out.entropy = _scatter(entropy(logits_nv), mask)
        if "values" in want:
            out.values = _scatter(self._head(role)(hidden[b_n, t_n]), mask)
        if "scores" in want:
            out.scores = self._head(role)(hidden[rows, joined.last])
        return out

    def _hidden_and_logits(
        self, joined: Joined, picked: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states (B, T, d) and the logits (N, V) of the N picked positions.

        The output layer is given the picked rows alone, so that soft-capping, logit scaling and
        whatever else the model does after it stay the model's business.
        """
        seen: list[Tensor] = []

        def pick(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0])
            return (args[0][picked].unsqueeze(0), *args[1:])

        with _pre_hook(self.model.get_output_embeddings(), pick):
            logits = self.model(**joined.inputs, use_cache=False).logits
        return seen[0], logits.squeeze(0)

    def _decode(self, step: DecodeStep) -> DecodeOutput:
        def last(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][:, -1:], *args[1:])

        inputs = {"input_ids": step.input_ids, "attention_mask": step.attention_mask}
        if self.joiner.takes_positions:
            inputs["position_ids"] = step.position_ids
        with _pre_hook(self.model.get_output_embeddings(), last):
            out = self.model(**inputs, past_key_values=step.cache, use_cache=True)
        return DecodeOutput(out.logits[:, -1], out.past_key_values)

    def _head(self, role: Role) -> nn.Module:
        assert role.head is not None, f"role {role.name} has no head"
        return self.heads[role.head]

    # --- parts ---

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that heads read (the output layer's input)."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def number_dtype(self) -> torch.dtype:
        """Type of log-probs, values and scores: float32, or float64 on a float64 base."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def add_head(self, name: str, head: ScalarHead | None = None) -> ScalarHead:
        """Give the trunk a head; a zero one in float32 (float64 on a float64 base) by default."""
        head = head or ScalarHead(self.hidden_size, self.number_dtype)
        self.heads[name] = head.to(self.device)
        return head

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return torch.device(next(self.model.parameters()).device)

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's own weights by name: no adapters, no heads."""
        adapters = {
            id(parameter)
            for name in adapter_names(self.model)
            for parameter in adapter_parameters(self.model, name)
        }
        for key, parameter in self.model.named_parameters():
            if id(parameter) not in adapters:
                yield key.replace(".base_layer.", "."), parameter

    def base_state(self) -> Iterator[tuple[str, Tensor]]:
        """The base's state under the names of a model without adapters, for saving."""
        adapters = adapter_names(self.model)
        for key, tensor in self.model.state_dict().items():
            if not any(is_of(key, name) for name in adapters):
                yield key.replace(".base_layer.", "."), tensor

    def role_parameters(self, role: Role) -> list[nn.Parameter]:
        """What training the role would train: its adapter, or the whole base; and its head."""
        if role.adapter is None:
            parameters = [parameter for _, parameter in self.base_parameters()]
        else:
            parameters = adapter_parameters(self.model, role.adapter)
        if role.head is not None:
            parameters = [*parameters, *self.heads[role.head].parameters()]
        return parameters

    def freeze(self) -> None:
        """Evaluation mode, nothing trainable: the state in which stages hand trunks on."""
        self.eval()
        self.requires_grad_(False)

    def base_hash(self) -> str:
        """SHA-256 of the base's weights in memory: the shared base must never move."""
        return tensors_hash(self.base_parameters())


@dataclass(frozen=True)
class Handle:
    """A trunk in one role, with the codec of its vocabulary: what stages hold and pass on."""

    trunk: Trunk
    role: Role
    codec: Codec = field(repr=False)

    def __call__(
        self, batch: TokenBatch, want: Collection[str], temperature: float = 1.0
    ) -> TrunkOutput:
        """The role's outputs for a batch (see `Trunk.forward`)."""
        out = self.trunk(batch.to(self.trunk.device), self.role, want, temperature)
        assert isinstance(out, TrunkOutput)
        return out

    def decode(self, step: DecodeStep) -> DecodeOutput:
        """One generation step in this role."""
        out = self.trunk(step, self.role)
        assert isinstance(out, DecodeOutput)
        return out

    def with_role(self, name: str, **changes: str | None) -> "Handle":
        """The same trunk in another role."""
        return replace(self, role=replace(self.role, name=name, **changes))

    def parameters(self) -> list[nn.Parameter]:
        """What training this handle's role would train."""
        return self.trunk.role_parameters(self.role)


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(name.encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def _scatter(x_n: Tensor, mask: Tensor) -> Tensor:
    """Numbers of the real response tokens (N,) at their places (B, R), zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=x_n.dtype, device=x_n.device).masked_scatter(mask, x_n)


@contextmanager
def _pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    registered = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        registered.remove()
