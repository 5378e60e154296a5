"""The example models train, and the MNIST files are read or refused."""

from __future__ import annotations

import gzip
import sys
import types
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from examples.digits import Digits, DigitsClassifier
from examples.mnist import FILES, PIXELS, Mnist, MnistMLP, read_idx
from lightning_sg import Boundary, SyntheticGradients
from tests.models import make_trainer

SAMPLES = 40


def idx_bytes(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def write_mnist(folder: Path, samples: int = SAMPLES, compressed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for name in FILES:
        images = "images" in name
        high, shape = (256, (samples, 28, 28)) if images else (10, (samples,))
        content = idx_bytes(torch.randint(0, high, shape, generator=generator))
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


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


@pytest.mark.parametrize(("cuts", "count"), [("every", 3), ("middle", 1), ("none", 0)])
def test_mnist_model_trains(tmp_path, cuts, count):
    write_mnist(tmp_path)
    model = MnistMLP(hidden_layers=3, width=8, cuts=cuts)
    assert sum(isinstance(child, Boundary) for child in model.modules()) == count
    trainer = make_trainer(fast_dev_run=True, callbacks=[SyntheticGradients()] if count else [])
    data = Mnist(str(tmp_path), batch_size=16, validation=0 if count else 8)
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    assert 0 <= tested["test_error"] <= 100


def test_mnist_model_refuses_nonsense():
    with pytest.raises(ValueError, match="at least one"):
        MnistMLP(hidden_layers=0)
    with pytest.raises(ValueError, match="cuts"):
        MnistMLP(cuts="all")


def test_digits_split_is_the_same_every_time():
    splits = []
    for seed in (1, 2):
        pl.seed_everything(seed, verbose=False)
        data = Digits()
        data.setup("fit")
        splits.append(data)
    first, second = splits
    assert (len(first.train), len(first.validation), len(first.test)) == (1257, 270, 270)
    assert torch.equal(first.test.tensors[0], second.test.tensors[0])
    seen = {tuple(row) for row in first.train.tensors[0].tolist()}
    assert not seen & {tuple(row) for row in first.test.tensors[0].tolist()}
    assert first.train.tensors[0].max() == 1


@pytest.mark.parametrize(("depth", "stages", "places"), [(4, 2, [2]), (7, 2, [4]), (3, 3, [1, 3]), (3, 1, [])])
def test_digits_boundaries(depth, stages, places):
    model = DigitsClassifier(depth=depth, width=8, stages=stages)
    assert [place for place, child in enumerate(model.net) if isinstance(child, Boundary)] == places


def test_digits_stages_must_fit():
    with pytest.raises(ValueError, match="not 4"):
        DigitsClassifier(depth=3, stages=4)


def test_digits_model_trains():
    model, data = DigitsClassifier(width=16), Digits()
    trainer = make_trainer(fast_dev_run=True, callbacks=[SyntheticGradients()])
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    assert 0 <= tested["test_accuracy"] <= 1
