"""Each mistake gives an error that names what it is about and says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import (
    Boundary,
    BoundaryError,
    LossModelPredictor,
    PartitionError,
    SyntheticGradients,
    SyntheticGradientsError,
)
from tests.models import CLASSES, FEATURES, Classifier, loader, make_trainer
from tests.ranks import Failure, run_ranks
from tests.refused import Stages, fit_one, fit_split


def test_unknown_boundary_names_the_nearest() -> None:
    with pytest.raises(BoundaryError, match=r"'frist' is not a submodule of Stages\. The nearest names are \['first'"):
        fit_one(Stages(), boundaries=["frist"])


def test_repeated_boundary() -> None:
    with pytest.raises(BoundaryError, match=r"\['first'\] is listed more than once"):
        fit_one(Stages(), boundaries=["first", "first"])


class Bypassing(Stages):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("devices", [1, 2])
def test_boundary_that_is_never_reached(devices: int) -> None:
    expected = "Boundary 'cut' was never reached in the step"
    if devices == 1:
        with pytest.raises(BoundaryError, match=expected):
            fit_one(Bypassing())
    else:
        assert all(expected in failure.message for failure in fit_split(Bypassing))


class Skipping(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.head(self.second(self.cut(h)) + h)


@pytest.mark.parametrize("devices", [1, 2])
def test_activation_that_goes_around_a_boundary(devices: int) -> None:
    expected = "An activation goes around boundary 'cut': 'Skipping' (stage 0) computes it with shape (16, 8), and `"
    if devices == 1:
        with pytest.raises(BoundaryError, match="goes around boundary") as raised:
            fit_one(Skipping())
        assert expected in str(raised.value)
    else:
        assert all(expected in failure.message for failure in fit_split(Skipping))


class Teacher(nn.Module):
    """A frozen network beside the student's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


class Distilled(Stages):
    """Learns from a teacher that is called before the student."""

    after = False

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Teacher()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        taught = self.teacher(batch[0]) if not self.after else None
        scores = self(batch[0])
        taught = self.teacher(batch[0]) if taught is None else taught
        return F.mse_loss(scores, taught) + F.cross_entropy(scores, batch[1])


class DistilledAfter(Distilled):
    after = True


class Within(nn.Module):
    """Teacher and student in one submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(FEATURES, 8), Boundary(), nn.Linear(8, CLASSES))
        self.teachers = nn.ModuleList([Teacher(), Teacher()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        taught = self.teachers[0](x) + self.teachers[1](x)
        return self.student(x), taught


class DistilledWithin(Stages):
    def __init__(self) -> None:
        super().__init__()
        del self.first, self.cut, self.second
        self.model = Within()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(*self.model(batch[0]))


@pytest.mark.parametrize(
    ("kind", "makers", "cut"),
    [(Distilled, "'teacher'", "cut"), (DistilledWithin, "'model.teachers'", "model.student.1")],
)
def test_a_teacher_before_the_student_is_to_be_called_after_the_boundary(
    kind: type[Stages], makers: str, cut: str
) -> None:
    for failure in fit_split(kind):
        assert failure.kind == "BoundaryError"
        assert f"Nothing that crosses it comes from {makers}: call {makers} after boundary '{cut}'" in failure.message


def test_a_teacher_after_the_boundary_trains_the_student() -> None:
    assert fit_split(DistilledAfter) == [None, None]


def test_an_activation_that_also_crosses_is_not_to_be_computed_later() -> None:
    for failure in fit_split(Skipping):
        assert "after boundary" not in failure.message
        assert "Pass the activation through the boundary too" in failure.message


class Mistaken(Stages):
    """Has an error that has nothing to do with stages."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, : FEATURES - 1])


class Reading(Stages):
    """Reads a value before the boundary."""

    def forward(self, x: Tensor) -> Tensor:
        if self.first(x).mean() > 100:
            raise AssertionError
        return super().forward(x)


