"""Traces a step, divides the model into stages, and places the stages on processes."""

from lightning_sg.partition.step import trace_step
from lightning_sg.partition.trace import Leak, Trace

__all__ = ["Leak", "Trace", "trace_step"]
