"""What a synthetic gradient at a boundary in time amounts to, against full and truncated backpropagation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_sg import (
    Chunks,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    ThroughTime,
    TrueGradient,
    ZeroPredictor,
)
from lightning_sg.predictors import GradientPredictor, TargetUse
from tests.models import assert_same_state, make_trainer, state_of
from tests.recurrent_models import CHUNK, LENGTH, SAMPLES, WIDTH, Recurrent, fit, make, sequences, true_gradients


class Oracle(GradientPredictor):
    """Is told the true gradients, in the order in which they are asked for."""

    target_use = TargetUse.NONE
    gradients: list[tuple[Tensor, ...]]

    def build(self, activations: Any, context: Any, loss: Any) -> None:
        self.asked = 0

    def forward(self, activations: tuple[Tensor, ...], context: Any) -> tuple[Tensor, ...]:
        self.asked += 1
        return self.gradients[self.asked - 1]


@pytest.mark.parametrize("kind", ["lstm", "gru", "nested", "two layers"])
def test_the_true_future_gradient_gives_full_backpropagation_element_by_element(kind: str) -> None:
    batch = sequences(1)[0]
    whole = make(kind)
    gradients, loss = true_gradients(whole, batch)
    (loss / len(range(0, LENGTH, CHUNK))).backward()

    oracle = Oracle()
    oracle.gradients = gradients
    seen: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen.update({name: p.grad.clone() for name, p in module.named_parameters()})

    module = make(kind)
    # One optimizer step for all chunks, so that all have the same weights.
    trainer = make_trainer(
        callbacks=[SyntheticGradients(predictor=oracle, through_time=ThroughTime(scale=1.0)), Look()],
        max_epochs=1,
        accumulate_grad_batches=LENGTH // CHUNK,
    )
    trainer.fit(module, Chunks([batch], CHUNK))
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def by_hand(module: Recurrent, data: list[Any]) -> None:
    """Truncated backpropagation through time, written out."""
    optimizer = module.configure_optimizers()
    for x, y in data:
        state = None
        for start in range(0, LENGTH, CHUNK):
            out, state = module.unroll(x[:, start : start + CHUNK], state)
            loss = module.loss(out, y[:, start : start + CHUNK])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = apply_to_collection(state, Tensor, Tensor.detach)


@pytest.mark.parametrize("callback", [None, SyntheticGradients(predictor=ZeroPredictor())])
@pytest.mark.parametrize("kind", ["lstm", "gru", "nested"])
def test_no_predictor_and_a_zero_one_are_truncated_backpropagation_bit_for_bit(kind: str, callback: Any) -> None:
    expected, module = make(kind), make(kind)
    by_hand(expected, sequences())
    fit(module, Chunks(sequences(), CHUNK), callback)
    assert_same_state(state_of(module), state_of(expected), exact=True)


def held_out(module: Recurrent, lag: int) -> float:
    module.eval()
    with torch.no_grad():
        (x, y) = sequences(1, lag, seed=99, samples=256)[0]
        return float(module.loss(module.unroll(x, None)[0], y))


class FixedStates(GradientPredictor):
    """Knows the true gradient: back-propagates the rest of the sequence before the network has seen it."""

    target_use = TargetUse.NONE
    module: Recurrent
    data: list[Any]

    def build(self, activations: Any, context: Any, loss: Any) -> None:
        self.asked = 0

    def forward(self, activations: tuple[Tensor, ...], context: Any) -> tuple[Tensor, ...]:
        batch, step = divmod(self.asked, LENGTH - 1)
        self.asked += 1
        x, y = self.data[batch]
        with torch.enable_grad():
            state = activations[0].unsqueeze(0).requires_grad_()
            out, _state = self.module.unroll(x[:, step + 1 :], state)
            # Each chunk is one step, and its loss the mean over it.
            rest = self.module.loss(out, y[:, step + 1 :]) * (LENGTH - step - 1)
            (gradient,) = torch.autograd.grad(rest, [state])
        return (gradient[0] * len(x),)


@pytest.mark.slow
def test_the_true_gradient_is_better_than_a_trained_predictor_and_that_better_than_none_on_held_out_data() -> None:
    # A chunk is a single step: within it, nothing tells the network to remember what it is asked for a step later.
    lag, batches = 1, 40
    data = sequences(batches, lag, samples=32)
    losses = {}
    for name in ("zero", "trained", "oracle"):
        module = make("gru", lag=lag, learning_rate=0.5, width=16)
        oracle = FixedStates()
        predictors = {"zero": ZeroPredictor(), "trained": MLPPredictor(32, conditional=False), "oracle": oracle}
        callback = SyntheticGradients(
            predictor=predictors[name],
            through_time=ThroughTime(scale=1.0),
            training=PredictorTraining(bound=2.0),
            guard=None,
        )
        FixedStates.module, FixedStates.data = module, data
        fit(module, Chunks(data, 1), callback)
        losses[name] = held_out(module, lag)
    assert losses["oracle"] < 0.9 * losses["trained"], losses
    assert losses["trained"] < 0.97 * losses["zero"], losses


def test_a_sequence_that_has_ended_has_nothing_to_learn_from() -> None:
    x, y = sequences(1)[0]
    lengths = torch.tensor([12, 3, 6, 7, 12, 1])
    seen: list[tuple[int, ...]] = []

    class Looking(MLPPredictor):
        def forward(self, activations: Any, context: Any) -> Any:
            seen.append(tuple(activations[0].shape))
            return super().forward(activations, context)

    data = Chunks([(x, y, lengths)], CHUNK, lengths=2)

    class Ragged(Recurrent):
        def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
            (x, y, _lengths), first, last = chunk
            return super().training_step(((x, y), first, last), batch_idx)

    torch.manual_seed(0)
    module = Ragged("gru")
    fit(
        module,
        data,
        SyntheticGradients(predictor=Looking(8, conditional=False), training=PredictorTraining(every=1000)),
    )
    # After 3 steps four sequences go on, after 6 three, after 9 two, after 12 none; the second shape 4 is learned from.
    assert [shape[0] for shape in seen if shape[0]] == [4, 3, 4, 2]


def test_a_learned_initial_state_is_trained() -> None:
    class Begins(Recurrent):
        def __init__(self) -> None:
            super().__init__("gru")
            self.start = nn.Parameter(torch.zeros(1, SAMPLES, WIDTH))

        def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
            (x, y), first, last = chunk
            out, state = self.unroll(x, self.memory.read(first, initial=self.start))
            self.memory.write(state, last)
            return self.loss(out, y)

    module = Begins()
    fit(module, Chunks(sequences(), CHUNK), SyntheticGradients(predictor=MLPPredictor(8, conditional=False)))
    assert module.start.abs().sum() > 0


def test_a_rule_that_needs_the_true_gradient_is_refused_by_name() -> None:
    with pytest.raises(SyntheticGradientsError, match="'memory' needs the true gradient"):
        fit(make("lstm"), Chunks(sequences(), CHUNK), SyntheticGradients(predictor=TrueGradient()))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(precision: Any) -> None:
    trainer = fit(make("gru"), Chunks(_as(precision, sequences(4)), CHUNK), SyntheticGradients(), precision=precision)
    assert trainer.global_step == 16


def _as(precision: str, data: list[Any]) -> list[Any]:
    return [(x.double(), y.double()) for x, y in data] if precision == "64-true" else data


class RootMeanSquare(Recurrent):
    """Its loss ends in an operation that keeps its result for the backward pass."""

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return super().loss(out, y).sqrt()


def test_manual_optimization() -> None:
    class Manual(RootMeanSquare):
        def __init__(self) -> None:
            super().__init__("gru")
            self.automatic_optimization = False

        def training_step(self, chunk: Any, batch_idx: int) -> None:
            loss = super().training_step(chunk, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def callback() -> SyntheticGradients:
        return SyntheticGradients(predictor=MLPPredictor(8, conditional=False), training=PredictorTraining(seed=1))

    torch.manual_seed(0)
    manual = Manual()
    torch.manual_seed(0)
    automatic = RootMeanSquare("gru")
    fit(manual, Chunks(sequences(), CHUNK), callback())
    fit(automatic, Chunks(sequences(), CHUNK), callback())
    assert_same_state(state_of(manual), state_of(automatic), exact=True)
