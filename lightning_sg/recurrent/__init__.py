"""Boundaries in time: recurrent networks beyond truncated backpropagation, and networks that act at different rates."""

from lightning_sg.batch.chunks import Chunk, Chunks, parallel_streams
from lightning_sg.recurrent.boundary import MessageBoundary, TimeBoundary
from lightning_sg.recurrent.settings import ThroughTime

__all__ = ["Chunk", "Chunks", "MessageBoundary", "ThroughTime", "TimeBoundary", "parallel_streams"]
