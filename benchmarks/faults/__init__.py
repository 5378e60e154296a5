"""Faults on purpose: what breaks in which rank at which moment, and whether the other ranks say so.

``python -m benchmarks.faults --rounds N`` runs the random campaign; ``tests/faults`` picks single faults.
"""
