"""Models of other packages, cut by the names of their submodules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_sg import PredictorTraining, SyntheticGradients, SyntheticGradientStrategy
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks

WORDS, LENGTH, CLASSES = 40, 9, 3
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


class Wrapped(pl.LightningModule):
    """Any model of ``transformers`` that computes its own loss from keyword arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def gpt2(tied: bool = False) -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_layer": 3, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, tie_word_embeddings=tied, use_cache=False))


def bert() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(
        BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=CLASSES, **SMALL, **off)
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=1, use_cache=False, **SMALL))


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_labels=CLASSES, hidden_dropout_prob=0.0, **SMALL)
    )


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=CLASSES))


def words(**more: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(WORDS, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, **more}


def sentences() -> dict[str, Tensor]:
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 3]])).long().repeat(8, 1)
    return words(attention_mask=mask, labels=torch.arange(16) % CLASSES)


def images(side: int) -> dict[str, Tensor]:
    pixels = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.arange(16) % CLASSES}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], list[str]]] = {
    "GPT-2": (gpt2, lambda: words(labels=words()["input_ids"]), ["model.transformer.h.0", "model.transformer.h.1"]),
    "GPT-2, embedding tied": (
        lambda: gpt2(tied=True),
        lambda: words(labels=words()["input_ids"]),
        ["model.transformer.h.0", "model.transformer.h.1"],
    ),
    "Llama": (llama, lambda: words(labels=words()["input_ids"]), ["model.model.layers.0", "model.model.layers.1"]),
    "BERT with a padding mask": (bert, sentences, ["model.bert.encoder.layer.0", "model.bert.encoder.layer.1"]),
    "ViT": (vit, lambda: images(8), ["model.vit.layers.0", "model.vit.layers.1"]),
    "ResNet": (resnet, lambda: images(32), ["model.resnet.encoder.stages.0", "model.resnet.encoder.stages.1"]),
}


class Rows(TensorDataset):
    """Samples as dicts."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        super().__init__(*columns.values())
        self.names = list(columns)

    def __getitem__(self, index: int) -> Any:
        return dict(zip(self.names, super().__getitem__(index)))


def train(name: str, devices: int) -> dict[str, Tensor]:
    make, batch, boundaries = MODELS[name]
    pl.seed_everything(3, verbose=False)
    module = Wrapped(make())
    tied = "synchronize" if "tied" in name else "refuse"
    trainer = make_trainer(
        devices=devices,
        strategy=SyntheticGradientStrategy(tied_weights=tied, timeout=40.0) if devices > 1 else "auto",
        callbacks=[SyntheticGradients(boundaries, training=PredictorTraining(seed=1))],
        max_epochs=3,
    )
    trainer.fit(module, DataLoader(Rows(batch()), batch_size=4))
    return state_of(module)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_split_by_name_trains_as_in_one_process(name: str) -> None:
    whole = train(name, 1)
    make, _, _ = MODELS[name]
    pl.seed_everything(3, verbose=False)
    start = Wrapped(make()).state_dict()
    for state in run_ranks(3, lambda: train(name, 3)):
        assert_same_state(whole, state)
    assert sum(not torch.equal(whole[key], start[key]) for key in start) > len(start) / 2
