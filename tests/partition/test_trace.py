"""What a traced step shows: the order of the boundaries, uses, operations, leaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import BoundaryError, PartitionError
from lightning_sg.predictors.base import LossInfo
from tests.partition.models import CLASSES, SAMPLES, WIDTH, Cut, labelled, linears, trace


def test_a_trace_shows_order_uses_and_operations() -> None:
    traced = trace(linears())
    assert traced.order == ["cuts.0", "cuts.1"]
    assert traced.stages == 3
    assert traced.uses == {f"parts.{n}.{kind}": {n} for n in range(3) for kind in ("weight", "bias")}
    assert traced.flops == [2 * SAMPLES * WIDTH * WIDTH] * 2 + [2 * SAMPLES * WIDTH * CLASSES]
    assert traced.leaks == []
    assert traced.cut_short is None


def test_the_order_is_that_of_the_data_not_of_the_declaration() -> None:
    class Backwards(Cut):
        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](self.cuts[0](self.parts[1](self.cuts[1](self.parts[2](x)))))

    traced = trace(Backwards(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))))
    assert traced.order == ["cuts.1", "cuts.0"]
    assert [traced.uses[f"parts.{n}.weight"] for n in range(3)] == [{2}, {1}, {0}]


def test_a_shape_that_depends_on_values_cuts_the_trace_short_in_the_last_stage() -> None:
    def reads(output: Tensor, labels: Tensor) -> Tensor:
        F.cross_entropy(output, labels)
        output[output > 0]
        raise AssertionError("not reached without data")

    traced = trace(linears(loss=reads))
    assert traced.cut_short is not None
    assert "not reached" not in traced.cut_short
    assert traced.loss == LossInfo("cross_entropy", CLASSES)
    assert traced.uses["parts.2.weight"] == {2}


@pytest.mark.parametrize("read", [Tensor.item, float, int, bool], ids=["item", "float", "int", "bool"])
def test_reading_one_number_in_the_last_stage_lets_the_trace_go_on(read: Callable[[Tensor], Any]) -> None:
    def reads(output: Tensor, labels: Tensor) -> Tensor:
        read(output.sum())
        return F.cross_entropy(output, labels)

    traced = trace(linears(loss=reads))
    assert traced.cut_short is None
    assert traced.loss == LossInfo("cross_entropy", CLASSES)


def test_reading_a_value_before_a_boundary_says_where() -> None:
    class Reading(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / super().forward(x).max().item()

    module = Cut(nn.Linear(WIDTH, WIDTH), Reading(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    with pytest.raises(PartitionError, match=r"to boundary 'cuts\.1': in 'parts\.1' of stage 1, .* It reads a value"):
        trace(module)


def test_a_boundary_that_the_step_does_not_reach_is_named() -> None:
    module = linears()
    with pytest.raises(BoundaryError, match=r"Boundary 'cuts\.1' was never reached.*\['cuts\.0'\]"):
        trace(module, step=lambda: module.cuts[0](module.parts[0](labelled(WIDTH)[0])))


class Leaking(Cut):
    detach = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.parts[0](x)
        around = hidden.detach() if self.detach else hidden
        return self.parts[2](self.parts[1](self.cuts[0](hidden)) + around)


@pytest.mark.parametrize("detach", [False, True])
def test_an_activation_that_goes_around_a_boundary_is_a_leak(detach: bool) -> None:
    module = Leaking(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    del module.cuts[1]
    module.detach = detach
    (leak,) = trace(module).leaks
    assert (leak.made_in, leak.used_in, leak.shape) == (0, 1, (SAMPLES, WIDTH))
    assert (leak.operation, leak.differentiable) == ("add", not detach)
    assert leak.used_by == "Leaking"


def test_asking_for_a_shape_and_using_the_batch_are_no_leaks() -> None:
    class Asking(Cut):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.parts[0](x)
            crossed = self.cuts[0](hidden)
            return self.parts[1](crossed.reshape(hidden.size(0), hidden.shape[1]) + x)

    assert trace(Asking(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))).leaks == []


def test_a_traced_manual_step_ends_before_the_backward_pass() -> None:
    class Manual(Cut):
        reached = False

        def training_step(self, batch: Any, batch_idx: int = 0) -> None:
            self.manual_backward(super().training_step(batch))
            type(self).reached = True

    module = Manual(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    traced = trace(module)
    assert traced.loss == LossInfo("cross_entropy", CLASSES)
    assert traced.cut_short is None
    assert not Manual.reached
    assert "manual_backward" not in module.__dict__
