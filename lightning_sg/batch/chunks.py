"""Cuts batches of long sequences into chunks, each of which is a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sg._compat import tree_leaves, tree_map_only
from lightning_sg.arguments import MOST_BATCHES, checked, context_source, flag, function, instance, optional, whole
from lightning_sg.batch.entries import entry_of

Cut = Callable[[Any, int, int], Any]
#: One answer for all samples of a batch, or a boolean tensor ``(N,)`` with one for each sample.
Which = bool | Tensor


class Chunk(NamedTuple):
    """A piece of a batch of sequences.

    Attributes:
        batch: These time steps of the batch, in its structure.
        first: Whether the sequences start here, or ``(N,)`` for each sample. Pass it to
            :meth:`TimeBoundary.read <lightning_sg.TimeBoundary.read>`.
        last: Whether the sequences end here, or ``(N,)`` for each sample if their lengths are known. Pass it to
            :meth:`TimeBoundary.write <lightning_sg.TimeBoundary.write>`.
    """

    batch: Any
    first: Which
    last: Which


def content_of(batch: Any) -> Any:
    """Returns the user's batch: what a :class:`Chunk` contains, anything else as it is."""
    return batch.batch if isinstance(batch, Chunk) else batch


class Chunks:
    """Wraps a data loader and yields each batch of long sequences as several chunks, in order.

    Only one chunk at a time is on the device. To Lightning every chunk is a batch: it takes an optimizer step, a number
    in ``batch_idx`` and a step of ``max_steps``.

    Args:
        loader: A data loader, or any iterable of batches, in any nesting of tuples, lists and dicts.
        length: The number of time steps in a chunk. The last chunk of a sequence may be shorter.
        batch_first: Whether tensors are ``(N, L, ...)`` rather than ``(L, N, ...)``.
        lengths: For padded sequences: the key or index of their true lengths in a batch, int ``(N,)``, or a function
            that returns them. No state is carried past the end of a sequence, and chunks of padding only are skipped.
        stateful: Whether each batch continues the one before, like pieces of a stream. Then only the first chunk of an
            epoch starts the sequences.
        cut: Takes a batch, a start and a stop, and returns the time steps from start to stop - 1. By default it cuts
            every tensor that has as many time steps as the longest and keeps the others whole.
        sequence_length: The length L of all sequences, if it is constant. Then the number of chunks is known in advance
            for progress bars, schedules over an epoch and ``val_check_interval``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a length is out of range, or a batch has no tensor with time steps.
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
        self.loader = checked("Chunks", "loader", loader, instance(Iterable, words="a data loader or another iterable"))
        self.length = checked("Chunks", "length", length, whole(1, MOST_BATCHES))
        self.batch_first = checked("Chunks", "batch_first", batch_first, flag())
        self.lengths = checked("Chunks", "lengths", lengths, optional(context_source()))
        self.stateful = checked("Chunks", "stateful", stateful, flag())
        self.sequence_length = checked("Chunks", "sequence_length", sequence_length, optional(whole(1, MOST_BATCHES)))
        cut = checked("Chunks", "cut", cut, optional(function("a function of a batch, a start and a stop")))
        self._cut = cut or self._cut_time
        self._done = 0
        self._skip = 0

    def __iter__(self) -> Iterator[Chunk]:
        """Yields the chunks of an epoch; after :meth:`load_state_dict`, those that were left."""
        skip, self._skip, self._done = self._skip, 0, 0
        for chunk in self._chunks():
            if self._done >= skip:
                yield chunk
            self._done += 1
        if 0 < self._done <= skip:  # saved at the end of an epoch: start the next one
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
            TypeError: If it is not known in advance.
        """
        if self.sequence_length is None or not isinstance(self.loader, Sized):
            raise TypeError(
                "Chunks does not know how many chunks an epoch has. Give the length of the sequences: "
                "Chunks(sequence_length=...)."
            )
        return len(self.loader) * -(-self.sequence_length // self.length)

    def state_dict(self) -> dict[str, Any]:
        """The progress in the epoch, for Lightning's checkpoints: a resumed run continues with the next chunk.

        It iterates over the loader again up to there, so a loader that shuffles must repeat its order.
        """
        return {"chunks": self._done + (1 if self._known() else 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._skip = state["chunks"]

    def _known(self) -> bool:
        # If the number of batches is unknown, Lightning fetches one batch ahead to see which is the last.
        return self.sequence_length is not None and isinstance(self.loader, Sized)

    def _steps_of(self, batch: Any) -> tuple[int, Tensor | None]:
        """The number of time steps, and the true lengths of the sequences or ``None``."""
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
    """Cuts a long sequence into parallel streams of inputs and labels: a batch for ``Chunks``.

    Args:
        sequence: ``(L, ...)``, such as the characters of a text.
        number: The number of streams N. The rest at the end of the sequence is dropped.
        shift: How many steps after its input each label comes.

    Returns:
        Inputs and labels, ``(N, (L - shift) // N, ...)`` each.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or the sequence is too short for N streams.
    """
    name = "parallel_streams"
    sequence = checked(name, "sequence", sequence, instance(Tensor))
    number = checked(name, "number", number, whole(1, MOST_BATCHES))
    shift = checked(name, "shift", shift, whole(0, MOST_BATCHES))
    length = (len(sequence) - shift) // number
    if length < 1:
        raise ValueError(f"A sequence of {len(sequence)} steps does not make {number} streams.")
    inputs, labels = (
        torch.stack([sequence[begin + start : begin + start + length] for begin in range(0, number * length, length)])
        for start in (0, shift)
    )
    return inputs, labels


__all__ = ["Chunk", "Chunks", "Which", "content_of", "parallel_streams"]
