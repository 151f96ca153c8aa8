"""The one place that says who makes frame tables and schedules on the host: mimo_kernels._C, in C++, or, where that
does not load, mimo_kernels.planner, in Python, with the same bytes."""

from __future__ import annotations

import warnings
from typing import Any

from mimo_kernels.core import backends

PYTHON = "mimo_kernels.planner"

# Decided once, here: a fallback that came and went would be hard to see.
_planner, _refusal = backends.extension(), ""
if _planner is None:
    _planner, _refusal = backends.load(PYTHON)
_noted = False


def planner() -> Any:
    """The module with frame_table_*, plan_rows and plan_keys. That it is the one in Python is said once, and why."""
    global _noted
    if in_python() and not _noted:
        _noted = True
        warnings.warn(
            f"masks are planned in Python, which takes longer than in C++: {backends.extension_reason()}"
            " (python -m mimo_kernels.collect_env says how long)",
            RuntimeWarning,
            stacklevel=2,
        )
    return _loaded()


def schedule_layout() -> dict[str, int]:
    """The numbers of csrc/schedule.h, by name."""
    return _loaded().schedule_layout


def in_python() -> bool:
    return _loaded().__name__ == PYTHON


def _loaded() -> Any:
    if _planner is None:
        raise ImportError(f"nothing makes schedules: {backends.extension_reason()}; {_refusal}")
    return _planner
