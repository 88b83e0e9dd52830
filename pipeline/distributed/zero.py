"""Optimiser steps by DeepSpeed's ZeRO (arXiv:1910.02054): gradients and optimiser over processes.

`Zero2Steps` leaves every process whole weights; under `Zero3Steps` they are sharded too
(`pipeline.distributed.zero_shards`). accelerate launches and configures it (`--launch
deepspeed-zero2`, its `deepspeed_*` settings); `deepspeed.initialize` is called here.

Held to DeepSpeed 0.19.8, whose private names are used where its public ones do not say enough:
the norm of a group of parameters before the step, and what each process has of a state.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.distributed import zero_settings
from pipeline.distributed.sharding import Part
from pipeline.distributed.steps import Steps, named_groups, trained
from pipeline.distributed.training_tensors import fitting_weight
from pipeline.distributed.zero_shards import Engine, ZeroShards
from pipeline.errors import ConfigError
from pipeline.saved_rows import Saved, SavedRows, stretch

if TYPE_CHECKING:
    from pipeline.distributed.runtime import Runtime


class ZeroSteps(Steps, ABC):
    """The steps of a DeepSpeed engine; the stages differ in where a process keeps its part."""

    takes_one_pass = True  # the engine counts a forward and a backward pass

    def __init__(self, module: nn.Module, optimiser: Any, runtime: "Runtime") -> None:
        self.runtime = runtime
        self.groups = named_groups(optimiser)  # here: the engine puts flat tensors in their place
        self.trained = trained(module, self.groups)
        self.stepping = self.groups
        self.adam = optimiser
        self.shards = [*_shards_in(module)]
        for shards in self.shards:
            shards.release()
        config = zero_settings.engine(runtime.run, runtime.device)
        self.engine = Engine(module, config, optimiser)
        self.module = self.engine.engine
        self.zero: Any = self.module.optimizer
        for shards in self.shards:
            shards.follow(self.zero.parameter_offload)
        self.optimiser = EngineOptimiser(optimiser, self.step)
        self.is_reduced = False  # whether all passes of the step in hand are made
        self.flats = [*self._flats()]  # of each group
        self.flat_of = dict(self._flat_of_each())

    # --- one step ---

    def begin(self, names: Collection[str] | None = None) -> None:
        """Begin a step of the named groups, whatever became of the last one."""
        self.stepping = self.groups if names is None else names
        self.is_reduced = False
        self.zero.zero_grad()
        self._forget_gradients()

    def passing(self, last: bool) -> AbstractContextManager[Any]:
        """Round a forward and a backward pass, each of which reduces its gradients."""
        # Which pass is the last is known when the step is taken: see `_reduced`.
        self.module.set_gradient_accumulation_boundary(False)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward of this process's share of the loss."""
        self.module.backward(loss * self.runtime.world_size, scale_wrt_gas=False)

    def clip(self, max_norm: float, name: str | None = None) -> float:
        """Clip the norm of a group's gradient (default: of all); returns it before clipping."""
        names = [*self.groups] if name is None else [name]
        gradients = [x for chosen in names for x in self._reduced(chosen)]
        squares = torch.stack([x.float().pow(2).sum() for x in gradients]).sum()
        norm = float(self.runtime.all_sum(squares).sqrt())
        for gradient in gradients:
            gradient.mul_(min(1.0, max_norm / (norm + 1e-6)))
        return norm

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:
        """Change the weights of the groups that this step trains."""
        resting = self.groups.keys() - set(self.stepping)
        kept = [self._rest(name) for name in resting]
        for name in self.groups:
            self._reduced(name)
        self.module.set_gradient_accumulation_boundary(True)
        self.module.step()
        assert self.module.was_step_applied()
        for name, (rate, states) in zip(resting, kept, strict=True):
            self._wake(name, rate, states)
        self.is_reduced = False

    def let_go(self) -> None:
        """Free the memory of gradients."""
        self.begin()

    def _reduced(self, name: str) -> list[Tensor]:
        """A group's gradients on this process, once all passes are made."""
        if not self.is_reduced:
            self.zero.finalize_gradient_accumulation_boundary()
            self.is_reduced = True
        return [*self._gradients([*self.groups].index(name))]

    def _rest(self, name: str) -> tuple[float, list[dict[str, Tensor]]]:
        """Have a step change nothing of a group but what `_wake` sets right: no gradient, rate 0.

        DeepSpeed knows no parameters without a gradient, which AdamW would leave alone.
        """
        index = [*self.groups].index(name)
        states = [
            {what: value.clone() for what, value in self.adam.state.get(flat, {}).items()}
            for flat in self.flats[index]
        ]
        for gradient in self._reduced(name):
            gradient.zero_()
        rate, self.adam.param_groups[index]["lr"] = self.adam.param_groups[index]["lr"], 0.0
        return rate, states

    def _wake(self, name: str, rate: float, states: list[dict[str, Tensor]]) -> None:
        index = [*self.groups].index(name)
        self.adam.param_groups[index]["lr"] = rate
        for flat, before in zip(self.flats[index], states, strict=True):
            for what, value in self.adam.state[flat].items():
                if before:
                    value.copy_(before[what])
                else:  # as good as none
                    value.zero_()

    # --- the state to go on from ---

    def tensors(self) -> dict[str, Any]:
        """Float32 weights by name, and the optimiser's numbers: of each what is here."""
        self._link()
        found: dict[str, Any] = {}
        for name, parameter in self.trained:
            found[f"weights/{name}"] = Part(self._piece(parameter))
            for what, value in self.adam.state.get(self.flat_of[id(parameter)], {}).items():
                part = value.clone() if value.dim() == 0 else Part(self._piece(parameter, what))
                found[f"{what}/{name}"] = part
        return found

    @torch.no_grad()
    def restore(self, tensors: Saved) -> None:
        """Go back to what `tensors` found, in this strategy or another."""
        for flat in (flat for flats in self.flats for flat in flats):
            self.adam.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._link()
        numbers = set(self.adam.state[self.flats[0][0]])
        for name, parameter in self.trained:
            weight = fitting_weight(tensors, numbers, name, parameter)
            self._piece(parameter).copy_(self._own(parameter, weight))
            for what, value in self.adam.state[self.flat_of[id(parameter)]].items():
                if f"{what}/{name}" not in tensors:
                    continue
                full = tensors[f"{what}/{name}"]
                if not isinstance(full, SavedRows) and full.dim() == 0:
                    value.copy_(full)
                else:
                    self._piece(parameter, what).copy_(self._own(parameter, full))
        self._publish()

    def weights(self, name: str) -> dict[str, Any]:
        """A group's float32 weights by name: of each what is here."""
        self._link()
        return {name: Part(self._piece(parameter)) for name, parameter in self._of_group(name)}

    @torch.no_grad()
    def set_weights(self, rows: Mapping[str, Tensor]) -> None:
        """Set float32 weights by name, of each what is here."""
        self._link()
        for name, parameter in self.trained:
            if name in rows:
                self._piece(parameter).copy_(rows[name])
        self._publish()

    def own_rows(self, name: str, full: Tensor | SavedRows) -> Tensor:
        """Of a tensor like the weight of that name, what is here of the weight."""
        return self._own(dict(self.trained)[name], full)

    def close(self) -> None:
        """Take the engine off the module: handles on it live on."""
        self.engine.release()
        for shards in self.shards:
            shards.hook()

    # --- what the stages do in their own way ---

    @abstractmethod
    def _flats(self) -> Iterator[list[Tensor]]:
        """The flat float32 weights of each group that the optimiser of this process knows."""

    @abstractmethod
    def _flat_of_each(self) -> Iterator[tuple[int, Tensor]]:
        """The id of each parameter, and the flat tensor that it is in."""

    @abstractmethod
    def _gradients(self, index: int) -> Iterable[Tensor]:
        """What this process has of a group's reduced gradients."""

    @abstractmethod
    def _forget_gradients(self) -> None:
        """Begin at zero, also after passes without a step."""

    def _link(self) -> None:
        """Make the optimiser's numbers known by parameter."""

    @abstractmethod
    def _piece(self, parameter: nn.Parameter, what: str | None = None) -> Tensor:
        """What is here of a parameter's float32 weights, or of a number of its optimiser; flat."""

    @abstractmethod
    def _own(self, parameter: nn.Parameter, full: Tensor | SavedRows) -> Tensor:
        """The same piece of a whole tensor."""

    @abstractmethod
    def _publish(self) -> None:
        """Have the float32 weights be those that passes compute with."""


