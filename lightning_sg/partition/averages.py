"""Finds averages of the model that users keep by hand: copies of parts of it that no step uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_sg.partition.placement import Placement
from lightning_sg.partition.replaced import named_tensors

Tensors = Mapping[str, Tensor]

_SURELY = 3  # so many tensors of the same names and shapes are no accident


def with_averages(placement: Placement, module: nn.Module, *, resumed: bool) -> Placement:
    """The placement in which a copy of a part of the model is where its original is.

    A hook that keeps an average (a slow copy, a mean teacher) has current values of the original there only.

    Args:
        placement: Where everything is; what no step has used is with the last process.
        module: The model.
        resumed: Whether it has been trained before, so that averages differ from their originals.
    """
    if not placement.unused:
        return placement
    parts = parts_of(module)
    copies = {
        name: part for name, part in parts.items() if name and all(f"{name}.{key}" in placement.unused for key in part)
    }
    used = {name: owner for name, owner in placement.owner.items() if name not in placement.unused}
    layers = {name.rpartition(".")[0]: owner for name, owner in used.items()}
    for name in placement.unused & {*parts[""]}:  # a counter that a step changes without a sign of it
        layer = name.rpartition(".")[0]
        if layer in layers:
            used[name] = layers[layer]
    found = originals(copies, parts, used, resumed=resumed)
    # A layer that trains may yet be used for the first time, see FirstUses; other processes have no data of the rest.
    frozen = [copy for copy in copies.values() if not any(tensor.requires_grad for tensor in copy.values())]
    kept = {id(tensor) for copy in frozen for tensor in copy.values()}
    return replace(
        placement,
        owner={**placement.owner, **{name: used[origin] for name, origin in found.items()}},
        unused=frozenset(name for name in placement.unused if name not in found or id(parts[""][name]) not in kept),
        averages=placement.averages | found.keys(),
    )


def parts_of(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """For the name of each submodule its parameters and buffers, by their names in it; parents come first."""
    tensors = named_tensors(module)
    parts: dict[str, dict[str, Tensor]] = {name: {} for name, _child in module.named_modules()}
    for name, tensor in tensors.items():
        pieces = name.split(".")
        for place in range(len(pieces)):
            parts.setdefault(".".join(pieces[:place]), {})[".".join(pieces[place:])] = tensor
    return {name: part for name, part in parts.items() if part}


def originals(
    copies: Mapping[str, Tensors], parts: Mapping[str, Tensors], owners: Mapping[str, int], *, resumed: bool
) -> dict[str, str]:
    """Finds for copies of parts of the model what each of their tensors is a copy of.

    Args:
        copies: What may be copies: for the name of each, its tensors; those with others in them first.
        parts: All submodules of the model in the same form.
        owners: For the names of parameters and buffers of the model that may be originals, the process that owns each.
        resumed: See :func:`with_averages`.

    Returns:
        For the full name of a tensor in a copy, the name of the original.
    """
    found: dict[str, str] = {}
    for name, copy in copies.items():
        if any(f"{name}.{key}" in found for key in copy):
            continue
        candidates = []
        for other, part in parts.items():
            if other == name or other.startswith(f"{name}."):
                continue
            match = {key: f"{other}.{theirs}" if other else theirs for key, theirs in _match(copy, part).items()}
            match = {key: origin for key, origin in match.items() if origin in owners}
            if match:
                candidates.append((len(part), match))
        match = _likeliest(copy, candidates, parts.get("", {}), sure=resumed)
        found |= {f"{name}.{key}": origin for key, origin in match.items()}
    return found


def _likeliest(
    copy: Tensors, candidates: Sequence[tuple[int, dict[str, str]]], tensors: Tensors, *, sure: bool
) -> dict[str, str]:
    """Of parts that a copy may be of, one with equal values, or else the smallest; none if it may be an accident."""
    by_size = [match for _size, match in sorted(candidates, key=lambda candidate: candidate[0])]
    sure = sure or any(len(match) >= _SURELY for match in by_size)
    if not by_size or (sure and len(by_size) == 1):
        return by_size[0] if by_size else {}
    for match in by_size:
        if all(torch.equal(copy[key].cpu(), tensors[origin].cpu()) for key, origin in match.items()):
            return match
    return by_size[0] if sure else {}


def _match(copy: Tensors, part: Tensors) -> dict[str, str]:
    """For the keys of a copy those of a part; empty unless the part has all of its tensors, but for numbers."""
    if all(key.isdigit() for key in copy):  # a list
        own = [key for key, tensor in part.items() if isinstance(tensor, nn.Parameter)]
        pairs = list(zip(own, copy.values()))
        alike = len(own) == len(copy) and all(_alike(part[key], tensor) for key, tensor in pairs)
        return dict(zip(copy, own)) if alike else {}
    match: dict[str, str] = {}
    plain: dict[str, str] = {}
    for key, tensor in copy.items():
        theirs = key
        if key not in part:
            plain = plain or {_plain(name): name for name in part}
            theirs = plain.get(_plain(key), "")
        if theirs and _alike(part[theirs], tensor):
            match[key] = theirs
        elif tensor.numel() > 1:
            return {}
    return match


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()


def _plain(key: str) -> str:
    """A key without its dots, which buffers cannot have in their names."""
    return key.replace(".", "").replace("_", "")


__all__ = ["originals", "parts_of", "with_averages"]
