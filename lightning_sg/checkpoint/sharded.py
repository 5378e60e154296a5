"""Checkpoints in shards: each process writes the tensors of its own stages and reads back what it needs.

Each process has a folder of its own in the checkpoint, in the format of ``torch.distributed.checkpoint``, beside a file
with everything else that Lightning saves. It is for models whose state does not fit one process; :func:`merge` makes
an ordinary checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sg.checkpoint.checksums import (
    IN_FOLDER,
    beside,
    checksum_of,
    read_checksums,
    write_checksums,
)
from lightning_sg.checkpoint.shards import PROCESS, REST, Shards, is_sharded
from lightning_sg.checkpoint.torch_file import disk_error, save_file
from lightning_sg.errors import CheckpointError, SyntheticGradientsError
from lightning_sg.files import part_of, remove, replace, sync_folder

_WEIGHT, _OPTIMIZER = "state_dict.", "optimizer."


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


def save(path: Path, checkpoint: dict[str, Any], position: int, meet: Callable[[], None], writes_rest: bool) -> None:
    """Writes a checkpoint. A collective of the processes of one replica.

    The checkpoint is written beside ``path`` and takes its place once it is complete and on disk.

    Args:
        path: The folder.
        checkpoint: As Lightning has it, with this process's own weights and optimizer states in it.
        position: This process's place among them.
        meet: Waits for all of them.
        writes_rest: Whether this process writes what is in no shard; one process does.

    Raises:
        OSError: If the disk is full or fails; the checkpoint before stays as it was.
    """
    checkpoint = dict(checkpoint)
    tensors = {_WEIGHT + name: value for name, value in checkpoint.pop("state_dict").items()}
    optimizers = [dict(state) for state in checkpoint.pop("optimizer_states", [])]
    for place, optimizer in enumerate(optimizers):
        for number, entry in optimizer.pop("state").items():
            for key, value in entry.items():
                tensors[f"{_OPTIMIZER}{place}.{number}.{key}"] = value
    part = part_of(path)
    own = part / f"{PROCESS}{position}"
    try:
        if writes_rest:
            remove(part)
            part.mkdir(parents=True)
        meet()
        _write_own(own, tensors)
        meet()
    except BaseException:
        remove(own)
        with suppress(OSError):
            part.rmdir()  # by the last of those that still can
        raise
    if writes_rest:
        try:
            _write_rest(part, {**checkpoint, "optimizer_states": optimizers})
            replace(part, path)
            beside(path).unlink(missing_ok=True)  # of a whole checkpoint that was there
        except BaseException:
            remove(part)
            raise


def _write_own(folder: Path, tensors: dict[str, Any]) -> None:
    """Writes this process's tensors, and the checksums of its files."""
    # Here, as they are slow to import and most runs do without.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_state

    remove(folder)  # left by a process that was killed, and in whose place this one is
    folder.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save_state(
                tensors,
                storage_writer=FileSystemWriter(folder),
                planner=DefaultSavePlanner(flatten_state_dict=False),
                no_dist=True,
            )
    except CheckpointException as error:  # which is no Exception, and keeps the reason inside
        reason = next(iter(error.failures.values()))[0]
        disk = disk_error(reason)
        if disk is None:
            raise reason from None
        raise OSError(disk.errno, f"{disk.strerror}; an earlier checkpoint is unchanged", str(folder)) from error
    write_checksums(folder / IN_FOLDER, [(file.name, checksum_of(file)) for file in sorted(folder.iterdir())])
    sync_folder(folder)


def _write_rest(part: Path, rest: dict[str, Any]) -> None:
    """Writes what is in no shard, and the checksums of all processes' files."""
    checksums = {REST: save_file(rest, part / REST)}
    for folder in sorted(part.glob(f"{PROCESS}*")):
        own = folder / IN_FOLDER
        checksums |= {f"{folder.name}/{name}": checksum for name, checksum in read_checksums(own).items()}
        own.unlink()
        sync_folder(folder)
    write_checksums(part / IN_FOLDER, checksums.items())


