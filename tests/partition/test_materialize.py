"""Models that were made on the meta device get memory and initial values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sg import PartitionError
from lightning_sg.partition.materialize import materialize


def test_a_module_on_the_meta_device_without_a_way_to_begin_is_refused_by_name() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        network = nn.Sequential(nn.BatchNorm1d(3), Scale())
    with pytest.raises(PartitionError, match=r"Module '1' \(Scale\) has \['factor'\] on the meta device"):
        materialize(network)
    del network[1]
    materialize(network)
    assert torch.equal(network[0].running_var, torch.ones(3))
