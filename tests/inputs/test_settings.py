"""Settings that make no sense are refused."""

from __future__ import annotations

import pytest

from lightning_sg import MLPInputPredictor, SyntheticInputs


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="warm_up must be a whole number from 0"):
        SyntheticInputs(warm_up=-1)
    with pytest.raises(ValueError, match="nothing to predict from"):
        SyntheticInputs(source=None)
    with pytest.raises(ValueError, match="hidden must be a whole number from 1"):
        MLPInputPredictor(hidden=0)
