"""The example models train, and the MNIST files are read or refused."""

from __future__ import annotations

import gzip
import subprocess
import sys
import types
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from examples.copying import Copier, CopyStreams, Curriculum
from examples.digits import Digits, DigitsClassifier
from examples.hard_mnist import HardMnist, distort
from examples.mnist import FILES, PIXELS, ImageSet, Mnist, MnistMLP, read_idx
from examples.mnist_cnn import MnistCNN
from examples.multirate import DigitSequences, TwoRates
from examples.regression import DIABETES_FEATURES, FEATURES, Housing, RegressionMLP
from examples.shakespeare import CHARACTERS, FILE, CharTransformer, Shakespeare
from examples.shakespeare_lstm import CharLSTM, ShakespeareStreams
from lightning_sg import Boundary, LinearPredictor, SyntheticGradients
from tests.models import make_trainer, state_of

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


def count_boundaries(model: nn.Module) -> int:
    return sum(isinstance(child, Boundary) for child in model.modules())


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


def test_hard_images_are_the_same_every_time_and_not_the_originals(tmp_path):
    write_mnist(tmp_path)
    made = []
    for _ in range(2):
        torch.rand(3)  # the distortions do not depend on torch's own random numbers
        data = HardMnist(str(tmp_path), validation=8)
        data.setup("fit")
        made.append(data)
    first, second = made
    for name in ("train_set", "val_set", "test_set"):
        assert torch.equal(getattr(first, name).images, getattr(second, name).images)
    plain = Mnist(str(tmp_path), validation=8)
    plain.setup("fit")
    assert first.train_set.images.shape == plain.train_set.images.shape
    assert not (first.train_set.images == plain.train_set.images).flatten(1).all(1).any()
    assert torch.equal(first.train_set.labels, plain.train_set.labels)
    images = first.train_set.images
    first.setup("test")
    assert first.train_set.images is images  # made once
    other = HardMnist(str(tmp_path), validation=8, seed=1)
    other.setup("fit")
    assert not torch.equal(other.train_set.images, images)


def test_hard_images_take_part_of_the_training_set(tmp_path):
    write_mnist(tmp_path)
    data, whole = (HardMnist(str(tmp_path), validation=8, train_images=count) for count in (5, None))
    for each in (data, whole):
        each.setup("fit")
    assert (len(data.train_set), len(whole.train_set)) == (5, SAMPLES - 8)
    assert torch.equal(data.test_set.images, whole.test_set.images)
    with pytest.raises(ValueError, match="train_images must be 1 to 32"):
        HardMnist(str(tmp_path), validation=8, train_images=33).setup("fit")
    with pytest.raises(ValueError, match="difficulty >= 0"):
        HardMnist(difficulty=-1)


def test_hard_images_of_no_difficulty_are_the_originals():
    images = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    difference = distort(images, 0.0, seed=0).int() - images.int()
    assert difference.abs().max() <= 1


def write_text(folder: Path, text: str | None = None) -> None:
    (folder / FILE).write_text(text or "To be, or not to be: that is the question.\n" * 20)


def test_shakespeare_batches(tmp_path):
    write_text(tmp_path)
    data = Shakespeare(str(tmp_path), batch_size=4, context=16, steps=3, seed=1)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = [list(loader), list(loader)]
    assert [len(epoch) for epoch in epochs] == [3, 3]
    x, y = epochs[0][0]
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(x, epochs[1][0][0])
    torch.rand(3)
    assert torch.equal(x, next(iter(data.train_dataloader()))[0])
    seen = torch.cat([y.flatten() for _, y in data.val_dataloader()])
    assert len(seen) == (86 - 1) // 16 * 16  # each character of the last tenth once, but for the rest
    assert torch.equal(seen[:16], next(iter(data.val_dataloader()))[1][0])


def test_shakespeare_missing_or_wrong_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tinyshakespeare") as caught:
        Shakespeare(str(tmp_path)).setup("fit")
    assert str(tmp_path) in str(caught.value)
    assert "--data.root" in str(caught.value)
    write_text(tmp_path, "".join(map(chr, range(200, 300))))
    with pytest.raises(ValueError, match="100 different characters"):
        Shakespeare(str(tmp_path)).setup("fit")
    write_text(tmp_path, "To be")
    with pytest.raises(ValueError, match="no window of 64"):
        Shakespeare(str(tmp_path)).setup("fit")


def test_char_transformer_with_boundaries_is_itself_undivided():
    outputs, gradients = [], []
    x = torch.randint(0, CHARACTERS, (2, 8))
    for stages in (1, 2, 4):
        pl.seed_everything(0, verbose=False)
        model = CharTransformer(width=16, heads=2, context=8, stages=stages)
        assert count_boundaries(model) == stages - 1
        logits = model(x)
        logits.square().mean().backward()
        outputs.append(logits)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for output, gradient in zip(outputs[1:], gradients[1:]):
        assert torch.equal(output, outputs[0])
        assert all(torch.equal(left, right) for left, right in zip(gradient, gradients[0]))


