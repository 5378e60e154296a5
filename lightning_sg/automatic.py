"""Where to cut a model whose user leaves that open."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import LOGGER, pl
from lightning_sg.partition.automatic import Run, choose_boundaries
from lightning_sg.partition.told import Told
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.work import Work
from lightning_sg.settings import Settings
from lightning_sg.time_boundary import boundaries_in_time

_log = logging.getLogger(LOGGER)


def choose_names(
    settings: Settings,
    module: pl.LightningModule,
    stages: int,
    run: Run,
    device: torch.device,
    batch: Any,
    *,
    tied: bool = False,
) -> list[str]:
    """Says, for ``boundaries="auto"``, where to cut, so that all stages cost about the same.

    The cost of a stage includes its predictor and what it does for late gradients.

    Args:
        settings: What the user said.
        module: The model, without boundaries installed.
        stages: How many to cut it into.
        run: Calls the step on ``batch``.
        device: The device that the step runs on.
        batch: A batch.
        tied: Whether stages on several processes may use one parameter.

    Raises:
        PartitionError: If there are too few places for a cut, or the step cannot be followed to any.
        SyntheticGradientsError: If predictors are given by name.
    """
    if isinstance(settings.template, Mapping):
        raise SyntheticGradientsError("boundaries='auto' takes one predictor for all boundaries, not one by name.")
    factory = settings.factory(list(boundaries_in_time(module)))

    def work(trace: Trace, names: Sequence[str]) -> dict[str, Work]:
        return factory.work(trace, Told(settings.context, trace), batch, names)

    choice = choose_boundaries(module, stages, run, device, work, batch, late_work=factory.late_work, tied=tied)
    _log.info(
        f"boundaries='auto' cuts after {choice.names}. To keep the cuts, write these names in its place."
        f"{choice.left_out}"
    )
    return choice.names


__all__ = ["choose_names"]
