"""Reads the scalars in TensorBoard's event files, if the tensorboard package is installed."""

from __future__ import annotations

from pathlib import Path

from lightning_sg.tools.report.run import ReportError


def read_events(folder: Path) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
    """Reads a folder of event files.

    Args:
        folder: The folder.

    Returns:
        Values by tag and step, and when the first value of each step was written, in seconds.

    Raises:
        ReportError: If tensorboard is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ReportError(
            f"{folder} has TensorBoard's event files and no metrics.csv. To read them: pip install tensorboard. "
            "Or train with Trainer(logger=CSVLogger(...))."
        ) from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: every value, not a sample
    events.Reload()
    # Lightning always writes hp_metric, a placeholder unless the user logs it.
    tags = [tag for tag in events.Tags()["scalars"] if tag != "hp_metric"]
    scalars = {tag: events.Scalars(tag) for tag in tags}
    clock: dict[int, float] = {}
    for event in sorted((each for found in scalars.values() for each in found), key=lambda each: each.wall_time):
        clock.setdefault(event.step, event.wall_time)
    return {tag: {event.step: event.value for event in found} for tag, found in scalars.items()}, clock


__all__ = ["read_events"]
