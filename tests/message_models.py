"""Two networks that act at different rates, and data for them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_sg import MessageBoundary

SAMPLES, FEATURES, WIDTH, TICKS = 6, 3, 5, 4


class TwoNetworks(pl.LightningModule):
    """The fast network speaks in every step; the slow one says, in each T-th, the sum of all it was told of."""

    def __init__(self, own: float = 1.0, same_step: bool = True, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.own = own
        self.same_step = same_step
        self.learning_rate = learning_rate
        self.fast = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh())
        self.out = nn.Linear(WIDTH, FEATURES)
        self.slow = nn.GRU(WIDTH, 2 * WIDTH, batch_first=True)
        self.sum = nn.Linear(2 * WIDTH, 1)
        self.messages = MessageBoundary()
        self.waiting: list[int] = []

    def own_loss(self, message: Tensor, x: Tensor) -> Tensor:
        return self.own * (self.out(message) - x).square().mean()

    def slow_loss(self, messages: list[Tensor], total: Tensor) -> Tensor:
        out, _ = self.slow(torch.stack(messages, dim=1))
        return (self.sum(out[:, -1]).squeeze(1) - total).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, total = batch
        acts = batch_idx % TICKS == TICKS - 1
        heard = self.messages.receive() if acts and not self.same_step else []
        message = self.fast(x)
        self.messages.send(message, context=x[:, :1])
        loss = self.own_loss(message, x)
        if acts and self.same_step:
            heard = self.messages.receive()
        if heard:
            loss = loss + self.slow_loss(heard, total)
        self.waiting.append(len(self.messages))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, total = batch
        if batch_idx == 0:  # the check before training ends in the middle of a window
            self.messages.forget()
        self.messages.send(self.fast(x))
        if batch_idx % TICKS == TICKS - 1:
            heard = self.messages.receive()
            assert len(heard) == TICKS
            self.log("val_loss", self.slow_loss(heard, total))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Batches:
    """Batches that go on where a checkpoint was made."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.done = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        begin = self.done
        for number, batch in enumerate(self.batches[begin:], start=begin + 1):
            self.done = number
            yield batch
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def steps(windows: int = 2, seed: int = 0, samples: int = SAMPLES) -> Batches:
    """T batches of each window; each has the sum of the first feature over its window."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(windows, TICKS, samples, FEATURES, generator=generator)
    return Batches([(part, window[:, :, 0].sum(0)) for window in x for part in window])
