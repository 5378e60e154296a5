"""Rounding what travels between processes is the same as rounding it in the model."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_sg import PredictorTraining, SyntheticGradients, SyntheticGradientStrategy
from lightning_sg.transport import Compression
from lightning_sg.transport.message import TensorSpec
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


class Rounded(torch.autograd.Function):
    """Rounds activations and gradients as transport does."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, compression: Compression) -> Tensor:
        ctx.compression = compression
        return rounded(tensor, compression)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return rounded(gradient, ctx.compression), None


def rounded(tensor: Tensor, compression: Compression) -> Tensor:
    spec = TensorSpec.of(tensor, compression)
    return spec.arrange(spec.parts(tensor))


class Rounding(nn.Module):
    def __init__(self, compression: Compression) -> None:
        super().__init__()
        self.compression = compression

    def forward(self, tensor: Tensor) -> Tensor:
        return Rounded.apply(tensor, self.compression) if self.training else tensor


@pytest.mark.parametrize("compression", ["full", "bf16", "int8"])
def test_rounding_on_the_wire_is_as_rounding_in_the_model(compression: Compression) -> None:
    def work(devices: int) -> Any:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=2)
        if devices == 1:  # after the boundary, where the next stage sees the rounded activations
            module.net[2] = nn.Sequential(Rounding(compression), module.net[2])
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(wire=compression) if devices > 1 else "auto",
            devices=devices,
            max_epochs=4,
            callbacks=[SyntheticGradients(training=PredictorTraining(seed=1))],
        )
        trainer.fit(module, loader(), loader(shuffle=False))
        state = {
            name.replace("net.2.1.", "net.2.") if devices == 1 else name: value
            for name, value in state_of(module).items()
        }
        return state, float(trainer.callback_metrics["val_loss"])

    expected, loss = work(1)
    for state, seen in run_ranks(2, lambda: work(2)):
        assert_same_state(expected, state)
        assert seen == pytest.approx(loss, abs=1e-5)
