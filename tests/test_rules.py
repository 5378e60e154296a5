"""The rules of a boundary: what each asks for, and what it makes of a batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from lightning_sg import DelayedGradient, TrueGradient, ZeroPredictor
from lightning_sg.replicas import Replicas
from lightning_sg.rules import BoundaryRule
from lightning_sg.training.record import TargetPlan
from lightning_sg.training.ruled import RuledBoundary

RULES = [
    (ZeroPredictor(), False, False, 0.0),
    (TrueGradient(), True, True, 0.0),
    (DelayedGradient(), False, True, 1.0),
    (DelayedGradient(shrink=0.7), False, True, 0.7),
]


def boundary(rule: BoundaryRule) -> RuledBoundary:
    return RuledBoundary("cut", rule, delay=1, replicas=Replicas())


@pytest.mark.parametrize(("rule", "waits", "asks", "late"), RULES, ids=lambda value: type(value).__name__)
def test_what_each_asks_for(rule: Any, waits: bool, asks: bool, late: float) -> None:
    ruled = boundary(rule)
    record = ruled.open([torch.ones(2, 3)], None, None)
    assert (record.coupled, record.wants_target, ruled.late_share) == (waits, asks, late)
    assert not ruled.wants_exact(None)
    assert ruled.needs_true_gradient == asks
    ruled.distance = 3
    assert ruled.late_share == pytest.approx(late**3)


@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("shape", [(), (6,), (4, 6), (4, 6, 5)])
def test_nothing_is_predicted_and_nothing_learned(rule: Any, shape: tuple[int, ...]) -> None:
    ruled = boundary(rule)
    for step in range(4):
        record = ruled.open([torch.ones(2, *shape)], None, None, TargetPlan(exact=step == 1))
        ruled.receive_due(record.step)
        ruled.learn_due(record.step)
        ruled.predict(record)
        record.add_target([torch.ones(2, *shape)])
        assert record.prediction is None
        assert not record.learns_target
    assert ruled.take_metrics() == {}
    assert [record.step for record in ruled.ledger] == [2, 3]


@pytest.mark.parametrize("shrink", [0.0, -1.0, 1.1, float("nan")])
def test_a_delayed_gradient_is_not_enlarged(shrink: float) -> None:
    with pytest.raises(ValueError, match=r"DelayedGradient\(shrink=.*must be a finite number above 0 and at most 1"):
        DelayedGradient(shrink)


@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES], ids=lambda rule: type(rule).__name__)
def test_rules_can_be_copied_and_pickled(rule: Any) -> None:
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert type(other) is type(rule)
        assert (other.waits, other.late_share(2)) == (rule.waits, rule.late_share(2))


def test_what_is_under_way_is_saved_and_goes_on() -> None:
    first, second = boundary(TrueGradient()), boundary(TrueGradient())
    record = first.open([torch.ones(2, 3)], None, None)
    first.predict(record)
    record.add_target([torch.ones(2, 3)])
    second.load_state_dict(first.state_dict())
    second.open([torch.ones(2, 3)], None, None)
    (restored,) = second.ledger
    assert restored.coupled
    assert restored.targets is not None
    assert record.targets is not None
    assert torch.equal(restored.targets[0], record.targets[0])
    assert second.step == 2
