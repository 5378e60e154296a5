"""``lightning_sg.advise``: says whether a split of a module pays on this machine, and where to cut it."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_sg.arguments import checked, instance, listed, one_of, optional, text, whole
from lightning_sg.automatic import choose_names
from lightning_sg.boundary import Boundary
from lightning_sg.callback import SyntheticGradients
from lightning_sg.errors import PartitionError, SyntheticGradientsError
from lightning_sg.lightning_api import pl
from lightning_sg.partition.step import call_training_step
from lightning_sg.settings import Settings

if TYPE_CHECKING:  # they read reports and timelines, which takes time to import
    from lightning_sg.tools.advise.advice import Advice

#: Options of the Trainer that a measurement needs for itself.
_TAKEN = ("strategy", "devices", "max_steps", "max_epochs", "logger", "profiler", "callbacks", "log_every_n_steps")


def advise(
    module: pl.LightningModule,
    data: pl.LightningDataModule | Iterable[Any],
    callback: SyntheticGradients | None = None,
    processes: int = 2,
    cuts: Sequence[Sequence[str]] | None = None,
    steps: int = 40,
    trainer: Mapping[str, Any] | None = None,
    start_method: Literal["fork", "spawn"] | None = None,
) -> Advice:
    """Trains a few dozen steps with and without a split on this machine, and says whether it pays and where to cut.

    Each training runs in processes of its own, from the same seed, without validation; ``module`` and ``data`` stay as
    they are. In a script, call it under ``if __name__ == "__main__":``.

    Args:
        module: The model.
        data: A data module, or the training loader.
        callback: The options of the split, such as predictors and ``delay``; by default those of
            :class:`~lightning_sg.SyntheticGradients`.
        processes: The number of processes of a split.
        cuts: The boundaries to try: lists of names. By default those of ``callback``, or every ``Boundary`` in the
            model, and beside them what ``boundaries="auto"`` chooses, with a cut that is earlier and one that is later.
        steps: How many steps are timed, after ten others.
        trainer: More options of the Trainer: ``{"precision": "bf16-mixed"}``. By default it trains on the CPU.
        start_method: How processes are started. ``"spawn"`` needs a module and data that can be pickled; ``"fork"``
            needs nothing, but cannot use a GPU, and computes with one thread in each process. By default ``"fork"`` in
            an interactive session, ``"spawn"`` in a script.

    Returns:
        What was measured. Printed, it is a table with what follows from it; ``best.names`` has the fastest cut,
        ``speedup``, ``price`` and ``overhead`` what it gains and costs.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range.
        SyntheticGradientsError: If there is nowhere to cut, or a training fails.
    """
    checked("advise", "module", module, instance(pl.LightningModule))
    if not isinstance(data, pl.LightningDataModule) and not isinstance(data, Iterable):
        raise TypeError(
            f"advise(data=...): data must be a LightningDataModule or a loader, not a {type(data).__name__}."
        )
    callback = checked("advise", "callback", callback, optional(instance(SyntheticGradients)))
    processes = checked("advise", "processes", processes, whole(2, 1000))
    checked("advise", "cuts", cuts, optional(listed(listed(text(), "a list of names"), "a list of lists of names")))
    steps = checked("advise", "steps", steps, whole(4, 100_000))
    if trainer is not None and not isinstance(trainer, Mapping):
        raise TypeError(f"advise(trainer=...): trainer must be a dict of options, not {trainer!r}.")
    options = dict(trainer or {})
    refused = sorted(set(_TAKEN) & set(options))
    if refused:
        raise ValueError(f"advise(trainer=...): {', '.join(refused)} are set for the measurement; leave them out.")
    checked("advise", "start_method", start_method, optional(one_of("fork", "spawn")))
    start = start_method or ("fork" if hasattr(sys, "ps1") else "spawn")
    options.setdefault("accelerator", "cpu")

    from lightning_sg.tools.advise.advice import Advice, Trial
    from lightning_sg.tools.advise.trials import Job, free_port, run

    settings = (callback or SyntheticGradients()).settings
    chosen = [list(cut) for cut in cuts] if cuts is not None else _candidates(module, data, settings, processes)
    if not chosen:
        raise SyntheticGradientsError(
            f"advise finds nowhere to cut {type(module).__name__}. Name cuts: advise(..., cuts=[['encoder.2']])."
        )
    kept = {each.name: getattr(settings, each.name) for each in fields(settings)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = run(Job(module, data, steps, folder / "plain", options), start)
        trials = []
        for place, names in enumerate(chosen):
            with_names = {**kept, "boundaries": names}
            job = Job(module, data, steps, folder / f"{place}", options, processes, with_names, free_port())
            trials.append(Trial(", ".join(names), names, run(job, start)))
    return Advice(plain, trials)


def _candidates(module: pl.LightningModule, data: Any, settings: Settings, processes: int) -> list[list[str]]:
    """The cuts that the user has made, then the automatic one, then an earlier and a later one."""
    named = settings.names
    if named is None:
        named = [name for name, child in module.named_modules() if isinstance(child, Boundary)]
    found = [list(named)] if len(named) >= processes - 1 and named else []
    batch, copied = _first_batch(data), copy.deepcopy(module)
    choose = partial(_choose, settings, copied, batch)
    found.append(choose(processes))
    more = choose(processes + 1)  # one cut too many: without the last they come earlier, without the first later
    found += [more[:-1], more[1:]] if more else []
    return [names for place, names in enumerate(found) if names and names not in found[:place]]


def _choose(settings: Settings, module: pl.LightningModule, batch: Any, stages: int) -> list[str]:
    """Where ``boundaries="auto"`` cuts; nowhere if it finds too few places."""
    run = partial(call_training_step, module, batch, 0)
    try:
        return choose_names(settings, module, stages, run, torch.device("cpu"), batch)
    except PartitionError:
        return []


def _first_batch(data: Any) -> Any:
    """The first training batch."""
    if isinstance(data, pl.LightningDataModule):
        data = copy.deepcopy(data)
        data.prepare_data()
        data.setup("fit")
        data = data.train_dataloader()
    if isinstance(data, (Mapping, list, tuple)):
        raise SyntheticGradientsError(
            f"advise chooses cuts by a batch of one loader, and was given a {type(data).__name__}. Name them: "
            "advise(..., cuts=[['encoder.2']])."
        )
    return next(iter(data))


__all__ = ["advise"]
