"""What every measured training of Lightning's goes without."""

from __future__ import annotations

from typing import Any

#: Arguments of the ``Trainer``: nothing is logged, saved or shown, which would be measured too.
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

__all__ = ["QUIET"]
