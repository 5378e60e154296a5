"""chemprop: message passing over molecules, whose batch is a named tuple and whose loss is a metric object."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from chemprop import data, models, nn

from tests.clients.client import Client

_GROUPS = ("C", "CC", "O", "N", "C(C)", "C(=O)", "C(O)", "C(N)", "C(F)", "C(Cl)")


def _molecules(count: int = 128) -> list[data.MoleculeDatapoint]:
    """Chains of random groups; what is to be predicted is their number of oxygen atoms less that of nitrogen atoms."""
    draw = random.Random(0)
    chains = ["C" + "".join(draw.choices(_GROUPS, k=draw.randint(2, 7))) for _ in range(count)]
    targets = np.array([chain.count("O") - chain.count("N") for chain in chains], dtype=float)
    targets /= targets.std()
    return [data.MoleculeDatapoint.from_smi(chain, np.array([y])) for chain, y in zip(chains, targets)]


class Chemprop(Client):
    """A directed message passing network, cut before its feed-forward head."""

    boundaries = ("agg",)
    context = "batch.Y"
    epochs = 6
    lightning = pl

    def module(self) -> Any:
        return models.MPNN(
            nn.BondMessagePassing(d_h=32, depth=2),
            nn.MeanAggregation(),
            nn.RegressionFFN(input_dim=32, hidden_dim=32, n_layers=2),
            warmup_epochs=1,
            init_lr=1e-3,
            max_lr=5e-3,
            final_lr=1e-3,
        )

    def loader(self) -> Any:
        return data.build_dataloader(data.MoleculeDataset(_molecules()), batch_size=16, shuffle=False)

    def validation(self) -> Any:
        return data.build_dataloader(data.MoleculeDataset(_molecules(20)), batch_size=10, shuffle=False)

    def load(self, path: Path) -> Any:
        return models.MPNN.load_from_checkpoint(path)