def test_char_transformer_sees_no_later_character():
    model = CharTransformer(width=16, heads=2, context=8)
    x = torch.randint(0, CHARACTERS, (1, 8))
    changed = x.clone()
    changed[0, 5:] = (x[0, 5:] + 1) % CHARACTERS
    assert torch.equal(model(x)[:, :5], model(changed)[:, :5])


def test_char_transformer_trains(tmp_path):
    write_text(tmp_path)
    # Two stages: with more, the first is told of no gradient in so few steps.
    model = CharTransformer(width=16, heads=2, context=8, stages=2)
    before = state_of(model)
    trainer = make_trainer(max_steps=3, max_epochs=-1, callbacks=[SyntheticGradients()])
    trainer.fit(model, Shakespeare(str(tmp_path), batch_size=4, context=8, steps=3))
    assert trainer.global_step == 3
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


def test_char_transformer_refuses_nonsense():
    with pytest.raises(ValueError, match="do not make 3 stages"):
        CharTransformer(stages=3)
    with pytest.raises(ValueError, match="128 cannot be divided among 3"):
        CharTransformer(heads=3)


@pytest.mark.parametrize(("source", "features"), [("generated", FEATURES), ("diabetes", DIABETES_FEATURES)])
def test_regression_trains(source, features):
    model = RegressionMLP(features=features, width=8)
    assert count_boundaries(model) == 2
    data = Housing(source, samples=300, batch_size=32)
    trainer = make_trainer(fast_dev_run=True, callbacks=[SyntheticGradients()])
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    assert 0 < tested["test_loss"] < 10


def test_regression_targets_may_be_a_column():
    model = RegressionMLP(width=8)
    x, y = torch.randn(6, FEATURES), torch.randn(6)
    model.eval()
    assert torch.equal(model._squared_error((x, y)), model._squared_error((x, y.unsqueeze(1))))


def test_regression_data_are_the_same_every_time_and_standardised():
    first, second = Housing(samples=500), Housing(samples=500)
    first.setup("fit")
    torch.rand(3)
    second.setup("fit")
    for part in ("train", "validation", "test"):
        for left, right in zip(getattr(first, part).tensors, getattr(second, part).tensors):
            assert torch.equal(left, right)
    x, y = first.train.tensors
    assert (len(first.train), len(first.validation), len(first.test)) == (350, 50, 100)
    torch.testing.assert_close(x.mean(0), torch.zeros(FEATURES), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(), torch.ones(()))


def test_regression_refuses_nonsense():
    with pytest.raises(ValueError, match="not 5"):
        RegressionMLP(stages=5)
    with pytest.raises(ValueError, match="source must be"):
        Housing("california")
    with pytest.raises(ValueError, match="at least 10"):
        Housing(samples=3)


@pytest.mark.parametrize(("stages", "places"), [(1, []), (2, [2]), (3, [1, 2]), (4, [1, 2, 3])])
def test_regression_boundaries(stages, places):
    net = RegressionMLP(width=8, stages=stages).net
    hidden = 0
    found = []
    for child in net:
        hidden += isinstance(child, nn.ReLU)
        if isinstance(child, Boundary):
            found.append(hidden)
    assert found == places


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


