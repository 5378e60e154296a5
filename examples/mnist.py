"""MNIST from its four IDX files, and a deep MLP for it, cut after each hidden layer or into fewer stages."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_sg import Boundary

PIXELS, CLASSES = 28 * 28, 10
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# Of the training images; the usual figures.
_MEAN, _STD = 0.1307, 0.3081

Batch = tuple[Tensor, Tensor]
Cuts = Literal["every", "middle", "four", "none"]


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads a file of unsigned bytes in the IDX format, plain or compressed with gzip.

    Args:
        path: The file.
        dimensions: How many dimensions it must have: 1 for labels, 3 for images.

    Returns:
        A uint8 tensor with the dimensions that the file states.

    Raises:
        ValueError: If the file is something else, or is incomplete.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged or incomplete gzip file ({error}).") from error
    magic, expected = content[:4], bytes([0, 0, 8, dimensions])  # 8: unsigned bytes
    if magic != expected:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes in {dimensions} dimension(s): it begins with "
            f"{magic.hex(' ') or 'nothing'} instead of {expected.hex(' ')}."
        )
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path} is {len(content)} bytes long (uncompressed), but its header announces "
            f"{start + math.prod(shape)}: the file is incomplete or damaged."
        )
    if not math.prod(shape):
        raise ValueError(f"{path} is empty: its header announces the shape {shape}.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


class ImageSet(Dataset[Batch]):
    """Images and labels in memory; hands out whole batches.

    Args:
        images: uint8, ``(N, 28, 28)``.
        labels: uint8, ``(N,)``.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> Batch:
        x, y = self.__getitems__([place])
        return x[0], y[0]

    def __getitems__(self, places: Sequence[int]) -> Batch:
        """A batch by indexing; a DataLoader calls this instead of asking for each item."""
        chosen = torch.as_tensor(places)
        x = self.images[chosen].flatten(1).float().div_(255).sub_(_MEAN).div_(_STD)
        return x, self.labels[chosen].long()


def _as_is(batch: Batch) -> Batch:
    return batch


