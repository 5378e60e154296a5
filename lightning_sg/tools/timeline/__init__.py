"""Shows when each process does what: a profiler for Lightning's Trainer, and ``python -m lightning_sg timeline``."""

from lightning_sg.tools.timeline.profiler import Timeline

__all__ = ["Timeline"]
