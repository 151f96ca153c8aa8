"""Tables of results: rows of named cells, written as JSON for programs, CSV for sheets and Markdown for readers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimo.folders import atomic_path

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]


def write_tables(
    out: Path,
    name: str,
    rows: Sequence[Row],
    *,
    about: Mapping[str, Any] | None = None,
    shown: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write OUT/NAME.json, .csv and .md, each whole or not at all; equal results give equal bytes.

    Args:
        rows: one per result; a cell that a row does not have is empty. Columns come in the order they are first met.
        about: what the results are of, for the JSON alone: {"about": ..., "rows": ...}.
        shown: columns of the Markdown, where it shows less than all.
        notes: lines below the Markdown table.

    Raises ValueError for no rows, and cells that are neither text, finite numbers nor None.
    """
    if not rows:
        raise ValueError(f"{name}: no rows, expected at least one")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for row in rows:
        for column, cell in row.items():
            if not (cell is None or isinstance(cell, (str, int)) or (isinstance(cell, float) and math.isfinite(cell))):
                raise ValueError(f"{name}: {column} is {cell!r}: expected text, a finite number or None")
    described = json.dumps({"about": dict(about or {}), "rows": [dict(row) for row in rows]}, indent=1)
    texts = {
        "json": described + "\n",
        "csv": as_csv(rows, columns),
        "md": "\n".join([as_markdown(rows, shown or columns), *(f"\n{note}" for note in notes)]) + "\n",
    }
    paths = []
    for kind, text in texts.items():
        with atomic_path(out / f"{name}.{kind}") as temporary:
            temporary.write_text(text, newline="")
        paths.append(out / f"{name}.{kind}")
    return paths


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """RFC 4180 with a line of names; numbers with all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(dict(row) for row in rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table with numbers to the right, of four significant digits; columns in which nothing stands are left out."""
    columns = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    numeric = [all(not isinstance(row.get(column), str) for row in rows) for column in columns]
    lines = [columns, ["---:" if right else "---" for right in numeric]]
    lines += [[in_words(row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def in_words(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1e5 else f"{cell:.3e}"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return "" if cell is None else " ".join(str(cell).split()).replace("|", "\\|")
