"""The campaign of faults: rounds follow from their numbers, verdicts from the fault, and the table from both."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from signal import SIGKILL

import pytest

from benchmarks.faults.__main__ import main
from benchmarks.faults.fault import Fault, exit_with
from benchmarks.faults.job import STEPS
from benchmarks.faults.outcome import Ending, Outcome
from benchmarks.faults.rounds import KINDS, draw_round
from benchmarks.faults.table import BEGIN, END, put
from benchmarks.faults.verdict import Ends, Fails, Names, Refuses, Survives
from tests.benchmarks.records import line


def outcome(*endings: Ending, left: int = 0, bad: str = "") -> Outcome:
    return Outcome(
        {ending.rank: ending for ending in endings}, struck=True, left=left, checkpoints=[bad] if bad else []
    )


WELL, OTHER = Ending(1, 0, digest="right"), Ending(1, 0, digest="other")
DIED = Ending(0, -9)
TOLD = Ending(1, 1, "StageLostError: stage 1 (rank 0) is gone")


@pytest.mark.parametrize(
    ("expectation", "found", "kind"),
    [
        pytest.param(Names(0), outcome(DIED, TOLD), "named", id="named"),
        pytest.param(Names(0), outcome(DIED, Ending(1, 1, "one of them is gone")), "unclear", id="not named"),
        pytest.param(Names(0), outcome(DIED, Ending(1, 1, "rank 01 is gone")), "unclear", id="another named"),
        pytest.param(Names(0), outcome(DIED, Ending(1, -6, TOLD.error)), "unclear", id="aborted"),
        pytest.param(Names(0), outcome(DIED, Ending(1, 0, TOLD.error)), "unclear", id="exit code 0 after an error"),
        pytest.param(Names(0), outcome(DIED, TOLD, Ending(2, 1, "gone")), "unclear", id="not by all"),
        pytest.param(Names(0), outcome(DIED, WELL), "unclear", id="ended well"),
        pytest.param(Names(0, may_end=True), outcome(DIED, WELL), "survived", id="may end well"),
        pytest.param(Names(0, may_end=True), outcome(DIED, OTHER), "silently wrong", id="other weights"),
        pytest.param(Names(0), outcome(DIED, Ending(1, -15, killed=True)), "hung", id="killed"),
        pytest.param(Names(0), outcome(DIED, TOLD, left=1), "hung", id="left behind"),
        pytest.param(Names(0), outcome(DIED, TOLD, bad="last.ckpt: short"), "silently wrong", id="bad checkpoint"),
        pytest.param(
            Names(0, "odd"), outcome(Ending(0, 1, "E: odd"), Ending(1, 1, "rank 0: odd")), "named", id="reason"
        ),
        pytest.param(Names(0, "odd"), outcome(Ending(0, 1, "E: odd"), TOLD), "unclear", id="no reason"),
        pytest.param(Names(0, "odd"), outcome(Ending(0, -6, "E: odd"), TOLD), "unclear", id="the failed one aborted"),
        pytest.param(Survives(), outcome(WELL), "survived", id="survived"),
        pytest.param(Survives(), outcome(TOLD), "unclear", id="not survived"),
        pytest.param(Refuses(("delay",)), outcome(WELL), "silently wrong", id="accepted"),
        pytest.param(Refuses(("delay",)), outcome(Ending(0, 1, "delay: 1, 2")), "named", id="refused"),
        pytest.param(Refuses(("x",), may_be_harmless=True), outcome(WELL), "survived", id="harmless"),
        pytest.param(Ends(), outcome(Ending(0, 1), Ending(1, 1)), "named", id="all ended"),
        pytest.param(
            Fails("No space"),
            outcome(Ending(0, 1, "OSError: No space"), Ending(1, 1, "StageLostError: rank 0 failed: No space")),
            "named",
            id="whoever fails by itself",
        ),
    ],
)
def test_the_verdict_follows_from_what_was_to_be_expected(expectation, found: Outcome, kind: str) -> None:
    assert expectation.judge(found, "right").kind == kind


def test_a_round_follows_from_its_number(tmp_path: Path) -> None:
    first = [str(draw_round(3, number, tmp_path, list(KINDS))) for number in range(50)]
    assert first == [str(draw_round(3, number, tmp_path, list(KINDS))) for number in range(50)]
    assert first != [str(draw_round(4, number, tmp_path, list(KINDS))) for number in range(50)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_draws_ranks_and_steps_that_there_are(kind: str, tmp_path: Path) -> None:
    for number in range(40):
        drawn = draw_round(0, number, tmp_path, [kind])
        assert drawn.kind == kind
        fault = drawn.job.fault
        assert fault is None or (fault.rank < drawn.job.processes and fault.step <= STEPS)


def test_a_fault_reads_as_it_was_written() -> None:
    assert str(Fault.at(rank=1, step=5).by(SIGKILL)) == "rank 1, training_step at step 5: SIGKILL"
    fault = Fault.at(rank=0, hook="setup").after(0.02).by(exit_with(3))
    assert str(fault) == "rank 0, setup, 20 ms later: os._exit"


def test_the_campaign_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert subprocess  # named here, because the processes are started elsewhere: see tests/conftest.py
    page, records = tmp_path / "page.md", tmp_path / "records.jsonl"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--rounds", "3", "--seed", "5", "--kinds", "hang", "SIGSTOP, short"]
    main([*arguments, "--page", str(page), "--records", str(records)])
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [each["round"] for each in lines] == [0, 1, 2]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "--rounds 3 --seed 5" in text
    assert line(text, "**all**")[1] == "**3**"
    assert {each["verdict"] for each in lines} <= {"named", "survived"}, capsys.readouterr().out


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="has no place for the table"):
        put("table", page)
