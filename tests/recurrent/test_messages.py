"""Messages between networks that act at different rates: what reaches both sides, with and without the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_sg import (
    LocalLoss,
    LossModelPredictor,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    ZeroPredictor,
)
from lightning_sg.predictors import GradientPredictor, TargetUse
from tests.message_models import SAMPLES, TICKS, WIDTH, Batches, TwoNetworks, steps
from tests.models import assert_same_state, make_trainer, state_of
from tests.recurrent_models import fit


def make(**arguments: Any) -> TwoNetworks:
    torch.manual_seed(0)
    return TwoNetworks(**arguments)


def trained_callback() -> SyntheticGradients:
    return SyntheticGradients(predictor=MLPPredictor(8), training=PredictorTraining(seed=1))


class Oracle(GradientPredictor):
    """Is told the true gradients, in the order in which they are asked for."""

    target_use = TargetUse.NONE
    gradients: list[Tensor]

    def build(self, activations: Any, context: Any, loss: Any) -> None:
        self.asked = 0

    def forward(self, activations: tuple[Tensor, ...], context: Any) -> tuple[Tensor, ...]:
        self.asked += 1
        return (self.gradients[self.asked - 1],)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_the_true_gradients_of_the_later_loss_give_those_of_one_graph_element_by_element(own: float) -> None:
    data = steps(1)
    whole = make(own=own)
    messages = [whole.fast(x) for x, _total in data.batches]
    later = whole.slow_loss(messages, data.batches[-1][1])
    oracle = Oracle()
    oracle.gradients = [part * SAMPLES for part in torch.autograd.grad(later, messages, retain_graph=True)]
    # The graph of the step in which they are received is cut at the last message too.
    loss = (
        later + torch.stack([whole.own_loss(message, x) for message, (x, _total) in zip(messages, data.batches)]).sum()
    )
    (loss / TICKS).backward()

    seen: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen.update({name: p.grad.clone() for name, p in module.named_parameters()})

    # One optimizer step for all, so that all have the same weights.
    trainer = make_trainer(
        callbacks=[SyntheticGradients(predictor=oracle), Look()], max_epochs=1, accumulate_grad_batches=TICKS
    )
    trainer.fit(make(own=own), data)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def by_hand(module: TwoNetworks, data: Batches) -> None:
    """The two networks with messages detached, written out."""
    optimizer = module.configure_optimizers()
    heard: list[Tensor] = []
    for number, (x, total) in enumerate(data.batches):
        message = module.fast(x)
        loss = module.own_loss(message, x)
        acts = number % TICKS == TICKS - 1
        if module.same_step:
            heard.append(message.detach())
        if acts and heard:
            loss = loss + module.slow_loss(heard, total)
            heard = []
        if not module.same_step:
            heard.append(message.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("callback", [None, SyntheticGradients(predictor=ZeroPredictor())])
@pytest.mark.parametrize("same_step", [True, False])
def test_no_predictor_and_a_zero_one_are_detached_messages_bit_for_bit(callback: Any, same_step: bool) -> None:
    expected, module = make(same_step=same_step), make(same_step=same_step)
    by_hand(expected, steps(3))
    fit(module, steps(3), callback)
    assert_same_state(state_of(module), state_of(expected), exact=True)


class Listening(MLPPredictor):
    """Keeps what it is told of targets."""

    told: list[tuple[Tensor, Tensor, Tensor]]

    def loss(self, activations: Any, context: Any, targets: Any) -> Tensor:
        self.told.append((activations[0].clone(), targets[0].clone(), context))
        return super().loss(activations, context, targets)


@pytest.mark.parametrize("same_step", [True, False])
def test_every_message_has_its_target_and_its_context_steps_later(same_step: bool) -> None:
    data = steps(2)
    module = make(same_step=same_step, learning_rate=0.0)
    Listening.told = []
    pending: list[int] = []
    callback = SyntheticGradients(predictor=Listening(8, conditional=False))

    class Count(pl.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            pending.append(len(callback.session.times.trainers["messages"].state_dict()["pending"]))

    trainer = make_trainer(callbacks=[callback, Count()], max_epochs=1)
    trainer.fit(module, data)

    expected: list[tuple[Tensor, Tensor, Tensor]] = []
    sent = [module.fast(x).detach().requires_grad_() for x, _total in data.batches]
    # Without the last step's own message, that is received in the next window.
    windows = [(0, 4), (4, 8)] if same_step else [(0, 3), (3, 7)]
    for (start, stop), (_x, total) in zip(windows, data.batches[TICKS - 1 :: TICKS]):
        gradients = torch.autograd.grad(module.slow_loss(sent[start:stop], total), sent[start:stop])
        for message, gradient, (x, _sum) in zip(sent[start:stop], gradients, data.batches[start:stop]):
            expected.append((message, SAMPLES * gradient, x[:, :1]))
    assert len(Listening.told) == len(expected)
    for told, right in zip(Listening.told, expected):
        for got, want in zip(told, right):
            torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-7)
    assert pending == ([1, 2, 3, 0, 1, 2, 3, 0] if same_step else [1, 2, 3, 1, 2, 3, 4, 1])


def test_a_message_that_the_receivers_loss_does_not_use_is_let_go() -> None:
    class Deaf(TwoNetworks):
        def slow_loss(self, messages: list[Tensor], total: Tensor) -> Tensor:
            return super().slow_loss(messages[:2], total)

    torch.manual_seed(0)
    callback = trained_callback()
    fit(Deaf(), steps(2), callback)
    assert callback.session.times.trainers["messages"].state_dict()["pending"] == []


@pytest.mark.parametrize("same_step", [True, False])
@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_a_run_resumed_between_two_sends_equals_one_that_went_on(stop: int, same_step: bool, tmp_path: Path) -> None:
    uninterrupted = make(same_step=same_step)
    fit(uninterrupted, steps(3), trained_callback())
    checkpoint = pl.callbacks.ModelCheckpoint(
        tmp_path, "stopped", every_n_train_steps=stop, save_on_train_epoch_end=False
    )
    trainer = make_trainer(
        callbacks=[trained_callback(), checkpoint], max_steps=stop, max_epochs=-1, enable_checkpointing=True
    )
    trainer.fit(make(same_step=same_step), steps(3))
    resumed = TwoNetworks(same_step=same_step)
    trainer = make_trainer(callbacks=[trained_callback()], max_epochs=1)
    trainer.fit(resumed, steps(3), ckpt_path=tmp_path / "stopped.ckpt")
    assert_same_state(state_of(resumed), state_of(uninterrupted), exact=True)


def test_validation_has_a_queue_of_its_own() -> None:
    undisturbed, disturbed = make(), make()
    fit(undisturbed, steps(3), trained_callback())
    trainer = make_trainer(callbacks=[trained_callback()], max_epochs=1, val_check_interval=2)
    trainer.fit(disturbed, steps(3), steps(1, seed=5))
    assert_same_state(state_of(disturbed), state_of(undisturbed), exact=True)
    assert disturbed.waiting == [1, 2, 3, 0] * 3
    assert "val_loss" in trainer.callback_metrics


def held_out(module: TwoNetworks) -> float:
    with torch.no_grad():
        data = steps(1, seed=99, samples=512)
        return float(module.slow_loss([module.fast(x) for x, _total in data.batches], data.batches[-1][1]))


@pytest.mark.parametrize("predictor", [LocalLoss(), LossModelPredictor(objective="both")])
def test_losses_of_ones_own_learn_from_what_they_are_told(predictor: GradientPredictor) -> None:
    callback = SyntheticGradients(predictor=predictor, training=PredictorTraining(seed=1))
    fit(make(), steps(), callback)
    (prediction,) = callback.session.times.trainers["messages"].predictor((torch.randn(6, WIDTH),), torch.randn(6, 1))
    assert prediction.any()  # an untrained one is zero


@pytest.mark.slow
def test_a_trained_predictor_makes_messages_better_than_none_on_held_out_data() -> None:
    losses = {}
    for name in ("zero", "trained"):
        # Nothing but the slow network's loss says what to speak of: the first feature.
        module = make(own=0.0, learning_rate=0.05)
        with torch.no_grad():  # at first it hardly speaks of it
            module.fast[0].weight[:, 0] *= 0.1
        predictor = ZeroPredictor() if name == "zero" else MLPPredictor(32, conditional=False)
        fit(module, steps(250, samples=32), SyntheticGradients(predictor=predictor, training=PredictorTraining(seed=1)))
        losses[name] = held_out(module)
    assert losses["trained"] < 0.7 * losses["zero"], losses


def test_forgotten_messages_leave_nothing_with_the_predictor() -> None:
    class Forgets(TwoNetworks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                self.messages.forget()
            return loss

    torch.manual_seed(0)
    callback = trained_callback()
    fit(Forgets(), steps(1), callback)
    assert callback.session.times.trainers["messages"].state_dict()["pending"] == []
