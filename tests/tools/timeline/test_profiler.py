"""The profiler: which batches it records."""

from __future__ import annotations

import pytest

from lightning_sg import Timeline
from lightning_sg.profiling import BATCH


def test_records_the_window_and_closes_what_an_exception_left_open() -> None:
    profiler = Timeline(skip=1, batches=2)
    for _ in range(4):
        with profiler.profile(BATCH):
            profiler.start("left open")
    assert [span.name for span in profiler.spans] == ["left open", BATCH] * 2


@pytest.mark.parametrize("arguments", [{"skip": -1}, {"batches": 0}])
def test_empty_window_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"(skip|batches) must be a whole number from (0|1) to"):
        Timeline(**arguments)
