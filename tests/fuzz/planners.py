"""The planner in Python against the one in C++: the same tables, schedules and refusals for whatever they are given."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

from mimo_kernels.core import backends

from ..kernels.planners import BothPlanners
from .registry import fuzzer

CASES = 300


class Three:
    """An int that is none, in place of those that change the list they stand in: both planners are to read the same."""

    def __init__(self, *_):
        pass

    def __index__(self):
        return 3

    def __repr__(self):
        return "Three"


def inputs(planners: object):
    """host_inputs.py with other planners in place of the sanitized extension."""
    spec = importlib.util.spec_from_file_location("inputs_of_both", Path(__file__).with_name("host_inputs.py"))
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "_C", planners)
        spec.loader.exec_module(module)
    module.Shrinks = Three
    return module


if backends.extension():

    @fuzzer("planners", ci_seeds=2)
    def both_planners(seed: int) -> int:
        both = BothPlanners()
        # The schedule of Hopper's kernels is made in C++ alone.
        both.plan_sm90 = lambda *lent, **sizes: None
        module, r = inputs(both), random.Random(seed)
        for _ in range(CASES):
            call = r.choices([module.table, module.from_cells, module.plan], [2, 1, 4])[0]
            try:
                call(r)
            except module.REFUSALS:
                pass
        return both.compared
