"""Unusual modules: gradients that go elsewhere, shared buffers, patched forwards, rare dtypes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_sg import BoundaryError, LossModelPredictor, SyntheticGradients, SyntheticGradientsError, TrueGradient
from tests.models import CLASSES, FEATURES, assert_same_state, dataset, loader, make_trainer, state_of
from tests.ranks import run_ranks
from tests.two_stages import Two, fit


class Regularized(Two):
    """Reads the loss, then adds a term over all parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.last_loss = loss.item()
        return loss + 1e-3 * torch.stack([parameter.square().sum() for parameter in self.parameters()]).sum()


def test_a_term_over_all_parameters_is_refused_between_processes() -> None:
    for failure in fit(Regularized, devices=2):
        assert failure.kind == "PartitionError"
        assert "Parameter 'first.weight' is used by stage 0" in failure.message


class Remembering(Two):
    """Uses an activation of the first stage in the loss, after code that cannot be traced."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = torch.relu(self.first(batch[0]))
        logits = self.second(self.cut(h))
        logits.detach().numpy()
        return F.cross_entropy(logits, batch[1]) + 0.1 * h.square().mean()


def test_an_activation_used_after_unfollowable_code_is_refused_or_warned_about() -> None:
    with pytest.warns(UserWarning, match="The check of the boundaries ended in the last stage"):
        fit(Remembering)
    last, _first = fit(Remembering, devices=2)
    assert last.kind == "PartitionError"
    assert "the loss of training batch 0 depends on a parameter or activation of another stage" in last.message


class Penalized(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        logits = self(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().mean()


def test_gradients_of_gradients_across_a_boundary_are_refused() -> None:
    with pytest.raises(BoundaryError, match=r"gradient of a gradient .* across boundary 'cut'"):
        fit(Penalized)


class PenalizedBetween(Two):
    """The gradient at an activation of the first stage, as a critic's at what a generator has made."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        between = self.first(batch[0])
        logits = self.second(self.cut(torch.relu(between)))
        (slope,) = torch.autograd.grad(logits.sum(), between, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().mean()


def test_a_penalty_on_a_gradient_at_an_activation_is_refused_by_name() -> None:
    with pytest.raises(BoundaryError, match=r"as for a gradient penalty, .* Put no boundary into the network"):
        fit(PenalizedBetween)


class PartlyUsed(Two):
    """One of the boundary's two outputs is unused. Weight decay shows whether its gradient is missing or zero."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, _other = self.cut(torch.relu(self.first(x)), self.other(x))
        return self.second(h)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)


def test_an_unused_output_of_the_boundary_has_no_gradient_rather_than_a_zero_one() -> None:
    pl.seed_everything(2, verbose=False)
    before = PartlyUsed().other.weight.detach()
    assert torch.equal(fit(PartlyUsed, callback={"predictor": TrueGradient()})["other.weight"], before)


class Complex(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(self.cut(torch.complex(h, h)).real)


def test_complex_activations_are_refused() -> None:
    with pytest.raises(BoundaryError, match="complex activation"):
        fit(Complex)


class Peeking(Two):
    """First runs the network once without gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self(batch[0])
        return super().training_step(batch, batch_idx)


def test_a_pass_without_gradients_does_not_count_in_one_process() -> None:
    assert_same_state(fit(Two), fit(Peeking), exact=True)


class SharedNorm(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, affine=False)
        self.middle = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cut(self.norm(self.first(x)))
        return self.second(self.norm(self.middle(h)))


def test_a_buffer_that_two_processes_change_is_refused() -> None:
    messages = [failure.message for failure in fit(SharedNorm, 2)]
    assert any("buffer 'norm." in message and "was changed in" in message for message in messages), messages


class Patched(Two):
    """Has a forward patched on the instance, an attribute that keeps an output, and a transposed cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh())
        original = self.first.forward
        self.first.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).view(len(x), 4, 4).transpose(1, 2)
        self.kept = h
        h = self.cut(h)
        return self.second(h.transpose(1, 2).view(len(x), 16))


def test_patched_forwards_kept_outputs_and_layouts_survive_the_split() -> None:
    def work() -> Any:
        pl.seed_everything(2, verbose=False)
        module = Patched()
        make_trainer(strategy="synthetic_gradients", devices=2).fit(
            module, loader(shuffle=False), loader(shuffle=False)
        )
        fake = type(module.kept).__name__ == "FakeTensor"
        return state_of(module), "forward" in module.first.__dict__, fake

    expected = fit(Patched)
    for state, patched, fake in run_ranks(2, work):
        assert_same_state(expected, state)
        assert patched
        assert not fake


class CopyAndPickle(Callback):
    """Copies and pickles the first stage in mid-run, and checks that the copies compute what it computes."""

    def __init__(self) -> None:
        self.equal: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        first = pl_module.first
        expected = F.linear(batch[0], first.weight, first.bias)
        for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
            # Twice, as a boundary may be reached once a step.
            self.equal += [torch.equal(twin(batch[0]), expected), torch.equal(twin(batch[0]), expected)]


def test_copies_of_a_cut_module_are_ordinary_modules() -> None:
    copies = CopyAndPickle()
    fit(Two, callback={"boundaries": ["first"]}, callbacks=[copies])
    assert copies.equal == [True] * 4 * 10  # in two epochs of five batches


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("devices", [1, 2])
def test_true_precisions(precision: str, devices: int) -> None:
    results = fit(Two, devices, precision=precision)
    for state in results if devices > 1 else [results]:
        assert state["first.weight"].dtype == (torch.float64 if precision == "64-true" else torch.bfloat16)


class Focal(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logs = self(batch[0]).log_softmax(-1).gather(1, batch[1].unsqueeze(1))
        return (-(1 - logs.exp()) * logs).mean()


def late_label() -> Any:
    x, y = dataset(32).tensors
    y = y.clamp_max(2)
    y[16:] = 4
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def test_a_label_beyond_those_of_the_first_batch_says_what_to_do() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"boundary 'cut' .*LossModelPredictor\(classes=\.\.\.\)"):
        fit(Focal, data=late_label, callback={"context": 1})
    fit(Focal, data=late_label, callback={"context": 1, "predictor": LossModelPredictor(classes=CLASSES)})


def test_a_loss_that_is_used_as_it_is_knows_its_classes() -> None:
    fit(Focal, data=late_label)


class InPlace(Two):
    """Changes the batch in place, and uses a detached activation after the boundary."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].mul_(2)
        h = torch.relu(self.first(x))
        self.seen = x.clone()
        return F.cross_entropy(self.second(self.cut(h) + h.detach()), batch[1])


def test_a_step_may_change_its_batch_and_use_detached_activations() -> None:
    pl.seed_everything(2, verbose=False)
    module = InPlace()
    make_trainer(callbacks=[SyntheticGradients()], limit_train_batches=1, max_epochs=1).fit(
        module, loader(shuffle=False)
    )
    assert torch.equal(module.seen, 2 * next(iter(loader(shuffle=False)))[0])
