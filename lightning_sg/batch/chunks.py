"""Yields long sequences chunk by chunk, so that each is a training step of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sg._compat import tree_leaves, tree_map_only
from lightning_sg.batch.entries import entry_of

Cut = Callable[[Any, int, int], Any]
#: All samples of a batch alike, or a boolean tensor ``(N,)`` with one entry for each.
Which = bool | Tensor


class Chunk(NamedTuple):
    """A piece of a batch of sequences.

    Attributes:
        batch: The batch, in its structure, with these time steps only.
        first: Whether the sequences begin here, ``(N,)`` if each sample has its own; for
            :meth:`TimeBoundary.read <lightning_sg.TimeBoundary.read>`.
        last: Whether they end here, ``(N,)`` if their lengths are known; for
            :meth:`TimeBoundary.write <lightning_sg.TimeBoundary.write>`.
    """

    batch: Any
    first: Which
    last: Which


def content_of(batch: Any) -> Any:
    """A batch as the user's data loader made it: of a chunk, what is in it."""
    return batch.batch if isinstance(batch, Chunk) else batch


class Chunks:
    """Wraps a data loader: each of its batches of long sequences comes as several chunks, in order.

    Only one chunk at a time is moved to the device. Every chunk is a batch to Lightning: an optimizer step, a number
    in ``batch_idx``, a step of ``max_steps``.

    Args:
        loader: A data loader, or any iterable of batches, in any nesting of tuples, lists and dicts.
        length: Time steps in a chunk; the last one of a sequence may be shorter.
        batch_first: Whether tensors are ``(N, L, ...)`` rather than ``(L, N, ...)``.
        lengths: Takes from a batch the true lengths of its sequences, int ``(N,)``, if they are padded: then nothing is
            carried on after a sequence's end, and chunks of padding only are left out. A key, an index or a function.
        stateful: Whether each batch goes on where the one before has ended, as pieces of a stream do: then only the
            first chunk of an epoch begins anew.
        cut: Takes a batch, a first and a last time step, and returns the chunk; by default cuts all tensors that have
            as many time steps as the longest, and leaves others as they are.
        sequence_length: The length L of all sequences, if it is always the same: then the number of chunks is known
            beforehand, which progress bars, schedules over an epoch and ``val_check_interval`` like.

    Raises:
        ValueError: If ``length`` is below 1, or a batch has no tensor with time steps.
        SyntheticGradientsError: If a batch has no entry that ``lengths`` names.

    Example::

        >>> import torch
        >>> batches = [torch.arange(10).view(2, 5)]
        >>> [(chunk.batch.tolist(), chunk.first, chunk.last) for chunk in Chunks(batches, length=3)]
        [([[0, 1, 2], [5, 6, 7]], True, False), ([[3, 4], [8, 9]], False, True)]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        length: int,
        batch_first: bool = True,
        lengths: str | int | Callable[[Any], Tensor] | None = None,
        stateful: bool = False,
        cut: Cut | None = None,
        sequence_length: int | None = None,
    ) -> None:
        if length < 1:
            raise ValueError(f"Chunks needs a length of 1 or more, not {length}.")
        self.loader = loader
        self.length = length
        self.batch_first = batch_first
        self.lengths = lengths
        self.stateful = stateful
        self.sequence_length = sequence_length
        self._cut = cut or self._cut_time
        self._done = 0
        self._skip = 0

    def __iter__(self) -> Iterator[Chunk]:
        """Goes through the loader once; after :meth:`load_state_dict`, from there on."""
        skip, self._skip, self._done = self._skip, 0, 0
        for chunk in self._chunks():
            if self._done >= skip:
                yield chunk
            self._done += 1
        if 0 < self._done <= skip:  # saved at the end of an epoch: the next one begins
            yield from self

    def _chunks(self) -> Iterator[Chunk]:
        begins = True
        for batch in self.loader:
            total, ends = self._steps_of(batch)
            for start in range(0, total, self.length):
                stop = min(start + self.length, total)
                last: Which = False
                if not self.stateful:
                    last = stop == total if ends is None or stop == total else ends <= stop
                yield Chunk(self._cut(batch, start, stop), begins, last)
                begins = False
            begins = not self.stateful

    def __len__(self) -> int:
        """The number of chunks in an epoch.

        Raises:
            TypeError: If it is not known beforehand.
        """
        if self.sequence_length is None or not isinstance(self.loader, Sized):
            raise TypeError(
                "The number of chunks is not known: Chunks(sequence_length=...) says how long sequences are."
            )
        return len(self.loader) * -(-self.sequence_length // self.length)

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch is, for Lightning's checkpoints: a resumed run goes on with the next chunk.

        The loader is gone through again up to there; one that shuffles must give the same order again.
        """
        return {"chunks": self._done + (1 if self._known() else 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._skip = state["chunks"]

    def _known(self) -> bool:
        # Lightning fetches a batch ahead where the number of batches is not known, to see which is the last one.
        return self.sequence_length is not None and isinstance(self.loader, Sized)

    def _steps_of(self, batch: Any) -> tuple[int, Tensor | None]:
        """The number of time steps, and the true lengths of the sequences if they are known."""
        if self.lengths is not None:
            ends = entry_of(batch, self.lengths, f"Chunks(lengths={self.lengths!r})")
            return int(ends.max()), ends
        if self.sequence_length is not None:
            return self.sequence_length, None
        return self._longest(batch), None

    def _longest(self, batch: Any) -> int:
        axis = 1 if self.batch_first else 0
        sizes = [leaf.shape[axis] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim > 1]
        if not sizes:
            raise ValueError(
                "Chunks was given a batch without a tensor of two or more dimensions, which has no time steps to cut."
            )
        return int(max(sizes))

    def _cut_time(self, batch: Any, start: int, stop: int) -> Any:
        axis, longest = (1 if self.batch_first else 0), self._longest(batch)

        def cut(tensor: Tensor) -> Tensor:
            if tensor.ndim > 1 and tensor.shape[axis] == longest:
                return tensor.narrow(axis, start, stop - start)
            return tensor

        return tree_map_only(Tensor, cut, batch)


def parallel_streams(sequence: Tensor, number: int, *, shift: int = 1) -> tuple[Tensor, Tensor]:
    """A long sequence as parallel streams, with what is to be predicted: a batch for :class:`Chunks`.

    Args:
        sequence: ``(L, ...)``, such as the characters of a text.
        number: How many streams N; what is left over at the end is dropped.
        shift: How many steps ahead is to be predicted.

    Returns:
        Inputs and goals, ``(N, (L - shift) // N, ...)`` each.

    Raises:
        ValueError: If the sequence is too short for that.
    """
    length = (len(sequence) - shift) // number
    if length < 1:
        raise ValueError(f"A sequence of {len(sequence)} steps does not make {number} streams.")
    inputs, goals = (
        torch.stack([sequence[begin + start : begin + start + length] for begin in range(0, number * length, length)])
        for start in (0, shift)
    )
    return inputs, goals


__all__ = ["Chunk", "Chunks", "Which", "content_of", "parallel_streams"]
