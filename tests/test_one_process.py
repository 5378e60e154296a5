"""The callback alone: the degenerate cases are exact, and the loop is the user's own."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_sg import (
    Boundary,
    GradientPredictor,
    LinearPredictor,
    LossModelPredictor,
    MLPPredictor,
    NonFinitePredictionError,
    PredictorTraining,
    SyntheticGradients,
    TrueGradient,
    ZeroPredictor,
)
from tests.models import CLASSES, FEATURES, Classifier, assert_same_state, loader, make_trainer, state_of


def fit(module: pl.LightningModule, callback: SyntheticGradients | None = None, **arguments: Any) -> dict[str, Tensor]:
    pl.seed_everything(3, verbose=False)
    trainer = make_trainer(callbacks=[callback] if callback else [], **arguments)
    trainer.fit(module, loader(), loader(shuffle=False))
    return state_of(module)


def classifier(kind: type[Classifier] = Classifier) -> Classifier:
    pl.seed_everything(3, verbose=False)
    return kind()


class Dropping(Classifier):
    """Draws random numbers in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x, 0.2, self.training))


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}])
def test_true_gradient_is_plain_backpropagation_bit_for_bit(arguments: dict[str, Any]) -> None:
    plain = fit(classifier(Dropping), **arguments)
    cut = fit(classifier(Dropping), SyntheticGradients(predictor=TrueGradient()), **arguments)
    assert_same_state(plain, cut, exact=True)


def test_no_boundary_changes_nothing() -> None:
    plain = fit(classifier(Dropping))
    assert_same_state(plain, fit(classifier(Dropping), SyntheticGradients(boundaries=[])), exact=True)


class Detached(Classifier):
    """The same network with ``detach`` where the boundaries are; weight decay tells no gradient from a zero one."""

    detach = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = x.detach() if self.detach and isinstance(layer, Boundary) else layer(x)
        return x

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)


class Attached(Detached):
    detach = False


def test_zero_predictor_is_detach_bit_for_bit() -> None:
    detached = fit(classifier(Detached))
    cut = fit(classifier(Attached), SyntheticGradients(predictor=ZeroPredictor()))
    assert_same_state(detached, cut, exact=True)
    assert torch.equal(cut["net.0.0.weight"], state_of(classifier(Attached))["net.0.0.weight"])


def test_predictors_leave_the_users_random_numbers_alone() -> None:
    pl.seed_everything(3, verbose=False)
    make_trainer(max_epochs=1).fit(classifier(), loader())
    plain = torch.rand(3)
    pl.seed_everything(3, verbose=False)
    make_trainer(max_epochs=1, callbacks=[SyntheticGradients()]).fit(classifier(), loader())
    assert torch.equal(torch.rand(3), plain)


class Named(pl.LightningModule):
    """A model without annotations; the second block changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 16), nn.LayerNorm(16))
        self.second = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.second(self.first(batch[0]))), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.head(self.second(self.first(batch[0]))), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def attributes(module: nn.Module) -> dict[str, Any]:
    """The names of a module's attributes, hooks among them; of the containers, also their sizes."""
    return {name: len(value) if isinstance(value, Sized) else None for name, value in vars(module).items()}


def test_boundaries_by_name_cut_models_that_cannot_be_edited() -> None:
    pl.seed_everything(3, verbose=False)
    module = Named()
    before = state_of(module)
    callback = SyntheticGradients(boundaries=["first", "second"])
    after = fit(module, callback, max_epochs=4)
    assert set(before) == set(after)
    assert not torch.equal(before["first.0.weight"], after["first.0.weight"])
    assert all(trained.step == 20 for trained in callback.trainers.values())
    assert attributes(module.first) == attributes(Named().first)


def test_an_in_place_operation_after_the_boundary_does_not_reach_the_predictor() -> None:
    seen: list[Tensor] = []

    class Watching(MLPPredictor):
        def loss(self, activations: Any, context: Any, targets: Any) -> Tensor:
            seen.append(activations[0].clone())
            return super().loss(activations, context, targets)

    pl.seed_everything(3, verbose=False)
    fit(Named(), SyntheticGradients(boundaries=["first"], predictor=Watching(hidden=8)), max_epochs=1)
    assert all((activation < 0).any() for activation in seen)  # LayerNorm's output, before the ReLU


