"""The oracle: a run split over processes computes what the same run computes in one process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy
from lightning_sg.transport import Coding
from lightning_sg.transport.message import TensorSpec
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


def train(devices: int, delay: int = 1, epochs: int = 4, **callback: Any) -> Any:
    """Trains, in ``devices`` processes, and returns the state of the module on each rank."""

    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=4)
        strategy = "synthetic_gradients" if devices > 1 else "auto"
        trainer = make_trainer(
            strategy=strategy,
            devices=devices,
            max_epochs=epochs,
            callbacks=[SyntheticGradients(delay=delay, **callback)],
        )
        trainer.fit(module, loader(), loader(shuffle=False))
        return state_of(module), {k: float(v) for k, v in trainer.callback_metrics.items()}

    return run_ranks(devices, work) if devices > 1 else [work()]


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_one_two_and_four_processes_end_with_the_same_weights(delay: int) -> None:
    ((expected, metrics),) = train(1, delay)
    for devices in (2, 4):
        for state, seen in train(devices, delay):
            assert_same_state(expected, state)
            assert seen["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-5)


class Rounded(torch.autograd.Function):
    """Rounds as the wire does, both ways."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, coding: Coding) -> Tensor:
        ctx.coding = coding
        return rounded(tensor, coding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return rounded(gradient, ctx.coding), None


def rounded(tensor: Tensor, coding: Coding) -> Tensor:
    spec = TensorSpec.of(tensor, coding)
    return spec.arrange(spec.parts(tensor))


class Rounding(nn.Module):
    def __init__(self, coding: Coding) -> None:
        super().__init__()
        self.coding = coding

    def forward(self, tensor: Tensor) -> Tensor:
        return Rounded.apply(tensor, self.coding) if self.training else tensor


@pytest.mark.parametrize("coding", ["full", "bf16", "int8"])
def test_rounding_on_the_wire_is_as_rounding_in_the_model(coding: Coding) -> None:
    def work(devices: int) -> Any:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=2)
        if devices == 1:  # behind the boundary, as the next stage sees it
            module.net[2] = nn.Sequential(Rounding(coding), module.net[2])
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(wire=coding) if devices > 1 else "auto",
            devices=devices,
            max_epochs=4,
            callbacks=[SyntheticGradients(seed=1)],
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


def test_an_unknown_wire_is_refused() -> None:
    with pytest.raises(ValueError, match=r"wire is one of \('full', 'bf16', 'int8'\), not 'int4'"):
        SyntheticGradientStrategy(wire="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_by_the_norm_of_the_model_is_as_in_one_process(accumulate: int) -> None:
    def work(devices: int, clip: float = 0.05) -> Any:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=4)
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(clip_over="model") if devices > 1 else "auto",
            devices=devices,
            callbacks=[SyntheticGradients(seed=1)],
            gradient_clip_val=clip,
            accumulate_grad_batches=accumulate,
        )
        trainer.fit(module, loader())
        return state_of(module)

    expected = work(1)
    assert not torch.equal(work(1, clip=0.0)["net.0.0.weight"], expected["net.0.0.weight"])
    for devices in (2, 4):
        for state in run_ranks(devices, lambda devices=devices: work(devices)):
            assert_same_state(expected, state)
