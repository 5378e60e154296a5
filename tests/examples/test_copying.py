"""Copying sequences: the streams, the curriculum and a network that learns to copy."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from examples.copying import Copier, CopyStreams, Curriculum
from lightning_sg import LinearPredictor, SyntheticGradients
from tests.models import make_trainer


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
