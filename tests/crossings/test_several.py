"""Steps of one process that run the network several times, or not at all."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg import LinearPredictor, SyntheticGradients, TrueGradient
from lightning_sg.errors import BoundaryError
from tests.models import assert_same_state, loader, make_trainer, state_of
from tests.noted import Watch
from tests.several_models import (
    Adversarial,
    EarlyReturn,
    Mixed,
    MixedOfThree,
    Sharp,
    Siamese,
    SiameseOfThree,
    Skipping,
    SkippingOfThree,
    Stages,
)

KINDS = [
    Siamese,
    SiameseOfThree,
    Mixed,
    MixedOfThree,
    Skipping,
    SkippingOfThree,
    EarlyReturn,
    Adversarial,
]


def fit(kind: type[pl.LightningModule], *callbacks: Any, **arguments: Any) -> dict[str, Tensor]:
    pl.seed_everything(3, verbose=False)
    module = kind()
    make_trainer(callbacks=list(callbacks), **arguments).fit(module, loader(shuffle=False))
    return state_of(module)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_true_gradient_it_is_plain_backpropagation(kind: type[pl.LightningModule]) -> None:
    assert_same_state(fit(kind), fit(kind, SyntheticGradients(predictor=TrueGradient())), exact=True)


def test_every_crossing_has_a_prediction_and_a_target_of_its_own() -> None:
    watch = Watch()
    fit(Siamese, SyntheticGradients(predictor=LinearPredictor(), delay=0), watch, max_epochs=1)
    ((_boundary, ledger),) = watch.ledgers.values()
    # Five batches, of which the last is still under way.
    assert [(record.step, record.crossing) for record in ledger.seen] == [(s, c) for s in range(4) for c in range(2)]
    first, second, *_others = ledger.seen
    assert first.targets is not None
    assert second.targets is not None
    assert not torch.equal(first.activations[0], second.activations[0])
    assert not torch.equal(first.targets[0], second.targets[0])


def test_targets_are_those_of_two_separate_backward_passes() -> None:
    watch = Watch()
    fit(Siamese, SyntheticGradients(predictor=LinearPredictor(), delay=0), watch, max_epochs=1)
    ((_boundary, ledger),) = watch.ledgers.values()
    pl.seed_everything(3, verbose=False)
    module = Siamese()
    x, y = next(iter(loader(shuffle=False)))
    lower, upper = module.net[0], module.net[1]
    hidden = [lower[:2](view).detach().requires_grad_() for view in (x, x.flip(0))]
    one, other = (upper(each) for each in hidden)
    (F.cross_entropy(one, y) + 0.5 * F.mse_loss(one, other.flip(0)) + 0.1 * other.square().mean()).backward()
    for record, leaf in zip(ledger.seen, hidden):
        assert record.targets is not None
        torch.testing.assert_close(record.targets[0] / record.samples, leaf.grad)


class ClosesTwice(Stages):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize(("kind", "name"), [(ClosesTwice, "LBFGS"), (Sharp, "Sharpness")])
def test_a_step_that_is_evaluated_again_for_one_batch_is_refused(kind: type[pl.LightningModule], name: str) -> None:
    message = rf"evaluated several times for training batch 0.*the optimizers here: {name}"
    with pytest.raises(BoundaryError, match=message):
        fit(kind, SyntheticGradients(predictor=TrueGradient()))


class SharpByHand(Stages):
    """The same with manual optimization: two crossings of one step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for _time in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(*batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_by_hand_a_step_may_go_backward_and_run_the_network_again() -> None:
    expected = fit(SharpByHand)
    assert_same_state(expected, fit(SharpByHand, SyntheticGradients(predictor=TrueGradient())), exact=True)


class FedBack(Stages):
    """Runs the network on what it has returned."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        once = F.pad(self(x), (0, x.shape[1] - 5))
        return F.cross_entropy(self(once), y)


def test_in_one_process_the_network_may_run_on_its_own_output() -> None:
    assert_same_state(fit(FedBack), fit(FedBack, SyntheticGradients(predictor=TrueGradient())), exact=True)


def test_state_under_way_is_saved_for_every_crossing(tmp_path: Any) -> None:
    def run(epochs: int, checkpoint: str | None = None) -> dict[str, Tensor]:
        pl.seed_everything(3, verbose=False)
        module = SiameseOfThree()
        trainer = make_trainer(callbacks=[SyntheticGradients(delay=1)], max_epochs=epochs)
        trainer.fit(module, loader(shuffle=False), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return state_of(module)

    whole = run(2)
    run(1)
    assert_same_state(whole, run(2, str(tmp_path / "last.ckpt")), exact=True)
