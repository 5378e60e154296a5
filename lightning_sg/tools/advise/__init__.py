"""Answers whether a split is worth it: trains a few steps with and without it, and compares time and loss."""
