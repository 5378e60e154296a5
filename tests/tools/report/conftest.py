"""Fixtures for the tests of reports."""

from __future__ import annotations

import pytest

from lightning_sg.tools.report.picture import Picture


@pytest.fixture
def undrawn(monkeypatch):
    """Replaces the pictures, which take a second to draw, with a placeholder."""
    pixel = Picture("pixel", "A pixel", "Nothing.", b"png")
    monkeypatch.setattr("lightning_sg.tools.report.draw.draw", lambda run, baselines: [pixel])
