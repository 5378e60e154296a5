"""Modules for the tests of Lightning's features: each does one thing that users' modules do."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_sg import Boundary
from tests.blocks import Blocks, plain
from tests.models import CLASSES, FEATURES


class Tabulated(Blocks):
    """Makes a table from a buffer and uses it in every stage, as rotary embeddings do."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.register_buffer("frequencies", torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.outer(torch.arange(len(x), device=x.device).float(), self.frequencies).cos()
        h = self.cuts[0](self.parts[0](x) + table)
        return self.parts[2](self.cuts[1](self.parts[1](h * table)) - table)


class Tokens(nn.Module):
    """Splits the features into tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.view(len(x), 3, 4))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))


def encoder() -> Blocks:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return Blocks(Tokens(), nn.TransformerEncoder(layer, 2), Pooled())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))


class Checkpointed(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Words(pl.LightningModule):
    """An embedding with sparse gradients, in the first stage only."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16, sparse=True)
        self.cut = Boundary()
        self.head = nn.Linear(16, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words = (10 * batch[0]).long().clamp(0, 49)
        return F.cross_entropy(self.head(self.cut(self.words(words).mean(1))), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Named(pl.LightningModule):
    """A dict crosses the boundary, with a mask that carries no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.last = nn.Linear(FEATURES, 16), Boundary(), nn.Linear(16, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.first(batch[0])
        crossed = self.cut({"hidden": hidden, "mask": batch[0][:, :1] > 0, "pair": (hidden.exp(), 3)})
        features = crossed["hidden"] * crossed["mask"] + crossed["pair"][0] * crossed["pair"][1]
        return F.cross_entropy(self.last(features), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ShapeDependent(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if len(x) > 6 else 2 * x)  # the last batch is smaller


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x += 1  # the first operation after the boundary
        return super().forward(x).relu_()


class Twice(nn.Module):
    """One block, called twice, with a keyword argument that has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(16, 16)

    def once(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        return self.block(x) if scale is None else scale * self.block(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(torch.relu(self.once(x)), scale=torch.full((), 0.5))


class SplitInTwo(torch.autograd.Function):
    """Has two outputs; the second gets no gradient if nothing uses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.exp()

    @staticmethod
    def backward(ctx: Any, double: Tensor, _exponential: Tensor | None) -> Tensor:
        return 2 * double


class Splitting(nn.Linear):
    """Several results of one operation, one of them unused."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = super().forward(x).split(8, dim=1)
        used, _unused = SplitInTwo.apply(torch.cat([right, left], 1))
        return used


class Bare(nn.Module):
    """Bare parameters, an alias of one, and a buffer that is added to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(16, 16))
        self.alias = self.weight
        self.register_buffer("shift", torch.arange(16.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(torch.mm(x, self.weight), self.alias) + 0.01 * self.shift.clone()


def hooked() -> Blocks:
    module = plain()
    module.parts[1].register_forward_hook(lambda _module, _args, output: 0.5 * output)
    module.parts[0].register_forward_pre_hook(lambda _module, args: (args[0] - 1,))
    module.parts[2].register_full_backward_hook(lambda _module, gradients, _outputs: (2 * gradients[0],))
    return module


class Plateau(Blocks):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class Stepping(Blocks):
    """Overrides the optimizer hooks that users override."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.seen = 0.0

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:  # a warm-up, as in Lightning's documentation
            group["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 8)
        optimizer.step(closure=optimizer_closure)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.clamp_(-0.01, 0.01)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.seen += 1


class TwoOptimizers(Blocks):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        schedule = self.lr_schedulers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()
        schedule.step()

    def configure_optimizers(self) -> Any:
        halves = [p for part in self.parts[:2] for p in part.parameters()], self.parts[2].parameters()
        first, second = torch.optim.Adam(halves[0], lr=1e-2), torch.optim.SGD(halves[1], lr=0.1)
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(first, 0.9)]


class Frozen(Blocks):
    def configure_optimizers(self) -> Any:
        self.parts[1][0].requires_grad_(False)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)
