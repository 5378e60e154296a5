"""A boundary through which no gradient flows is refused, alike in one process and in several."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_sg import Boundary, BoundaryError, Chunks, PartitionError, SyntheticGradients, TrueGradient
from lightning_sg.partition.automatic import choose_boundaries
from lightning_sg.partition.work import Work
from tests.message_models import TwoNetworks, steps
from tests.models import CLASSES, FEATURES, assert_same_state, loader, make_trainer
from tests.ranks import Failure
from tests.recurrent_models import Recurrent, sequences
from tests.refused import Stages, fit_one, fit_split
from tests.two_stages import Two, fit


class UnderNoGrad(Stages):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.cut(torch.relu(self.first(x)))
        return self.second(h)


class UnderInferenceMode(Stages):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            h = self.cut(torch.relu(self.first(x)))
        return self.second(h.clone())


class GradientsSwitchedOff(Stages):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        h = self.cut(torch.relu(self.first(x)))
        torch.set_grad_enabled(True)
        return self.second(h)


class Detached(Stages):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(torch.relu(self.first(x)).detach()))


class StageUnderNoGrad(Stages):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.relu(self.first(x))
        return self.second(self.cut(h))


class Rounded(Stages):
    """The activations are the numbers of words for the next stage."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Embedding(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(self.first(x).argmax(-1)))


class Rereads(Stages):
    """Several tensors, none of which carries a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.cut(torch.relu(self.first(x)).detach(), x.argmax(-1))
        return self.second(h)


class Sealed(Stages):
    """Of three stages, the one in the middle is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.again = nn.Linear(8, 8), Boundary()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.middle(self.cut(torch.relu(self.first(x)))))
        return self.second(self.again(h.detach()))


STAGE = r"so stage 0 \(from the start up to boundary 'cut'\) gets no gradient and never trains"
BLOCKED: dict[str, tuple[type[Stages], str]] = {
    "no_grad": (UnderNoGrad, r"Boundary 'cut' was reached under `torch\.no_grad\(\)`, so .* never trains"),
    "inference_mode": (
        UnderInferenceMode,
        r"Boundary 'cut' was reached under `torch\.inference_mode\(\)`, so .* never",
    ),
    "set_grad_enabled": (GradientsSwitchedOff, r"Boundary 'cut' was reached under `torch\.no_grad\(\)`, so .* never"),
    "detach": (Detached, rf"Boundary 'cut' was given tensors that are detached .*, {STAGE}\. Take that out"),
    "the stage under no_grad": (StageUnderNoGrad, rf"Boundary 'cut' was given tensors that are detached .*, {STAGE}"),
    "integers": (Rounded, rf"Boundary 'cut' was given integers only, .*, {STAGE}\. Move it before"),
    "several tensors": (Rereads, rf"Boundary 'cut' was given tensors that are detached .*, {STAGE}"),
    "the middle": (
        Sealed,
        r"Boundary 'again' .* detached .*, so stage 1 \(after boundary 'cut' up to boundary 'again'\)",
    ),
}


def refuse(make: type[Stages], devices: int, message: str) -> None:
    if devices == 1:
        with pytest.raises(BoundaryError, match=message):
            fit_one(make())
    else:
        failures = fit_split(make, devices)
        assert [failure.kind for failure in failures] == ["BoundaryError"] * devices
        for failure in failures:
            with pytest.raises(BoundaryError, match=message):
                raise BoundaryError(failure.message)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("case", BLOCKED)
def test_a_stage_that_never_trains_is_refused(case: str, devices: int) -> None:
    make, message = BLOCKED[case]
    torch.set_grad_enabled(True)
    try:
        refuse(make, devices, message)
    finally:
        torch.set_grad_enabled(True)


class Untraceable(Detached):
    def forward(self, x: Tensor) -> Tensor:
        if self.first(x).mean().item() > 1e9:
            raise AssertionError
        return super().forward(x)


class UntraceableUnderNoGrad(UnderNoGrad):
    def forward(self, x: Tensor) -> Tensor:
        if self.first(x).mean().item() > 1e9:
            raise AssertionError
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:The boundaries could not be checked")
@pytest.mark.parametrize(("make", "seen"), [(Untraceable, "detached"), (UntraceableUnderNoGrad, "no_grad")])
def test_it_is_refused_too_where_the_step_cannot_be_traced(make: type[Stages], seen: str) -> None:
    with pytest.raises(BoundaryError, match=rf"Boundary 'cut' .*{seen}.* never trains"):
        fit_one(make())


# What stays allowed


class Partly(Two):
    """Of several tensors, one carries a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        h, rows, mask = self.cut(torch.relu(self.first(x)), x.argmax(-1), (x[:, :1] > 0).float())
        return self.second(h * mask) + F.one_hot(rows % CLASSES, CLASSES)


class TeachesItself(Two):
    """A pass without gradients goes before the one that trains."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            goal = self(batch[0]).softmax(-1)
        return F.cross_entropy(self(batch[0]), goal)


