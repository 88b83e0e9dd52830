"""How a pass goes through a transformers model: its body, its tail, and recomputation.

The *body* turns tokens into final hidden states: a decoder, behind an encoder where the model has
one. The *tail* is all that the model does after it: output layer, soft-capping, logit scaling.
Calling them apart makes logits only where they are wanted, and leaves what the tail does the
model's business.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.models.adapters import activate


def decoder(model: Any) -> Any:
    """The module whose `last_hidden_state` the output layer reads."""
    found = model.get_decoder()
    return model.model if found is model else found  # Llama 4 does not find its own


def body(model: Any, input_ids: Tensor, **inputs: Any) -> Any:
    """What the decoder returns, its final hidden states among it; nothing is cached.

    `inputs` are a joiner's. Of an encoder-decoder `input_ids` (B, P) and `attention_mask` are the
    encoder's, and `decoder_input_ids` (B, T) the decoder's.
    """
    if not model.config.is_encoder_decoder:
        return decoder(model)(input_ids=input_ids, **inputs, use_cache=False)
    mask = inputs["attention_mask"]
    encoded = model.get_encoder()(input_ids=input_ids, attention_mask=mask)
    return decoder(model)(
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=mask,
        use_cache=False,
    )


def tail(model: Any, states: Any, hidden: Tensor) -> Tensor:
    """Logits (B, S, V) of final hidden states (B, S, d), as the model itself makes them.

    `states` is what the body returned. The model's own `forward` runs, with a decoder that hands
    over `hidden` in its place.
    """
    from transformers.modeling_outputs import BaseModelOutput

    inner = decoder(model)
    states.last_hidden_state = hidden
    own = inner.__dict__.get("forward")
    inner.forward = lambda *_args, **_kwargs: states
    try:
        placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        inputs: dict[str, Any] = {"input_ids": placeholder}
        if model.config.is_encoder_decoder:
            encoded = BaseModelOutput(last_hidden_state=hidden)  # there is no need of an encoder
            inputs = {"decoder_input_ids": placeholder, "encoder_outputs": encoded}
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own


def widths(model: Any) -> tuple[int, int]:
    """Tokens of a model's vocabulary, and the width of its final states."""
    output = model.get_output_embeddings()
    if output is None:  # an encoder, whose embeddings may be narrower than its states
        return len(model.get_input_embeddings().weight), model.config.hidden_size
    vocabulary, width = output.weight.shape
    return vocabulary, width


def recomputed(model: Any, adapter: str | None, function: Callable[..., Any], *args: Tensor) -> Any:
    """`function(*args)` without kept activations: the backward pass computes it again.

    The backward pass of several adapters on one base runs after the last of them was activated:
    the second computation switches to the adapter of the first.
    """
    from torch.utils.checkpoint import checkpoint

    contexts = partial(_contexts, model, adapter)
    # Only dropout draws numbers in a pass.
    return checkpoint(
        function, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=model.training
    )


def row_by_row(function: Callable[[Tensor], Tensor], x_nd: Tensor) -> Tensor:
    """`function(x)`, (N,) of (N, d), where each number depends on its own row alone.

    Its slopes (N, d) are computed at once and kept in place of all that the function made. Nothing
    inside gets gradients but x.
    """
    with torch.enable_grad():
        rows = x_nd.detach().requires_grad_()
        y_n = function(rows)
        (slopes_nd,) = torch.autograd.grad(y_n.sum(), rows)
    result: Tensor = _Linearised.apply(x_nd, y_n.detach(), slopes_nd)
    return result


class _Linearised(torch.autograd.Function):
    """y_n with known slopes s_n = d y_n / d x_n: dx_n = g_n s_n."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, y_n: Tensor, slopes_nd: Tensor) -> Tensor:
        ctx.save_for_backward(slopes_nd)
        return y_n.view_as(y_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes_nd,) = ctx.saved_tensors
        return (grads[0].unsqueeze(-1) * slopes_nd).to(slopes_nd.dtype), None, None


@contextmanager
def recomputing(
    model: Any, again: Callable[..., Any], apart: nn.Module | None = None
) -> Iterator[None]:
    """Within it, the model's layers but `apart` keep their inputs only.

    `again(function, *inputs)` makes their calls (`recomputed`). transformers asks for it in
    training mode only. In evaluation mode (PPO, dropout off) a layer is told that it trains until
    it asks, and computes as it was.

    Raises:
        ModelError: the architecture's layers are not marked as such.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layers that can be recomputed: set "
            "gradient_checkpointing to false"
        )
    modes = {layer: layer.training for layer in found if layer is not apart}

    def run(layer: GradientCheckpointingLayer, function: Callable[..., Any], *args: Any) -> Any:
        return again(_in_mode(layer, modes[layer], function), *args)

    for layer in modes:
        layer.gradient_checkpointing, layer.training = True, True
        layer._gradient_checkpointing_func = partial(run, layer)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, mode in modes.items():
            del layer.gradient_checkpointing
            layer.training = mode


def _in_mode(layer: nn.Module, training: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's bound forward, with the layer in the mode that its sub-modules are in (dropout)."""

    def run(*args: Any) -> Any:
        layer.training = training
        return function(*args)

    return run


def _contexts(
    model: Any, adapter: str | None
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _with_adapter(model, adapter)


@contextmanager
def _with_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    activate(model, adapter)
    yield
