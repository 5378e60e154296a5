"""Two networks at different rates, told apart by nothing but a message: odd digits, and how many threes there were."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.mnist import PIXELS, ImageSet
from lightning_sg import Chunk, Chunks, MessageBoundary, TimeBoundary

#: Images (N, L, 784), how many of the last T digits are odd (N, L), how many threes: of a window, of the last T (N, L).
Sequences = tuple[Tensor, Tensor, Tensor, Tensor]

#: So many threes or more are one answer.
MOST_THREES = 5


class DigitSequences:
    """Sequences of digits drawn at random, with what both networks are to say.

    A window is T² digits. Counts hold where they are asked for: that of odd digits at each T-th digit, of the T until
    then; that of threes at the end of a window, of all digits in it.

    Args:
        images: To draw from.
        ticks: T.
        windows: In a sequence.
        batch_size: Sequences N in a batch.
        batches: How many there are.
        seed: Of the draw.
    """

    def __init__(self, images: ImageSet, ticks: int, windows: int, batch_size: int, batches: int, seed: int) -> None:
        self.images = images
        self.ticks = ticks
        self.windows = windows
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Sequences]:
        """The same batches each time."""
        generator = torch.Generator().manual_seed(self.seed)
        length = self.windows * self.ticks**2
        for _ in range(self.batches):
            places = torch.randint(len(self.images), (self.batch_size * length,), generator=generator)
            x, y = self.images.__getitems__(places.tolist())
            y = y.view(self.batch_size, length)
            odd = self._counts(y % 2, self.ticks)
            threes = self._counts((y == 3).long(), self.ticks**2).clamp(max=MOST_THREES)
            recent = self._counts((y == 3).long(), self.ticks)
            yield x.view(self.batch_size, length, PIXELS), odd, threes, recent

    def _counts(self, marked: Tensor, span: int) -> Tensor:
        """At each digit, the count in its span."""
        return marked.view(self.batch_size, -1, span).sum(2).repeat_interleave(span, dim=1)


class TwoRates(pl.LightningModule):
    """A fast network sees a digit at each tick; a slow one hears of it by a message every T digits.

    The fast one says at each T-th digit how many of the last T were odd (0 to T). The slow one says every T² digits
    how many threes were among them (0 to 4, or more). Both keep their state from window to window.

    Args:
        ticks: T.
        coupled: Whether all is back-propagated together, a whole window of T² digits in each training step. Otherwise
            a step is T digits, a message is all that joins the networks, and the slow one acts in each T-th step.
        width: Of both recurrent states.
        message: Numbers in a message.
        learning_rate: Adam's.
        labels: Whether the predictor at the message is told how many of its T digits were threes.
    """

    def __init__(
        self,
        ticks: int = 4,
        coupled: bool = False,
        width: int = 64,
        message: int = 32,
        learning_rate: float = 2e-3,
        labels: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.ticks = ticks
        self.coupled = coupled
        self.labels = labels
        self.learning_rate = learning_rate
        self.see = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, width), nn.ReLU())
        # Where in its T digits it is, the fast network is told.
        self.fast = nn.GRU(width + ticks, width, batch_first=True)
        self.odd = nn.Linear(width, ticks + 1)
        self.speak = nn.Sequential(nn.Linear(width, message), nn.Tanh())
        self.slow = nn.GRU(message + ticks, width, batch_first=True)
        self.threes = nn.Linear(width, MOST_THREES + 1)
        self.fast_memory, self.slow_memory = TimeBoundary(), TimeBoundary()
        self.messages = MessageBoundary()

    def look(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The fast network: its outputs at each T-th digit, ``(N, L / T, width)``, and its last state."""
        out, after = self.fast(self._with_clock(self.see(x)), state)
        return out[:, self.ticks - 1 :: self.ticks], after

    def listen(self, messages: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The slow network: its outputs at each T-th message, and its last state."""
        out, after = self.slow(self._with_clock(messages), state)
        return out[:, self.ticks - 1 :: self.ticks], after

    def training_step(self, chunk: Chunk, batch_idx: int) -> Tensor:
        """The sum of the losses of all answers in the chunk."""
        (x, odd, threes, recent), first, last = chunk
        if first:
            self.slow_memory.forget()
            self.messages.forget()
        said, state = self.look(x, self.fast_memory.read(first))
        self.fast_memory.write(state, last)
        answers = self.odd(said).flatten(0, 1)
        losses = len(answers) // len(x) * F.cross_entropy(answers, odd[:, self.ticks - 1 :: self.ticks].flatten())
        message = self.speak(said)
        if not self.coupled:
            # With labels the message's predictor is a conditional one: what the slow network will be asked about this.
            self.messages.send(message.squeeze(1), recent[:, -1:].float() if self.labels else None)
            if len(self.messages) < self.ticks:
                return losses
            message = torch.stack(self.messages.receive(), dim=1)
        heard, state = self.listen(message, self.slow_memory.read())
        self.slow_memory.write(state, last)
        return losses + F.cross_entropy(self.threes(heard[:, -1]), threes[:, -1])

    def right(self, batch: Sequences) -> dict[str, Tensor]:
        """The share of right answers of both networks over whole sequences, in percent."""
        x, odd, threes, _recent = batch
        said, _ = self.look(x, None)
        heard, _ = self.listen(self.speak(said), None)
        return {
            name: 100 * (answers.argmax(-1) == goals[:, every - 1 :: every]).float().mean()
            for name, answers, every, goals in (
                ("odd", self.odd(said), self.ticks, odd),
                ("threes", self.threes(heard), self.ticks**2, threes),
            )
        }

    def validation_step(self, batch: Sequences, batch_idx: int) -> None:
        """Logs :meth:`right`."""
        for name, share in self.right(batch).items():
            self.log(f"val_{name}", share, prog_bar=True, batch_size=len(batch[0]))

    def chunks(self, sequences: DigitSequences) -> Chunks:
        """The training data, cut into this network's training steps."""
        length = self.ticks**2 if self.coupled else self.ticks
        return Chunks(sequences, length, sequence_length=sequences.windows * self.ticks**2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on everything; a network that did not act in a step has no gradient, and stays as it is."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def _with_clock(self, x: Tensor) -> Tensor:
        clock = torch.eye(self.ticks, dtype=x.dtype, device=x.device).repeat(x.shape[1] // self.ticks, 1)
        return torch.cat([x, clock.expand(len(x), -1, -1)], dim=2)
