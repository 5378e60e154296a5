"""Shakespeare: windows and streams of its text, and the models that read them."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from examples.python_reference import BYTES, PythonReference
from examples.shakespeare import CHARACTERS, CharTransformer, Shakespeare
from examples.shakespeare_lstm import CharLSTM, ShakespeareStreams
from lightning_sg import SyntheticGradients
from tests.examples.files import count_boundaries, write_text
from tests.models import make_trainer, state_of


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


def test_pythons_reference_is_a_text_of_bytes_for_the_same_model():
    data = PythonReference(batch_size=4, context=8, steps=3)
    text = data.text()
    assert text.dtype == torch.int64
    assert len(text) > 300_000
    assert text.max() < BYTES
    assert "The for statement" in bytes(text.tolist()).decode().replace('"', "")
    model = CharTransformer(width=16, heads=2, context=8, stages=4, characters=BYTES)
    trainer = make_trainer(callbacks=[SyntheticGradients()], max_epochs=1)
    trainer.fit(model, data)
    assert trainer.global_step == 3


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


def test_streams_of_shakespeare_are_read_chunk_by_chunk_by_an_lstm(tmp_path):
    write_text(tmp_path)
    data = ShakespeareStreams(str(tmp_path), chunk=8, streams=4)
    model = CharLSTM(width=8)
    trainer = make_trainer(max_epochs=1, callbacks=[SyntheticGradients()])
    trainer.fit(model, data)
    length = (len(data.train) - 1) // 4
    assert trainer.global_step == -(-length // 8)
    assert 0 < float(trainer.callback_metrics["val_bits"]) < 10