class Mnist(pl.LightningDataModule):
    """MNIST: 60000 images to train on, less those held out, and 10000 to test.

    Args:
        root: The folder with the four IDX files, compressed with gzip or not.
        batch_size: Samples in a training batch.
        validation: How many training images are held out for validation, the last ones; 0 for none.
    """

    def __init__(self, root: str = "data/mnist", batch_size: int = 256, validation: int = 5000) -> None:
        super().__init__()
        self.root = Path(root)
        self.batch_size = batch_size
        self.validation = validation

    def prepare_data(self) -> None:
        """Fetches missing files if torchvision is there to do it.

        Raises:
            FileNotFoundError: If files are missing and torchvision is not installed.
        """
        if not self._missing():
            return
        try:
            from torchvision.datasets import MNIST
        except ImportError:
            raise self._not_found() from None
        MNIST(str(self.root), download=True)

    def setup(self, stage: str) -> None:
        """Reads the files.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one is damaged, or they do not belong together.
        """
        if self._missing():
            raise self._not_found()
        images, labels = self._read("train")
        kept = len(labels) - self.validation
        if not 0 <= self.validation < len(labels):
            raise ValueError(f"validation must be 0 to {len(labels) - 1} images, not {self.validation}.")
        self.train_set = ImageSet(images[:kept], labels[:kept])
        self.val_set = ImageSet(images[kept:], labels[kept:])
        self.test_set = ImageSet(*self._read("t10k"))

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        image_file, label_file = (self._find(name) for name in FILES if name.startswith(part))
        assert image_file is not None
        assert label_file is not None
        images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{image_file} has {len(images)} images, but {label_file} has {len(labels)} labels: "
                "the files do not belong together."
            )
        return images, labels

    def _find(self, name: str) -> Path | None:
        # torchvision puts the files two folders down.
        places = [folder / (name + end) for folder in (self.root, self.root / "MNIST" / "raw") for end in ("", ".gz")]
        return next((place for place in places if place.is_file()), None)

    def _missing(self) -> list[str]:
        return [name for name in FILES if self._find(name) is None]

    def _not_found(self) -> FileNotFoundError:
        return FileNotFoundError(
            f"MNIST is not complete in {self.root.absolute()}: {', '.join(self._missing())} "
            "(each may end in .gz) missing. Put the files there, from Yann LeCun's MNIST page or a mirror such as the "
            "one torchvision.datasets.MNIST uses, or name their folder with --data.root. With torchvision installed "
            "they are fetched."
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training set, in a new order each epoch."""
        # BatchNorm cannot train on the lone sample that some batch sizes would leave over.
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The images held out; no loader if there are none, and Lightning does not validate."""
        return DataLoader(self.val_set, 1000, collate_fn=_as_is) if self.validation else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test set."""
        return DataLoader(self.test_set, 1000, collate_fn=_as_is)


def places_to_cut(layers: int, cuts: Cuts) -> set[int]:
    """After which hidden layers, counted from one, the boundaries are.

    Args:
        layers: How many hidden layers there are.
        cuts: After ``"every"`` one, in the ``"middle"``, into ``"four"`` stages of about as many layers each, or
            ``"none"``.

    Raises:
        ValueError: If ``cuts`` is something else, or there are too few layers for four stages.
    """
    if cuts not in get_args(Cuts):
        raise ValueError(f"cuts must be one of {', '.join(map(repr, get_args(Cuts)))}, not {cuts!r}.")
    if cuts == "four" and layers < 3:
        raise ValueError(f"cuts='four' needs three boundaries, but there are only {layers} hidden layers to cut after.")
    if cuts == "every":
        return set(range(1, layers + 1))
    stages = {"middle": 2, "four": 4, "none": 1}[cuts]
    return {math.ceil(layers * stage / stages) for stage in range(1, stages)}


class ImageClassifier(pl.LightningModule):
    """Training and testing of a network that tells digits: what the models for MNIST have in common.

    A subclass makes ``net`` and sets ``learning_rate``, which falls to zero along a cosine.
    """

    net: nn.Module
    learning_rate: float

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 784)`` to logits ``(N, 10)``."""
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The error on the images held out, in percent."""
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_error", error_percent(logits, y), prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The error on the test set, in percent."""
        x, y = batch
        self.log("test_error", error_percent(self(x), y))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on everything (each process steps only its own stages' parameters), its rate falling to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MnistMLP(ImageClassifier):
    """Hidden layers of Linear, BatchNorm and ReLU, as in the first experiments with synthetic gradients.

    Args:
        hidden_layers: Number of hidden layers.
        width: Width of each.
        learning_rate: Adam's at the start; it falls to zero along a cosine.
        cuts: Where the boundaries are: after ``"every"`` hidden layer, in the ``"middle"``, between ``"four"`` stages
            of about as many layers each, or at ``"none"``.
        normalised: Whether there is BatchNorm; without it, the Linear layers have biases.
    """

    def __init__(
        self,
        hidden_layers: int = 6,
        width: int = 256,
        learning_rate: float = 1e-3,
        cuts: Cuts = "every",
        normalised: bool = True,
    ) -> None:
        super().__init__()
        if hidden_layers < 1:
            raise ValueError(f"MnistMLP needs at least one hidden layer, not {hidden_layers}.")
        places = places_to_cut(hidden_layers, cuts)
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        layers: list[nn.Module] = []
        for number in range(1, hidden_layers + 1):
            inputs = PIXELS if number == 1 else width
            norm = [nn.BatchNorm1d(width)] if normalised else []
            layers += [nn.Linear(inputs, width, bias=not normalised), *norm, nn.ReLU()]
            if number in places:
                layers.append(Boundary())
        self.net = nn.Sequential(*layers, nn.Linear(width, CLASSES))


def error_percent(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of wrong answers, in percent."""
    return 100.0 * (logits.argmax(-1) != labels).float().mean()
