"""Batches under way, and when each is due."""

from __future__ import annotations

from lightning_sg.training.ledger import NEVER, Ledger


def test_what_is_due_comes_out_once_in_the_order_of_due_dates_and_then_of_steps() -> None:
    ledger: Ledger[str] = Ledger()
    for step, due in enumerate([4, 2, 2, 3]):
        ledger.add(step, f"of step {step}", due)
    assert ledger.due(1) == []
    assert ledger.due(3) == ["of step 1", "of step 2", "of step 3"]
    assert ledger.due(3) == []
    assert list(ledger) == ["of step 0"]


def test_what_comes_at_a_time_of_its_own_is_never_due_and_can_be_dropped() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.add(7, "in time", NEVER)
    assert ledger.due(10**9) == []
    assert ledger[7] == "in time"
    ledger.drop(7)
    ledger.drop(7)
    assert 7 not in ledger
    assert len(ledger) == 0


def test_entries_come_in_the_order_in_which_they_were_made_whenever_they_are_due() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.add(0, "exact", due=6)
    ledger.add(1, "next", due=3)
    assert list(ledger) == ["exact", "next"]
    assert ledger.steps() == [0, 1]
    ledger.clear()
    assert list(ledger) == []
