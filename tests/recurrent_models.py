"""Recurrent models that are trained chunk by chunk, and data for them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_sg import Boundary, TimeBoundary
from tests.models import make_trainer

SAMPLES, FEATURES, WIDTH, LENGTH, CHUNK = 6, 3, 5, 12, 3


class Recurrent(pl.LightningModule):
    """Repeats the input of ``lag`` steps before, with any recurrent module or a nested state."""

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


class TwoStages(pl.LightningModule):
    """A GRU and an LSTM, each with a state of its own, and a boundary between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.GRU(FEATURES, 6, batch_first=True), nn.LSTM(6, 5, batch_first=True)
        self.out = nn.Linear(5, FEATURES)
        self.first_memory, self.second_memory = TimeBoundary(), TimeBoundary()
        self.cut = Boundary()

    def loss(self, chunk: Any) -> Tensor:
        (x, y), first, last = chunk
        h, state = self.first(x, self.first_memory.read(first))
        self.first_memory.write(state, last)
        h = self.cut(h)
        h, state = self.second(h, self.second_memory.read(first))
        self.second_memory.write(state, last)
        return (self.out(h) - y).square().mean()

    def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
        return self.loss(chunk)

    def validation_step(self, chunk: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(chunk), batch_size=len(chunk.batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sequences(batches: int = 2, lag: int = 2, seed: int = 0, length: int = LENGTH, samples: int = SAMPLES) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        x = torch.randn(samples, length, FEATURES, generator=generator)
        y = torch.cat([torch.zeros(samples, lag, FEATURES), x[:, : length - lag]], dim=1) if lag else x
        made.append((x, y))
    return made


def make(kind: str, **arguments: Any) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(kind, **arguments)


def fit(module: pl.LightningModule, data: Any, callback: Any = None, **arguments: Any) -> pl.Trainer:
    callbacks = [] if callback is None else [callback]
    trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 1, **arguments})
    trainer.fit(module, data)
    return trainer


def tensors_in(state: Any) -> list[Tensor]:
    """The tensors in a nested state, in order."""
    found: list[Tensor] = []
    apply_to_collection(state, Tensor, found.append)
    return found


def true_gradients(module: Recurrent, batch: Any, chunk: int = CHUNK) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """What a perfect predictor would say at the end of each chunk but the last, and the sum of all chunks' losses.

    The gradients are per sample, ``(N, ...)``, with one row for each sample's state.
    """
    x, y = batch
    state, losses, ends = None, [], []
    for start in range(0, x.shape[1], chunk):
        out, state = module.unroll(x[:, start : start + chunk], state)
        losses.append(module.loss(out, y[:, start : start + chunk]))
        ends.append([tensor for tensor in tensors_in(state) if tensor.requires_grad])
    total = torch.stack(losses).sum()
    gradients = []
    for number, end in enumerate(ends[:-1]):
        # Later losses only: this chunk's own loss needs no prediction.
        later = torch.autograd.grad(torch.stack(losses[number + 1 :]).sum(), end, retain_graph=True)
        gradients.append(tuple(part.movedim(1, 0).flatten(1) * len(x) for part in later))
    return gradients, total