class Zero2Steps(ZeroSteps):
    """ZeRO-2: of each group's flattened weights a process steps one stretch."""

    def _flats(self) -> Iterator[list[Tensor]]:
        return ([flat] for flat in self.zero.single_partition_of_fp32_groups)

    def _flat_of_each(self) -> Iterator[tuple[int, Tensor]]:
        for group, (flat,) in zip(self.zero.bit16_groups, self.flats, strict=True):
            for parameter in group:
                yield id(parameter), flat

    def _gradients(self, index: int) -> Iterable[Tensor]:
        found: list[Tensor] = self.zero.averaged_gradients[index]
        return found

    def _forget_gradients(self) -> None:
        for index in range(len(self.flats)):
            self.zero.averaged_gradients[index] = self.zero.all_grad_tensors[index] = None
        self.zero.clear_backward_seen_flag()

    def _link(self) -> None:
        # DeepSpeed does so once, and before all groups have numbers.
        if all(flat in self.adam.state for (flat,) in self.flats):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _piece(self, parameter: nn.Parameter, what: str | None = None) -> Tensor:
        place: Any = getattr(parameter, "_hp_mapping", None)
        if place is None:
            return torch.empty(0, device=parameter.device)
        found: Tensor = place.get_hp_fragment(what)
        return found

    def _own(self, parameter: nn.Parameter, full: Tensor | SavedRows) -> Tensor:
        place: Any = getattr(parameter, "_hp_mapping", None)
        if place is None:
            return torch.empty(0, device=parameter.device)
        address = place.lp_fragment_address
        own = stretch(full, address.start, address.start + address.numel)
        return own.to(parameter.device)

    def _publish(self) -> None:
        self.zero.update_lp_params()


