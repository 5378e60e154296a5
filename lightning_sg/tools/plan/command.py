"""``lightning-sg plan``: what the split of a configuration would be."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_sg.callback import SyntheticGradients
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.strategy import SyntheticGradientStrategy
from lightning_sg.tools.plan.estimate import Plan, plan
from lightning_sg.tools.text import aligned


def show(module: pl.LightningModule, data: pl.LightningDataModule, trainer: pl.Trainer) -> None:
    """Plans the split that a configuration asks for, and prints it.

    Args:
        module: The model.
        data: Its data, of which one training batch is taken.
        trainer: With the strategy, the devices and the callback.

    Raises:
        SystemExit: If there is no such split, with the reason.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callback = next((each for each in callbacks if isinstance(each, SyntheticGradients)), None)
    strategy = trainer.strategy
    processes = strategy.stages_in_parallel if isinstance(strategy, SyntheticGradientStrategy) else 1
    module.trainer = data.trainer = trainer
    try:
        print(table(plan(module, _batch(data), callback, processes)))
    except SyntheticGradientsError as error:
        raise SystemExit(str(error)) from None


def _batch(data: pl.LightningDataModule) -> Any:
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise SyntheticGradientsError(f"A plan needs one training data loader, not {type(loader).__name__}.")
    return next(iter(loader))


def table(planned: Plan) -> str:
    """A plan in words and numbers, for a terminal."""
    rows = [["stage", "process", "parameters", "MFLOP forward", "ends at", "MiB", "predictor / model"]]
    whole = sum(stage.cost for stage in planned.stages)
    for number, stage in enumerate(planned.stages):
        row = [str(number), str(stage.process), f"{stage.parameters:,}", f"{stage.flops / 1e6:,.1f}"]
        if number < len(planned.boundaries):
            boundary = planned.boundaries[number]
            row += [boundary.name, f"{boundary.bytes / 2**20:.2f}", f"{boundary.cost / whole:.1%}"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    lines = [*aligned(rows), ""]
    for words in dict.fromkeys(boundary.predictor for boundary in planned.boundaries):
        names = ", ".join(each.name for each in planned.boundaries if each.predictor == words)
        lines.append(f"Predictor at {names}: {words}")
    if planned.processes == 1:
        lines.append(f"In one process predictors add {max(planned.loads) / whole - 1:.0%} to the model's operations.")
    else:
        shares = [f"process {place} {load / whole:.0%}" for place, load in enumerate(planned.loads)]
        lines.append(f"Load, predictors included, as a share of the model's operations: {', '.join(shares)}.")
        lines.append(
            f"Speed-up over plain backpropagation in one process: at most {planned.speedup:.2f} of "
            f"{planned.processes}; process {planned.bottleneck} is the bottleneck."
        )
    return "\n".join(lines)


__all__ = ["show", "table"]
