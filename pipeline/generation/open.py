"""From settings to an engine."""

import os
from pathlib import Path
from typing import Literal

from pipeline.distributed import Runtime
from pipeline.errors import ConfigError
from pipeline.generation.engine import Engine
from pipeline.generation.local import LocalEngine
from pipeline.generation.vllm import VllmEngine
from pipeline.generation.vllm_adapters import SETTING, AdapterHandover
from pipeline.json_http import JsonServer
from pipeline.runfolder import json_hash
from pipeline.vllm_config import VllmSection


def open_engine(
    name: Literal["native", "vllm"],
    rows_at_once: int,
    vllm: VllmSection,
    folder: Path,
    runtime: Runtime,
) -> Engine:
    """The engine called `name`; a vLLM server is first asked when something is generated.

    `folder` is the stage's: a run has it to itself.

    Raises:
        ConfigError: the variable that should hold the server's key is not set.
    """
    if name == "native":
        return LocalEngine(rows_at_once, cuda_graphs=runtime.run.cuda_graphs)
    key = None
    if vllm.api_key_env is not None:
        key = os.environ.get(vllm.api_key_env)
        if key is None:
            raise ConfigError(
                f"{SETTING}.api_key_env is {vllm.api_key_env}, but there is no such environment "
                "variable: set it to the key that the server was started with"
            )
    server = JsonServer(
        vllm.url, api_key=key, timeout_seconds=vllm.timeout_seconds, retries=vllm.retries
    )
    handover = AdapterHandover(server, *_places(vllm, folder.resolve()))
    return VllmEngine(server, handover, runtime, rows_at_once)


def close_engine(engine: Engine) -> None:
    """Let go of what the engine holds outside this process."""
    if isinstance(engine, VllmEngine):
        engine.close()


def _places(vllm: VllmSection, folder: Path) -> tuple[VllmSection, Path, str]:
    """The section, the run's own folder of adapters here, and the same as the server sees it."""
    if vllm.adapters is None:
        here = folder / "adapters"
        return vllm, here, vllm.adapters_on_server or str(here)
    # Many runs may share the folder that is named.
    own = json_hash(str(folder))[:12]
    here = Path(vllm.adapters).expanduser().resolve()
    there = vllm.adapters_on_server or str(here)
    return vllm, here / own, f"{there.rstrip('/')}/{own}"
