"""Boundaries in time by themselves: what they carry from one step to a later one."""

from __future__ import annotations

import pytest
import torch

from lightning_sg import BoundaryError, Chunks, MessageBoundary, TimeBoundary
from tests.models import make_trainer
from tests.recurrent_models import CHUNK, LENGTH, make, sequences


def test_the_state_in_validation_is_carried_from_chunk_to_chunk() -> None:
    module = make("lstm")
    trainer = make_trainer()
    whole = trainer.validate(module, Chunks(sequences(1), LENGTH), verbose=False)[0]["val_loss"]
    parts = trainer.validate(module, Chunks(sequences(1), CHUNK), verbose=False)[0]["val_loss"]
    assert parts == pytest.approx(whole, rel=1e-5)


def test_samples_that_begin_anew_do_so_from_zero_or_from_what_is_given() -> None:
    memory = TimeBoundary()
    memory.write({"h": torch.ones(3, 2)})
    first = torch.tensor([True, False, True])
    assert memory.read(first)["h"].tolist() == [[0, 0], [1, 1], [0, 0]]
    begun = memory.read(first, initial={"h": torch.full((3, 2), 5.0)})
    assert begun["h"].tolist() == [[5, 5], [1, 1], [5, 5]]
    assert memory.read(True, initial="none") == "none"


def test_bad_states_are_refused_by_name() -> None:
    with pytest.raises(BoundaryError, match="no tensor"):
        TimeBoundary().write("state")
    memory = TimeBoundary(batch_dim=2)
    with pytest.raises(BoundaryError, match="batch_dim"):
        memory.write(torch.ones(2, 3, requires_grad=True))


@pytest.mark.parametrize("training", [True, False])
def test_messages_that_nobody_receives_do_not_pile_up_without_a_word(training: bool) -> None:
    messages = MessageBoundary(most=3).train(training)
    for _ in range(3):
        messages.send(torch.ones(2, 1))
    with pytest.raises(BoundaryError, match=r"3 messages.*receive\(\).*forget\(\).*most="):
        messages.send(torch.ones(2, 1))
    assert len(messages.receive()) == 3
    messages.send(torch.ones(2, 1))
    with pytest.raises(ValueError, match="most"):
        MessageBoundary(most=0)
