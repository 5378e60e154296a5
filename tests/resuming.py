"""A run that is saved half-way and resumed, and the same run as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_sg import SyntheticGradients
from tests.models import loader, make_trainer, state_of
from tests.ranks import run_ranks


def resumed_and_whole(
    make_module: Callable[[], pl.LightningModule],
    make_callback: Callable[[], SyntheticGradients],
    devices: int,
    folder: Path,
) -> list[tuple[Any, Any]]:
    """In each process, the state after four epochs: resumed from a checkpoint after two, and trained at one go."""

    def work() -> tuple[Any, Any]:
        def fit(epochs: int, resume: str | None = None) -> Any:
            pl.seed_everything(7, verbose=False)
            module = make_module()
            trainer = make_trainer(
                strategy="synthetic_gradients" if devices > 1 else "auto",
                devices=devices,
                max_epochs=epochs,
                callbacks=[make_callback()],
            )
            trainer.fit(module, loader(shuffle=False), ckpt_path=resume, weights_only=True)
            return trainer, module

        trainer, _ = fit(2)
        trainer.save_checkpoint(folder / "half.ckpt")
        _, resumed = fit(4, str(folder / "half.ckpt"))
        _, whole = fit(4)
        return state_of(resumed), state_of(whole)

    return run_ranks(devices, work) if devices > 1 else [work()]
