"""What a process was told in meetings is told again to a new process in its place."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.objects import pack, unpack
from lightning_sg.transport.history import History


def note(history: History, *meetings: tuple[str, Any]) -> None:
    for what, value in meetings:
        history.note(what, [pack(value), pack(None)])


def again(history: History, what: str) -> Any:
    told = history.again(what)
    return None if told is None else unpack(told[0])


def taken_over(history: History) -> History:
    """That of a new process."""
    state, new = history.state(), History()
    new.restore_start(state["start"])
    return new


def test_nothing_is_kept_unless_somebody_may_need_it() -> None:
    history = History()
    note(history, ("vote", True))
    assert history.state() == {"start": [], "told": []}


def test_the_start_and_what_was_told_since_the_epoch_began_are_told_again_in_order() -> None:
    history = History()
    history.recording = True
    note(history, ("set-up", 1), ("broadcast", 2))
    history.begin_anew()
    note(history, ("vote", 3))
    history.begin_anew()
    note(history, ("vote", 4), ("broadcast", 5), ("vote", 6))
    new = taken_over(history)
    assert [again(new, "set-up"), again(new, "broadcast")] == [1, 2]
    assert again(new, "vote") is None  # of an epoch that it does not go through
    new.restore(history.state()["told"])
    assert [again(new, "vote"), again(new, "vote")] == [4, 6]


def test_a_script_that_goes_another_way_is_refused() -> None:
    history = History()
    history.recording = True
    history.begin_anew()
    note(history, ("vote", 1))
    new = taken_over(history)
    new.restore(history.state()["told"])
    with pytest.raises(SyntheticGradientsError, match=r"come to 'broadcast'.*same command, script and environment"):
        new.again("broadcast")