class Frozen(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


def test_several_tensors_of_which_one_carries_a_gradient_train_alike() -> None:
    expected = fit(Partly)
    for state in fit(Partly, devices=2):
        assert_same_state(expected, state)


@pytest.mark.filterwarnings("error:Boundary")
def test_a_pass_without_gradients_beside_the_one_that_trains() -> None:
    fit(TeachesItself)


def test_between_processes_such_a_pass_trains_alike() -> None:
    expected = fit(TeachesItself)
    for state in fit(TeachesItself, devices=2):
        assert_same_state(expected, state)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_frozen_stage_is_told_as_before(devices: int) -> None:
    message = "has no trainable parameters"
    if devices == 1:
        with pytest.raises(PartitionError, match=message):
            fit_one(Frozen())
    else:
        assert all(message in failure.message for failure in fit_split(Frozen))


@pytest.mark.filterwarnings("error:Boundary")
def test_evaluation_has_no_gradients_and_needs_none() -> None:
    fit(Two)
    assert not any(isinstance(each, Failure) for each in fit(Two, devices=2))


# A later batch


class Alternates(Two):
    """Trains all stages on even batches, the last on odd ones."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = torch.relu(self.first(batch[0]))
        return F.cross_entropy(self.second(self.cut(h if batch_idx % 2 == 0 else h.detach())), batch[1])


class AlternatesByNoGrad(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.set_grad_enabled(batch_idx % 2 == 0):
            h = self.cut(torch.relu(self.first(batch[0])))
        return F.cross_entropy(self.second(h), batch[1])


class AlternatesFromTheLast(Two):
    """Trains the last stage alone on the first batch, by its index."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = torch.relu(self.first(batch[0]))
        return F.cross_entropy(self.second(self.cut(h if batch_idx % 2 else h.detach())), batch[1])


class AlternatesByCount(Two):
    """Trains the last stage alone on the first batch, by a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        h = torch.relu(self.first(batch[0]))
        return F.cross_entropy(self.second(self.cut(h.detach() if self.seen % 3 else h)), batch[1])


@pytest.mark.parametrize("make", [AlternatesFromTheLast, AlternatesByCount])
def test_a_step_that_alternates_may_begin_with_the_last_stage(make: type[Two]) -> None:
    with pytest.warns(UserWarning, match=r"Boundary 'cut' .*detached.* in training batch 0, so stage 0"):
        expected = fit(make)
    for state in fit(make, devices=2):
        assert_same_state(expected, state)


@pytest.mark.parametrize(("make", "seen"), [(Alternates, "detached"), (AlternatesByNoGrad, "no_grad")])
def test_a_later_batch_without_a_gradient_is_told_once_and_trains_on_alike(make: type[Two], seen: str) -> None:
    with pytest.warns(UserWarning, match=rf"Boundary 'cut' .*{seen}.* in training batch 1, so stage 0") as caught:
        expected = fit(make)
    assert sum("Boundary 'cut'" in str(each.message) for each in caught) == 1
    for state in fit(make, devices=2):
        assert_same_state(expected, state)


def test_in_several_processes_the_one_whose_stage_it_is_says_so() -> None:
    class Notes(Alternates):
        def on_train_end(self) -> None:
            if any("Boundary 'cut'" in str(each.message) for each in caught):
                raise AssertionError("noted")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last, first = fit(Notes, devices=2)
    assert "noted" in first.message
    assert last.kind == "StageLostError"  # it has not noted anything, and hears of it from the other
    assert "(rank 1) failed" in last.message


# Activation checkpointing


class Checkpointed(Stages):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self._first, x, use_reentrant=self.reentrant))

    def _first(self, x: Tensor) -> Tensor:
        return torch.relu(self.cut(torch.relu(self.first(x))))


class CheckpointedReentrant(Checkpointed):
    reentrant = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0].requires_grad_()), batch[1])


class UntraceableCheckpointed(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        if self.first(x).mean().item() > 1e9:
            raise AssertionError
        return super().forward(x)


class UntraceableCheckpointedReentrant(CheckpointedReentrant):
    def forward(self, x: Tensor) -> Tensor:
        if self.first(x).mean().item() > 1e9:
            raise AssertionError
        return super().forward(x)


INSIDE = r"Boundary 'cut' was reached inside activation checkpointing.*leave the boundary outside"


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("make", [Checkpointed, CheckpointedReentrant])
def test_a_boundary_inside_activation_checkpointing_is_told_as_that(make: type[Stages], devices: int) -> None:
    refuse(make, devices, INSIDE)


@pytest.mark.filterwarnings("ignore:The boundaries could not be checked")
@pytest.mark.parametrize("make", [UntraceableCheckpointed, UntraceableCheckpointedReentrant])
def test_a_recomputation_is_told_as_that_where_the_step_cannot_be_traced(make: type[Stages]) -> None:
    with pytest.raises(BoundaryError, match=INSIDE):
        fit_one(make())


class CheckpointedBetween(Two):
    """Each stage on its own is checkpointed."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cut(checkpoint(lambda x: torch.relu(self.first(x)), x, use_reentrant=False))
        return checkpoint(self.second, h, use_reentrant=False)


def test_checkpointing_between_boundaries_trains_alike() -> None:
    expected = fit(CheckpointedBetween)
    assert_same_state(fit(Two), expected)
    for state in fit(CheckpointedBetween, devices=2):
        assert_same_state(expected, state)


class ClosesTwice(Stages):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1)


