"""Boundaries in time: recurrent networks beyond truncated backpropagation, and networks that act at different rates."""

from lightning_sg.recurrent.settings import ThroughTime

__all__ = ["ThroughTime"]
