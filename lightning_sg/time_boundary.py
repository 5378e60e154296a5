"""Boundaries in time: a recurrent state carried from chunk to chunk, and messages between networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_sg._compat import FakeTensor, tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from lightning_sg.arguments import checked, optional, which_samples, whole
from lightning_sg.batch.chunks import Which
from lightning_sg.errors import BoundaryError


@dataclass
class Written:
    """A value that one training step wrote for a later one.

    Attributes:
        leaves: Its leaves in order, with tensors detached.
        structure: Its structure, which :meth:`value` restores.
        places: The indices of the leaves that carried a gradient.
        carriers: These leaves with the graph of the step that wrote them. Empty when that step is over.
        dims: For each of them, the batch dimension.
        last: For which samples the sequence ends here.
        step: The number under which the predictor keeps it until its target arrives, or ``None``.
        context: The context of its predictor.
        read: The leaves with a gradient as the current step reads them.
    """

    leaves: list[Any]
    structure: Any
    places: list[int]
    carriers: list[Tensor]
    dims: list[int]
    last: Which
    step: int | None = None
    context: Any = None
    read: list[Tensor] = field(default_factory=list)

    @property
    def elsewhere(self) -> bool:
        """Whether another process wrote it, so that it consists of fake tensors here."""
        return _without_data(self.leaves)

    @cached_property
    def going_on(self) -> Tensor | None:
        """The indices of the samples whose sequences continue; ``None`` for all of them.

        Cached, because reading ``last`` from a tensor synchronizes the device.
        """
        if not isinstance(self.last, Tensor):
            return torch.zeros(0, dtype=torch.long) if self.last else None
        return (~self.last).nonzero().flatten()

    def value(self) -> Any:
        """The value in its structure, with the leaves of :attr:`read`."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, self.read):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.structure)


class Handover(Protocol):
    """Connects the step that writes with the one that reads: supplies gradients and collects targets."""

    def wrote(self, written: Written) -> None:
        """Called when a step has written ``written``."""

    def reads(self, written: Written) -> None:
        """Called when a step reads ``written``; sets :attr:`Written.read`."""

    def forget(self, written: Written) -> None:
        """Called when no step will read ``written`` any more."""


