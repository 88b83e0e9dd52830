"""A tiny policy with an adapter, and engines on a stand-in of a vLLM server."""

from pathlib import Path
from typing import Any

import torch

from pipeline.config import DataSection, LoraSection, RunSection
from pipeline.distributed import Runtime
from pipeline.generation import Sampling, VllmEngine, open_engine
from pipeline.models.store import ModelStore
from pipeline.models.trunk import Handle
from pipeline.vllm_config import VllmSection
from tests.conftest import TEXTS, tiny_section
from tests.vllm_stand_in import StandIn

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13], [14, 15, 16, 17], [18, 19, 20]]
GREEDY = Sampling(max_new_tokens=8, temperature=0)
RUNTIME = Runtime(RunSection(device="cpu"))


def make_policy(root: Path, **lora: Any) -> Handle:
    """An adapter, far from zero, on a base that lies in a folder under `root`."""
    torch.manual_seed(0)
    store = ModelStore(
        tiny_section(dtype="float32"), DataSection(max_prompt_tokens=32, max_response_tokens=32)
    )
    base = store.build(TEXTS).with_role("sft")
    with torch.no_grad():
        for parameter in base.trunk.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    store.save(base, root / "sft")
    shape = LoraSection(**{"rank": 4, "alpha": 8, **lora})
    handle = store.trainable_copy(base, "policy", "lora", shape)
    step(handle, 1)
    return handle


def step(handle: Handle, seed: int) -> None:
    """Move the adapter as far as an update that changes most greedy tokens."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=random)


def engine_of(
    server: StandIn, root: Path, rows: int = 4, runtime: Any = RUNTIME, **section: Any
) -> VllmEngine:
    """An engine whose pauses take no time."""
    given = {"url": server.url, "retries": 2, "timeout_seconds": 20.0, **section}
    vllm = VllmSection.model_validate(given)
    engine = open_engine("vllm", rows, vllm, root / "ppo", runtime)
    assert isinstance(engine, VllmEngine)
    engine._server._sleep = lambda seconds: None
    return engine
