"""Answers whether a split is worth it: trains a few steps with and without it, and compares time, memory and loss."""

from lightning_sg.tools.advise.function import advise

__all__ = ["advise"]
