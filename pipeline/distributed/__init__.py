"""The only owner of accelerate and torch.distributed: devices, collectives, seeds."""

from pipeline.distributed.runtime import Runtime

__all__ = ["Runtime"]
