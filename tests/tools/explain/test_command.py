"""``lightning-sg explain``: every public error has its section, and says where it is."""

from __future__ import annotations

import pickle
import re
import traceback
from pathlib import Path

import pytest

import lightning_sg
from lightning_sg import BoundaryError, SyntheticGradientsError
from lightning_sg.cli import main
from lightning_sg.errors import RepeatedBoundaryError
from lightning_sg.tools.explain.command import sections

PACKAGE = Path(lightning_sg.__file__).parent
ERRORS = [name for name in lightning_sg.__all__ if name.endswith("Error")]


def test_every_public_error_has_a_section_and_every_section_an_error() -> None:
    assert len(ERRORS) >= 8
    assert sorted(sections()) == sorted(ERRORS)
    for name, text in sections().items():
        assert "cure" in text, name


def test_quoted_messages_are_those_of_the_source() -> None:
    source = "".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))
    said = re.sub(r"\"\n\s*f?\"", "", source)  # literals over several lines
    seen = [row.split("|")[1] for text in sections().values() for row in text.splitlines() if row.startswith("| `")]
    quoted = [part.strip() for cell in seen for quote in re.findall(r"`([^`]+)`", cell) for part in quote.split("...")]
    assert len(quoted) > 12
    assert [part for part in quoted if part not in said] == []


@pytest.mark.parametrize("name", ERRORS)
def test_a_traceback_names_the_command_that_explains_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error: SyntheticGradientsError = getattr(lightning_sg, name)("what happened")
    assert str(error) == "what happened"
    for each in (error, pickle.loads(pickle.dumps(error))):
        *_, last = traceback.format_exception(each)
        command, _, shown = last.strip().rpartition(" ")
        assert command.endswith("lightning-sg explain")
        assert shown == name
    main(["explain", name])
    assert capsys.readouterr().out.startswith(f"{name}\n\n")


def test_a_private_error_names_the_section_of_its_kind() -> None:
    notes = BoundaryError("").__notes__
    assert len(notes) == 1
    assert RepeatedBoundaryError("twice").__notes__ == notes


def test_names_are_listed_and_misspelt_ones_recognized(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain"])
    assert capsys.readouterr().out.split() == list(sections())
    main(["explain", "lightning_sg.errors.stagelosterror"])
    assert capsys.readouterr().out.startswith("StageLostError")
    with pytest.raises(SystemExit, match="Did you mean StageLostError"):
        main(["explain", "StageLostEror"])
