"""A residual CNN with BatchNorm for colour images of 32 x 32, cut between its blocks."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from examples.colour_digits import CLASSES, Batch
from lightning_sg import Boundary


class Block(nn.Module):
    """Two convolutions with BatchNorm, added to what came in; the first may halve the side.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: 2 to halve the side.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.skip: nn.Module = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, D, H / stride, W / stride)``."""
        return F.relu(self.body(x) + self.skip(x))


#: After which blocks the boundaries are, by the number of stages.
CUTS: dict[int, tuple[int, ...]] = {1: (), 2: (3,), 3: (2, 4), 4: (2, 3, 5)}


class ResidualCNN(pl.LightningModule):
    """A convolution that halves the side, six residual blocks, and a linear layer on the mean over all places.

    Args:
        channels: Channels of the first, middle and last two blocks.
        stages: Number of stages, 1 to 4; blocks are shared out evenly, and there is a boundary between each two.
        learning_rate: AdamW's at the start; it falls to zero along a cosine.
        weight_decay: AdamW's.

    Raises:
        ValueError: If there are to be more stages.
    """

    def __init__(
        self,
        channels: tuple[int, int, int] = (16, 32, 64),
        stages: int = 4,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        if stages not in CUTS:
            raise ValueError(f"ResidualCNN has 1 to {max(CUTS)} stages, not {stages}.")
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        first, middle, last = channels
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        ]
        sizes = [(first, first, 1)] * 2 + [(first, middle, 2), (middle, middle, 1), (middle, last, 2), (last, last, 1)]
        for number, size in enumerate(sizes, start=1):
            layers.append(Block(*size))
            if number in CUTS[stages]:
                layers.append(Boundary())
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, 32, 32)`` to logits ``(N, 10)``."""
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The error on the images held out, in percent."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The error on the test images, in percent."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, part: str) -> None:
        x, y = batch
        logits = self(x)
        self.log(f"{part}_loss", F.cross_entropy(logits, y))
        self.log(f"{part}_error", 100.0 * (logits.argmax(-1) != y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on everything, its rate falling to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
