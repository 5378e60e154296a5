"""Update unlocking: a stage runs ahead of the next by its delay, and no further."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.nn.functional as F
from torch import Tensor

from lightning_sg import LossModelPredictor, SyntheticGradients, ZeroPredictor
from tests.everywhere import trainer_for
from tests.models import Classifier, loader
from tests.ranks import run_ranks


class SlowEnd(Classifier):
    """Its last stage sleeps once; each process notes when it was done with each batch."""

    SLEEP = 1.5

    def __init__(self) -> None:
        super().__init__(stages=2)
        self.times: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if loss.requires_grad and batch_idx == 8 and loss.item() > -1:
            time.sleep(self.SLEEP)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.monotonic())


@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("predictor", [LossModelPredictor(hidden=8), ZeroPredictor()])
def test_the_first_stage_goes_on_up_to_its_delay_and_no_further(delay: int, predictor: Any) -> None:
    def work() -> list[float]:
        pl.seed_everything(1, verbose=False)
        module = SlowEnd()
        callback = SyntheticGradients(delay=delay, predictor=predictor)
        trainer_for(2, [callback], max_epochs=1).fit(module, loader(batch_size=8, samples=8 * 20))
        return module.times

    last, first = run_ranks(2, work)
    stuck = last[8] - SlowEnd.SLEEP + 0.2, last[8] - 0.2  # while the last stage sleeps, with a margin
    done_before = sum(moment < stuck[0] for moment in first)
    done_after = sum(moment < stuck[1] for moment in first)
    # Batches 0 to 7 have their targets, batch 8 has none: the first stage gets to the end of batch 8 + delay.
    assert done_before == done_after == 9 + delay
    assert len(first) == 20
