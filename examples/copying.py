"""Copying a sequence from memory, once or several times: the tasks on which truncated backpropagation falls short."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import Chunk, Chunks, TimeBoundary

Batch = tuple[Tensor, Tensor, Tensor]


class Curriculum:
    """The length to copy and how often, raised whenever the last batches were solved.

    Args:
        repeats: Whether the number of repetitions is raised too, in turn with the length.
        threshold: Bits of error for each bit below which a batch counts as solved.
        memory: Over how many batches the error is averaged, exponentially.
    """

    def __init__(self, repeats: bool = False, threshold: float = 0.15, memory: float = 10.0) -> None:
        self.raises_repeats = repeats
        self.threshold = threshold
        self.memory = memory
        self.length, self.repeats = 1, 1
        self.solved = 0
        self._error = 1.0

    def see(self, bits: float) -> None:
        """Takes in the error of one batch of the current length."""
        self._error += (bits - self._error) / self.memory
        if self._error < self.threshold:
            self.solved = self.length * self.repeats
            if self.raises_repeats and self.repeats <= self.length:
                self.repeats += 1
            else:
                self.length += 1
            self._error = 1.0


class CopySequences:
    """Batches of random bits to be read, and then given back as often as a number beside them says.

    Inputs are ``(N, L, 3)``: a bit as -1 or 1, a mark where the copies begin, and there the number of repetitions; goals
    and the mask of what counts are ``(N, L)``.

    Args:
        curriculum: Says how long sequences are.
        batch_size: Sequences in a batch.
        seed: Seeds the bits.
    """

    def __init__(self, curriculum: Curriculum, batch_size: int, seed: int) -> None:
        self.curriculum = curriculum
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        """Without end."""
        while True:
            length, repeats = self.curriculum.length, self.curriculum.repeats
            bits = torch.randint(2, (self.batch_size, length), generator=self._generator).float()
            total = length + 1 + length * repeats
            x = torch.zeros(self.batch_size, total, 3)
            x[:, :length, 0] = 2 * bits - 1
            x[:, length, 1] = 1
            x[:, length, 2] = repeats / 10
            y = torch.zeros(self.batch_size, total)
            y[:, length + 1 :] = bits.repeat(1, repeats)
            mask = torch.zeros(self.batch_size, total)
            mask[:, length + 1 :] = 1
            yield x, y, mask


class Copier(pl.LightningModule):
    """An LSTM that copies, trained chunk by chunk.

    Args:
        chunk: Time steps in a chunk.
        repeats: Whether to copy several times.
        width: Of the LSTM.
        batch_size: Sequences in a batch.
        learning_rate: Adam's.
        seed: Seeds the bits.
    """

    def __init__(
        self,
        chunk: int = 3,
        repeats: bool = False,
        width: int = 128,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.curriculum = Curriculum(repeats)
        self.core = nn.LSTM(3, width, batch_first=True)
        self.out = nn.Linear(width, 1)
        self.memory = TimeBoundary()
        self._errors: list[Tensor] = []

    def training_step(self, chunk: Chunk, batch_idx: int) -> Tensor:
        """Nats for each position of one chunk; positions where nothing is asked count as zero."""
        (x, y, mask), first, last = chunk
        out, state = self.core(x, self.memory.read(first))
        self.memory.write(state, last)
        nats = F.binary_cross_entropy_with_logits(self.out(out).squeeze(-1), y, reduction="none") * mask
        self._note(nats.detach().sum() / len(x), bool(last))
        return nats.mean()

    def _note(self, nats: Tensor, last: bool) -> None:
        """At the end of a sequence, tells the curriculum how well it went."""
        self._errors.append(nats)
        if last:
            asked = self.curriculum.length * self.curriculum.repeats
            self.curriculum.see(float(torch.stack(self._errors).sum()) / asked / math.log(2))
            self._errors = []
            self.log("solved", float(self.curriculum.solved), prog_bar=True)

    def train_dataloader(self) -> Any:
        """Sequences of the curriculum's length, chunk by chunk."""
        h = self.hparams
        return Chunks(CopySequences(self.curriculum, h.batch_size, h.seed), h.chunk)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on everything."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate, fused=True)
