"""``lightning-sg plan``: shows how a configuration would be split."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_sg.callback import SyntheticGradients
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import pl
from lightning_sg.strategy import SyntheticGradientStrategy
from lightning_sg.time_boundary import boundaries_in_time
from lightning_sg.tools.plan.estimate import Overhead, Plan, plan
from lightning_sg.tools.text import aligned

#: What ``lightning-sg plan --help`` says.
DESCRIPTION = (
    "Shows how a configuration would be split, before anything is trained: the stages, which process has each, what "
    "they cost, what crosses between them, and the speed-up to expect at most. It reads one training batch and runs "
    "one step on tensors without data. It takes the options of 'fit'; those that matter most are --config, --model, "
    "--data, --trainer.strategy, --trainer.devices and --sg.*. With --overhead PLAIN SPLIT, the two numbers that "
    "'lightning-sg advise' ends with, it says which speed-up to expect on the machine that they were measured on."
)

_HEADINGS = ("stage", "rank", "parameters", "MFLOP forward", "ends at", "MiB", "predictor / model")


def overhead_in(arguments: Sequence[str]) -> tuple[Overhead, list[str]]:
    """Takes ``--overhead`` out of the arguments of ``plan``; returns the others as well.

    Raises:
        SystemExit: If it is not two numbers.
    """
    parser = argparse.ArgumentParser(prog="lightning-sg plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--overhead", nargs=2, type=float, default=(0.0, 0.0))
    found, rest = parser.parse_known_args(arguments)
    try:
        return Overhead(*found.overhead), rest
    except ValueError as error:
        parser.error(f"--overhead: {error}")


def show(
    module: pl.LightningModule, data: pl.LightningDataModule, trainer: pl.Trainer, overhead: Overhead = Overhead()
) -> None:
    """Plans the split that a configuration asks for, and prints it.

    Args:
        module: The model.
        data: The data; one training batch is loaded.
        trainer: The trainer, with the strategy, the devices and the callback.
        overhead: What a step costs besides operations.

    Raises:
        SystemExit: If the model cannot be split this way, with the reason.
    """
    in_time = list(boundaries_in_time(module))
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callback = next((each for each in callbacks if isinstance(each, SyntheticGradients)), None)
    strategy = trainer.strategy
    processes = strategy.stages_in_parallel if isinstance(strategy, SyntheticGradientStrategy) else 1
    module.trainer = data.trainer = trainer
    try:
        print("\n".join([table(plan(module, _batch(data), callback, processes, overhead)), *_in_time(in_time)]))
    except SyntheticGradientsError as error:
        raise SystemExit(" ".join([str(error), *_in_time(in_time)])) from None


def _in_time(names: Sequence[str]) -> list[str]:
    """What a plan says about boundaries in time: nothing if there are none."""
    if not names:
        return []
    return [
        f"Boundaries in time ({', '.join(names)}) split nothing: each carries a state from one chunk to the next "
        "within its stage, and their predictors are not counted here. Only a boundary between layers begins a stage."
    ]


def _batch(data: pl.LightningDataModule) -> Any:
    """The first training batch."""
    data.prepare_data()
    data.setup("fit")
    loader: Any = data.train_dataloader()
    if isinstance(loader, (Mapping, list, tuple)) or not isinstance(loader, Iterable):
        raise SyntheticGradientsError(
            f"A plan needs train_dataloader() to return one loader; {type(data).__name__} returned a "
            f"{type(loader).__name__}."
        )
    return next(iter(loader))


def table(planned: Plan) -> str:
    """A plan as text for a terminal: a table of the stages, the predictors, and the load of each process."""
    return "\n".join([*aligned(_stages(planned)), "", *_predictors(planned), *_loads(planned)])


def _stages(planned: Plan) -> list[list[str]]:
    """The headings, then a row for each stage with the boundary at its end; the last stage has none."""
    rows = [list(_HEADINGS)]
    for number, stage in enumerate(planned.stages):
        row = [str(number), str(planned.rank(stage.process)), f"{stage.parameters:,}", f"{stage.flops / 1e6:,.1f}"]
        if number < len(planned.boundaries):
            boundary = planned.boundaries[number]
            row += [boundary.name, f"{boundary.bytes / 2**20:.2f}", f"{boundary.cost / planned.model_cost:.1%}"]
        rows.append(row + [""] * (len(_HEADINGS) - len(row)))
    return rows


def _predictors(planned: Plan) -> list[str]:
    """A line for each kind of predictor, with the boundaries that have it."""
    names: dict[str, list[str]] = {}
    for boundary in planned.boundaries:
        names.setdefault(boundary.predictor, []).append(boundary.name)
    return [f"Predictor at {', '.join(at)}: {predictor}" for predictor, at in names.items()]


def _loads(planned: Plan) -> list[str]:
    """What the predictors add in one process, or the load of each process and the speed-up."""
    shares = [load / planned.model_cost for load in planned.loads]
    late = sum(boundary.late for boundary in planned.boundaries)
    what = "predictors and late gradients" if late else "predictors"
    if planned.processes == 1:
        return [f"In one process, {what} add {max(shares) - 1:.0%} to the model's work."]
    bound = "at most" if planned.overhead == Overhead() else "with this overhead about"
    loads = ", ".join(f"rank {planned.rank(process)} {share:.0%}" for process, share in enumerate(shares))
    return [
        f"Load with {what}, as a share of the model's work: {loads}.",
        f"Speed-up over plain backpropagation in one process: {bound} {planned.speedup:.2f} of "
        f"{planned.processes}; rank {planned.rank(planned.bottleneck)} is the bottleneck.",
    ]


__all__ = ["overhead_in", "show", "table"]
