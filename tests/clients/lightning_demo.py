"""Lightning's own demo, on a text made here: a transformer with an encoder and a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.client import Client

VOCABULARY = 24


def _text() -> TensorDataset:
    """Sequences that count upwards by a stride of their own; each is followed by itself, one token later."""
    strides = torch.arange(1, 9).repeat(8)[:, None]
    tokens = (strides * torch.arange(11) + torch.arange(64)[:, None]) % VOCABULARY
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


class _Offline(LightningTransformer):
    """The demo, without the download of its text."""

    def prepare_data(self) -> None:
        pass


class DemoTransformer(Client):
    """``LightningTransformer``, cut before its last layer: what goes around the encoder is embedded before it."""

    boundaries = ("model.transformer",)
    context = "batch[1]"
    epochs = 6
    lightning = pl

    def module(self) -> Any:
        module = _Offline(vocab_size=VOCABULARY)
        # The demo's sizes are fixed in its code, and large.
        module.model = Transformer(vocab_size=VOCABULARY, ninp=32, nhid=32, nlayers=1, dropout=0.0)
        return module

    def loader(self) -> Any:
        return DataLoader(_text(), batch_size=16)

    def validation(self) -> Any:
        return DataLoader(_text(), batch_size=16)

    def load(self, path: Path) -> Any:
        network = self.module()
        network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        return network


__all__ = ["DemoTransformer"]
