"""A character model of Shakespeare's plays that is trained on the text as streams, chunk by chunk."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shakespeare import CHARACTERS, Shakespeare
from lightning_sg import Chunk, Chunks, TimeBoundary, parallel_streams


class ShakespeareStreams(pl.LightningDataModule):
    """The first nine tenths of the text as parallel streams to train on; the last tenth to validate.

    Args:
        root: The folder with ``input.txt``.
        chunk: Characters in a chunk.
        streams: Streams in a batch.
    """

    def __init__(self, root: str = "data/tinyshakespeare", chunk: int = 8, streams: int = 160) -> None:
        super().__init__()
        self.root = Path(root)
        self.chunk = chunk
        self.streams = streams

    def setup(self, stage: str) -> None:
        """Reads the text."""
        text = Shakespeare.read(self.root)
        kept = len(text) * 9 // 10
        self.train, self.validation = text[:kept], text[kept:]

    def train_dataloader(self) -> Chunks:
        """The text once, each stream from its beginning on."""
        return self._chunks(self.train, self.streams, self.chunk)

    def val_dataloader(self) -> Chunks:
        """The text held out, in chunks that do not depend on those of training."""
        return self._chunks(self.validation, 32, 64)

    @staticmethod
    def _chunks(text: Tensor, streams: int, length: int) -> Chunks:
        batch = parallel_streams(text, streams)
        return Chunks([batch], length, sequence_length=batch[0].shape[1])


class CharLSTM(pl.LightningModule):
    """Says what the next character is.

    Args:
        width: Of the LSTM.
        learning_rate: Adam's.
    """

    def __init__(self, width: int = 128, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(CHARACTERS, 32)
        self.core = nn.LSTM(32, width, batch_first=True)
        self.out = nn.Linear(width, CHARACTERS)
        self.memory = TimeBoundary()

    def _nats(self, chunk: Chunk) -> Tensor:
        (x, y), first, last = chunk
        out, state = self.core(self.embedding(x), self.memory.read(first))
        self.memory.write(state, last)
        return F.cross_entropy(self.out(out).flatten(0, 1), y.flatten())

    def training_step(self, chunk: Chunk, batch_idx: int) -> Tensor:
        """Nats for each character of one chunk."""
        loss = self._nats(chunk)
        self.log("train_loss", loss, prog_bar=True, batch_size=chunk.batch[0].numel())
        return loss

    def validation_step(self, chunk: Chunk, batch_idx: int) -> None:
        """Bits for each character of the text held out."""
        self.log("val_bits", self._nats(chunk) / math.log(2), prog_bar=True, batch_size=chunk.batch[0].numel())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on everything."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate, fused=True)