def test_an_error_of_the_users_own_is_not_put_down_to_the_boundaries() -> None:
    for failure in fit_split(Mistaken):
        assert failure.kind == "PartitionError"
        assert (
            "The step fails before it comes to boundary 'cut': in 'first' of stage 0, RuntimeError" in failure.message
        )
        assert "on ordinary tensors too" in failure.message
        assert "Move the code" not in failure.message
    with pytest.raises(RuntimeError, match="cannot be multiplied"), pytest.warns(UserWarning, match="ordinary tensors"):
        fit_one(Mistaken())


def test_code_that_needs_values_is_still_told_as_that() -> None:
    for failure in fit_split(Reading):
        assert "It reads a value" in failure.message
        assert "Move the code behind the last boundary" in failure.message


class Twice(Stages):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(self.cut(torch.relu(self.first(x)))))


def test_boundary_that_is_reached_with_what_has_crossed_it() -> None:
    for failure in fit_split(Twice):
        assert "comes to boundary 'cut' again with what 'boundary 'cut'' makes" in failure.message


class Tied(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, FEATURES, bias=False)
        self.again.weight = self.first.weight = nn.Parameter(torch.randn(FEATURES, FEATURES))
        self.first.bias = None
        self.second = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.again(self.cut(torch.relu(self.first(x)))))


def test_tied_parameter_across_processes() -> None:
    for failure in fit_split(Tied):
        assert failure.kind == "PartitionError"
        assert "Parameter 'first.weight' (also named ['again.weight']) is used by stage 0" in failure.message
        assert "stage 1 (after boundary 'cut' to the end)" in failure.message


def test_tied_parameter_in_one_process_trains() -> None:
    module = Tied()
    before = module.first.weight.detach().clone()
    fit_one(module)
    assert module.again.weight is module.first.weight
    assert torch.isfinite(module.first.weight).all()
    assert not torch.equal(module.first.weight, before)


class Empty(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.again = Boundary()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.again(self.cut(torch.relu(self.first(x))))))


@pytest.mark.parametrize("devices", [1, 2])
def test_stage_without_parameters(devices: int) -> None:
    expected = "stage 1 (after boundary 'cut' up to boundary 'again') has no trainable parameters"
    if devices == 1:
        with pytest.raises(PartitionError) as raised:
            fit_one(Empty())
        assert expected in str(raised.value)
    else:
        assert all(expected in failure.message for failure in fit_split(Empty))


def test_more_devices_than_stages() -> None:
    for failure in fit_split(Stages, devices=3):
        assert failure.kind == "PartitionError"
        assert "3 processes but only 2 stages" in failure.message
        assert "Trainer(devices=2)" in failure.message


class Peeking(Stages):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(self.cut(torch.relu(h if h.mean().item() > 0 else -h)))


def test_reading_a_value_before_the_last_boundary() -> None:
    for failure in fit_split(Peeking):
        assert failure.kind == "PartitionError"
        assert "cannot be followed to boundary 'cut': in 'Peeking' of stage 0" in failure.message
        assert "It reads a value" in failure.message


def test_reading_a_value_is_no_obstacle_in_one_process() -> None:
    with pytest.warns(UserWarning, match="could not be checked before training, which goes on"):
        fit_one(Peeking())


def test_replicas_are_refused_by_name() -> None:
    def work() -> None:
        trainer = make_trainer(strategy="ddp", devices=2, callbacks=[SyntheticGradients()])
        trainer.fit(Classifier(), loader())

    for failure in run_ranks(2, work, may_fail=True):
        assert isinstance(failure, Failure)
        assert "does not support 2 replicas under DDPStrategy" in failure.message


def test_predictor_that_needs_labels_says_so() -> None:
    class Unlabelled(Stages):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            goal = torch.from_numpy(batch[0].sum(1, keepdim=True).numpy() * 2)
            return (self(batch[0]) - goal).square().mean()

    data = DataLoader(TensorDataset(torch.randn(20, FEATURES)), batch_size=10)
    with pytest.raises(
        SyntheticGradientsError,
        match=r"LossModelPredictor at boundary 'cut' cannot work with .* LossModelPredictor needs the labels",
    ):
        fit_one(Unlabelled(), data, predictor=LossModelPredictor())


def test_context_that_the_batch_does_not_have() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"context='label'\): the batch has no such entry"):
        fit_one(Stages(), context="label")
