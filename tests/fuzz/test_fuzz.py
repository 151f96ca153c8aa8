"""The fuzzers with fixed seeds, and the command that runs them for longer."""

import os
import re

import pytest

from . import registry
from .__main__ import main
from .registry import Fuzzer, check_examples


@pytest.mark.parametrize(
    ("name", "seed"), [(fuzzer.name, seed) for fuzzer in registry.load().values() for seed in range(fuzzer.ci_seeds)]
)
def test_fixed_seeds(name, seed):
    assert registry.load()[name].run(seed) > 0


def right(seed: int) -> int:
    return 7


def wrong(seed: int) -> int:
    assert seed < 4, "seeds from 4 on are wrong"
    return 1


def deadly(seed: int) -> int:
    os._exit(9)


@pytest.fixture
def toys(monkeypatch):
    """Three fuzzers instead of the real ones; the worker that runs them is a copy of this process."""
    toys = {run.__name__: Fuzzer(run.__name__, run, 0) for run in (right, wrong, deadly)}
    monkeypatch.setattr(registry, "FUZZERS", toys)
    monkeypatch.setattr(registry, "MODULES", ())


def test_a_failure_and_a_death_are_counted_and_the_run_goes_on(toys, capfd):
    assert main(["--minutes", "0.02", "--seed", "3"], start="fork") == 1
    printed = capfd.readouterr().out
    assert "wrong, seed 4; again with: python -m tests.fuzz --minutes 0.01 --seed 4 --only wrong" in printed
    assert "AssertionError: seeds from 4 on are wrong" in printed and "deadly, seed 3" in printed
    rows = {
        line.split()[0]: line.split()[1:] for line in printed.splitlines() if re.fullmatch(r"\w+( +[\d,]+){3}", line)
    }
    batches, cases, failures = (int(x.replace(",", "")) for x in rows["right"])
    assert batches >= 2 and cases == 7 * batches and failures == 0
    assert rows["deadly"][0] == rows["deadly"][2] and int(rows["wrong"][0]) == int(rows["wrong"][2]) + 1


def test_only_what_is_named_runs_and_success_is_told(toys, capfd):
    assert main(["--minutes", "0.001", "--only", "right"], start="fork") == 0
    assert "deadly" not in capfd.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(["--minutes", "1", "--only", "nobody"])
    assert error.value.code == 2


def test_the_same_seed_draws_the_same_cases():
    from hypothesis import strategies as st

    drawn = [[] for _ in range(3)]
    for seed, cases in zip((5, 5, 6), drawn):
        assert check_examples(seed, 30, st.lists(st.integers()), cases.append) == len(cases) == 30
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_wrong_case_is_raised():
    from hypothesis import strategies as st

    def check(x):
        assert x < 100

    with pytest.raises(AssertionError):
        check_examples(0, 200, st.integers(0, 1000), check)