class CutInTime(nn.Module):
    """Base of both boundaries in time: keeps values that one step writes and a later step reads.

    Attributes:
        uses: The names of the methods that write and read.
        batch_dim: The batch dimension of the tensors, or ``None`` for the default.
    """

    uses: tuple[str, ...] = ()

    def __init__(self, batch_dim: int | None) -> None:
        super().__init__()
        # Recurrent states have few dimensions; a negative one would not mean the same for all of their tensors.
        self.batch_dim = checked(type(self).__name__, "batch_dim", batch_dim, optional(whole(0, 63)))
        self._handover: Handover | None = None
        self._written: dict[bool, list[Written]] = {True: [], False: []}

    def forget(self) -> None:
        """Drops all values not read yet, so that the next read starts a sequence."""
        for written in self._mine:
            if self._active is not None:
                self._active.forget(written)
        self._keep([])

    def begin_evaluation(self) -> None:
        """Drops what an earlier evaluation left unread: Lightning's sanity check stops anywhere in a sequence."""
        self._written = {**self._written, False: []}

    def connect(self, handover: Handover | None) -> None:
        """Sets the handover that training uses; ``None`` removes it."""
        self._handover = handover

    def carried(self) -> list[dict[str, Any]]:
        """The values that training wrote and has not read yet, for a checkpoint."""
        return [
            {
                "value": written.value(),
                "places": written.places,
                "dims": written.dims,
                "last": written.last,
                "step": written.step,
                "context": written.context,
            }
            for written in self._written[True]
            if not written.elsewhere
        ]

    def load(self, carried: list[dict[str, Any]]) -> None:
        """Restores :meth:`carried`."""
        every = []
        for entry in carried:
            leaves, structure = tree_flatten(entry["value"])
            known = [entry[name] for name in ("dims", "last", "step", "context")]
            written = Written(leaves, structure, entry["places"], [], *known)
            every.append(written)
        self._written = {True: every, False: []}

    @property
    def _active(self) -> Handover | None:
        # In evaluation nothing is predicted.
        return self._handover if self.training else None

    @property
    def _mine(self) -> list[Written]:
        # Training and evaluation have separate values, as validation may run between two training chunks.
        return self._written[self.training]

    def _keep(self, written: list[Written]) -> None:
        # Always a new list: a traced step is undone by restoring attributes.
        self._written = {**self._written, self.training: written}

    def drop_fakes(self) -> None:
        """Drops the values of other processes, which are fake tensors and useless after a run."""
        self._written = {
            training: [written for written in every if not written.elsewhere]
            for training, every in self._written.items()
        }

    def _write(self, value: Any, last: Which) -> Written:
        leaves, structure = tree_flatten(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise BoundaryError(f"{type(self).__name__} was given no tensor to carry, but {type(value).__name__}.")
        carries = self.training and torch.is_grad_enabled() and not _without_data(tensors)
        places = [
            place
            for place, leaf in enumerate(leaves)
            if carries and isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
        ]
        carriers = [leaves[place] for place in places]
        # A copy, so that an in-place operation cannot change what the next chunk starts from.
        kept = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        dims = [self._samples_in(tensor) for tensor in carriers]
        return Written(kept, structure, places, carriers, dims, last)

    def _samples_in(self, tensor: Tensor) -> int:
        dim = (1 if tensor.ndim == 3 else 0) if self.batch_dim is None else self.batch_dim
        if tensor.ndim <= dim:
            raise BoundaryError(
                f"{type(self).__name__} was given a tensor of shape {tuple(tensor.shape)}, which has no dimension "
                f"{dim} for the samples. Name the batch dimension: {type(self).__name__}(batch_dim=...)."
            )
        return dim

    def _give(self, written: Written) -> Any:
        if written.elsewhere:
            return written.value()
        if self._active is not None and torch.is_grad_enabled():
            self._active.reads(written)
        else:
            written.read = [written.leaves[place] for place in written.places]
        return written.value()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model (weight averaging, export, another process) carries no training state.
        return {**self.__dict__, "_handover": None, "_written": {True: [], False: []}}


class TimeBoundary(CutInTime):
    """Carries a recurrent state from one chunk of a sequence to the next: truncated backpropagation through time.

    Each chunk of a sequence is one optimizer step. The step reads the state that the previous step wrote, and no
    gradient flows back through it. With :class:`~lightning_sg.SyntheticGradients` the state at the end of a chunk gets
    a synthetic gradient, which predicts the gradient from the rest of the sequence. Its target is the gradient at the
    start of the next chunk. Source: Jaderberg et al. 2017 (arXiv 1608.05343), section 2.2.

    Training and evaluation carry separate states, so validation may run between two chunks. The state is not in the
    model's ``state_dict``; the callback puts it in the checkpoint.

    Args:
        batch_dim: The batch dimension of the state's tensors. By default the second dimension of tensors with three,
            as in ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` whatever their ``batch_first``, and the first of all others.

    Raises:
        TypeError: If ``batch_dim`` is no whole number.
        ValueError: If ``batch_dim`` is negative.

    Example::

        >>> import torch
        >>> memory, cell = TimeBoundary(), torch.nn.GRUCell(2, 3)
        >>> for chunk in torch.ones(4, 5, 2).split(2):  # four steps, five samples
        ...     state = memory.read()
        ...     for x in chunk:
        ...         state = cell(x, state)
        ...     memory.write(state)
    """

    uses = ("read", "write")

    def __init__(self, batch_dim: int | None = None) -> None:
        super().__init__(batch_dim)

    def read(self, first: Which = False, initial: Any = None) -> Any:
        """Reads the state that the previous chunk wrote.

        Args:
            first: Whether the sequences start here: for all samples, or bool ``(N,)`` for each.
            initial: The state at the start of a sequence, with the structure of the state. By default zero, for samples
                that start while others continue.

        Returns:
            The state; ``initial`` if there is none or all sequences start here. Torch's recurrent modules take the
            default, ``None``, for zero.

        Raises:
            TypeError: If ``first`` is neither.
            BoundaryError: If ``initial`` has another structure than the state.
        """
        first = checked("TimeBoundary.read", "first", first, which_samples())
        if not isinstance(first, Tensor) and first:
            self.forget()
        if not self._mine:
            return initial
        state = self._give(self._mine[-1])
        return state if not isinstance(first, Tensor) else self._begun_anew(state, first, initial)

    def write(self, state: Any, last: Which = False) -> None:
        """Writes the state at the end of this chunk for the next one.

        Args:
            state: A tensor, or any nesting of tuples, lists and dicts of tensors.
            last: Whether the sequences end here: for all samples, or bool ``(N,)`` for each. At the end of a sequence
                there is no synthetic gradient, because no chunk follows.

        Raises:
            TypeError: If ``last`` is neither.
            BoundaryError: If ``state`` contains no tensor, or a tensor without the batch dimension.
        """
        last = checked("TimeBoundary.write", "last", last, which_samples())
        if _without_data(tree_leaves(state)):  # of another process, or in a traced step
            return
        written = self._write(state, last)
        for old in self._mine[:-1]:
            if self._active is not None:
                self._active.forget(old)
        # Keep the previous state: this step may have read it, and its backward pass will bring the target.
        self._keep([*self._mine[-1:], written])
        if self._active is not None:
            self._active.wrote(written)

    def _begun_anew(self, state: Any, first: Tensor, initial: Any) -> Any:
        def begin(old: Tensor, new: Tensor | None) -> Tensor:
            shape = [1] * old.ndim
            shape[self._samples_in(old)] = -1
            where = first.to(old.device).view(shape)
            return torch.where(where, torch.zeros_like(old) if new is None else new.to(old.dtype), old)

        if initial is None:
            begun: Any = tree_map_only(Tensor, lambda old: begin(old, None), state)
            return begun
        leaves, structure = tree_flatten(state)
        news, other = tree_flatten(initial)
        if structure != other:
            raise BoundaryError("TimeBoundary.read: `initial` has another structure than the state that was written.")
        return tree_unflatten(
            [begin(old, new) if isinstance(old, Tensor) else new for old, new in zip(leaves, news)], structure
        )


class MessageBoundary(CutInTime):
    """Carries messages from a network that runs often to one that runs rarely, without either waiting for the other.

    The fast network sends a message in every training step. The slow one receives all new messages in a later step.
    With :class:`~lightning_sg.SyntheticGradients` each message gets a synthetic gradient when it is sent; its target
    comes steps later, from the receiver's backward pass. Without the callback the message is detached.
    Source: Jaderberg et al. 2017 (arXiv 1608.05343), section 3.3.

    Args:
        batch_dim: The batch dimension of a message's tensors, see :class:`TimeBoundary`.
        most: How many messages may wait to be received, at most 1,000,000. More raise an error.

    Raises:
        TypeError: If an argument is no whole number.
        ValueError: If an argument is out of range.
    """

    uses = ("send", "receive")

    def __init__(self, batch_dim: int | None = None, most: int = 1000) -> None:
        super().__init__(batch_dim)
        self.most = checked(type(self).__name__, "most", most, whole(1, 1_000_000))

    def send(self, message: Any, context: Any = None) -> None:
        """Sends a message.

        Args:
            message: A tensor, or any nesting of tuples, lists and dicts of tensors.
            context: The predictor's context, ``(N, ...)``, for instance the labels that the sender's step knows. The
                receiver does not get it.

        Raises:
            BoundaryError: If the message contains no tensor, or a tensor without the batch dimension, or if ``most``
                messages wait already.
        """
        written = self._write(message, False)
        if len(self) >= self.most:
            raise BoundaryError(
                f"{len(self)} messages wait at a MessageBoundary and nobody receives them "
                f"({'training' if self.training else 'evaluation'}). Call receive() in the steps in which the slow "
                "network acts, forget() where the messages of an unfinished sequence are to be dropped, or allow more "
                "with MessageBoundary(most=...)."
            )
        written.context = tree_map_only(Tensor, lambda tensor: tensor.detach(), context)
        # Keep other processes' messages as fake tensors, so that all processes take the same branches.
        self._keep([*self._mine, written])
        if self._active is not None and not written.elsewhere:
            self._active.wrote(written)

    def receive(self) -> list[Any]:
        """Returns and removes all waiting messages, the oldest first."""
        received = [self._give(written) for written in self._mine]
        self._keep([])
        return received

    def __len__(self) -> int:
        """The number of messages that wait to be received."""
        return len(self._mine)


def _without_data(leaves: Iterable[Any]) -> bool:
    """Whether there is a fake tensor among ``leaves``."""
    return any(isinstance(leaf, FakeTensor) for leaf in leaves)


def boundaries_in_time(module: nn.Module) -> dict[str, CutInTime]:
    """The boundaries in time of ``module``, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, CutInTime)}


__all__ = ["CutInTime", "Handover", "MessageBoundary", "TimeBoundary", "Written", "boundaries_in_time"]
