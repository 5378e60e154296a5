"""scvi-tools: a variational autoencoder of gene counts, which samples in the middle and reconstructs its input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import lightning.pytorch as pl
import numpy as np
import scvi

from tests.clients.client import Client


def _counts(cells: int = 96, genes: int = 20) -> anndata.AnnData:
    """Counts of cells of three types, in two batches."""
    draw = np.random.default_rng(0)
    kinds = draw.integers(3, size=cells)
    rates = draw.gamma(1.0, 4.0, size=(3, genes))[kinds]
    data = anndata.AnnData(draw.poisson(rates).astype(np.float32))
    data.obs["batch"] = draw.integers(2, size=cells).astype(str)
    return data


class VariationalAutoencoder(Client):
    """SCVI by its own ``train``; cut after the layers of the encoder, so that the last stage samples."""

    boundaries = ("module.z_encoder.encoder",)
    context = 'batch["X"]'
    epochs = 8
    long = 40
    lightning = pl

    def fit(self, **trainer: Any) -> None:
        data = _counts()
        scvi.model.SCVI.setup_anndata(data, batch_key="batch")
        self.model = scvi.model.SCVI(data, n_hidden=32, n_latent=4)
        self.model.train(train_size=1.0, shuffle_set_split=False, batch_size=24, plan_kwargs={"lr": 5e-3}, **trainer)
        self.network, self.trainer = self.model.module, self.model.trainer

    def save(self, path: Path) -> None:
        if self.trainer.global_rank == 0:  # what the model has is whole in every process
            self.model.save(str(path), save_anndata=True)

    def load(self, path: Path) -> Any:
        return scvi.model.SCVI.load(str(path)).module
