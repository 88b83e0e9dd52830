"""Rollout engines behind one protocol."""

from pipeline.generation.engine import Engine, Generations, Sampling
from pipeline.generation.native import NativeEngine

__all__ = ["Engine", "Generations", "NativeEngine", "Sampling"]
