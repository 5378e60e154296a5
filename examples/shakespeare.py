"""Shakespeare's plays character by character, and a small transformer for them, cut between its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lightning_sg import Boundary

FILE, CHARACTERS = "input.txt", 65

Batch = tuple[Tensor, Tensor]


class Windows(Dataset[Batch]):
    """Windows of a text, each with the same window one character later; hands out whole batches.

    Args:
        text: int64, ``(L,)``.
        length: Characters in a window.
        stride: How far a window begins after the one before it.

    Raises:
        ValueError: If the text is shorter than one window.
    """

    def __init__(self, text: Tensor, length: int, stride: int = 1) -> None:
        if len(text) <= length:
            raise ValueError(f"A text of {len(text)} characters has no window of {length} and one more to predict.")
        self.windows = text.unfold(0, length + 1, stride)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, place: int) -> Batch:
        x, y = self.__getitems__([place])
        return x[0], y[0]

    def __getitems__(self, places: Sequence[int]) -> Batch:
        """A batch by indexing; a DataLoader calls this instead of asking for each item."""
        chosen = self.windows[torch.as_tensor(places)]
        return chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()


def _as_is(batch: Batch) -> Batch:
    return batch


class Text(pl.LightningDataModule):
    """Random windows of the first nine tenths of a text to train on; the last tenth, end to end, to validate.

    A subclass says what the text is.

    Args:
        batch_size: Windows in a training batch.
        context: Characters in a window.
        steps: Batches in an epoch.
        seed: Seeds the choice of windows: runs with the same seed see the same batches.
    """

    def __init__(self, batch_size: int = 32, context: int = 64, steps: int = 800, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.context = context
        self.steps = steps
        self.seed = seed

    def text(self) -> Tensor:
        """The whole text, int64 ``(L,)``."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Makes both sets of windows.

        Raises:
            ValueError: If the text is shorter than a window.
        """
        text = self.text()
        kept = len(text) * 9 // 10
        self.train = Windows(text[:kept], self.context)
        self.validation = Windows(text[kept:], self.context, stride=self.context)

    def train_dataloader(self) -> DataLoader[Batch]:
        """``steps`` batches of random windows, others in each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = RandomSampler(
            self.train, replacement=True, num_samples=self.steps * self.batch_size, generator=generator
        )
        return DataLoader(self.train, self.batch_size, sampler=chosen, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The last tenth of the text, each character once."""
        return DataLoader(self.validation, 64, collate_fn=_as_is)


class Shakespeare(Text):
    """Shakespeare's plays.

    Args:
        root: The folder with ``input.txt``.
        batch_size: Windows in a training batch.
        context: Characters in a window.
        steps: Batches in an epoch.
        seed: Seeds the choice of windows: runs with the same seed see the same batches.
    """

    def __init__(
        self,
        root: str = "data/tinyshakespeare",
        batch_size: int = 32,
        context: int = 64,
        steps: int = 800,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, context, steps, seed)
        self.root = Path(root)

    def text(self) -> Tensor:
        """The whole text, int64 ``(L,)``; see :meth:`read`."""
        return self.read(self.root)

    @staticmethod
    def read(root: Path) -> Tensor:
        """The whole text, int64 ``(L,)``; characters are numbered in their order.

        Raises:
            FileNotFoundError: If it is missing.
            ValueError: If it is another text, with more characters than the models know.
        """
        path = root / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.absolute()} is missing. It is Andrej Karpathy's tinyshakespeare, about a megabyte: "
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt. "
                "Put it there, or name its folder with --data.root."
            )
        text = path.read_text(encoding="utf-8")
        characters = sorted(set(text))
        if len(characters) > CHARACTERS:
            raise ValueError(
                f"{path} has {len(characters)} different characters, but tinyshakespeare, for which the model is "
                f"made, has {CHARACTERS}: it is another text."
            )
        numbers = {character: number for number, character in enumerate(characters)}
        return torch.tensor([numbers[character] for character in text])


class Embedding(nn.Module):
    """Characters and their positions as vectors.

    Args:
        characters: How many there are.
        width: Of the vectors.
        context: The number of positions.
    """

    def __init__(self, characters: int, width: int, context: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        for weight in (self.characters.weight, self.positions):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T)`` to ``(N, T, D)``."""
        return self.characters(x) + self.positions[: x.shape[1]]


class Block(nn.Module):
    """Causal attention and a GELU network, each added to what came in and normalised before.

    Args:
        width: Of the vectors.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, D)`` to ``(N, T, D)``."""
        split = self.queries_keys_values(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.output(seen.transpose(1, 2).flatten(2))
        return x + self.network(self.network_norm(x))


class CharTransformer(pl.LightningModule):
    """Says what the next character is, for each position of a window.

    Args:
        blocks: Number of blocks.
        width: Of the vectors.
        heads: Attention heads.
        context: The longest window.
        stages: Number of stages of equally many blocks; there is a boundary between each two.
        learning_rate: The optimizer's at the start; it falls to zero along a cosine.
        weight_decay: The optimizer's.
        look_ahead: Train with NAdam, which suits gradients that come late, in place of AdamW.
        characters: How many there are.
    """

    def __init__(
        self,
        blocks: int = 4,
        width: int = 128,
        heads: int = 4,
        context: int = 64,
        stages: int = 2,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        look_ahead: bool = False,
        characters: int = CHARACTERS,
    ) -> None:
        super().__init__()
        if stages < 1 or blocks % stages:
            raise ValueError(f"{blocks} blocks do not make {stages} stages of equally many.")
        if width % heads:
            raise ValueError(f"A width of {width} cannot be divided among {heads} heads.")
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.look_ahead = look_ahead
        layers: list[nn.Module] = [Embedding(characters, width, context)]
        for number in range(blocks):
            if number and number % (blocks // stages) == 0:
                layers.append(Boundary())
            layers.append(Block(width, heads))
        self.net = nn.Sequential(*layers, nn.LayerNorm(width), nn.Linear(width, characters))

    def forward(self, x: Tensor) -> Tensor:
        """Characters ``(N, T)`` to logits ``(N, T, C)``."""
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Nats for each character of one batch."""
        loss = self._nats(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Nats for each character of the text held out."""
        self.log("val_loss", self._nats(batch), prog_bar=True)

    def _nats(self, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or NAdam on everything, its rate falling to zero."""
        settings: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        optimizer: torch.optim.Optimizer
        if self.look_ahead:
            settings |= {"betas": (0.95, 0.999), "decoupled_weight_decay": True}
            optimizer = torch.optim.NAdam(self.parameters(), **settings)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), **settings)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
