"""MNIST: its files are read or refused, and the models on it train."""

from __future__ import annotations

import gzip
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.mnist import FILES, PIXELS, Mnist, MnistMLP, read_idx
from examples.mnist_cnn import MnistCNN
from lightning_sg import Boundary, SyntheticGradients
from tests.examples.files import SAMPLES, count_boundaries, idx_bytes, write_mnist
from tests.models import make_trainer


@pytest.fixture
def no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read_as_written(tmp_path, compressed):
    values = torch.arange(24).reshape(2, 3, 4)
    path = tmp_path / "values"
    content = idx_bytes(values)
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert torch.equal(read_idx(path, 3), values.to(torch.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"\x00\x00\x0d\x03" + content[4:], "not an IDX file of unsigned bytes in 3"),
        (lambda content: b"<html>", "begins with 3c 68 74 6d"),
        (lambda content: b"", "begins with nothing"),
        (lambda content: content[:10], "incomplete"),
        (lambda content: content[:-1], "incomplete"),
        (lambda content: content + b"x", "damaged"),
        (lambda content: gzip.compress(content)[:-12], "incomplete gzip"),
        (lambda content: gzip.compress(content)[:10] + b"\xff" * 30, "damaged or incomplete gzip"),
        (lambda content: idx_bytes(torch.zeros(0, 3, 4)), "is empty"),
    ],
    ids=["type", "html", "empty", "header", "short", "long", "gzip-short", "gzip-damaged", "no-images"],
)
def test_bad_idx_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "values"
    path.write_bytes(change(idx_bytes(torch.zeros(2, 3, 4))))
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)


def test_labels_in_place_of_images_are_refused(tmp_path):
    path = tmp_path / "values"
    path.write_bytes(idx_bytes(torch.zeros(5)))
    with pytest.raises(ValueError, match="00 00 08 01 instead of 00 00 08 03"):
        read_idx(path, 3)


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_batches(tmp_path, compressed):
    write_mnist(tmp_path, compressed=compressed)
    data = Mnist(str(tmp_path), batch_size=16, validation=8)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [tuple(x.shape) for x, _ in batches] == [(16, PIXELS)] * 2
    x, y = data.train_set[3]
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert torch.equal(x, data.train_set.__getitems__([1, 3])[0][1])
    raw = data.train_set.images[3].flatten().float() / 255
    torch.testing.assert_close(x * 0.3081 + 0.1307, raw)
    assert sum(len(y) for _, y in data.val_dataloader()) == 8
    assert sum(len(y) for _, y in data.test_dataloader()) == SAMPLES


def test_mnist_missing_files_are_named(tmp_path, no_torchvision):
    write_mnist(tmp_path)
    (tmp_path / FILES[1]).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        Mnist(str(tmp_path)).prepare_data()
    text = str(caught.value)
    assert FILES[1] in text
    assert FILES[0] not in text
    assert str(tmp_path) in text
    assert "LeCun" in text
    assert "--data.root" in text


def test_mnist_is_fetched_with_torchvision(tmp_path, monkeypatch):
    fake = types.ModuleType("torchvision.datasets")
    fake.MNIST = lambda root, download: write_mnist(Path(root) / "MNIST" / "raw")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    data = Mnist(str(tmp_path), validation=8)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_set) == SAMPLES - 8


def test_mnist_files_that_do_not_match_are_refused(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / FILES[1]).write_bytes(idx_bytes(torch.zeros(SAMPLES - 1)))
    with pytest.raises(ValueError, match="do not belong together"):
        Mnist(str(tmp_path), validation=0).setup("fit")


@pytest.mark.parametrize("validation", [-1, SAMPLES])
def test_mnist_validation_must_fit(tmp_path, validation):
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match="validation must be 0 to 39"):
        Mnist(str(tmp_path), validation=validation).setup("fit")


@pytest.mark.parametrize(
    ("make", "cuts", "count"),
    [
        (lambda cuts: MnistMLP(hidden_layers=5, width=8, cuts=cuts), "every", 5),
        (lambda cuts: MnistMLP(hidden_layers=5, width=8, cuts=cuts), "four", 3),
        (lambda cuts: MnistMLP(hidden_layers=5, width=8, cuts=cuts), "middle", 1),
        (lambda cuts: MnistMLP(hidden_layers=5, width=8, cuts=cuts), "none", 0),
        (lambda cuts: MnistCNN(channels=(2, 3), width=8, cuts=cuts), "every", 3),
        (lambda cuts: MnistCNN(channels=(2, 3), width=8, cuts=cuts), "none", 0),
    ],
    ids=["mlp-every", "mlp-four", "mlp-middle", "mlp-none", "cnn-every", "cnn-none"],
)
def test_mnist_model_trains(tmp_path, make, cuts, count):
    write_mnist(tmp_path)
    model = make(cuts)
    assert count_boundaries(model) == count
    trainer = make_trainer(fast_dev_run=True, callbacks=[SyntheticGradients()] if count else [])
    data = Mnist(str(tmp_path), batch_size=16, validation=0 if count else 8)
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    assert 0 <= tested["test_error"] <= 100


def test_mnist_model_refuses_nonsense():
    with pytest.raises(ValueError, match="at least one"):
        MnistMLP(hidden_layers=0)
    for model in (MnistMLP, MnistCNN):
        with pytest.raises(ValueError, match="cuts must be one of"):
            model(cuts="all")
    with pytest.raises(ValueError, match="only 2 hidden layers"):
        MnistMLP(hidden_layers=2, cuts="four")


@pytest.mark.parametrize(("layers", "after"), [(3, [1, 2, 3]), (4, [1, 2, 3]), (6, [2, 3, 5]), (12, [3, 6, 9])])
def test_mnist_model_in_four_stages(layers, after):
    net = MnistMLP(hidden_layers=layers, width=8, cuts="four").net
    hidden = 0
    found = []
    for child in net:
        hidden += isinstance(child, nn.ReLU)
        if isinstance(child, Boundary):
            found.append(hidden)
    assert found == after
