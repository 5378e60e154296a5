"""Boundaries in time: what they carry, and what synthetic gradients there amount to, against full backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_sg import (
    BoundaryError,
    Chunks,
    LinearPredictor,
    MLPPredictor,
    SyntheticGradients,
    SyntheticGradientsError,
    ThroughTime,
    TimeBoundary,
    TrueGradient,
    ZeroPredictor,
)
from lightning_sg.predictors import GradientPredictor
from tests.models import assert_same_state, make_trainer, state_of

SAMPLES, FEATURES, WIDTH, LENGTH, CHUNK = 6, 3, 5, 12, 3


class Recurrent(pl.LightningModule):
    """Says at every step what the input was ``lag`` steps before; any recurrent module that torch has, or a nested state."""

    def __init__(self, kind: str = "lstm", lag: int = 2, learning_rate: float = 0.1, width: int = WIDTH) -> None:
        super().__init__()
        self.kind = kind
        self.lag = lag
        self.learning_rate = learning_rate
        kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "nested": nn.GRU, "two layers": nn.LSTM}
        layers = 2 if kind == "two layers" else 1
        self.core = kinds[kind](FEATURES, width, num_layers=layers, batch_first=True)
        self.out = nn.Linear(width, FEATURES)
        self.memory = TimeBoundary()

    def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.kind != "nested":
            out, state = self.core(x, state)
        else:
            out, hidden = self.core(x, None if state is None else state["layers"][0])
            state = {"layers": (hidden,), "steps": torch.tensor(x.shape[1]), "name": "core"}
        return self.out(out), state

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return (out - y).square().mean()

    def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
        (x, y), first, last = chunk
        out, state = self.unroll(x, self.memory.read(first))
        self.memory.write(state, last)
        return self.loss(out, y)

    def validation_step(self, chunk: Any, batch_idx: int) -> None:
        (x, y), first, last = chunk
        out, state = self.unroll(x, self.memory.read(first))
        self.memory.write(state, last)
        self.log("val_loss", self.loss(out, y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def sequences(batches: int = 2, lag: int = 2, seed: int = 0, length: int = LENGTH, samples: int = SAMPLES) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        x = torch.randn(samples, length, FEATURES, generator=generator)
        y = torch.cat([torch.zeros(samples, lag, FEATURES), x[:, : length - lag]], dim=1) if lag else x
        made.append((x, y))
    return made


class Oracle(GradientPredictor):
    """Is told the true gradients, in the order in which they are asked for."""

    needs_target = False
    gradients: list[tuple[Tensor, ...]]

    def build(self, activations: Any, context: Any, loss: Any) -> None:
        self.asked = 0

    def forward(self, activations: tuple[Tensor, ...], context: Any) -> tuple[Tensor, ...]:
        self.asked += 1
        return self.gradients[self.asked - 1]


def make(kind: str, **arguments: Any) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(kind, **arguments)


def true_gradients(module: Recurrent, batch: Any, chunk: int = CHUNK) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """The gradients of the chunks' mean losses by the states at the chunks' ends, times N; and the loss of all.

    Those of the samples' states in rows, as predictors see them.
    """
    x, y = batch
    state, losses, ends = None, [], []
    for start in range(0, x.shape[1], chunk):
        out, state = module.unroll(x[:, start : start + chunk], state)
        losses.append(module.loss(out, y[:, start : start + chunk]))
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
        ends.append([leaf for leaf in leaves if leaf.requires_grad])
    total = torch.stack(losses).sum()
    gradients = []
    for number, end in enumerate(ends[:-1]):
        # Of later chunks alone: this chunk's own loss goes backward by itself.
        later = torch.autograd.grad(torch.stack(losses[number + 1 :]).sum(), end, retain_graph=True)
        gradients.append(tuple(part.movedim(1, 0).flatten(1) * len(x) for part in later))
    return gradients, total


def fit(module: Recurrent, data: Any, callback: Any = None, **arguments: Any) -> pl.Trainer:
    callbacks = [] if callback is None else [callback]
    trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 1, **arguments})
    trainer.fit(module, data)
    return trainer


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
        callbacks=[SyntheticGradients(predictor=oracle), Look()], max_epochs=1, accumulate_grad_batches=LENGTH // CHUNK
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
            state = torch.utils._pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)


@pytest.mark.parametrize("callback", [None, SyntheticGradients(predictor=ZeroPredictor())])
@pytest.mark.parametrize("kind", ["lstm", "gru", "nested"])
def test_no_predictor_and_a_zero_one_are_truncated_backpropagation_bit_for_bit(kind: str, callback: Any) -> None:
    expected, module = make(kind), make(kind)
    by_hand(expected, sequences())
    fit(module, Chunks(sequences(), CHUNK), callback)
    assert_same_state(state_of(module), state_of(expected), exact=True)
