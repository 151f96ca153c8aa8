"""log.jsonl: rows come back, a cut last line is left out, and damage costs neither the run nor the damaged file."""

import json
import os

import pytest
import torch

from mimo.errors import InputError
from mimo.training.log import RunLog, read_log

ROWS = [{"step": step, "diffusion": 0.1 * step, "lr": 1e-3} for step in (2, 4, 6)]


def write(run, rows=ROWS):
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_log(run, start=6):
    return RunLog(run, 10, start=start, device=torch.device("cpu"))


def test_rows_come_back_and_a_cut_last_line_is_left_out(tmp_path):
    assert read_log(tmp_path) == []
    write(tmp_path)
    whole = (tmp_path / "log.jsonl").read_bytes()
    for end in range(len(whole)):
        (tmp_path / "log.jsonl").write_bytes(whole[:end])
        rows = read_log(tmp_path)
        assert rows == ROWS[: len(rows)] and len(rows) >= whole[:end].count(b"\n")
    (tmp_path / "log.jsonl").write_bytes(whole + b"\0" * 4096)  # as a power failure may leave it
    assert read_log(tmp_path) == ROWS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"step": 3, "diff', "not JSON"),
        ("\0" * 40, "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("3", "it is 3, expected an object"),
        ('{"diffusion": 0.5}', "step is null, expected a whole number"),
        ('{"step": 2.5}', "step is 2.5, expected a whole number"),
        ('{"step": 3, "lr": "much"}', 'lr"] is "much", expected a number'),
        ('{"step": ' + "9" * 5000 + "}", "line 2"),
    ],
)
def test_a_damaged_log_is_kept_beside_and_the_run_goes_on(tmp_path, capsys, line, words):
    write(tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    damaged = "\n".join([lines[0], line, *lines[2:], ""])
    (tmp_path / "log.jsonl").write_text(damaged)
    with pytest.raises(InputError, match="log.jsonl: line 2") as caught:
        read_log(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    for number in (1, 2):
        with open_log(tmp_path) as log:
            log.write(8, {"diffusion": 0.1, "mask": 0.1, "grad_norm": 1.0, "skipped": 0}, 10, 1e-3, 0.0)
        rows = read_log(tmp_path)
        assert [row["step"] for row in rows] == [2, 6, 8] and rows[:2] == [ROWS[0], ROWS[2]]
        assert (tmp_path / f"log.damaged-{number}.jsonl").read_text() == damaged
        out = capsys.readouterr().out
        assert f"the damaged log stays as log.damaged-{number}.jsonl, 2 rows go on in log.jsonl" in out and words in out
        (tmp_path / "log.jsonl").write_text(damaged)  # once more: the first one stays


def test_a_log_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(InputError, match="log.jsonl: Is a directory"):
        open_log(tmp_path)


def test_rows_are_on_disk_when_they_are_written(tmp_path, monkeypatch):
    synced = []
    with open_log(tmp_path) as log:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
        log.write(8, {"diffusion": 0.1, "mask": 0.1, "grad_norm": 1.0, "skipped": 0}, 10, 1e-3, 0.0)
    assert synced == [(tmp_path / "log.jsonl").stat().st_size] and synced[0] > 0
