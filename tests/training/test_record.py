"""One batch at one boundary: targets in the predictor's units."""

from __future__ import annotations

import pytest
import torch

from lightning_sg.training import Record


def test_targets_of_several_backward_passes_add_up() -> None:
    record = Record(0, (torch.ones(4, 2),), None, wants_target=True)
    record.add_target([torch.full((4, 2), 0.25)])
    record.add_target([None])
    record.add_target([torch.full((4, 2), 0.5)])
    assert record.targets is not None
    assert torch.equal(record.targets[0], torch.full((4, 2), 3.0))


def test_a_smaller_last_batch_has_targets_of_the_same_size_for_each_sample() -> None:
    target_of_each_sample = torch.tensor([1.0, -2.0])
    for samples in (8, 3):
        record = Record(0, (torch.ones(samples, 2),), None, wants_target=True)
        record.add_target([target_of_each_sample.expand(samples, 2) / samples])
        assert record.targets is not None
        torch.testing.assert_close(record.targets[0], target_of_each_sample.expand(samples, 2))


def test_the_residual_is_the_exact_minus_the_used_gradient() -> None:
    record = Record(0, (torch.ones(4, 2),), None, wants_target=True)
    assert record.residual is None
    record.prediction = (torch.full((4, 2), 0.5),)
    record.add_target([torch.full((4, 2), 0.25)])  # of the mean: 1 for each sample
    record.add_residual([torch.full((4, 2), 0.5)])
    assert record.exact_targets is not None
    assert record.residual is not None
    assert torch.equal(record.exact_targets[0], torch.full((4, 2), 3.0))
    assert torch.equal(record.residual[0], torch.full((4, 2), 2.5))


def test_a_coupled_batch_uses_its_target() -> None:
    record = Record(0, (torch.ones(4, 2),), None, wants_target=True, coupled=True)
    record.prediction = (torch.zeros(4, 2),)
    assert record.used is None
    record.add_target([torch.full((4, 2), 0.25)])
    assert record.used is record.targets


def test_a_record_of_earlier_versions_loads() -> None:
    record = Record(3, (torch.ones(4, 2),), None, wants_target=True, coupled=True, due=5)
    state = record.state_dict()
    del state["coupled"]
    assert Record.load({**state, "true_share": 1.0}) == record


@pytest.mark.parametrize("laid_out", [(3, 5, 2), (5, 3, 2), (3, 6, 2)])
def test_targets_lie_in_memory_as_activations_do(laid_out: tuple[int, int, int]) -> None:
    """A sum in another order ends in other last bits, and two processes would not compute what one does."""
    activation = torch.randn(5, 3, 2).transpose(0, 1)  # as of a recurrent layer with `batch_first`
    values = torch.randn(3, 5, 2)
    gradient = torch.zeros(laid_out)
    gradient = gradient.transpose(0, 1) if laid_out[0] == 5 else gradient[:, :5]
    gradient.copy_(values)
    record = Record(0, (activation,), None, wants_target=True)
    record.add_target((gradient,))
    assert record.targets is not None
    assert record.targets[0].stride() == activation.stride()
    assert torch.equal(record.targets[0], values * 3)
