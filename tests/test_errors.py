"""Nothing fails silently: each mistake gives an error that names what it is about and says what to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
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
    SyntheticGradientStrategy,
)
from tests.models import CLASSES, FEATURES, Classifier, dataset, loader, make_trainer
from tests.ranks import Failure, run_ranks


def fit_one(module: pl.LightningModule, data: Any = None, **callback: Any) -> None:
    pl.seed_everything(1, verbose=False)
    make_trainer(callbacks=[SyntheticGradients(**callback)]).fit(module, data or loader())


def fit_split(
    make: Callable[[], pl.LightningModule],
    devices: int = 2,
    timeout: float = 20.0,
    data: Callable[[], Any] = loader,
    **arguments: Any,
) -> list[Any]:
    """Fits in several processes and returns each rank's :class:`Failure`, or ``None`` where it ended well."""

    def work() -> None:
        pl.seed_everything(1, verbose=False)
        strategy = SyntheticGradientStrategy(timeout=timeout)
        make_trainer(strategy=strategy, devices=devices, **arguments).fit(make(), data())

    return run_ranks(devices, work, may_fail=True)


class Stages(pl.LightningModule):
    """Two linear stages; subclasses do something wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.second = nn.Linear(FEATURES, 8), Boundary(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(torch.relu(self.first(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


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
    expected = "An activation goes around boundary 'cut': made in 'Skipping' (stage 0), of shape (16, 8), it is used by"
    if devices == 1:
        with pytest.raises(BoundaryError, match="goes around boundary") as raised:
            fit_one(Skipping())
        assert expected in str(raised.value)
    else:
        assert all(expected in failure.message for failure in fit_split(Skipping))


class Twice(Stages):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(self.cut(torch.relu(self.first(x)))))


def test_boundary_that_is_reached_twice() -> None:
    with pytest.raises(BoundaryError, match="'cut' was reached twice in one step"):
        fit_one(Twice())


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
    fit_one(Tied())


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


def shuffled_by_rank() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    return DataLoader(dataset(), batch_size=10, shuffle=True, generator=generator)


def test_stages_that_see_different_batches() -> None:
    last, first = fit_split(Stages, data=shuffled_by_rank)
    assert last.kind == "BatchMismatchError"
    assert "stage 1 (rank 0) and stage 0 (rank 1) were given different batches at training batch 0" in last.message
    assert first.kind == "StageLostError"
    assert "stage 1 (rank 0) failed at training batch 0" in first.message


def sized_by_rank() -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=10 + int(os.environ["RANK"]))


def test_stages_that_see_batches_of_different_size() -> None:
    last, _first = fit_split(Stages, data=sized_by_rank)
    assert "has activations of shape [(11, 8)] where [(10, 8)] are due" in last.message


class Dying(Classifier):
    """Its last stage dies without a word at the sixth batch."""

    how = "kill"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.trainer.global_step == 5 and loss.requires_grad and loss.item() > -1:
            if self.how == "kill":
                os._exit(1)
            if self.how == "hang":
                time.sleep(6)
            raise ValueError("the loss is odd")
        return loss


class Failing(Dying):
    how = "raise"


class Hanging(Dying):
    how = "hang"


def test_a_stage_that_dies_is_named_at_once() -> None:
    began = time.monotonic()
    results = fit_split(lambda: Dying(stages=3), devices=3, timeout=60.0)
    assert results[0] is None
    assert results[1].kind == results[2].kind == "StageLostError"
    assert "stage 2 (rank 0) is gone" in results[1].message
    # The chain of reasons reaches the first stage too.
    assert "stage 1 (rank 1)" in results[2].message
    assert time.monotonic() - began < 45


def test_a_stage_that_fails_tells_its_neighbours_why() -> None:
    results = fit_split(lambda: Failing(stages=3), devices=3, timeout=60.0)
    assert results[0].kind == "ValueError"
    for result in results[1:]:
        assert "stage 2 (rank 0) failed at training batch" in result.message
        assert "ValueError: the loss is odd" in result.message


def test_a_stage_that_hangs_runs_into_the_timeout() -> None:
    results = fit_split(lambda: Hanging(stages=2), devices=2, timeout=2.0)
    assert results[1].kind == "StageLostError"
    assert "stage 1 (rank 0) did not send the target of" in results[1].message
    assert "within 2 s" in results[1].message


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
            return self(batch[0]).square().mean()

    data = DataLoader(TensorDataset(torch.randn(20, FEATURES)), batch_size=10)
    with pytest.raises(
        SyntheticGradientsError,
        match=r"LossModelPredictor at boundary 'cut' cannot work with .* LossModelPredictor needs the labels",
    ):
        fit_one(Unlabelled(), data, predictor=LossModelPredictor())


def test_context_that_the_batch_does_not_have() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"context='label'\): the batch has no such entry"):
        fit_one(Stages(), context="label")


@pytest.mark.parametrize("arguments", [{"delay": -1}, {"train_every": 0}, {"bound": 0.0}, {"boundaries": "first"}])
def test_arguments_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"delay|boundaries"):
        SyntheticGradients(**arguments)
