"""Checks that all processes were set up alike: the same model, settings, optimizers and trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import pl

Description = dict[str, str]

_FLAGS = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
_SHOWN = 5


def description(
    module: pl.LightningModule, settings: Any, options: Sequence[Any], optimizers: Sequence[Optimizer]
) -> Description:
    """What must be the same in all processes, in words.

    Args:
        module: The model.
        settings: What the user said to the callback.
        options: What the user said to the strategy, in records.
        optimizers: Those of the model.
    """
    found = {f"SyntheticGradients({name}=...)": text for name, text in _fields(settings).items()}
    for each in options:
        found |= {f"SyntheticGradientStrategy({name}=...)": text for name, text in _fields(each).items()}
    found |= {f"parameter '{name}'": _shape(tensor) for name, tensor in module.named_parameters()}
    found |= {f"buffer '{name}'": _shape(tensor) for name, tensor in module.named_buffers()}
    trainer = module.trainer
    found |= {f"Trainer({name}=...)": str(getattr(trainer, name, None)) for name in _FLAGS}
    found["Trainer(precision=...)"] = str(trainer.precision)
    for place, optimizer in enumerate(optimizers):
        inner = getattr(optimizer, "_optimizer", optimizer)
        found[f"optimizer {place}"] = type(inner).__qualname__
        for number, group in enumerate(inner.param_groups):
            known = {key: value for key, value in group.items() if key != "params"}
            found[f"optimizer {place}, group {number}"] = f"{len(group['params'])} parameters, {_words(known)}"
    return found


def check_alike(descriptions: Mapping[int, Description]) -> None:
    """Refuses processes that were set up differently.

    Args:
        descriptions: By global rank.

    Raises:
        SyntheticGradientsError: If two differ; says in what.
    """
    first, own = min(descriptions.items(), key=lambda item: item[0])
    differences = []
    for rank, other in sorted(descriptions.items()):
        for name in dict.fromkeys([*own, *other]):
            ours, theirs = own.get(name, "not there"), other.get(name, "not there")
            if ours != theirs:
                differences.append(f"{name}: {ours} on rank {first}, {theirs} on rank {rank}")
    if differences:
        more = len(differences) - _SHOWN
        raise SyntheticGradientsError(
            f"The processes were set up differently. {'; '.join(differences[:_SHOWN])}"
            f"{f'; and {more} more' if more > 0 else ''}. Every process must make the same model, settings, optimizers "
            "and trainer: do not let them depend on the rank or on a file that differs between machines."
        )


def _fields(record: Any) -> Description:
    return {field.name: _words(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _shape(tensor: torch.Tensor) -> str:
    if nn.parameter.is_lazy(tensor):
        return "not yet known"
    trained = "" if tensor.requires_grad else ", frozen"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{trained}"


def _words(value: Any) -> str:
    """A value in words that are the same in every process, such as without addresses."""
    if isinstance(value, torch.Tensor):
        return _words(value.item()) if value.numel() == 1 else _shape(value)
    if isinstance(value, nn.Module):
        own = {key: entry for key, entry in vars(value).items() if not key.startswith("_") and key != "training"}
        children = {name: _words(child) for name, child in value.named_children()}
        shapes = [_shape(parameter) for parameter in value.parameters(recurse=False)]
        return f"{type(value).__qualname__}({_words({**own, **children})}{_words(shapes) if shapes else ''})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__}({', '.join(f'{k}={v}' for k, v in _fields(value).items())})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_words(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_words, value)) + "]"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    name: str = getattr(value, "__qualname__", type(value).__qualname__)
    return name


__all__ = ["Description", "check_alike", "description"]
