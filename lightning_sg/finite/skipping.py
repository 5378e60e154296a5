"""Leaves batches that are not finite out, stage by stage."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg._compat import tree_leaves
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.finite.buffers import BuffersBefore
from lightning_sg.finite.policy import IgnoresNonFinite, Watched, gradient_cause, gradients_of, loss_cause
from lightning_sg.finite.values import are_finite
from lightning_sg.partition.trace import Trace

_REMEMBERED = 4096  # batches: far more than an exact gradient is ever late


class SkipsNonFinite(IgnoresNonFinite):
    """A stage skips a batch if what it is given, what it computes, or a gradient of its weights is not finite.

    From the first stage whose activations or loss are not finite, all later stages skip the batch, too: they are given
    NaN. Stages before go on with their predictions, for which there is then no target. A gradient that is not finite
    concerns its own stage only. What a stage does about a batch depends on nothing that a stage in another process
    would not know, and all replicas decide alike.

    Args:
        watched: The training.
    """

    def __init__(self, watched: Watched) -> None:
        self.skipped: dict[int, int] = {}
        self._watched = watched
        self._buffers = BuffersBefore(watched.module)
        self._first: int | None = None  # from this stage on, the current batch is skipped
        self._broken: dict[int, set[int]] = {}  # by batch, stages whose gradients were not finite
        self._before: dict[int, Tensor] = {}  # by the id of a parameter, its gradient before the backward pass
        self._stages: dict[int, int] = {}  # by the id of a parameter
        self._warned = False

    def accept(self, trace: Trace) -> None:
        """Takes what a traced step showed.

        Raises:
            SyntheticGradientsError: If it does not say which stage a parameter belongs to.
        """
        self._stages.clear()
        if not trace.order:
            raise SyntheticGradientsError(
                "SyntheticGradients(on_non_finite='skip') needs to know which stage a parameter belongs to, but the "
                "step could not be followed on tensors without data (see the warning at the start). Use 'raise' with "
                "this model, or move the code that reads values behind the last boundary."
            )
        parameters = {name for name, _parameter in self._watched.module.named_parameters()}
        tied = sorted(name for name, users in trace.uses.items() if len(users) > 1 and name in parameters)
        if tied:
            raise SyntheticGradientsError(
                f"SyntheticGradients(on_non_finite='skip') does not go with a weight that several stages use "
                f"({tied[0]}): one of them may skip a batch that the other learns from. Use 'raise'."
            )

    # ------------------------------------------------------------------ forward

    def begin(self) -> None:
        """A training batch begins.

        Raises:
            SyntheticGradientsError: If a gradient scaler skips steps, too.
        """
        if self._watched.scaled:
            raise SyntheticGradientsError(
                "SyntheticGradients(on_non_finite='skip') does not go with precision='16-mixed', whose gradient scaler "
                "skips steps itself. Use precision='bf16-mixed', or 'raise'."
            )
        self._first = None
        self._buffers.keep()

    def crosses(self, boundary: str, carriers: Sequence[Tensor], context: Any) -> bool:
        """See :meth:`IgnoresNonFinite.crosses`."""
        stage = self._watched.before(boundary)
        told = [leaf for leaf in tree_leaves(context) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self._judge(stage, [*carriers, *told])
        return self._first is not None and self._first <= stage

    def receives(self, boundary: str, carriers: Sequence[Tensor]) -> None:
        """See :meth:`IgnoresNonFinite.receives`."""
        self._judge(self._watched.before(boundary) + 1, carriers)

    def before_backward(self, loss: Tensor) -> None:
        """Looks at the loss, and keeps the gradients that are there already."""
        if self._watched.has_loss:
            self._judge(self._watched.last, [loss])
        self._before = {
            id(parameter): parameter.grad.detach().clone()
            for parameter in self._watched.parameters()
            if parameter.grad is not None
        }

    def _judge(self, stage: int, tensors: Sequence[Tensor]) -> None:
        """Skips the batch from ``stage`` on if a tensor is not finite, in any replica."""
        if self._first is not None and self._first <= stage:
            return
        if self._any(not are_finite(tensors)):
            self._first = stage
            self._warn(stage, "what it computes is not finite")

    def skips_loss(self) -> bool:
        """See :meth:`IgnoresNonFinite.skips_loss`."""
        return self._first is not None

    # ------------------------------------------------------------------ backward

    def withholds(self, boundary: str) -> bool:
        """See :meth:`IgnoresNonFinite.withholds`."""
        return self._first is not None and self._first <= self._watched.before(boundary) + 1

    def teaches(self, boundary: str, targets: Sequence[Tensor]) -> bool:
        """See :meth:`IgnoresNonFinite.teaches`."""
        return not self._any(self.withholds(boundary) or not are_finite(targets))

    def leave_out(self) -> None:
        """Takes back the gradients of stages that skip the batch."""
        by_stage = self._by_stage()
        kept = {stage: parts for stage, parts in by_stage.items() if self._first is None or stage < self._first}
        broken = self._bad_stages({stage: gradients_of(parts) for stage, parts in kept.items()})
        if broken:
            self._broken.setdefault(self._watched.number, set()).update(broken)
            self._warn(min(broken), "gradients of its weights are not finite")
        while len(self._broken) > _REMEMBERED:
            del self._broken[min(self._broken)]
        for stage, parameters in by_stage.items():
            if stage not in kept or stage in broken:
                for parameter in parameters:
                    self._restore(parameter)
        self._before = {}

    def before_step(self) -> None:
        """Drops the gradients of stages with one that is not finite; earlier batches' parts in them are lost, too."""
        if self._any(not are_finite(gradients_of(self._watched.parameters()))):
            self.leave_out()

    @torch.no_grad()
    def _restore(self, parameter: nn.Parameter) -> None:
        before = self._before.get(id(parameter))
        if before is None or parameter.grad is None or parameter.grad.layout != torch.strided:
            parameter.grad = before
        else:
            parameter.grad.copy_(before)

    def corrections(self, number: int, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Without those of stages that skipped the batch, or whose exact gradient is not finite."""
        if not gradients:
            return gradients
        by_stage: dict[int, list[Tensor]] = {}
        for name, gradient in gradients.items():
            by_stage.setdefault(self._watched.stage_of(name), []).append(gradient)
        dropped = self._bad_stages(by_stage) | self._broken.get(number, set())
        return {name: part for name, part in gradients.items() if self._watched.stage_of(name) not in dropped}

    # ------------------------------------------------------------------ the end of a batch

    def end(self) -> None:
        """Counts the batch where it is skipped, and restores what its forward pass did to buffers there."""
        broken = self._broken.get(self._watched.number, set())
        first = self._watched.last + 1 if self._first is None else self._first
        stages = broken | set(range(first, self._watched.last + 1))
        for stage in stages:
            self.skipped[stage] = self.skipped.get(stage, 0) + 1
        if stages:
            self._buffers.restore(lambda name, _tensor: self._watched.stage_of(name) in stages)

    def undo(self) -> None:
        """Restores buffers that the batch has broken."""
        self._buffers.restore(lambda _name, tensor: not are_finite([tensor]))

    # ------------------------------------------------------------------ parts of it

    def _any(self, wish: bool) -> bool:
        return self._watched.replicas.any(wish)

    def _by_stage(self) -> dict[int, list[nn.Parameter]]:
        """This process's trained parameters that have, or had, a gradient."""
        by_stage: dict[int, list[nn.Parameter]] = {}
        for parameter in self._watched.parameters():
            if parameter.grad is not None:
                by_stage.setdefault(self._stage_of(parameter), []).append(parameter)
        return dict(sorted(by_stage.items()))

    def _stage_of(self, parameter: nn.Parameter) -> int:
        if id(parameter) not in self._stages:
            named = self._watched.module.named_parameters()
            self._stages = {id(each): self._watched.stage_of(name) for name, each in named}
        return self._stages.get(id(parameter), self._watched.last)

    def _bad_stages(self, by_stage: Mapping[int, Iterable[Tensor]]) -> set[int]:
        """The stages of which a tensor is not finite, in any replica."""
        every = [tensor for tensors in by_stage.values() for tensor in tensors]
        if not self._any(not are_finite(every)):
            return set()
        return {stage for stage in by_stage if self._any(not are_finite(by_stage[stage]))}

    def _warn(self, stage: int, what: str) -> None:
        """Says so, once."""
        if self._warned:
            return
        self._warned = True
        scene = self._watched.scene()
        cause = loss_cause(scene) if stage == scene.last else (scene.cause(stage) or gradient_cause(scene, stage))
        warnings.warn(
            f"{scene.origin.words.capitalize()} is skipped in {scene.name(stage)}: {what}. {cause} Further batches are "
            "skipped without a word; sg/skipped counts them.",
            stacklevel=2,
        )


__all__ = ["SkipsNonFinite"]
