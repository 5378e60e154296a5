"""BP(λ): earlier chunks learn from the error of a later one, without keeping their graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sg.predictors.base import Gradients
from lightning_sg.recurrent.rows import choose, from_rows, to_rows
from lightning_sg.time_boundary import Written

Predict = Callable[[Gradients, Any], Gradients | None]


@dataclass
class _Snapshot:
    """An earlier state, ``(N, ...)`` each, and the Jacobian of the newest with respect to it, ``(N, D, D)``."""

    state: Gradients
    jacobian: Tensor


class EligibilityTrace:
    r"""The accumulating trace of one boundary in time.

    Pemberton & Costa 2024 (arXiv 2401.07044) carry :math:`e_t = γλ J_t e_{t-1} + ∂ĝ_t / ∂θ`, whose size is that of the
    state times that of the parameters. This class keeps the states and the products of Jacobians instead. They give
    the same update, for any predictor, as one learning step with the target
    :math:`ĝ_{t-k} + (γλ)^k δ_t \, ∂h_t / ∂h_{t-k}` at each of the last chunks, all with the newest parameters.

    With D numbers per sample in the state, a chunk costs D backward passes, done as one batch, and the trace holds up
    to ``chunks`` matrices of size D × D per sample. Samples must not depend on each other.

    Args:
        decay: γλ.
        chunks: How many chunks learn from an error, including the newest.
    """

    def __init__(self, decay: float, chunks: int) -> None:
        self._decay = decay
        self._chunks = chunks
        self._snapshots: list[_Snapshot] = []
        self._step: Tensor | None = None

    def clear(self) -> None:
        """Forgets all chunks: the sequence is over."""
        self._snapshots, self._step = [], None

    def advance(self, read: Written | None, written: Written) -> None:
        """Computes the Jacobian of a chunk, from its start to its end, while its graph exists.

        Args:
            read: What the chunk started from; ``None`` at the start of a sequence.
            written: What the chunk ended with; it has no prediction at the end of a sequence.
        """
        if read is None:
            self.clear()
        elif written.step is not None:
            self._step = _jacobian(written, read.read, read.dims)

    def shift(self, read: Written) -> None:
        """Adds the state at the start of the chunk, once its error has been learned from: its end is now the newest."""
        jacobian, self._step = self._step, None
        if jacobian is None:
            self._snapshots = []
            return
        older = [_Snapshot(kept.state, jacobian @ kept.jacobian) for kept in self._snapshots]
        state = to_rows([leaf.detach().float() for leaf in read.read], read.dims)
        self._snapshots = [_Snapshot(state, jacobian), *older][: self._chunks - 1]

    def echo(
        self, predict: Predict, state: Gradients, targets: Gradients, numbers: Tensor | None
    ) -> tuple[Gradients, Gradients]:
        """States and targets for one learning step of the newest chunk together with those before it.

        Args:
            predict: The predictor.
            state: The newest state of the samples in ``numbers``.
            targets: Its target.
            numbers: The indices of these samples; ``None`` for all.

        Returns:
            States and targets, ``(K * N, ...)`` each.
        """
        now = predict(state, None)
        if now is None or not self._snapshots:
            return state, targets
        error = _flat([target - part for target, part in zip(targets, now)])
        states, goals = [state], [targets]
        for age, kept in enumerate(self._snapshots, start=1):
            then = choose(kept.state, numbers)
            jacobian = kept.jacobian if numbers is None else kept.jacobian[numbers]
            share = self._decay**age * torch.einsum("ni,nij->nj", error, jacobian)
            before = predict(then, None)
            assert before is not None
            states.append(then)
            goals.append(tuple(part + more for part, more in zip(before, _split(share, before))))
        return _joined(states), _joined(goals)

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""
        return {"states": [kept.state for kept in self._snapshots], "jacobians": [k.jacobian for k in self._snapshots]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._snapshots = [_Snapshot(tuple(s), j) for s, j in zip(state["states"], state["jacobians"])]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)


def _split(flat: Tensor, like: Gradients) -> Gradients:
    parts = flat.split([tensor[0].numel() for tensor in like], dim=1)
    return tuple(part.reshape(tensor.shape) for part, tensor in zip(parts, like))


def _joined(batches: Sequence[Gradients]) -> Gradients:
    return tuple(torch.cat(parts) for parts in zip(*batches))


def _jacobian(end: Written, start: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """The derivative of each sample's state at the end with respect to that at the start, ``(N, D_end, D_start)``."""
    rows = to_rows(end.carriers, end.dims)
    sizes = [row[0].numel() for row in rows]
    # All samples share the unit vectors, because they do not depend on each other.
    units = torch.eye(sum(sizes), device=rows[0].device, dtype=rows[0].dtype).split(sizes, dim=1)

    def seeds(number: int) -> list[Tensor]:
        own = [unit[number].expand(len(row), -1) for unit, row in zip(units, rows)]
        return list(from_rows(own, end.carriers, end.dims))

    every = [seeds(number) for number in range(sum(sizes))]
    batched = [torch.stack(parts) for parts in zip(*every)]
    arguments = {"retain_graph": True, "allow_unused": True}
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(end.carriers, start, batched, is_grads_batched=True, **arguments)
    except RuntimeError:  # an operation without batched gradients, such as cuDNN's LSTM
        single = [torch.autograd.grad(end.carriers, start, parts, **arguments) for parts in every]
        found = [None if parts[0] is None else torch.stack(parts) for parts in zip(*single)]
    columns = []
    for part, leaf, dim in zip(found, start, dims):
        gradient = leaf.new_zeros(len(every), *leaf.shape) if part is None else part
        columns.append(gradient.movedim(dim + 1, 0).flatten(2))
    return torch.cat(columns, dim=2).float()


__all__ = ["EligibilityTrace"]
