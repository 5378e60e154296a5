"""16 bits with a scaled loss: each process scales for itself, and trains as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_sg import (
    ExactGradients,
    LinearPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
    ZeroPredictor,
)
from tests.blocks import Blocks, plain
from tests.models import CLASSES, FEATURES, assert_same_state, loader, make_trainer, state_of
from tests.ranks import DEVICE, run_ranks


def scaled(
    devices: int, folder: Path, predictor: Any = "auto", scale: float = 2.0**10, epochs: int = 2
) -> tuple[Any, float, int]:
    """A run in 16 bits with a scaled loss, which the Trainer chooses by ``precision="16-mixed"`` on GPUs only."""
    pl.seed_everything(3, verbose=False)
    module = plain()
    plugin = MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE, init_scale=scale))
    callback = SyntheticGradients(predictor=predictor, training=PredictorTraining(seed=1))
    strategy = SyntheticGradientStrategy(timeout=20.0) if devices > 1 else "auto"
    trainer = make_trainer(
        strategy=strategy, devices=devices, callbacks=[callback], plugins=[plugin], max_epochs=epochs
    )
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer.fit(module, loader(shuffle=False))
    trainer.save_checkpoint(folder / "scaled.ckpt")
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    return state_of(module), plugin.scaler.get_scale(), changed


def test_scaled_losses_train_as_in_one_process(tmp_path: Path) -> None:
    whole, scale, changed = scaled(1, tmp_path)
    for state, own, count in run_ranks(2, lambda: scaled(2, tmp_path)):
        assert_same_state(whole, state)
        assert (own, count) == (scale, changed)
    saved = torch.load(tmp_path / "scaled.ckpt", weights_only=False)
    assert saved["MixedPrecision"]["scale"] == scale


class Small(Blocks):
    """A loss so small that its gradients vanish in 16 bits unless they are scaled, from activations in 16 bits."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 1e-6 * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1000.0)


def sizes_of_targets(devices: int, scaled: bool, **options: Any) -> dict[str, float]:
    """The root mean square of the targets, for each boundary whose predictor is in this process."""
    pl.seed_everything(3, verbose=False)
    module = Small(nn.Linear(FEATURES, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, CLASSES))
    plugin = MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE, init_scale=2.0**16))
    callback = SyntheticGradients(predictor=LinearPredictor(), training=PredictorTraining(seed=1), **options)
    trainer = make_trainer(
        strategy=SyntheticGradientStrategy(timeout=20.0) if devices > 1 else "auto",
        devices=devices,
        callbacks=[callback],
        plugins=[plugin] if scaled else [],
    )
    trainer.fit(module, loader(shuffle=False))
    return {name: float(t.scale.rms[0]) for name, t in callback.trainers.items() if t.scale.rms is not None}


@pytest.mark.parametrize("options", [{}, {"exact": ExactGradients(every=2)}], ids=["synthetic", "exact"])
def test_targets_do_not_vanish_in_16_bits(options: dict[str, Any]) -> None:
    expected = sizes_of_targets(1, False, **options)
    assert 0 < expected["cuts.1"] < 1e-5
    several = run_ranks(3, lambda: sizes_of_targets(3, True, **options))
    for found in (
        sizes_of_targets(1, True, **options),
        {name: size for each in several for name, size in each.items()},
    ):
        assert found == pytest.approx(expected, rel=2e-2)


def test_scaled_losses_that_overflow_skip_steps_and_go_on(tmp_path: Path) -> None:
    """Each process has a scale of its own, as its gradients differ."""
    for state, scale, changed in run_ranks(2, lambda: scaled(2, tmp_path, scale=2.0**24, epochs=6)):
        assert all(tensor.isfinite().all() for tensor in state.values())
        assert scale < 2.0**24
        assert changed == len(state)


def test_scaled_losses_and_the_norm_of_the_model_are_refused_together() -> None:
    def work() -> None:
        plugin = MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE))
        strategy = SyntheticGradientStrategy(timeout=20.0, clip_over="model")
        make_trainer(strategy=strategy, devices=2, plugins=[plugin], gradient_clip_val=1.0).fit(plain(), loader())

    for failure in run_ranks(2, work, may_fail=True):
        assert "Use 'bf16-mixed', or clip_over='stages'" in failure.message


def test_scaled_losses_need_no_gradient_in_every_process(tmp_path: Path) -> None:
    results = run_ranks(2, lambda: scaled(2, tmp_path, predictor=ZeroPredictor()))
    whole = scaled(1, tmp_path, predictor=ZeroPredictor())
    for state, _, count in results:
        assert_same_state(whole[0], state)
        assert count == whole[2] < len(state)
