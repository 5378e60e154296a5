"""Small modules whose steps run the network several times, or not at all."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import Boundary
from tests.models import CLASSES, FEATURES

WIDTH = 16


class Stages(pl.LightningModule):
    """As many stages as are asked for; the step is that of plain classification."""

    stages = 2

    def __init__(self) -> None:
        super().__init__()
        sizes = [FEATURES, *[WIDTH] * (self.stages - 1)]
        blocks = [nn.Sequential(nn.Linear(size, WIDTH), nn.Tanh(), Boundary()) for size in sizes[:-1]]
        self.net = nn.Sequential(*blocks, nn.Linear(sizes[-1], CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class ThreeStages(Stages):
    stages = 3


class Siamese(Stages):
    """Two views in one step, whose outputs the loss compares."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        one, other = self(x), self(x.flip(0))
        return F.cross_entropy(one, y) + 0.5 * F.mse_loss(one, other.flip(0)) + 0.1 * other.square().mean()


class SiameseOfThree(Siamese):
    stages = 3


class Mixed(Siamese):
    """Views that are as many as the number of the batch says: 1, 2, 3, 1, ..."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        losses = [F.cross_entropy(self(x * (1 + view)), y) for view in range(1 + batch_idx % 3)]
        self.log("train_loss", losses[0].item())
        return torch.stack(losses).mean()


class MixedOfThree(Mixed):
    stages = 3


class Skipping(Stages):
    """Every other batch does without the network."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        if batch_idx % 2:
            return 0.1 * self.net[-1].weight.square().mean()
        return self.loss(x, y)


class SkippingOfThree(Skipping):
    stages = 3


class EarlyReturn(Stages):
    """Leaves every other batch out, the first one too."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 2 == 0 else self.loss(*batch)


class Adversarial(pl.LightningModule):
    """A generator, and a discriminator in two stages that sees real samples and generated ones."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(4, FEATURES)
        self.lower, self.cut = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh()), Boundary()
        self.upper = nn.Linear(WIDTH, 1)

    def judge(self, x: Tensor) -> Tensor:
        return self.upper(self.cut(self.lower(x)))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        noise = real[:, :4].sin()
        of_generator, of_discriminator = self.optimizers()
        fake = self.generator(noise)
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        loss = F.binary_cross_entropy_with_logits(self.judge(real), ones)
        loss = loss + F.binary_cross_entropy_with_logits(self.judge(fake.detach()), zeros)
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        loss = F.binary_cross_entropy_with_logits(self.judge(self.generator(noise)), ones)
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()

    def configure_optimizers(self) -> Any:
        discriminator = [*self.lower.parameters(), *self.upper.parameters()]
        return torch.optim.SGD(self.generator.parameters(), lr=0.1), torch.optim.SGD(discriminator, lr=0.1)


class AdversarialOfThree(Adversarial):
    """The discriminator has three stages."""

    stages = 3

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Boundary(), nn.Linear(WIDTH, 1))


class Evaluated(Stages):
    """Validates as often as the batch says, and logs what comes of it."""

    times: Any = staticmethod(lambda batch_idx: 1)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        total: Any = 0.0
        for view in range(self.times(batch_idx)):
            loss = F.cross_entropy(self(x + view), y)
            self.log(f"val_{view}", loss)
            total = total + loss.item()
        self.log("val_total", total)
        return total

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0]
        views = [self(x + view) for view in range(self.times(batch_idx))]
        return torch.stack(views).mean(0) if views else x.mean()


class Sharpness(torch.optim.SGD):
    """Evaluates its closure twice, as sharpness-aware minimization does."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            return closure()


class Sharp(Stages):
    def configure_optimizers(self) -> Any:
        return Sharpness(self.parameters(), lr=0.1)
