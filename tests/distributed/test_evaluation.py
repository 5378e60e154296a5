"""Validation, test and prediction on several processes give the results of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_sg import PredictorTraining, SyntheticGradients
from tests.everywhere import everywhere, trainer_for
from tests.models import CLASSES, Classifier, loader, make_trainer
from tests.ranks import run_ranks
from tests.two_stages import fit


class Scored(Classifier):
    """Has a torchmetrics object, and code at the end of an epoch that needs the outputs of its steps."""

    def __init__(self) -> None:
        super().__init__(stages=4)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.losses: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.losses.append(F.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log("val_mean", torch.stack(self.losses).mean())
        self.losses.clear()


def test_evaluation_is_that_of_the_whole_network() -> None:
    def work(devices: int) -> Any:
        pl.seed_everything(5, verbose=False)
        module = Scored()
        trainer = trainer_for(devices)
        trainer.fit(module, loader(), loader(shuffle=False))
        fitted = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        (validated,) = trainer.validate(module, loader(shuffle=False), verbose=False)
        (tested,) = trainer.test(module, loader(shuffle=False), verbose=False)
        predicted = trainer.predict(module, loader(shuffle=False))
        alone = trainer_for(devices, max_epochs=1)
        (before_any_fit,) = alone.test(module, loader(shuffle=False), verbose=False)
        return fitted, validated, tested, predicted, before_any_fit

    ((fitted, validated, tested, predicted, again),) = everywhere(1, work)
    results = everywhere(2, work)
    for result in results:
        assert result[0] == pytest.approx(fitted, abs=1e-5)
    assert results[0][1] == pytest.approx(validated, abs=1e-5)
    assert results[0][2] == pytest.approx(tested, abs=1e-5)
    assert results[0][4] == pytest.approx(again, abs=1e-5)
    torch.testing.assert_close(results[0][3], predicted, rtol=1e-4, atol=1e-5)


def test_evaluation_alone_and_from_a_checkpoint_is_that_of_one_process(tmp_path: Path) -> None:
    def work(devices: int) -> Any:
        pl.seed_everything(4, verbose=False)
        module = Classifier(stages=3)
        arguments: dict[str, Any] = {"strategy": "synthetic_gradients" if devices > 1 else "auto", "devices": devices}
        trainer = make_trainer(**arguments, callbacks=[SyntheticGradients(training=PredictorTraining(seed=1))])
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False))
        trainer.save_checkpoint(tmp_path / "eval.ckpt")
        found = []
        for path in (None, str(tmp_path / "eval.ckpt")):
            fresh = Classifier(stages=3) if path else module
            alone = make_trainer(**arguments, callbacks=[SyntheticGradients(training=PredictorTraining(seed=1))])
            data = loader(shuffle=False)
            found.append(alone.validate(fresh, data, ckpt_path=path, verbose=False))
            found.append(alone.test(fresh, data, ckpt_path=path, verbose=False))
            predicted = alone.predict(fresh, data, ckpt_path=path)
            if alone.is_global_zero:
                found.append({"predicted": float(torch.cat(predicted).sum())})
        return found

    expected = work(1)
    first, *_others = run_ranks(2, lambda: work(2))
    for one, other in zip(expected, first, strict=True):
        for left, right in zip(one if isinstance(one, list) else [one], other if isinstance(other, list) else [other]):
            assert right == pytest.approx(left, rel=1e-4)


class Classic(Classifier):
    """Collects outputs of batches and epochs in hooks, as many modules do."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self(batch[0]), batch[1])}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", outputs["loss"])


def test_hooks_that_use_outputs_run_where_there_are_some() -> None:
    results = fit(Classic, devices=2)
    assert all(isinstance(result, dict) for result in results), results
