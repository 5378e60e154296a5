"""Hooks that are given the loss or outputs of a step see the real ones, or none; never a value that stands for them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy, TrueGradient
from lightning_sg.distributed.elsewhere import ElsewhereError, LossElsewhere, OutputsElsewhere, in_place_of
from tests.models import loader, make_trainer
from tests.ranks import run_ranks
from tests.two_stages import Two


class StopsWhenSmall(Callback):
    """Stops when the loss is small, and prints it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs["loss"] < 0.5:
            trainer.should_stop = True
        self.losses.append(outputs["loss"].item())


class StopsWhenOdd(Callback):
    """Stops when the loss is not a number."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not torch.isfinite(outputs["loss"]):
            trainer.should_stop = True


class Averages(Callback):
    def __init__(self) -> None:
        self.mean = MeanMetric()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mean.update(outputs["loss"])


class LooksBefore(Callback):
    """Looks at the loss before the backward pass."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.losses.append(float(loss))


class Guards(Callback):
    """Takes the loss everywhere, and reads it where it is."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].detach().cpu()
        if trainer.is_global_zero:
            self.losses.append(float(loss))
        self.batches += 1


class Other(Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last = outputs["logits"]


def train(devices: int, *kinds: type[Callback], epochs: int = 1) -> list[Any]:
    """The callbacks after a training, the number of steps, and the warnings of hooks; of each rank."""

    def work() -> Any:
        torch.manual_seed(4)
        module, callbacks = Two(), [kind() for kind in kinds]
        options: dict[str, Any] = {}
        added: list[Callback] = list(callbacks)
        if devices > 1:
            added.insert(0, SyntheticGradients(predictor=TrueGradient()))
            options["strategy"] = SyntheticGradientStrategy(timeout=20.0)
        trainer = make_trainer(devices=devices, callbacks=added, max_epochs=epochs, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, loader(shuffle=False))
        words = [str(warning.message) for warning in caught if "no loss and no outputs" in str(warning.message)]
        return callbacks, trainer.global_step, words

    return run_ranks(devices, work) if devices > 1 else [work()]


def test_a_callback_that_stops_when_the_loss_is_small_sees_the_loss() -> None:
    ((expected,), steps, _words) = train(1, StopsWhenSmall)[0]
    assert steps == 5
    assert min(expected.losses) > 0.5
    (last, first) = train(2, StopsWhenSmall)
    assert last[1] == first[1] == steps  # a surrogate of zero would stop all at once
    assert last[0][0].losses == expected.losses
    assert first[0][0].losses == []
    assert last[2] == []
    (words,) = first[2]
    assert "StopsWhenSmall.on_train_batch_end" in words
    assert "stage 0 (rank 1)" in words


def test_a_stop_for_a_small_loss_stops_all() -> None:
    def work() -> int:
        torch.manual_seed(4)
        trainer = make_trainer(
            devices=2,
            strategy=SyntheticGradientStrategy(timeout=20.0),
            callbacks=[SyntheticGradients(predictor=TrueGradient()), StopsWhenSmall()],
            max_epochs=100,
        )
        trainer.fit(Two(), loader(shuffle=False))
        return trainer.global_step

    first, second = run_ranks(2, work)
    assert 20 < first == second < 400


@pytest.mark.parametrize("kind", [StopsWhenOdd, Averages, LooksBefore, Guards])
def test_other_readers_of_the_loss(kind: type[Callback]) -> None:
    ((expected,), steps, _words) = train(1, kind)[0]
    (last, first) = train(2, kind)
    assert last[1] == first[1] == steps
    assert getattr(last[0][0], "losses", None) == getattr(expected, "losses", None)
    if kind is Averages:
        assert last[0][0].mean.compute() == expected.mean.compute()
    if kind is Guards:
        assert first[0][0].batches == steps
        assert first[0][0].losses == []
    assert len(first[2]) == (kind is not Guards)
    assert last[2] == []


def test_other_outputs_are_named() -> None:
    class Returning(Two):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "logits": torch.zeros(1)}

    def work() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(devices=2, strategy="synthetic_gradients", callbacks=[Other()]).fit(Returning(), loader())
        return [str(warning.message) for warning in caught if "no loss and no outputs" in str(warning.message)]

    last, first = run_ranks(2, work)
    assert last == []
    assert "the output 'logits' of the step is known in the last stage only" in first[0]


def test_what_stands_for_outputs_says_so_when_it_is_read() -> None:
    outputs = in_place_of({"loss": torch.zeros(())}, torch.device("cpu"))
    assert isinstance(outputs, OutputsElsewhere)
    loss = outputs["loss"]
    assert isinstance(loss.detach().clone(), LossElsewhere)
    assert loss.shape == ()
    assert "last stage" in repr(loss)
    reads: list[Any] = [
        float, bool, int, Tensor.item, Tensor.tolist, Tensor.numpy, torch.isnan, torch.isfinite,
        lambda loss: loss < 1, lambda loss: loss < 1, lambda loss: loss + 1, lambda loss: torch.stack([loss]).mean(),
        lambda loss: f"{loss:.3f}", lambda loss: torch.zeros(()).add_(loss),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(ElsewhereError):
            read(loss)
    with pytest.raises(ElsewhereError):
        outputs["logits"]
    with pytest.raises(ElsewhereError):
        outputs.get("logits")
    assert in_place_of(None, torch.device("cpu")) is None
