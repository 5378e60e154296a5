"""Settings that make no sense are refused."""

from __future__ import annotations

import pytest

from lightning_sg import ThroughTime


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="trace_decay"):
        ThroughTime(trace_decay=2)
