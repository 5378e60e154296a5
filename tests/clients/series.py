"""Time series for forecasting packages: a season, a trend and noise, from fixed seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd

SEASON = 12


def series(count: int = 4, length: int = 72) -> list[np.ndarray]:
    """Series of shape ``(length,)``, each with a season of its own height and phase."""
    draw = np.random.default_rng(0)
    time = np.arange(length)
    return [
        1.0 + draw.uniform(1, 2) * np.sin(2 * np.pi * (time / SEASON + draw.uniform())) + draw.normal(0, 0.1, length)
        for _ in range(count)
    ]


def table() -> pd.DataFrame:
    """The series one below the other: ``group``, ``step``, ``date`` and ``value``."""
    parts = [
        pd.DataFrame(
            {
                "group": str(index),
                "step": np.arange(len(values)),
                "date": pd.date_range("2020-01-01", periods=len(values), freq="D"),
                "value": values.astype(np.float32),
            }
        )
        for index, values in enumerate(series())
    ]
    return pd.concat(parts, ignore_index=True)


__all__ = ["SEASON", "series", "table"]
