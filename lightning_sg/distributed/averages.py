"""Gathers averages of the model that are kept outside of it: by callbacks, and in attributes of the module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.lightning_api import pl
from lightning_sg.partition.averages import originals, parts_of
from lightning_sg.partition.replaced import named_tensors

# Whose objects are not looked into: averages of a user's are in the user's.
_NOT_LOOKED_INTO = ("builtins", "torch", "torchmetrics", "lightning", "pytorch_lightning", "lightning_sg")
_MODULES_OWN = ("_modules", "_parameters", "_buffers", "_trainer")


def kept_averages(module: pl.LightningModule, owners: Mapping[str, int]) -> dict[str, tuple[Tensor, int]]:
    """Finds the tensors that callbacks and the module's attributes keep one of for each parameter of some part.

    Args:
        module: The module.
        owners: For the names of its parameters and buffers, the process that owns each.

    Returns:
        For the name of each such tensor, the tensor and the process with the parameter that it belongs to.
    """
    own = {id(tensor) for tensor in named_tensors(module).values()}
    copies: dict[str, dict[str, Tensor]] = {}
    for name, value in _attributes(module):
        for prefix, tensors in _copies(value, name, deep=True):
            if tensors and not any(id(tensor) in own for tensor in tensors.values()):
                copies.setdefault(prefix, tensors)
    if not copies:
        return {}
    found = originals(copies, parts_of(module), owners, resumed=True)
    tensors = {f"{prefix}.{key}": tensor for prefix, copy in copies.items() for key, tensor in copy.items()}
    return {name: (tensors[name], owners[origin]) for name, origin in found.items()}


def gather_averages(module: pl.LightningModule, runtime: StageRuntime) -> None:
    """Takes each tensor of an average from the process with the parameter that it belongs to. A collective.

    Args:
        module: The module.
        runtime: This process's part of the run.
    """
    placement = runtime.ownership.placement
    if placement is None:
        return
    averages = kept_averages(module, placement.owner)
    known = [set(names) for names in runtime.meetings.gather("averages", sorted(averages))]
    names = sorted(set.intersection(*known))  # some users have a callback on one rank only
    if not names:
        return
    with runtime.status.meeting("gathering averages"):
        runtime.chain.spread("gathering averages", {name: averages[name] for name in names})


def _attributes(module: pl.LightningModule) -> Iterator[tuple[str, Any]]:
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    known: Counter[str] = Counter()
    for owner in (module, *callbacks):
        if type(owner).__module__.partition(".")[0] == "lightning_sg":
            continue
        kind = type(owner).__name__
        known[kind] += 1
        for name, value in vars(owner).items():
            if name not in _MODULES_OWN:
                yield f"{kind}.{known[kind]}.{name}", value


def _copies(value: Any, name: str, *, deep: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What may be copies of parts of the model in a value, those with others in them first."""
    if isinstance(value, nn.Module):
        if not isinstance(value, Metric):
            yield from ((f"{name}.{prefix}" if prefix else name, part) for prefix, part in parts_of(value).items())
    elif isinstance(value, (Mapping, list, tuple)):
        entries = {str(key): each for key, each in (value.items() if isinstance(value, Mapping) else enumerate(value))}
        if entries and all(isinstance(each, Tensor) for each in entries.values()):
            yield name, entries
        for key, each in entries.items():
            if isinstance(each, nn.Module):
                yield from _copies(each, f"{name}.{key}", deep=False)
    elif deep and type(value).__module__.partition(".")[0] not in _NOT_LOOKED_INTO and hasattr(value, "__dict__"):
        for key, each in vars(value).items():
            yield from _copies(each, f"{name}.{key}", deep=False)


__all__ = ["gather_averages", "kept_averages"]
