"""pina: a solver for scientific problems, with labelled tensors and a Trainer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from pina import LabelTensor, Trainer
from pina.model import FeedForward
from pina.problem.zoo import SupervisedProblem
from pina.solver import SupervisedSolver
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.client import Client


def _points() -> tuple[Tensor, Tensor]:
    """Points in a square, and a smooth function of them."""
    inputs = torch.rand(128, 2, generator=torch.Generator().manual_seed(0))
    outputs = torch.sin(6 * inputs[:, :1]) * (1 + inputs[:, 1:])
    return inputs, (outputs - outputs.mean()) / outputs.std()


class Supervised(Client):
    """A supervised solver of a feed-forward network on plain tensors, cut in its middle."""

    labels: ClassVar[bool] = False

    boundaries = ("_pina_models.0.model.3",)
    context = 'batch[0][1]["target"]'
    epochs = 6
    lightning = pl

    def named(self, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors, with the names of their columns if they are to have any."""
        return (LabelTensor(inputs, ["x", "y"]), LabelTensor(outputs, ["u"])) if self.labels else (inputs, outputs)

    def module(self) -> Any:
        names = {"input_variables": ["x", "y"], "output_variables": ["u"]} if self.labels else {}
        problem = SupervisedProblem(*self.named(*_points()), **names)
        model = FeedForward(input_dimensions=2, output_dimensions=1, inner_size=32, n_layers=3)
        return SupervisedSolver(problem, model, use_lt=self.labels)

    def loader(self) -> Any:
        # pina's own loader takes all processes of torch's group for replicas, and gives each a part of the data.
        return DataLoader(TensorDataset(*_points()), batch_size=16, collate_fn=self.batch)

    def batch(self, points: list[tuple[Tensor, Tensor]]) -> Any:
        """A batch as pina has them: the points of each condition."""
        inputs, outputs = self.named(*(torch.stack(column) for column in zip(*points)))
        return [("data", {"input": inputs, "target": outputs})]

    def fit(self, **trainer: Any) -> None:
        self.network = self.module()
        self.trainer = Trainer(self.network, batch_size=16, **trainer, enable_checkpointing=False)
        self.trainer.fit(self.network, self.loader())

    def load(self, path: Path) -> Any:
        fresh = self.module()
        return SupervisedSolver.load_from_checkpoint(
            path, problem=fresh.problem, model=fresh.model, use_lt=self.labels, weights_only=False
        )


class Labelled(Supervised):
    """The same on pina's own kind of tensor, which knows the names of its columns; what crosses is one of them."""

    labels = True