class Tuples(pl.LightningModule):
    """Two activations and an integer tensor cross together."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 6)
        self.cut = Boundary()
        self.head = nn.Linear(14, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = {"left": torch.tanh(self.left(x)), "right": torch.tanh(self.right(x)), "places": torch.arange(len(x))}
        left, (right, places) = self.cut(h["left"], (h["right"], h["places"]))
        assert torch.equal(places, h["places"])
        return F.cross_entropy(self.head(torch.cat([left, right], -1)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("predictor", [LinearPredictor(), MLPPredictor(hidden=16), LossModelPredictor(hidden=16)])
def test_tuples_of_tensors_cross_together(predictor: GradientPredictor) -> None:
    pl.seed_everything(3, verbose=False)
    module = Tuples()
    callback = SyntheticGradients(predictor=predictor)
    before = state_of(module)
    trainer = make_trainer(callbacks=[callback], max_epochs=30)
    trainer.fit(module, loader())
    assert not torch.equal(before["left.weight"], module.left.weight)
    assert not torch.equal(before["right.weight"], module.right.weight)
    assert trainer.callback_metrics["sg/cut/cosine"] > 0.2


@pytest.mark.parametrize("accumulate", [1, 4])
def test_targets_do_not_depend_on_gradient_accumulation(accumulate: int) -> None:
    """With a learning rate of zero every batch has the same target, however the loss is divided."""
    targets: list[Tensor] = []

    class Watching(MLPPredictor):
        def loss(self, activations: Any, context: Any, targets_: Any) -> Tensor:
            targets.append(targets_[0].clone())
            return super().loss(activations, context, targets_)

    pl.seed_everything(3, verbose=False)
    module = Classifier(stages=2, learning_rate=0.0)
    callback = SyntheticGradients(predictor=Watching(hidden=8), delay=0)
    make_trainer(callbacks=[callback], accumulate_grad_batches=accumulate, max_epochs=1).fit(
        module, loader(shuffle=False)
    )
    x, y = next(iter(loader(shuffle=False)))
    module.train()
    h = module.net[0](x).detach().requires_grad_()
    F.cross_entropy(module.net[2:](h), y, reduction="sum").backward()
    torch.testing.assert_close(targets[0], h.grad)


def test_metrics_reach_loggers(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    callback = SyntheticGradients(metrics="all")
    fit(classifier(), callback, logger=logger, log_every_n_steps=1)
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    for name in ("net.1", "net.3", "net.5"):
        for metric in ("loss", "cosine", "norm_ratio"):
            assert f"sg/{name}/{metric}" in logged[0]
            column = logged[0].split(",").index(f"sg/{name}/{metric}")
            values = [float(line.split(",")[column]) for line in logged[1:] if line.split(",")[column]]
            assert len(values) >= 7


@pytest.mark.parametrize("train_every", [1, 3])
def test_predictors_learn_from_the_batches_that_are_due(train_every: int) -> None:
    learned: list[int] = []

    class Counting(MLPPredictor):
        def loss(self, activations: Any, context: Any, targets: Any) -> Tensor:
            learned.append(len(learned))
            return super().loss(activations, context, targets)

    module = Classifier(stages=2)
    callback = SyntheticGradients(predictor=Counting(hidden=8), delay=2, training=PredictorTraining(every=train_every))
    make_trainer(callbacks=[callback], max_steps=10, max_epochs=-1).fit(module, loader())
    # Batch t is learned from before the prediction for batch t + 3: of ten batches, 0 to 6.
    assert len(learned) == len(range(0, 7, train_every))


class Exploding(LossModelPredictor):
    """Returns NaN from its third prediction on."""

    def forward(self, activations: Any, context: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return tuple(part * float("nan") if self.calls > 2 else part for part in super().forward(activations, context))


def test_a_non_finite_prediction_is_an_error_that_names_the_boundary() -> None:
    module = Classifier(stages=2)
    with pytest.raises(NonFinitePredictionError, match=r"boundary 'net\.1' is not finite .*predictor itself diverged"):
        fit(module, SyntheticGradients(predictor=Exploding(hidden=8), guard=None))
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


class Plain(pl.LightningModule):
    """A deep network without normalisation layers, and SGD with momentum: where errors could feed on themselves."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place in range(4):
            layers += [nn.Linear(64 if place else FEATURES, 64), nn.ReLU(), Boundary()]
        self.net = nn.Sequential(*layers, nn.Linear(64, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "predictor",
    [
        LinearPredictor(),
        LinearPredictor(normalize="none"),
        MLPPredictor(hidden=32),
        LossModelPredictor(hidden=32),
    ],
)
def test_networks_without_normalisation_stay_finite(predictor: GradientPredictor) -> None:
    pl.seed_everything(3, verbose=False)
    trainer = make_trainer(callbacks=[SyntheticGradients(predictor=predictor)], max_epochs=40)
    trainer.fit(Plain(), loader())
    assert trainer.callback_metrics["loss"] < 1.7  # at the start log(5) = 1.61


class Manual(Classifier):
    """Manual optimization, with the loss read and logged."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss)


def test_manual_optimization_is_the_same() -> None:
    automatic = fit(classifier(), SyntheticGradients())
    assert_same_state(automatic, fit(classifier(Manual), SyntheticGradients()), exact=True)
