"""Synthetic inputs in one process: the next stage goes on with a predicted activation."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sg import Boundary, ExactGradients, SyntheticGradients, SyntheticInputs, TrueGradient
from tests.input_models import Masked, Told, as_dict, classifier, fit
from tests.models import FEATURES, Classifier, assert_same_state, dataset, loader, make_trainer, state_of


@pytest.mark.parametrize("options", [{}, {"exact": ExactGradients(every=1, correction=1.0)}, {"delay": 0}])
def test_the_true_activation_as_a_prediction_changes_nothing_bit_for_bit(options: dict[str, Any]) -> None:
    plain, told = classifier(4), classifier(4)
    fit(plain, SyntheticGradients(**options))
    before = itertools.cycle([1, 3, 5])  # in each step the boundaries ask in their order

    def true(features: Tensor, _shapes: Any) -> tuple[Tensor]:
        with torch.no_grad():  # a copy, whose running statistics may move
            return (copy.deepcopy(told.net[: next(before)])(features),)

    fit(told, SyntheticGradients(inputs=SyntheticInputs(Told(true)), **options))
    assert_same_state(state_of(plain), state_of(told), exact=True)


class Replacing(Classifier):
    """The next stage goes on with a value of its own; its gradient counts as the activation's."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
            if isinstance(layer, Boundary) and self.training and self.global_step >= 2:
                x = x - x.detach() + _constant(x)
        return x


def _constant(like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, like.numel()).view_as(like)


def test_targets_are_the_gradients_at_the_predicted_activation() -> None:
    """With the true gradient passed on, the stage before is given the gradient found at the prediction."""
    replaced, predicted = Replacing(2), Classifier(2)
    predicted.load_state_dict(replaced.state_dict())
    pl.seed_everything(3, verbose=False)
    make_trainer().fit(replaced, loader())
    pl.seed_everything(3, verbose=False)
    inputs = SyntheticInputs(
        Told(lambda features, shapes: (_constant(torch.empty(len(features), *shapes[0])),)), warm_up=2
    )
    make_trainer(callbacks=[SyntheticGradients(predictor=TrueGradient(), inputs=inputs)]).fit(predicted, loader())
    assert_same_state(state_of(replaced), state_of(predicted))


def test_evaluation_uses_the_true_path() -> None:
    module = classifier()
    trainer = fit(module, SyntheticGradients(inputs=SyntheticInputs()))
    x, y = dataset().tensors
    module.eval()
    with torch.no_grad():
        logits = module.net(x)
    (seen,) = trainer.validate(module, DataLoader(dataset(), batch_size=len(y)), verbose=False)
    assert seen["val_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), abs=1e-6)
    predicted = torch.cat(trainer.predict(module, DataLoader(dataset(), batch_size=32)))  # type: ignore[arg-type]
    torch.testing.assert_close(predicted, logits)


def test_masks_cross_unchanged_and_labels_are_not_seen() -> None:
    callback = SyntheticGradients(inputs=SyntheticInputs())
    fit_data = DataLoader(dataset(), batch_size=16, collate_fn=as_dict)
    pl.seed_everything(3, verbose=False)
    make_trainer(callbacks=[callback]).fit(Masked(), fit_data)
    trained = callback.session.inputs.trainers["cut"]
    assert trained.learned > 0
    assert trained.predictor.shapes == [(8,)]  # type: ignore[union-attr]
    assert list(trained.ledger)[-1].features.shape[1] == FEATURES


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_predictions_have_the_activations_dtype(precision: Any) -> None:
    callback = SyntheticGradients(inputs=SyntheticInputs())
    fit(classifier(), callback, precision=precision)
    assert all(p.dtype == torch.float32 for p in callback.session.inputs.trainers["net.1"].predictor.parameters())
