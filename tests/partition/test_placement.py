"""Which process gets which stages, parameters and buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sg import PartitionError
from lightning_sg.partition.placement import Placement, place
from tests.partition.models import CLASSES, WIDTH, Counting, Cut, held, linears, trace


def test_a_placement_knows_where_everything_is() -> None:
    placement = Placement(["a", "b", "c", "d"], first=[0, 1, 4])
    assert placement.processes == 3
    assert [placement.process_of(stage) for stage in range(5)] == [0, 1, 1, 1, 2]
    assert [placement.sends_at(process) for process in range(3)] == ["a", "d", None]
    assert [placement.receives_at(process) for process in range(3)] == [None, "a", "d"]
    assert [placement.predictor_process(name) for name in "abcd"] == [0, 1, 1, 1]
    names = [placement.name(process, rank) for process, rank in enumerate((2, 1, 0))]
    assert names == ["stage 0 (rank 2)", "stages 1-3 (rank 1)", "stage 4 (rank 0)"]


def test_a_model_is_placed_by_its_stages_work() -> None:
    module = Cut(nn.Linear(WIDTH, 64), nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    placement = place(module, trace(module), 2)
    assert placement.first == [0, 1]
    wide = Cut(nn.Linear(WIDTH, 8), nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, CLASSES))
    assert place(wide, trace(wide), 2).first == [0, 3]


def test_every_tensor_has_one_owner() -> None:
    module = Counting()
    placement = place(module, trace(module), 2)
    assert set(placement.owner) == set(held(module))
    assert placement.elsewhere(0) == {"parts.1.weight", "parts.1.bias"}
    assert placement.elsewhere(1) == set(held(module)) - placement.elsewhere(0)


def test_unused_tensors_belong_to_the_last_process() -> None:
    module = linears(2)
    module.spare = nn.Linear(2, 2)
    placement = place(module, trace(module), 2)
    assert placement.owner["spare.weight"] == placement.owner["spare.bias"] == 1


def tied_in_a_stage() -> Cut:
    first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    first[1].weight = first[0].weight
    return Cut(first, nn.Linear(WIDTH, CLASSES))


def test_a_tied_parameter_within_a_stage_is_placed_under_both_names() -> None:
    module = tied_in_a_stage()
    placement = place(module, trace(module), 2)
    assert placement.owner["parts.0.0.weight"] == placement.owner["parts.0.1.weight"] == 0


def test_a_tied_parameter_across_processes_is_refused_under_both_names() -> None:
    module = linears(3)
    module.parts[1].weight = module.parts[0].weight
    traced = trace(module)
    assert traced.uses["parts.0.weight"] == {0, 1}
    with pytest.raises(PartitionError, match=r"'parts\.0\.weight' \(also named \['parts\.1\.weight'\]\) is used by"):
        place(module, traced, 3)


def test_a_buffer_that_several_processes_use_is_kept_by_each() -> None:
    class Shared(Cut):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__(*parts)
            self.register_buffer("offset", torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.cuts[0](self.parts[0](x + self.offset)) + self.offset)

    module = Shared(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    placement = place(module, trace(module), 2)
    assert placement.shared == {"offset"}
    assert "offset" not in placement.elsewhere(0) | placement.elsewhere(1)


def test_more_processes_than_stages_are_refused() -> None:
    module = linears(2)
    with pytest.raises(PartitionError, match="3 processes but only 2 stages"):
        place(module, trace(module), 3)
