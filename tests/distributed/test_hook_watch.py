"""Hooks in mid-epoch that depend on weights or gradients of other stages are warned of once, by name; no others are."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import grad_norm
from torch import Tensor

from lightning_sg import PredictorTraining, SyntheticGradients, SyntheticGradientStrategy, TrueGradient
from tests.models import assert_same_state, loader, make_trainer, state_of
from tests.ranks import Failure, run_ranks
from tests.two_stages import Two, fit

WORDS = ("in the middle of an epoch", "computes something from gradients", "clips by the norm")


def warned(kind: type[Two], *callbacks: type[Callback], **options: Any) -> list[list[str]]:
    """What each rank was warned of."""

    def work() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(
                devices=2,
                strategy=SyntheticGradientStrategy(timeout=20.0, **options),
                callbacks=[SyntheticGradients(predictor=TrueGradient()), *(callback() for callback in callbacks)],
                log_every_n_steps=1,
            ).fit(kind(), loader())
        messages = [str(warning.message) for warning in caught]
        return [message for message in messages if any(words in message.lower() for words in WORDS)]

    return run_ranks(2, work)


class GradientNorms(Two):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, 2))


class Manual(Two):
    """Clips by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def clip(self, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip(optimizer)
        optimizer.step()


class ByLightning(Manual):
    def clip(self, optimizer: Any) -> None:
        self.clip_gradients(optimizer, 0.05, "norm")


class InAHook(Two):
    def on_after_backward(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class InConfigure(Two):
    def configure_gradient_clipping(self, optimizer: Any, *_arguments: Any, **_options: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        (GradientNorms, "GradientNorms.on_before_optimizer_step computes"),
        (Manual, "Manual.training_step computes"),
        (InAHook, "InAHook.on_after_backward computes"),
        (ByLightning, "clip_gradients clips by the norm of each process's own stages"),
        (InConfigure, "clip_gradients clips by the norm of each process's own stages"),
    ],
)
def test_a_norm_of_some_of_the_gradients_is_warned_of_once(kind: type[Two], who: str) -> None:
    last, _first = warned(kind)
    assert len(last) == 1
    assert who in last[0]


def train(kind: type[Two], devices: int, **options: Any) -> list[Any]:
    """The states of a model whose steps clip by the norm of the whole model."""

    def work() -> Any:
        torch.manual_seed(1)
        module, arguments = kind(), {}
        if devices > 1:
            arguments["strategy"] = SyntheticGradientStrategy(timeout=20.0, clip_over="model")
        callback = SyntheticGradients(training=PredictorTraining(seed=1), **options)
        make_trainer(devices=devices, callbacks=[callback], **arguments).fit(module, loader(shuffle=False))
        return state_of(module)

    return run_ranks(devices, work, may_fail=True) if devices > 1 else [work()]


@pytest.mark.parametrize("kind", [ByLightning, InConfigure])
def test_clipping_by_hand_takes_the_norm_of_the_model_if_the_strategy_does(kind: type[Two]) -> None:
    (expected,) = train(kind, 1)
    for found in train(kind, 2):
        assert not isinstance(found, Failure), found.trace
        assert_same_state(found, expected)


def test_it_is_refused_where_a_stage_would_wait_for_the_end_of_the_step() -> None:
    last, first = train(ByLightning, 2, predictor=TrueGradient())
    assert "clip_over='model' does not go with manual optimization where the true gradient" in last.message
    assert "clip_over='model' does not go" in first.message  # it is told


class WeightNorm(Two):
    def on_train_batch_end(self, *_arguments: Any) -> None:
        self.norm = torch.stack([parameter.detach().norm() for parameter in self.parameters()]).norm().item()


class LogsAWeight(Callback):
    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pl_module.log("first", pl_module.first.weight.norm())
        pl_module.log("second", pl_module.second.weight.norm())


class Keeps(Callback):
    """Keeps a copy of the state, at one batch only."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            self.best = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
            self.norms = [tensor.norm() for tensor in self.best.values()]


def test_weights_of_another_stage_are_warned_of_once() -> None:
    for rank, words in enumerate(warned(WeightNorm)):
        assert len(words) == 1
        assert "WeightNorm.on_train_batch_end uses" in words[0]
        assert f"of stage {rank}" in words[0]  # of the other
    for words in warned(Two, LogsAWeight, Keeps):
        assert [word.split()[0] for word in sorted(words)] == [
            "Keeps.on_train_batch_end",
            "LogsAWeight.on_before_zero_grad",
        ]


class Harmless(Two):
    """Hooks as users have them, none of which depends on another stage."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.mean = batch[0].mean().item()
        self.log("mean", self.mean)

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                torch.nan_to_num_(parameter.grad)
                parameter.grad.div_(parameter.grad.norm().clamp(min=1.0))  # of each on its own

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_value_(self.parameters(), 0.1)

    def on_train_batch_end(self, *_arguments: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-2, 2)
        self.count = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


class HarmlessByHand(Manual):
    def clip(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.clamp_(-0.1, 0.1)


class Saves(Callback):
    """A checkpoint in mid-epoch: all is current then."""

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/middle.ckpt")


@pytest.mark.parametrize("kind", [Harmless, HarmlessByHand])
def test_harmless_hooks_are_not_warned_of(kind: type[Two]) -> None:
    assert warned(kind) == [[], []]


def test_they_compute_what_they_do_in_one_process() -> None:
    expected = fit(Harmless, callback={"predictor": TrueGradient()})
    for found in fit(Harmless, 2, callback={"predictor": TrueGradient()}):
        assert_same_state(found, expected)
