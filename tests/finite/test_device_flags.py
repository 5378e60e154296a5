"""What a device notes without being waited for; here the device is the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sg import NonFiniteLossError
from lightning_sg.finite.device_flags import DeviceFlags
from lightning_sg.finite.diagnosis import BatchOrigin, Scene

NAN = torch.tensor(float("nan"))


class Batches:
    """The scenes of batches, one after the other."""

    def __init__(self) -> None:
        self.index = -1
        self.data: Any = None

    def next(self, data: Tensor) -> None:
        self.index += 1
        self.data = [data, torch.tensor([1])]

    def scene(self) -> Scene:
        return Scene(BatchOrigin(2, self.index, self.data), nn.Linear(1, 1), 1, 0, {}, lambda _name: True)


def test_the_first_batch_is_named_at_the_next_look_and_from_then_on() -> None:
    batches = Batches()
    flags = DeviceFlags(batches.scene)
    flags.check()
    for loss in (torch.ones(()), NAN, NAN):
        batches.next(torch.ones(2))
        flags.see(loss=[loss])
        flags.see(gradients=[torch.ones(3), loss])
    for _ in range(2):
        with pytest.raises(
            NonFiniteLossError, match=r"The loss of training batch 1 \(batch_idx\) of epoch 2"
        ) as caught:
            flags.check()
        assert "The data of this batch are finite" in str(caught.value)


def test_data_are_blamed_where_they_are_at_fault() -> None:
    batches = Batches()
    flags = DeviceFlags(batches.scene)
    batches.next(torch.ones(2))
    flags.see(loss=[torch.ones(())])
    flags.check()
    batches.next(NAN.repeat(2))
    flags.see(gradients=[NAN])
    with pytest.raises(NonFiniteLossError, match=r"A gradient of training batch 1 .*data of this batch are at fault"):
        flags.check()


def test_finite_batches_are_no_error() -> None:
    batches = Batches()
    flags = DeviceFlags(batches.scene)
    for _ in range(3):
        batches.next(NAN.repeat(2))  # a label that the loss leaves out
        flags.see(loss=[torch.ones(())], gradients=[])
    flags.check()
