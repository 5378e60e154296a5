"""The page that says what works: every row has a test, every case has a row, and the page is the one written here."""

from __future__ import annotations

import re

import pytest

from tests.compatibility import AREAS, PAGE, Row, page, rows
from tests.distributed.test_lightning_features import CASES


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.feature)
def test_a_row_names_a_test_that_runs_everywhere(row: Row) -> None:
    source, name = row.path.read_text(), row.shown_by.split("::")[1]
    (before,) = re.findall(rf"((?:^@.*\n(?:^[ )\]].*\n)*)*)^def {name}\(", source, flags=re.MULTILINE)
    assert "xfail" not in before
    assert "mark.skip(" not in before


def test_every_case_has_a_row() -> None:
    assert sorted(name for names in AREAS.values() for name in names) == sorted(CASES)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "Run `python -m tests.compatibility`."