def load_rest(shards: Shards) -> dict[str, Any]:
    """What is in no shard; :func:`load_weights` and :func:`load_optimizers` read the tensors.

    Raises:
        CheckpointError: If it is damaged, or has something in it that could run code.
    """
    rest = shards.rest()
    if not isinstance(rest, dict) or "optimizer_states" not in rest:
        raise CheckpointError(
            f"{shards.path / REST} is not what SyntheticGradientStrategy(checkpoint='sharded') writes."
        )
    return {**rest, "state_dict": {}, "optimizer_states": [{"state": {}, **each} for each in rest["optimizer_states"]]}


def load_weights(shards: Shards, module: nn.Module, strict: bool = True) -> None:
    """Reads the weights into a module, tensor by tensor.

    Raises:
        SyntheticGradientsError: If the names or shapes in the checkpoint are not the module's.
        CheckpointError: If a file is damaged, or has something in it that could run code.
    """
    shapes = {
        name.removeprefix(_WEIGHT): entry.shape for name, entry in shards.entries.items() if name.startswith(_WEIGHT)
    }
    own = module.state_dict()
    names = set(shapes)
    other = [name for name, value in own.items() if name in names and shapes[name] not in (None, _shape(value))]
    if other or (strict and names != set(own)):
        raise SyntheticGradientsError(
            f"The checkpoint {shards.path} is of another model. Only in the checkpoint: {sorted(names - set(own))}; "
            f"only in the model: {sorted(set(own) - names)}; of another shape: {other}."
        )
    in_place = {name for name, _tensor in _named_tensors(module)}
    others: dict[str, Any] = {}  # metrics, extra state
    for key, value in shards.read(_WEIGHT + name for name in own if name in names):
        name = key.removeprefix(_WEIGHT)
        if name in in_place:
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{name} in {shards.path} is no tensor, but a {type(value).__name__}.")
            own[name].detach().copy_(value)
        else:
            others[name] = value
    if others:
        module.load_state_dict({**own, **others}, strict=strict)


def load_optimizers(
    shards: Shards, optimizers: Sequence[Optimizer], module: nn.Module, holds: Callable[[str], bool]
) -> None:
    """Reads the states of the parameters that this process trains into the optimizers.

    Args:
        shards: The checkpoint.
        optimizers: In the order in which they were saved, with their groups restored.
        module: Whose parameters they have.
        holds: Whether this process trains the parameter of that name.

    Raises:
        CheckpointError: If a file is damaged, or has something in it that could run code.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    wanted: list[str] = []
    for place, optimizer in enumerate(optimizers):
        parameters = [parameter for entry in optimizer.param_groups for parameter in entry["params"]]
        own = {str(n) for n, p in enumerate(parameters) if id(p) in names and holds(names[id(p)])}
        prefix = f"{_OPTIMIZER}{place}."
        wanted += [
            key for key in shards.entries if key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in own
        ]
    for optimizer, state in zip(optimizers, _states(shards.read(wanted), len(optimizers))):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def merge(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """The whole checkpoint, as one process would have saved it.

    Args:
        path: The folder of shards.
        weights_only: Whether to refuse all but tensors and plain values.

    Raises:
        CheckpointError: If a file is damaged, or has something in it that could run code.
    """
    shards = Shards(path, weights_only)
    checkpoint = load_rest(shards)
    everything = dict(shards.read(shards.entries))
    checkpoint["state_dict"] = {
        key.removeprefix(_WEIGHT): value for key, value in everything.items() if key.startswith(_WEIGHT)
    }
    states = _states(everything.items(), len(checkpoint["optimizer_states"]))
    for optimizer, state in zip(checkpoint["optimizer_states"], states):
        optimizer["state"] = dict(sorted(state.items()))
    return checkpoint


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers, each under every name it has."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _states(found: Iterable[tuple[str, Any]], count: int) -> list[dict[int, dict[str, Any]]]:
    """The values by optimizer and number of the parameter."""
    states: list[dict[int, dict[str, Any]]] = [{} for _ in range(count)]
    for key, value in found:
        if key.startswith(_OPTIMIZER):
            place, number, name = key.removeprefix(_OPTIMIZER).split(".", 2)
            if int(place) < count:
                states[int(place)].setdefault(int(number), {})[name] = value
    return states


__all__ = ["is_sharded", "load_optimizers", "load_rest", "load_weights", "merge", "own_weights", "save"]
