"""What every row of the matrix and the first runs train to is what it was: a redesign changes no number."""

from __future__ import annotations

import json

import golden
import pytest
from test_methods import teachers  # noqa: F401

RECORD = json.loads(golden.FILE.read_text())
TOLERANCE = {"weights": 2e-3, "rows": 0.1}
"""Relative, for other processors and libraries than the record's: a first update of Adam turns rounding errors of a
gradient into steps of the whole rate, and what a row says of them follows."""
ROUNDING = 1e-3
"""Numbers of rows below it are differences of equal things."""


def test_every_case_is_recorded():
    assert list(RECORD) == golden.cases()


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.cases())
def test_numbers_are_what_they_were(name, teachers, tmp_path):  # noqa: F811
    before, now = RECORD[name], golden.numbers(name, teachers, tmp_path / "run")
    for role, summary in before["weights"].items():
        assert now["weights"][role]["elements"] == summary["elements"]
        assert now["weights"][role]["norm"] == pytest.approx(summary["norm"], rel=TOLERANCE["weights"])
    assert len(now["rows"]) == len(before["rows"])
    for row, earlier in zip(now["rows"], before["rows"], strict=True):
        assert row.keys() == earlier.keys()
        for key, value in earlier.items():
            if isinstance(value, float):
                assert row[key] == pytest.approx(value, rel=TOLERANCE["rows"], abs=ROUNDING), key
            else:
                assert row[key] == value, key
