"""Which parameter belongs to which stage, and which stage to which process."""

from lightning_sg.partition.trace import Leak, Trace, trace_step

__all__ = ["Leak", "Trace", "trace_step"]
