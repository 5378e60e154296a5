"""Copying a sequence from memory, once or several times: the tasks on which truncated backpropagation falls short."""

from __future__ import annotations

import math
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import Chunk, TimeBoundary


class Curriculum:
    """The length to copy and how often, raised whenever sequences of the current length are solved.

    Args:
        repeats: Whether the number of repetitions is raised too, in turn with the length.
        threshold: Bits of error for each bit below which a length counts as solved.
        memory: Over how many bits the error is averaged, exponentially.
    """

    def __init__(self, repeats: bool = False, threshold: float = 0.15, memory: float = 2000.0) -> None:
        self.raises_repeats = repeats
        self.threshold = threshold
        self.memory = memory
        self.length, self.repeats = 1, 1
        self.solved = 0
        self._error = 1.0

    def see(self, bits_of_error: float, bits: float) -> None:
        """Takes in the error summed over so many bits of the current length."""
        share = min(1.0, bits / self.memory)
        self._error += share * (bits_of_error / max(bits, 1) - self._error)
        if self._error < self.threshold:
            self.solved = self.length * self.repeats
            if self.raises_repeats and self.repeats <= self.length:
                self.repeats += 1
            else:
                self.length += 1
            self._error = 1.0


class CopyStreams:
    """Parallel streams of sequences: bits to be read, then to be given back as often as a number beside them says.

    Each stream is at another place of its sequences, so that a chunk has all of them in it. A sequence begins with a
    chunk: it is padded up to that. Inputs are ``(N, T, 3)``: a bit as -1 or 1, a mark where the copies begin, and there
    the number of repetitions; goals ``(N, T)``; what counts ``(N, T)``, 1, or 2 in sequences of the newest length.

    Args:
        curriculum: Says how long sequences are.
        number: Streams N.
        chunk: Time steps T in a chunk.
        seed: Seeds the bits.
    """

    def __init__(self, curriculum: Curriculum, number: int, chunk: int, seed: int) -> None:
        self.curriculum = curriculum
        self.number = number
        self.chunk = chunk
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks without end."""
        streams = torch.arange(self.number)
        x, y, asked, lengths = self._sequences(self.number)
        newest = (self.curriculum.length, self.curriculum.repeats)
        place = self.chunk * (streams % (lengths // self.chunk))
        first = torch.ones(self.number, dtype=torch.bool)
        while True:
            steps = place[:, None] + torch.arange(self.chunk)
            batch = tuple(part[streams[:, None], steps] for part in (x, y, asked))
            place = place + self.chunk
            last = place >= lengths
            yield Chunk(batch, first, last)
            now = (self.curriculum.length, self.curriculum.repeats)
            if now != newest:  # what is in the streams is of an older length
                newest = now
                asked.clamp_(max=1)
            ended = last.nonzero().flatten()
            if len(ended):
                fresh = self._sequences(len(ended))
                x, y, asked = (_replace(old, ended, new) for old, new in zip((x, y, asked), fresh))
                lengths[ended], place[ended] = fresh[3], 0
            first = last

    def _sequences(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs, goals, what counts, and the length of each, all of the curriculum's length."""
        length, repeats = self.curriculum.length, self.curriculum.repeats
        total = math.ceil((length + 1 + length * repeats) / self.chunk) * self.chunk
        bits = torch.randint(2, (number, length), generator=self._generator).float()
        x, y, asked = torch.zeros(number, total, 3), torch.zeros(number, total), torch.zeros(number, total)
        x[:, :length, 0] = 2 * bits - 1
        x[:, length, 1:] = torch.tensor([1, repeats / 10])
        answer = slice(length + 1, length + 1 + length * repeats)
        y[:, answer], asked[:, answer] = bits.repeat(1, repeats), 2
        return x, y, asked, torch.full((number,), total)


def _replace(old: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """``old`` with some rows replaced, padded with zeros if the new ones are longer."""
    if new.shape[1] > old.shape[1]:
        padded = old.new_zeros(old.shape[0], new.shape[1], *old.shape[2:])
        padded[:, : old.shape[1]] = old
        old = padded
    old[rows, : new.shape[1]] = new
    return old


class Copier(pl.LightningModule):
    """An LSTM that copies, trained chunk by chunk.

    Args:
        chunk: Time steps in a chunk.
        repeats: Whether to copy several times.
        width: Of the LSTM.
        batch_size: Streams in a batch.
        learning_rate: Adam's.
        seed: Seeds the bits.
    """

    def __init__(
        self,
        chunk: int = 3,
        repeats: bool = False,
        width: int = 64,
        batch_size: int = 64,
        learning_rate: float = 3e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.curriculum = Curriculum(repeats)
        self.core = nn.LSTM(3, width, batch_first=True)
        self.out = nn.Linear(width, 1)
        self.memory = TimeBoundary()

    def training_step(self, chunk: Chunk, batch_idx: int) -> Tensor:
        """Nats for each position of one chunk; positions where nothing is asked count as zero."""
        (x, y, asked), first, last = chunk
        out, state = self.core(x, self.memory.read(first))
        self.memory.write(state, last)
        nats = F.binary_cross_entropy_with_logits(self.out(out).squeeze(-1), y, reduction="none") * (asked > 0)
        newest = asked == 2
        self.curriculum.see(float(nats.detach()[newest].sum()) / math.log(2), float(newest.sum()))
        if batch_idx % 50 == 0:  # logging takes longer than such a small network's step
            self.log("solved", float(self.curriculum.solved), prog_bar=True, batch_size=len(x))
        return nats.mean()

    def train_dataloader(self) -> CopyStreams:
        """Streams of sequences of the curriculum's length, chunk by chunk."""
        h = self.hparams
        return CopyStreams(self.curriculum, h.batch_size, h.chunk, h.seed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on everything."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate, fused=True)
