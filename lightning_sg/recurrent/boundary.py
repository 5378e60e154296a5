"""Where a sequence is cut in time: a state carried from chunk to chunk, and messages between networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_sg._compat import FakeTensor, tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from lightning_sg.batch.chunks import Which
from lightning_sg.errors import BoundaryError


@dataclass
class Written:
    """What one training step handed on to a later one.

    Attributes:
        leaves: All that was in it, in order, tensors cut off from their graph.
        structure: Puts the leaves together again.
        places: Which of the leaves carried a gradient.
        carriers: These, with the graph of the step that wrote them; empty when that step is over.
        dims: For each of the leaves with a gradient, the dimension of its samples.
        last: For which samples nothing follows.
        step: The number under which the predictor keeps it until its target arrives, or ``None``.
        context: What its predictor is told besides, as the predictors at other boundaries are of a batch.
        read: The leaves with a gradient, as the step that is going on was given them.
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
        """Whether another process wrote it: here it has a form, and no data."""
        return _without_data(self.leaves)

    @cached_property
    def going_on(self) -> Tensor | None:
        """The numbers of the samples after which something follows; ``None`` for all of them.

        Where samples end each for itself, a device must be asked for them; once.
        """
        if not isinstance(self.last, Tensor):
            return torch.zeros(0, dtype=torch.long) if self.last else None
        return (~self.last).nonzero().flatten()

    def value(self) -> Any:
        """What was written, in its structure, with :attr:`read` in it."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, self.read):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.structure)


class Link(Protocol):
    """What happens between the step that writes and the one that reads; the callback brings it."""

    def wrote(self, written: Written) -> None:
        """A step has written."""

    def reads(self, written: Written) -> None:
        """A step reads: sets :attr:`Written.read`."""

    def forget(self, written: Written) -> None:
        """No step will read it."""


class CutInTime(nn.Module):
    """What both kinds of boundaries in time have: values written in one step and read in a later one.

    Attributes:
        uses: The methods by which steps write and read.
    """

    uses: tuple[str, ...] = ()

    def __init__(self, batch_dim: int | None) -> None:
        super().__init__()
        self.batch_dim = batch_dim
        self._link: Link | None = None
        self._written: dict[bool, list[Written]] = {True: [], False: []}

    def forget(self) -> None:
        """Drops what was written and not read yet: the next read begins anew."""
        for written in self._mine:
            if self._active is not None:
                self._active.forget(written)
        self._keep([])

    def begin_evaluation(self) -> None:
        """Drops what an evaluation before this one has left unread; Lightning's sanity check stops anywhere."""
        self._written = {**self._written, False: []}

    def link(self, link: Link | None) -> None:
        """Puts what happens between writing and reading into the boundary, or takes it out."""
        self._link = link

    def carried(self) -> list[dict[str, Any]]:
        """What training has written and not read yet, for a checkpoint."""
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
    def _active(self) -> Link | None:
        # Evaluation predicts nothing.
        return self._link if self.training else None

    @property
    def _mine(self) -> list[Written]:
        # Validation between two training chunks has sequences of its own.
        return self._written[self.training]

    def _keep(self, written: list[Written]) -> None:
        # A new list each time: a step that is only followed, without data, is undone by putting attributes back.
        self._written = {**self._written, self.training: written}

    def let_go_of_ghosts(self) -> None:
        """Drops what other processes wrote, whose form is of no use after a run."""
        self._written = {
            training: [written for written in every if not written.elsewhere]
            for training, every in self._written.items()
        }

    def _write(self, value: Any, last: Which) -> Written:
        leaves, structure = tree_flatten(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise BoundaryError(f"{type(self).__name__} was given no tensor to hand on, but {type(value).__name__}.")
        carries = self.training and torch.is_grad_enabled() and not _without_data(tensors)
        places = [
            place
            for place, leaf in enumerate(leaves)
            if carries and isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
        ]
        carriers = [leaves[place] for place in places]
        # A copy, so that an in-place operation cannot reach what the next chunk begins with.
        kept = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        dims = [self._samples_in(tensor) for tensor in carriers]
        return Written(kept, structure, places, carriers, dims, last)

    def _samples_in(self, tensor: Tensor) -> int:
        dim = (1 if tensor.ndim == 3 else 0) if self.batch_dim is None else self.batch_dim
        if tensor.ndim <= dim:
            raise BoundaryError(
                f"{type(self).__name__} was given a tensor of shape {tuple(tensor.shape)}, which has no dimension "
                f"{dim} for the samples. Say which it is: {type(self).__name__}(batch_dim=...)."
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
        # A copy of the model (weight averaging, export, another process) carries no state of a training.
        return {**self.__dict__, "_link": None, "_written": {True: [], False: []}}


class TimeBoundary(CutInTime):
    """Carries a recurrent state from one chunk of a sequence to the next: truncated backpropagation through time.

    A sequence is trained on chunk by chunk, one optimizer step each. The step reads the state that the step before has
    written, and no gradient goes back through it. With :class:`~lightning_sg.SyntheticGradients` the end of a chunk is
    given a synthetic gradient: what the rest of the sequence would send back. Its target is the gradient at the start
    of the next chunk. Source: Jaderberg et al. 2017 (arXiv 1608.05343), section 2.2.

    In training and in evaluation a state of its own is carried, so validation may come between two chunks. The state
    is not in the ``state_dict`` of the model; with the callback it is in the checkpoint.

    Args:
        batch_dim: The dimension of the samples in the state's tensors. By default the second for tensors of three
            dimensions, as ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` have it whatever their ``batch_first``, and the first
            for all others.

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
        """The state that the last chunk has written.

        Args:
            first: Whether a sequence begins here: for all samples, or ``(N,)`` for each.
            initial: The state to begin a sequence with, of the state's structure; by default zero for samples among
                others that go on.

        Returns:
            The state; ``initial`` if nothing was written yet or all samples begin, and that is ``None`` by default,
            which torch's recurrent modules take for zero.
        """
        if not isinstance(first, Tensor) and first:
            self.forget()
        if not self._mine:
            return initial
        state = self._give(self._mine[-1])
        return state if not isinstance(first, Tensor) else self._begun_anew(state, first, initial)

    def write(self, state: Any, last: Which = False) -> None:
        """Hands the state at the end of this chunk on to the next.

        Args:
            state: A tensor, or any nesting of tuples, lists and dicts of them.
            last: Whether the sequence ends here: for all samples, or ``(N,)`` for each. Where it ends there is nothing
                more to learn from, and no synthetic gradient.

        Raises:
            BoundaryError: If there is no tensor in ``state``, or one has no dimension for the samples.
        """
        if _without_data(tree_leaves(state)):  # another process's, or the step is only being followed
            return
        written = self._write(state, last)
        for old in self._mine[:-1]:
            if self._active is not None:
                self._active.forget(old)
        # The one before may have been read in this very step, whose backward pass brings its target.
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
    """Hands messages from a network that acts often to one that acts seldom, which neither waits for the other.

    The fast network sends a message in every training step; the slow one receives, in a step of its own, all that came
    since. With :class:`~lightning_sg.SyntheticGradients` the sender is given a synthetic gradient for each message at
    once; the target comes when the receiver's loss is back-propagated, steps later. Without it the message is simply
    detached. Source: Jaderberg et al. 2017 (arXiv 1608.05343), section 3.3.

    Args:
        batch_dim: The dimension of the samples in a message's tensors, see :class:`TimeBoundary`.
        most: How many messages may wait to be received; more are taken for a mistake.

    Raises:
        ValueError: If ``most`` is below 1.
    """

    uses = ("send", "receive")

    def __init__(self, batch_dim: int | None = None, most: int = 1000) -> None:
        if most < 1:
            raise ValueError(f"MessageBoundary needs room for a message or more, not most={most}.")
        super().__init__(batch_dim)
        self.most = most

    def send(self, message: Any, context: Any = None) -> None:
        """Sends a message.

        Args:
            message: A tensor, or any nesting of tuples, lists and dicts of them.
            context: What the predictor is told besides the message, ``(N, ...)``: of the labels, for instance, what the
                sender's step has of them. The receiver is not given it.

        Raises:
            BoundaryError: If there is no tensor in it, one has no dimension for the samples, or too many messages
                wait already.
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
        # Of other processes' messages the form is kept, so that all processes follow the same steps.
        self._keep([*self._mine, written])
        if self._active is not None and not written.elsewhere:
            self._active.wrote(written)

    def receive(self) -> list[Any]:
        """All messages sent since the last time, the oldest first."""
        received = [self._give(written) for written in self._mine]
        self._keep([])
        return received

    def __len__(self) -> int:
        """How many messages wait to be received."""
        return len(self._mine)


def _without_data(leaves: Iterable[Any]) -> bool:
    """Whether a tensor among them has a form and no data."""
    return any(isinstance(leaf, FakeTensor) for leaf in leaves)


def boundaries_in_time(module: nn.Module) -> dict[str, CutInTime]:
    """The boundaries in time of a module, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, CutInTime)}


__all__ = ["CutInTime", "Link", "MessageBoundary", "TimeBoundary", "Written", "boundaries_in_time"]