def test_lbfgs_keeps_its_own_message() -> None:
    with pytest.raises(BoundaryError, match=r"evaluated several times for training batch 0.*LBFGS"):
        make_trainer(callbacks=[SyntheticGradients(predictor=TrueGradient())]).fit(ClosesTwice(), loader())


# Boundaries in time


class CutsItsMemory(Recurrent):
    def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
        (x, y), first, last = chunk
        out, state = self.unroll(x, self.memory.read(first))
        self.memory.write(state.detach(), last)
        return self.loss(out, y)


class CountsOnly(Recurrent):
    def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
        (x, y), _first, last = chunk
        out, _state = self.unroll(x, None)
        self.memory.write(torch.full((len(x),), batch_idx), last)
        return self.loss(out, y)


class SaysWords(TwoNetworks):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.messages.send(self.fast(batch[0]).argmax(-1))
        self.messages.receive()
        return self.own_loss(self.fast(batch[0]), batch[0])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: CutsItsMemory("gru"), ["Boundary in time 'memory' was given tensors that are detached"]),
        (lambda: SaysWords(), ["Boundary in time 'messages' was given integers only"]),
        (lambda: CountsOnly("gru"), []),
        (lambda: Recurrent("gru"), []),
    ],
    ids=["a state", "messages", "counters", "a state with a gradient"],
)
def test_what_is_carried_in_time_without_a_gradient_is_told_once(make: Any, told: list[str]) -> None:
    module = make()
    data = steps() if isinstance(module, TwoNetworks) else Chunks(sequences(3), 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=[SyntheticGradients()]).fit(module, data)
    said = [str(each.message) for each in caught if "Boundary in time" in str(each.message)]
    assert len(said) == len(told)
    for one, start in zip(said, told):
        assert one.startswith(start)


# Places that are chosen


class PartlyBlocked(pl.LightningModule):
    """Three of the places between its layers are no place for a boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.inside = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.relu(self.fixed(x))
        h = checkpoint(lambda h: torch.relu(self.first(torch.relu(self.inside(h)))), h, use_reentrant=False)
        return self.last(torch.relu(self.second(h)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_no_place_without_a_gradient_is_chosen() -> None:
    module, batch = PartlyBlocked(), next(iter(loader()))
    step, device = partial(module.training_step, batch, 0), torch.device("cpu")
    names = choose_boundaries(module, 2, step, device, lambda _trace, names: dict.fromkeys(names, Work())).names
    assert names == ["second"]


# No boundary at all


class Uncut(Stages):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))

    def __init__(self) -> None:
        super().__init__()
        del self.cut


class MadeLate(Stages):
    """Has its boundary from ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        del self.cut

    def configure_model(self) -> None:
        self.cut = Boundary()


def plain_warnings(module: Stages, use: str = "fit", **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(**{"callbacks": [SyntheticGradients()], **arguments})
        getattr(trainer, use)(module, loader())
    return [str(each.message) for each in caught if "plain backpropagation" in str(each.message)]


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (Uncut, {}),
        (Uncut, {"strategy": "synthetic_gradients", "callbacks": []}),
        (Stages, {"callbacks": [SyntheticGradients(boundaries=[])]}),
        (Stages, {"callbacks": [SyntheticGradients(boundaries=())]}),
    ],
    ids=["none in the model", "by the strategy", "an empty list", "an empty tuple"],
)
def test_a_fit_without_a_boundary_says_that_it_is_plain_backpropagation(make: Any, arguments: Any) -> None:
    (said,) = plain_warnings(make(), **arguments)
    for way in ("lightning_sg.Boundary()", "boundaries=[...]", "boundaries='auto'"):
        assert way in said


def test_no_other_run_says_so() -> None:
    class Predicts(Uncut):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    assert not plain_warnings(Predicts(), use="predict")
    assert not plain_warnings(Stages())
    assert not plain_warnings(MadeLate())
    assert not plain_warnings(Uncut(), callbacks=[])
