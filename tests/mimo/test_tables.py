"""Tables in three formats: what is written is what was given."""

import csv
import json
import math

import pytest

from mimo.evaluation.tables import write_tables

ROWS = [
    {"subject": "a|b, c", "score": "psnr", "value": 21.123456789, "n": 8},
    {"subject": "b", "score": "ssim", "value": 0.5, "n": 8, "why": 'says "no"'},
]


def test_three_formats_of_one_table(tmp_path):
    paths = write_tables(tmp_path / "new", "table", ROWS, about={"seed": 3}, notes=["A note."])
    assert [path.name for path in paths] == ["table.json", "table.csv", "table.md"]
    assert json.loads(paths[0].read_text()) == {"about": {"seed": 3}, "rows": ROWS}
    with paths[1].open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["subject"] for row in read] == ["a|b, c", "b"] and float(read[0]["value"]) == 21.123456789
    assert read[0]["why"] == "" and read[1]["why"] == 'says "no"'
    assert paths[2].read_text() == (
        "| subject | score | value | n | why |\n| --- | --- | ---: | ---: | --- |\n"
        '| a\\|b, c | psnr | 21.12 | 8 |  |\n| b | ssim | 0.5 | 8 | says "no" |\n\nA note.\n'
    )
    before = [path.read_bytes() for path in paths]
    write_tables(tmp_path / "new", "table", ROWS, about={"seed": 3}, notes=["A note."])
    assert [path.read_bytes() for path in paths] == before


def test_columns_that_are_shown(tmp_path):
    _, _, page = write_tables(tmp_path, "table", ROWS, shown=["score", "value", "nothing"])
    assert page.read_text().splitlines()[0] == "| score | value |"


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(ValueError, match="table: no rows"):
        write_tables(tmp_path, "table", [])
    with pytest.raises(ValueError, match="value is nan: expected text, a finite number or None"):
        write_tables(tmp_path, "table", [{"value": math.nan}])
    assert not list(tmp_path.iterdir())
