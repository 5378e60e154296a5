"""Names the predictors that a resumed run drops, starts afresh, or continues with other settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_sg.lightning_api import rank_zero_warn
from lightning_sg.training.base import BoundaryTrainer


def warn_of_differences(saved: Mapping[str, Mapping[str, Any]], trainers: Mapping[str, BoundaryTrainer]) -> None:
    """Warns once for each kind of difference between a checkpoint and the run that resumes from it.

    Args:
        saved: The state of each boundary in the checkpoint.
        trainers: The boundaries of the resumed run.
    """
    for name in saved:
        if name not in trainers:
            rank_zero_warn(
                f"The checkpoint has a predictor for boundary '{name}', which this model does not have: it is dropped."
            )
    warn_of_fresh(trainers.keys() - saved.keys(), "the checkpoint has none of these boundaries")
    shared = {name: (saved[name], trainer) for name, trainer in trainers.items() if name in saved}
    kinds = {
        f"'{name}' ({kind} in the checkpoint, {trainer.described} now)"
        for name, (state, trainer) in shared.items()
        if (kind := state.get("kind") or state.get("rule")) not in (None, trainer.described)
    }
    if kinds:
        rank_zero_warn(f"Boundaries resume with another predictor or rule than they were saved with: {_listed(kinds)}.")
    delays = {
        f"'{name}' ({state['delay']} in the checkpoint, {trainer.delay} now)"
        for name, (state, trainer) in shared.items()
        if state.get("delay", trainer.delay) != trainer.delay
    }
    if delays:
        rank_zero_warn(
            f"Boundaries resume with another delay than they were saved with: {_listed(delays)}. Targets under way "
            "keep the step at which they were due."
        )


def warn_of_fresh(names: Iterable[str], reason: str) -> None:
    """Warns that the predictors of these boundaries start afresh, if there are any.

    Args:
        names: The boundaries.
        reason: Why, as the end of a sentence.
    """
    quoted = [f"'{name}'" for name in names]
    if quoted:
        rank_zero_warn(f"Predictors start afresh at {_listed(quoted)}: {reason}.")


def _listed(items: Iterable[str]) -> str:
    return ", ".join(sorted(items))


__all__ = ["warn_of_differences", "warn_of_fresh"]
