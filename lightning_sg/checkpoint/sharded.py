"""Checkpoints in shards: each process writes the tensors of its own stages and reads back what it needs.

Tensors are in a folder in the format of ``torch.distributed.checkpoint``, beside a file with everything else that
Lightning saves. It is for models whose state does not fit one process; :func:`merge` makes an ordinary checkpoint.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.optim import Optimizer

from lightning_sg.errors import SyntheticGradientsError

_REST = "rest.pt"
_WEIGHT, _OPTIMIZER = "state_dict.", "optimizer."


def is_sharded(path: str | Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (Path(path) / _REST).is_file()


def own_weights(module: nn.Module, holds: Callable[[str], bool]) -> dict[str, Any]:
    """The part of a module's state that this process holds.

    Args:
        module: The module.
        holds: Whether it holds the parameter or buffer of that name.
    """
    first = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    # A tensor with two names goes by the one under which it was placed.
    names = {name: first[id(tensor)] for name, tensor in _named_tensors(module)}
    return {name: value for name, value in module.state_dict().items() if holds(names.get(name, name))}


def save(path: Path, checkpoint: dict[str, Any], group: Any, writes_rest: bool) -> None:
    """Writes a checkpoint. A collective of the processes of one replica.

    The checkpoint is written beside ``path`` and takes its place once it is complete.

    Args:
        path: The folder.
        checkpoint: As Lightning has it, with this process's own weights and optimizer states in it.
        group: A gloo group of these processes.
        writes_rest: Whether this process writes the metadata; one process does.
    """
    checkpoint = dict(checkpoint)
    tensors = {_WEIGHT + name: value for name, value in checkpoint.pop("state_dict").items()}
    optimizers = [dict(state) for state in checkpoint.pop("optimizer_states", [])]
    for place, optimizer in enumerate(optimizers):
        for number, entry in optimizer.pop("state").items():
            for key, value in entry.items():
                tensors[f"{_OPTIMIZER}{place}.{number}.{key}"] = value
    beside = path.with_name(f".{path.name}.part")
    if writes_rest:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier(group)
    save_state(tensors, storage_writer=FileSystemWriter(beside), process_group=group)
    if writes_rest:
        torch.save({**checkpoint, "optimizer_states": optimizers}, beside / _REST)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.is_file():
            path.unlink()
        elif path.exists():
            path.rename(old)
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def load_rest(path: Path, weights_only: bool) -> dict[str, Any]:
    """The metadata; :func:`load_weights` and :func:`load_optimizers` read the tensors."""
    rest: dict[str, Any] = torch.load(path / _REST, map_location="cpu", weights_only=weights_only)
    return {**rest, "state_dict": {}, "optimizer_states": [{"state": {}, **each} for each in rest["optimizer_states"]]}


def load_weights(path: Path, module: nn.Module, group: Any, strict: bool = True) -> None:
    """Reads the weights into a module, tensor by tensor. A collective.

    Raises:
        SyntheticGradientsError: If the names or shapes in the checkpoint are not the module's.
    """
    saved = _metadata(path)
    names = {name.removeprefix(_WEIGHT) for name in saved if name.startswith(_WEIGHT)}
    own = module.state_dict()
    shapes = {name: tuple(saved[_WEIGHT + name].size) for name in names if _is_tensor(saved[_WEIGHT + name])}
    other = [
        name
        for name, value in own.items()
        if isinstance(value, Tensor) and shapes.get(name, value.shape) != tuple(value.shape)
    ]
    if other or (strict and names != set(own)):
        raise SyntheticGradientsError(
            f"The checkpoint {path} is of another model. Only in the checkpoint: {sorted(names - set(own))}; only in "
            f"the model: {sorted(set(own) - names)}; of another shape: {other}."
        )
    wanted = {_WEIGHT + name: value for name, value in own.items() if name in names}
    _read(path, wanted, group)
    in_place = {_WEIGHT + name for name, _tensor in _named_tensors(module)}
    if others := {name: value for name, value in wanted.items() if name not in in_place}:  # metrics, extra state
        module.load_state_dict({**own, **{name.removeprefix(_WEIGHT): others[name] for name in others}}, strict=strict)


def load_optimizers(
    path: Path, optimizers: Sequence[Optimizer], module: nn.Module, holds: Callable[[str], bool], group: Any
) -> None:
    """Reads the states of the parameters that this process trains into the optimizers. A collective.

    Args:
        path: The folder.
        optimizers: In the order in which they were saved, with their groups restored.
        module: Whose parameters they have.
        holds: Whether this process trains the parameter of that name.
        group: A gloo group of all processes.
    """
    saved = _metadata(path)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    wanted: dict[str, Any] = {}
    for place, optimizer in enumerate(optimizers):
        parameters = [parameter for entry in optimizer.param_groups for parameter in entry["params"]]
        own = {str(n) for n, p in enumerate(parameters) if id(p) in names and holds(names[id(p)])}
        prefix = f"{_OPTIMIZER}{place}."
        keys = [key for key in saved if key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in own]
        wanted |= {key: _room_for(saved[key]) for key in keys}
    _read(path, wanted, group)
    for optimizer, state in zip(optimizers, _states(wanted, len(optimizers))):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def merge(path: Path) -> dict[str, Any]:
    """The whole checkpoint, as one process would have saved it."""
    saved = _metadata(path)
    everything = {key: _room_for(entry) for key, entry in saved.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        _read(path, everything, None)
    checkpoint = load_rest(path, weights_only=False)
    checkpoint["state_dict"] = {
        key.removeprefix(_WEIGHT): value for key, value in everything.items() if key.startswith(_WEIGHT)
    }
    states = _states(everything, len(checkpoint["optimizer_states"]))
    for optimizer, state in zip(checkpoint["optimizer_states"], states):
        optimizer["state"] = dict(sorted(state.items()))
    return checkpoint


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers, each under every name it has."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _metadata(path: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    return found


def _read(path: Path, wanted: dict[str, Any], group: Any) -> None:
    load_state(wanted, storage_reader=FileSystemReader(path), process_group=group)


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, TensorStorageMetadata)


def _room_for(entry: Any) -> Any:
    return torch.empty(entry.size, dtype=entry.properties.dtype) if _is_tensor(entry) else None


def _states(found: Mapping[str, Any], count: int) -> list[dict[int, dict[str, Any]]]:
    states: list[dict[int, dict[str, Any]]] = [{} for _ in range(count)]
    for key, value in found.items():
        if key.startswith(_OPTIMIZER):
            place, number, name = key.removeprefix(_OPTIMIZER).split(".", 2)
            states[int(place)].setdefault(int(number), {})[name] = value
    return states


__all__ = ["is_sharded", "load_optimizers", "load_rest", "load_weights", "merge", "own_weights", "save"]
