"""Saves and loads the model and its optimizers, whose parts are in several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.optim import Optimizer

from lightning_sg.checkpoint.sharded import load_optimizers, load_rest, load_weights, merge, own_weights
from lightning_sg.checkpoint.sharded import save as save_shards
from lightning_sg.checkpoint.shards import Shards, is_sharded
from lightning_sg.checkpoint.whole import gather_weights, own_optimizer_state
from lightning_sg.distributed.averages import gather_averages
from lightning_sg.distributed.collectives import GridCollectives
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.files import local_path
from lightning_sg.lightning_api import pl
from lightning_sg.partition.paging import PagedParameters

_SHARDS = "lightning_sg_shards"  # in a checkpoint that is being loaded: where its tensors are

Checkpoint = dict[str, Any]


class Saving(Protocol):
    """What the strategy does about checkpoints; ``default`` is always what Lightning would do."""

    def gather_weights(self) -> None:
        """Makes the module whole in every process. A collective."""

    def weights(self, default: Callable[[], Checkpoint]) -> Checkpoint:
        """The model's state to save. A collective."""

    def optimizer_state(self, optimizer: Optimizer, default: Callable[[Optimizer], Checkpoint]) -> Checkpoint:
        """An optimizer's state to save. A collective."""

    def save(self, checkpoint: Checkpoint, path: Any, default: Callable[[], None]) -> None:
        """Writes a checkpoint. A collective."""

    def load(self, path: Any, weights_only: bool, default: Callable[[], Checkpoint]) -> Checkpoint:
        """Reads a checkpoint.

        Args:
            path: The file or folder.
            weights_only: Whether to refuse all but tensors and plain values in a folder of shards.
            default: Reads a file.
        """

    def load_weights(self, checkpoint: Mapping[str, Any], strict: bool, default: Callable[[], None]) -> None:
        """Restores the weights."""

    def load_optimizers(self, checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Restores what :meth:`load` has left out of the optimizers' states."""


class OneProcessSaving:
    """All is in this process; a folder of shards is merged when it is read."""

    def gather_weights(self) -> None:
        """Does nothing: the module is whole."""

    def weights(self, default: Callable[[], Checkpoint]) -> Checkpoint:
        """Lightning's own."""
        return default()

    def optimizer_state(self, optimizer: Optimizer, default: Callable[[Optimizer], Checkpoint]) -> Checkpoint:
        """Lightning's own."""
        return default(optimizer)

    def save(self, checkpoint: Checkpoint, path: Any, default: Callable[[], None]) -> None:
        """Lightning's own."""
        default()

    def load(self, path: Any, weights_only: bool, default: Callable[[], Checkpoint]) -> Checkpoint:
        """Lightning's own, and of shards the whole they make."""
        if not is_sharded(path):
            return default()
        return merge(_local(path), weights_only)

    def load_weights(self, checkpoint: Mapping[str, Any], strict: bool, default: Callable[[], None]) -> None:
        """Lightning's own."""
        default()

    def load_optimizers(self, checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Does nothing: nothing was left out."""


class WholeSaving:
    """Gathers all stages into one ordinary checkpoint on global rank 0; reads those and shards.

    Args:
        runtime: This process's part of the run.
        module: The module.
        pages: The parameters that are in files.
    """

    def __init__(self, runtime: StageRuntime, module: pl.LightningModule, pages: PagedParameters) -> None:
        self._runtime = runtime
        self._module = module
        self._pages = pages

    def gather_weights(self) -> None:
        """See :meth:`Saving.gather_weights`."""
        runtime = self._runtime
        runtime.agree_on_owners()
        placement = runtime.ownership.placement
        if placement is not None:
            with runtime.status.meeting("gathering weights"):
                gather_weights(self._module, placement, runtime.chain)
            self._pages.let_go()
            gather_averages(self._module, runtime)

    def weights(self, default: Callable[[], Checkpoint]) -> Checkpoint:
        """The whole model's state, with the keys of the undivided model."""
        self.gather_weights()
        return default()

    def optimizer_state(self, optimizer: Optimizer, default: Callable[[Optimizer], Checkpoint]) -> Checkpoint:
        """The whole optimizer's state, on global rank 0."""
        self._runtime.settle()  # no batch may have come since shards were loaded
        self._runtime.agree_on_owners()
        if self._runtime.ownership.placement is None:
            return default(optimizer)
        with self._runtime.status.meeting("saving optimizers"):
            return self._united(self._own_optimizer_state(optimizer))

    def _own_optimizer_state(self, optimizer: Optimizer) -> Checkpoint:
        placement = self._runtime.ownership.placement
        assert placement is not None
        return own_optimizer_state(optimizer, self._module, placement, self._runtime.grid.position)

    def _united(self, state: Checkpoint) -> Checkpoint:
        union = self._runtime.meetings.union("saving optimizers", state["state"])
        return {**state, "state": dict(sorted(union.items()))}

    def save(self, checkpoint: Checkpoint, path: Any, default: Callable[[], None]) -> None:
        """Lightning's own: on global rank 0."""
        default()

    def load(self, path: Any, weights_only: bool, default: Callable[[], Checkpoint]) -> Checkpoint:
        """For shards, the metadata only; tensors are loaded later."""
        if not is_sharded(path):
            checkpoint = default()
            checkpoint.pop(_SHARDS, None)  # a file that says so itself is not to be believed
            return checkpoint
        shards = Shards(_local(path), weights_only)
        return {**load_rest(shards), _SHARDS: shards}

    def load_weights(self, checkpoint: Mapping[str, Any], strict: bool, default: Callable[[], None]) -> None:
        """Restores the weights of all stages."""
        if _SHARDS not in checkpoint:
            default()
            return
        load_weights(checkpoint[_SHARDS], self._module, strict)
        self._pages.let_go()

    def load_optimizers(self, checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Of shards, restores the states of this process's stages, once it knows them."""
        if _SHARDS not in checkpoint:
            return
        runtime = self._runtime
        runtime.when_settled(
            lambda: load_optimizers(checkpoint[_SHARDS], optimizers, self._module, runtime.ownership.holds)
        )


class ShardedSaving(WholeSaving):
    """Every process of the first replica writes its own stages into a folder."""

    def weights(self, default: Callable[[], Checkpoint]) -> Checkpoint:
        """The state of this process's stages."""
        self._runtime.agree_on_owners()
        gather_averages(self._module, self._runtime)
        return own_weights(self._module, self._runtime.ownership.writes)

    def _united(self, state: Checkpoint) -> Checkpoint:
        return state

    def save(self, checkpoint: Checkpoint, path: Any, default: Callable[[], None]) -> None:
        """Writes this process's part.

        Raises:
            SyntheticGradientsError: For a remote path.
        """
        if local_path(path) is None:
            raise SyntheticGradientsError(f"checkpoint='sharded' writes to a local or shared folder, not to {path}.")
        grid = self._runtime.grid
        collectives = GridCollectives(grid, self._runtime.meetings, self._runtime.status)
        path = _local(collectives.broadcast(str(path), 0))
        own = own_weights(self._module, self._runtime.ownership.writes)
        # What callbacks put there besides is not this process's, and another has it right.
        state = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        replays = self._runtime.chain.history.replaying  # the process in whose place this one is has written its part
        if grid.replica == 0 and not replays:
            writes_rest = grid.rank == 0
            save_shards(path, {**checkpoint, "state_dict": state}, grid.position, self._meet, writes_rest)
        collectives.barrier("shards")

    def _meet(self) -> None:
        """Waits for the processes of this replica."""
        self._runtime.meetings.gather("saving shards", None)


def _local(path: str | Path) -> Path:
    local = local_path(path)
    assert local is not None
    return local


__all__ = ["OneProcessSaving", "Saving", "ShardedSaving", "WholeSaving"]
