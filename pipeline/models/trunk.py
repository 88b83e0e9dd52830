"""Trunks and handles: one base, its named adapters and its heads behind one `forward`."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.batches import TokenBatch
from pipeline.codec import Codec
from pipeline.distributed.sharding import Shards, is_sharded
from pipeline.distributed.zero_shards import ZeroShards
from pipeline.models import sequence_attention
from pipeline.models.adapters import (
    activate,
    adapter_names,
    adapter_parameters,
    base_name,
    is_of,
    tuner_layers,
)
from pipeline.models.calls import DecodeOutput, DecodeStep, TrunkOutput, Writing
from pipeline.models.encoders import pooled_states
from pipeline.models.heads import ScalarHead
from pipeline.models.joiner import EncoderJoiner, PackedJoiner, make_joiner
from pipeline.models.last_layer import Reads, choose_places, last_layer_at, selective_layer
from pipeline.models.origin import BaseOrigin
from pipeline.models.passes import body, decoder, recomputed, recomputing, row_by_row, tail, widths
from pipeline.tensors import entropy, scatter, send, tempered, tensors_hash, token_logprobs, widen

# Elements of the logits in memory at a time: 64 MiB in float32.
LOGITS_AT_A_TIME = 1 << 24
# Tokens of a micro-batch where none are set: on an accelerator, and tokens x width on a processor.
DEVICE_TOKENS = 8192
CPU_STATES = 1024 * 384


@dataclass(frozen=True)
class Role:
    """What a forward pass plays: an adapter of the trunk (None: the bare base) and a head."""

    name: str
    adapter: str | None = None
    head: str | None = None
    pooling: str | None = None  # what a score reads of an encoder (`encoders.READINGS`)


class Trunk(nn.Module):
    """A base model, its adapters and heads; everything goes through `forward`.

    DDP, FSDP2 and DeepSpeed hook `forward`; methods that bypass it would miss gathered weights.
    """

    def __init__(self, model: Any, origin: BaseOrigin) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict()
        self.origin = origin
        # Logits a position, and the width of the states that the output layer and heads read.
        self.vocabulary_size, self.hidden_size = widths(model)
        self.tokenizer: Any = None  # the one that came with the base, if it was loaded
        self.joiner = make_joiner(model)
        # Where it can be computed at some positions only. In a tuple: the layer is the model's, not
        # one more module of the trunk.
        self.last_layer = (selective_layer(model),)
        self.recompute = False  # activations of the layers, in the backward pass (checkpointing)
        # How its weights lie over processes, if they do.
        self.shards: Shards | ZeroShards | None = None

    # --- computation ---

    def forward(
        self,
        batch: TokenBatch | DecodeStep | Writing,
        role: Role,
        want: Collection[str] = (),
        temperature: float = 1.0,
        forbidden: Collection[int] = frozenset(),
    ) -> TrunkOutput | DecodeOutput | Tensor:
        """Run the base in a role. In a `TokenBatch`'s pass we read nothing back from the device.

        `want` names fields of `TrunkOutput`; logits are made at response positions only, divided
        by `temperature`, without the `forbidden` ids, never more at a time than `LOGITS_AT_A_TIME`.
        A `DecodeStep` returns a `DecodeOutput`, a `Writing` the ids (B, P + new) that `generate`
        returns.
        """
        activate(self.model, role.adapter)
        if isinstance(batch, DecodeStep):
            return self._decode(batch, role)
        if isinstance(batch, Writing):
            written: Tensor = self.model.generate(batch.input_ids, **batch.settings)
            return written
        if self.is_encoder:
            assert set(want) == {"scores"}, f"an encoder has no {want}"
            return TrunkOutput(scores=self._head(role)(self._pooled(batch, role)))
        mask = batch.response_mask  # on the host, like the batch
        of_tokens = not {"values", "logprobs", "entropy"}.isdisjoint(want)
        of_last = "scores" in want
        states, hidden_nd, hidden_bd = self._states(batch, role, of_tokens, of_last)
        out = TrunkOutput()
        if of_last:
            out.scores = self._head(role)(hidden_bd)
        if "values" in want:
            out.values = scatter(self._head(role)(hidden_nd), mask)
        if "logprobs" in want or "entropy" in want:
            ids_n = send(batch.response_ids[mask], self.device)
            logprobs_n, entropy_n = self._token_numbers(
                states, role, hidden_nd, ids_n, temperature, forbidden, "entropy" in want
            )
            out.logprobs = scatter(logprobs_n, mask)
            if "entropy" in want:
                out.entropy = scatter(entropy_n, mask)
        return out

    def _states(
        self, batch: TokenBatch, role: Role, of_tokens: bool, of_last: bool
    ) -> tuple[Any, Tensor, Tensor]:
        """What the body returned, and the final hidden states that are read.

        Those before the response tokens, row by row, (N, d), if `of_tokens`; those at the last
        tokens, (B, d), if `of_last`.
        """
        joined = self.joiner(batch)
        reads = Reads.of(joined, batch.response_mask, of_tokens, of_last)
        inputs: dict[str, Any] = {n: send(x, self.device) for n, x in joined.inputs.items()}
        if joined.lengths is not None:
            inputs |= sequence_attention.arguments(joined.lengths, self.device)
        (layer,), places = self.last_layer, None
        if layer is not None and (joined.lengths is not None or not self.packs):
            places = choose_places(reads, joined, self.hidden_size)
        again = partial(recomputed, self.model, role.adapter)
        recomputes = self.recompute and torch.is_grad_enabled()
        with ExitStack() as stack:
            if recomputes:
                apart = layer if places is not None else None
                stack.enter_context(recomputing(self.model, again, apart))
            if layer is not None and places is not None:
                at = last_layer_at(layer, places.to(self.device), again if recomputes else None)
                stack.enter_context(at)
            states = body(self.model, **inputs)
        hidden_md = states.last_hidden_state.flatten(0, 1)
        if places is None:
            places_bs = joined.rows.unsqueeze(1) * joined.width + reads.columns
            wanted = places_bs.flatten()[reads.order]
            hidden_md = hidden_md.index_select(0, send(wanted, self.device))
        elif not places.is_flat:
            hidden_md = hidden_md.index_select(0, send(reads.order, self.device))
        tokens = len(reads.order) - of_last * len(batch)
        return states, hidden_md[:tokens], hidden_md[tokens:]

    def _pooled(self, batch: TokenBatch, role: Role) -> Tensor:
        assert role.pooling is not None, f"role {role.name} does not say what its score reads"
        recomputes = self.recompute and torch.is_grad_enabled()
        again = partial(recomputed, self.model, role.adapter) if recomputes else None
        return pooled_states(self.model, self.joiner(batch), role.pooling, self.device, again)

    def _token_numbers(
        self,
        states: Any,
        role: Role,
        hidden_nd: Tensor,
        ids_n: Tensor,
        temperature: float,
        forbidden: Collection[int],
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (N,), from logits of a bounded number of rows at a time.

        Of more rows than one chunk, what is kept for the backward pass does not grow with the
        vocabulary: under a frozen output layer each log-prob's slope is (`passes.row_by_row`);
        otherwise the logits of each chunk are made again.
        """

        def numbers(hidden_nd: Tensor, ids_n: Tensor) -> tuple[Tensor, Tensor]:
            logits_nv = widen(tail(self.model, states, hidden_nd.unsqueeze(0)).squeeze(0))
            logits_nv = tempered(logits_nv, temperature, forbidden)
            logprobs_n = token_logprobs(logits_nv, ids_n, consume=not with_entropy)
            return logprobs_n, entropy(logits_nv) if with_entropy else logprobs_n.detach()

        def logprobs(ids_n: Tensor, hidden_nd: Tensor) -> Tensor:
            return numbers(hidden_nd, ids_n)[0]

        rows = max(1, LOGITS_AT_A_TIME // self.vocabulary_size)
        number = -(-len(ids_n) // rows)
        if self.shards is not None:  # some chunks may be none: others have more
            number = self.shards.calls(number)
        if number <= 1:
            return numbers(hidden_nd, ids_n)
        chunks = list(zip(hidden_nd.split(rows), ids_n.split(rows), strict=True))
        chunks += [(hidden_nd[:0], ids_n[:0])] * (number - len(chunks))
        if not torch.is_grad_enabled():
            parts = [numbers(*chunk) for chunk in chunks]
        elif with_entropy or not hidden_nd.requires_grad or self._output_layer_trains:
            parts = [recomputed(self.model, role.adapter, numbers, *chunk) for chunk in chunks]
        else:
            found = torch.cat([row_by_row(partial(logprobs, ids), x) for x, ids in chunks])
            return found, found.detach()
        logprobs_n, entropy_n = (torch.cat(found) for found in zip(*parts, strict=True))
        return logprobs_n, entropy_n

    @property
    def _output_layer_trains(self) -> bool:
        return any(w.requires_grad for w in self.model.get_output_embeddings().parameters())

    def _decode(self, step: DecodeStep, role: Role) -> DecodeOutput:
        inputs: dict[str, Any] = {"input_ids": step.input_ids}
        if step.attention_mask is not None:
            inputs["attention_mask"] = step.attention_mask
        if self.joiner.takes_positions:
            inputs["position_ids"] = step.position_ids
        states = decoder(self.model)(**inputs, past_key_values=step.cache, use_cache=True)
        last = states.last_hidden_state[:, -1:]  # logits only where a token is sampled
        values = None if role.head is None else self._head(role)(last.squeeze(1))
        logits = tail(self.model, states, last).squeeze(1)
        return DecodeOutput(logits, values, states.past_key_values)

    def _head(self, role: Role) -> nn.Module:
        assert role.head is not None, f"role {role.name} has no head"
        return self.heads[role.head]

    # --- what numbers it makes, and how many at a time ---

    @property
    def is_exact(self) -> bool:
        """Whether a cached pass gives a whole pass's log-probs to rounding, exact for ratios.

        In half precision it does not: 4 to 8% of the sampled tokens would be others. 8-bit bases
        compute in float16, and outliers of one row change the others' rounding.
        """
        wide = self.model.dtype in (torch.float32, torch.float64)
        wide = wide and not getattr(self.model, "is_loaded_in_8bit", False)
        return wide and not torch.is_autocast_enabled(self.device.type)

    @property
    def is_encoder(self) -> bool:
        """Whether it reads in both directions and writes nothing: it gives scores alone."""
        return isinstance(self.joiner, EncoderJoiner)

    @property
    def packs(self) -> bool:
        """Whether a batch passes without padding: it then costs its tokens, not its rectangle."""
        return isinstance(self.joiner, PackedJoiner)

    def token_budget(self, setting: int | None) -> int:
        """Tokens of a micro-batch: the setting, or as many as suit the device.

        On a processor smaller is less memory, and activations that stay in its cache; larger is
        fewer passes over the gradients of the weights.
        """
        if setting is not None:
            return setting
        if self.device.type != "cpu":
            return DEVICE_TOKENS
        return min(max(CPU_STATES // self.hidden_size, 256), 4096)

    # --- parts ---

    @property
    def number_dtype(self) -> torch.dtype:
        """Type of log-probs, values and scores: float32, or float64 on a float64 base."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def add_head(self, name: str, head: ScalarHead | None = None) -> ScalarHead:
        """Give the trunk a head; a zero one in float32 (float64 on a float64 base) by default."""
        head = head or ScalarHead(self.hidden_size, self.number_dtype)
        self.heads[name] = head.to(self.device)
        return head

    def place(self, device: torch.device) -> "Trunk":
        """Move to a device; how rows are joined depends on it."""
        self.to(device)
        self.joiner = make_joiner(self.model)
        return self

    def layers(self) -> list[nn.Module]:
        """The base's layers: where weights are sharded, each gathers its own."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        marked = (m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer))
        layers: list[nn.Module] = list(marked)
        assert layers, f"{type(self.model).__name__} has no layers that transformers marks as such"
        return layers

    def readers(self) -> list[nn.Module]:
        """What reads weights of modules within it without calling those: adapters' layers do."""
        layers: list[nn.Module] = tuner_layers(self.model)
        return layers

    def whole(self) -> AbstractContextManager[None]:
        """Within it all weights are here, and a pass waits for no other process."""
        return nullcontext() if self.shards is None else self.shards.whole()

    def freeze_output_layer(self) -> None:
        """Leave an output layer of its own as it is: no score depends on it, and DDP would wait."""
        output = self.model.get_output_embeddings()
        if output is not None and output.weight is not self.model.get_input_embeddings().weight:
            output.weight.requires_grad_(False)

    def drop_output_layer(self) -> None:
        """Let go of weights that only logits need: of a model whose values alone are asked for."""
        output = self.model.get_output_embeddings()
        if output.weight is self.model.get_input_embeddings().weight:
            return
        for module in self.model.modules():
            for name, child in module.named_children():
                if child is output:
                    setattr(module, name, nn.Module())  # whoever asks for logits gets an error

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
                yield base_name(key), parameter

    def base_state(self) -> Iterator[tuple[str, Tensor]]:
        """The base's state under the names of a model without adapters, for saving."""
        adapters = adapter_names(self.model)
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            if not any(is_of(key, name) for name in adapters):
                # Detached, a weight under ZeRO-3 would not be known as one.
                yield base_name(key), tensor if is_sharded(tensor) else tensor.detach()

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
        self.recompute = False

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
        self,
        batch: TokenBatch,
        want: Collection[str],
        temperature: float = 1.0,
        forbidden: Collection[int] = frozenset(),
    ) -> TrunkOutput:
        """The role's outputs for a batch (see `Trunk.forward`)."""
        out = self.trunk(batch, self.role, want, temperature, forbidden)
        assert isinstance(out, TrunkOutput)
        return out

    def decode(self, step: DecodeStep) -> DecodeOutput:
        """One generation step in this role."""
        out = self.trunk(step, self.role)
        assert isinstance(out, DecodeOutput)
        return out

    def write(self, input_ids: Tensor, **settings: Any) -> Tensor:
        """transformers' `generate` in this role: ids (B, P) to (B, P + new)."""
        written: Tensor = self.trunk(Writing(input_ids, settings), self.role)
        return written

    def with_role(self, name: str, **changes: str | None) -> "Handle":
        """The same trunk in another role."""
        return replace(self, role=replace(self.role, name=name, **changes))

    def parameters(self) -> list[nn.Parameter]:
        """What training this handle's role would train."""
        return self.trunk.role_parameters(self.role)
