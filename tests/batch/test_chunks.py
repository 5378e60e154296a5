"""Long sequences chunk by chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sg import Chunks, SyntheticGradientsError, parallel_streams
from tests.models import make_trainer
from tests.recurrent_models import make, sequences


def test_all_tensors_with_time_steps_are_cut_and_others_come_along() -> None:
    x, label = torch.arange(24).view(2, 6, 2), torch.tensor([7, 8])
    static = torch.ones(2, 3)
    chunks = list(Chunks([{"x": x, "y": (x[..., 0], label), "static": static}], 4))
    assert [chunk.batch["x"].shape[1] for chunk in chunks] == [4, 2]
    assert torch.equal(torch.cat([chunk.batch["x"] for chunk in chunks], 1), x)
    assert torch.equal(torch.cat([chunk.batch["y"][0] for chunk in chunks], 1), x[..., 0])
    assert all(chunk.batch["y"][1] is label and chunk.batch["static"] is static for chunk in chunks)
    assert [(chunk.first, chunk.last) for chunk in chunks] == [(True, False), (False, True)]


def test_time_may_come_first() -> None:
    chunks = list(Chunks([torch.arange(10).view(5, 2)], 2, batch_first=False))
    assert [chunk.batch.tolist() for chunk in chunks] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]


def test_padding_is_left_out_and_ends_are_told_for_each_sequence() -> None:
    batch = (torch.zeros(3, 9), torch.tensor([2, 5, 6]))
    chunks = list(Chunks([batch], 2, lengths=1))
    assert len(chunks) == 3
    assert isinstance(chunks[0].last, Tensor)
    assert chunks[0].last.tolist() == [True, False, False]
    assert chunks[1].last.tolist() == [True, False, False]
    assert chunks[2].last is True


def test_lengths_that_the_batch_does_not_have_are_named() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"Chunks\(lengths='size'\).*no such entry \(keys \['x'\]\)"):
        list(Chunks([{"x": torch.zeros(1, 4)}], 2, lengths="size"))


def test_a_stream_begins_once_an_epoch_and_does_not_end() -> None:
    chunks = Chunks([torch.zeros(1, 4), torch.zeros(1, 4)], 2, stateful=True)
    for _epoch in range(2):
        assert [(chunk.first, chunk.last) for chunk in chunks] == [(True, False)] + [(False, False)] * 3


def test_another_cut_may_be_given() -> None:
    def cut(batch: Any, start: int, stop: int) -> Any:
        return batch["text"][start:stop]

    chunks = list(Chunks([{"text": "abcde"}], 2, cut=cut, sequence_length=5))
    assert [chunk.batch for chunk in chunks] == ["ab", "cd", "e"]


def test_the_number_of_chunks_is_told_where_it_is_known() -> None:
    data = sequences(3)
    assert len(Chunks(data, 5, sequence_length=12)) == 9
    with pytest.raises(TypeError, match="sequence_length"):
        len(Chunks(data, 5))
    with pytest.raises(TypeError):
        len(Chunks(iter(data), 5, sequence_length=12))


@pytest.mark.parametrize("known", [True, False])
def test_lightning_counts_chunks_as_batches(known: bool) -> None:
    trainer = make_trainer(max_epochs=2)
    trainer.fit(make("gru"), Chunks(sequences(3), 5, sequence_length=12 if known else None))
    assert trainer.global_step == 2 * 3 * 3
    trainer = make_trainer(max_epochs=1, limit_train_batches=4)
    trainer.fit(make("gru"), Chunks(sequences(3), 5, sequence_length=12 if known else None))
    assert trainer.global_step == 4


def test_what_has_no_time_steps_and_bad_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="no time steps"):
        list(Chunks([torch.zeros(3)], 2))
    with pytest.raises(ValueError, match="length must be a whole number from 1"):
        Chunks([], 0)


def test_parallel_streams_have_the_next_step_as_their_goal() -> None:
    x, y = parallel_streams(torch.arange(11), 2)
    assert x.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert y.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    with pytest.raises(ValueError, match="does not make 20"):
        parallel_streams(torch.arange(11), 20)
