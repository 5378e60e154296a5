"""pina: a solver for scientific problems, with labelled tensors and a Trainer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from pina import LabelTensor, Trainer
from pina.model import FeedForward
from pina.problem.zoo import SupervisedProblem
from pina.solver import SupervisedSolver

from tests.clients.client import Client


def _problem() -> SupervisedProblem:
    """A smooth function of two variables."""
    inputs = torch.rand(128, 2, generator=torch.Generator().manual_seed(0))
    outputs = torch.sin(6 * inputs[:, :1]) * (1 + inputs[:, 1:])
    outputs = (outputs - outputs.mean()) / outputs.std()
    return SupervisedProblem(
        LabelTensor(inputs, ["x", "y"]), LabelTensor(outputs, ["u"]), input_variables=["x", "y"], output_variables=["u"]
    )


class Supervised(Client):
    """A supervised solver of a feed-forward network, cut in its middle."""

    boundaries = ("_pina_models.0.model.3",)
    context = "target"
    epochs = 6
    lightning = pl

    def module(self) -> Any:
        model = FeedForward(input_dimensions=2, output_dimensions=1, inner_size=32, n_layers=3)
        return SupervisedSolver(_problem(), model)

    def fit(self, **trainer: Any) -> None:
        self.network = self.module()
        self.trainer = Trainer(self.network, batch_size=16, **trainer, enable_checkpointing=False)
        self.trainer.train()

    def load(self, path: Path) -> Any:
        fresh = self.module()
        return SupervisedSolver.load_from_checkpoint(path, problem=fresh.problem, model=fresh.model, weights_only=False)