class Zero3Steps(ZeroSteps):
    """ZeRO-3: of each parameter's flattened weights a process has, and steps, one stretch."""

    def __init__(self, module: nn.Module, optimiser: Any, runtime: "Runtime") -> None:
        """Raises ConfigError where weights of several types are trained."""
        types = {p.dtype for parameters in named_groups(optimiser).values() for p in parameters}
        if len(types) > 1:
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
            raise ConfigError(
                f"DeepSpeed ZeRO-3 trains weights of one type, but here they are {names} (heads "
                "are of float32): set model.dtype to float32 and run.mixed_precision to bf16, "
                "tuning to lora, or start with --launch deepspeed-zero2 or fsdp2"
            )
        super().__init__(module, optimiser, runtime)

    def _flats(self) -> Iterator[list[Tensor]]:
        flats, group_of = self.zero.fp32_partitioned_groups_flat, self.zero.sub_group_to_group_id
        for index in range(len(self.groups)):
            yield [flats[sub] for sub, group in group_of.items() if group == index]

    def _flat_of_each(self) -> Iterator[tuple[int, Tensor]]:
        flats = self.zero.fp32_partitioned_groups_flat
        for group, flat in zip(self.zero.fp16_groups, flats, strict=True):
            for parameter in group:
                yield id(parameter), flat

    def _gradients(self, index: int) -> Iterable[Tensor]:
        for sub, group in self.zero.sub_group_to_group_id.items():
            if group == index:
                yield from self.zero.averaged_gradients[sub]

    def _forget_gradients(self) -> None:
        # DeepSpeed overwrites those that the first pass of a step has, and no others.
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        for _, parameter in self.trained:
            safe_set_local_grad(parameter, torch.zeros_like(safe_get_local_grad(parameter)))

    def _piece(self, parameter: nn.Parameter, what: str | None = None) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if what is None:
            found: Tensor = safe_get_local_fp32_param(parameter)
        else:
            found = safe_get_local_optimizer_state(parameter, what)
        rows: Any = parameter
        return found[: rows.to_local().numel()]  # without padding

    def _own(self, parameter: nn.Parameter, full: Tensor | SavedRows) -> Tensor:
        rows: Any = parameter
        own: Tensor = rows.rows_of(full)
        return own

    def _publish(self) -> None:
        self.zero.parameter_offload.partition_all_parameters()
        for index in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        self.zero._post_step(set())


class EngineOptimiser:
    """The optimiser inside an engine, for those who set rates and call `step`."""

    def __init__(self, inner: Any, step: Any) -> None:
        self.inner, self.step = inner, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _shards_in(module: nn.Module) -> Iterator[ZeroShards]:
    for part in module.modules():
        shards = getattr(part, "shards", None)
        if isinstance(shards, ZeroShards):
            yield shards
