"""Which layers FSDP2 may gather in bfloat16 where passes run under autocast."""

import pytest
import torch
from torch import nn

from pipeline.distributed.sharding import _takes_cast

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("family", "device", "cast"),
    [
        ("llama", CPU, True),
        ("gemma", CPU, True),
        ("mixtral", CPU, True),
        ("gpt2", GPU, True),  # biases, and transformers' Conv1D
        ("gpt2", CPU, False),  # LayerNorm takes no weights of bfloat16 there
        ("phi", GPU, True),
    ],
)
def test_products_and_norms_are_cast(make_handle, family, device, cast):
    layers = make_handle(family, "float32").trunk.layers()
    assert [_takes_cast(layer, device) for layer in layers] == [cast, cast]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_cast_but_not_magnitudes(make_handle, dora):
    """A magnitude over a norm of weights is 1 at first, which quotients of bfloat16 are not."""
    from pipeline.config import LoraSection
    from pipeline.models.adapters import add_adapter, lora_config

    trunk = make_handle("llama", "float32").trunk
    add_adapter(trunk.model, "policy", lora_config(LoraSection(rank=2, alpha=4, use_dora=dora)))
    assert all(_takes_cast(layer, GPU) is not dora for layer in trunk.layers())


def test_what_is_bfloat16_stays_as_it_is(make_handle):
    """A cast would change nothing but the type of the gradients' sums."""
    layers = make_handle("llama", "bfloat16").trunk.layers()
    assert not any(_takes_cast(layer, GPU) for layer in layers)


def test_vectors_that_autocast_leaves_in_float32_are_not_cast():
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 4)
            self.A_log = nn.Parameter(torch.zeros(4))

    assert _takes_cast(nn.Sequential(nn.Linear(4, 4)), CPU)
    assert not _takes_cast(nn.Sequential(Decay()), CPU)
