"""Rollout engines behind one protocol."""

from pipeline.generation.caches import needs_static_batches
from pipeline.generation.engine import Engine, Generations, Listener, Sampling
from pipeline.generation.local import LocalEngine, serving
from pipeline.generation.native import NativeEngine
from pipeline.generation.open import close_engine, open_engine
from pipeline.generation.static import StaticEngine
from pipeline.generation.streaming import TextStream
from pipeline.generation.vllm import VllmEngine

__all__ = [
    "Engine",
    "Generations",
    "Listener",
    "LocalEngine",
    "NativeEngine",
    "Sampling",
    "StaticEngine",
    "TextStream",
    "VllmEngine",
    "close_engine",
    "needs_static_batches",
    "open_engine",
    "serving",
]