def test_streams_of_shakespeare_are_read_chunk_by_chunk_by_an_lstm(tmp_path):
    write_text(tmp_path)
    data = ShakespeareStreams(str(tmp_path), chunk=8, streams=4)
    model = CharLSTM(width=8)
    trainer = make_trainer(max_epochs=1, callbacks=[SyntheticGradients()])
    trainer.fit(model, data)
    length = (len(data.train) - 1) // 4
    assert trainer.global_step == -(-length // 8)
    assert 0 < float(trainer.callback_metrics["val_bits"]) < 10


@pytest.mark.parametrize(("length", "repeats"), [(3, 1), (2, 3)])
def test_streams_to_copy_are_sequences_one_after_the_other(length, repeats):
    curriculum = Curriculum()
    curriculum.length, curriculum.repeats = length, repeats
    chunks = iter(CopyStreams(curriculum, number=3, chunk=2, seed=0))
    pieces = [next(chunks) for _ in range(20)]
    x, y, asked = (torch.cat(parts, dim=1) for parts in zip(*(piece.batch for piece in pieces)))
    begins = torch.stack([piece.first for piece in pieces], dim=1)
    assert begins[:, 0].all()
    assert torch.equal(begins[:, 1:], torch.stack([piece.last for piece in pieces], dim=1)[:, :-1])
    for stream in range(3):
        starts = [2 * int(number) for number in begins[stream].nonzero()][1:]  # the first is the middle of one
        for start in starts[:-1]:
            bits = (x[stream, start : start + length, 0] + 1) / 2
            assert x[stream, start + length, 1] == 1
            answer = slice(start + length + 1, start + length + 1 + length * repeats)
            assert torch.equal(y[stream, answer], bits.repeat(repeats))
            assert (asked[stream, answer] == 2).all()


def test_streams_to_copy_go_on_with_the_new_length_and_count_it_apart():
    curriculum = Curriculum()
    chunks = iter(CopyStreams(curriculum, number=4, chunk=3, seed=0))
    before = next(chunks)
    assert before.batch[2].max() == 2
    curriculum.length = 4  # nine steps instead of three
    pieces = [next(chunks) for _ in range(6)]
    assert [bool(piece.last.all()) for piece in pieces] == [False, False, True] * 2
    x, y, asked = (torch.cat(parts, dim=1) for parts in zip(*(piece.batch for piece in pieces[:3])))
    assert torch.equal(y[:, 5:9], (x[:, :4, 0] + 1) / 2)
    assert (asked[:, 5:9] == 2).all()
    assert not asked[:, :5].any()
    # A stream in the middle of a longer sequence counts it no more as of the newest length.
    next(chunks)
    curriculum.length = 5
    assert next(chunks).batch[2].max() <= 1


def test_the_curriculum_of_copying_rises_when_a_length_is_solved():
    curriculum = Curriculum(repeats=True, memory=10)
    seen = []
    for _ in range(12):
        curriculum.see(0.0, 10)
        seen.append((curriculum.length, curriculum.repeats, curriculum.solved))
    assert seen[:4] == [(1, 2, 1), (2, 2, 2), (2, 3, 4), (3, 3, 6)]
    before = curriculum.length
    curriculum.see(10.0, 10)
    assert curriculum.length == before


def test_a_copier_learns_to_copy_a_bit():
    pl.seed_everything(0, verbose=False)
    model = Copier(chunk=3, width=16, batch_size=32, learning_rate=1e-2)
    trainer = make_trainer(
        max_steps=400,
        max_epochs=-1,
        callbacks=[SyntheticGradients(predictor=LinearPredictor(conditional=False, normalize="none"), guard=None)],
    )
    trainer.fit(model)
    assert model.curriculum.solved >= 1


def random_digits(samples: int = 60) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (samples, 28, 28), generator=generator).to(torch.uint8)
    return ImageSet(images, torch.randint(10, (samples,), generator=generator).to(torch.uint8))


def test_sequences_of_digits_are_counted_in_their_spans():
    images = random_digits()
    images.images[:] = images.labels[:, None, None]  # so that an image tells its label
    (x, odd, threes, recent) = next(iter(DigitSequences(images, 2, windows=3, batch_size=5, batches=1, seed=1)))
    tone = x[..., 0]
    labels = torch.searchsorted(tone.unique(), tone)  # the digits in order of their tone
    assert x.shape == (5, 12, PIXELS)
    assert len(tone.unique()) == 10
    assert torch.equal(odd[:, 1::2], (labels % 2).view(5, 6, 2).sum(2))
    assert torch.equal(recent[:, 1::2], (labels == 3).long().view(5, 6, 2).sum(2))
    assert torch.equal(threes[:, 3::4], (labels == 3).long().view(5, 3, 4).sum(2))


@pytest.mark.parametrize(("coupled", "labels"), [(True, False), (False, False), (False, True)])
def test_networks_at_different_rates_train_and_are_judged(coupled, labels):
    torch.manual_seed(0)
    sequences = DigitSequences(random_digits(), 2, windows=2, batch_size=4, batches=3, seed=1)
    module = TwoRates(2, coupled, width=8, message=4, labels=labels)
    trainer = make_trainer(max_epochs=1, callbacks=[] if coupled else [SyntheticGradients()])
    before = state_of(module)
    trainer.fit(module, module.chunks(sequences), sequences)
    assert trainer.global_step == 3 * (2 if coupled else 4)
    assert 0 <= float(trainer.callback_metrics["val_threes"]) <= 100
    after = state_of(module)
    assert not any(torch.equal(before[name], after[name]) for name in ("slow.weight_ih_l0", "fast.weight_ih_l0"))


def test_the_demo_runs_to_its_plot(tmp_path):
    """As ``make demo`` runs it, for a shorter time."""
    command = [sys.executable, "-m", "examples.demo", "--epochs", "2", "--outputs", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "Decoupled, training went at" in ended.stdout
    assert "net.4: " in ended.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
