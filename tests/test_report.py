"""How benchmarks/report.py keeps to its time, and what is left when something is stopped."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in ("common", "report")}
    finally:
        sys.path[:] = path


def test_a_budget_begins_nothing_that_would_not_fit(modules):
    Budget = modules["common"].Budget
    assert list(Budget().of("abc")) == ["a", "b", "c"]
    budget, done = Budget(minutes=0.3 / 60), []
    for piece in budget.of("abcd"):
        time.sleep(0.18)
        done.append(piece)
    assert done == ["a"] and budget.left_out == ["b", "c", "d"]


def test_at_most(modules):
    with pytest.raises(TimeoutError, match="took more than 0 s"), modules["common"].at_most(0.05):
        time.sleep(5)
    with modules["common"].at_most(0.2):
        pass
    time.sleep(0.25)  # the alarm is off


def test_results_are_whole_after_every_save(modules, tmp_path):
    common, plot = modules["common"], {"group": "shape", "bar": "name", "value": "ms", "panel": "what", "unit": "ms"}
    for rows in ([{"a": 1}], [{"a": 1}, {"b": 2}]):
        common.save_results(tmp_path, "some", {"device": "none"}, {}, rows, plot)
        assert json.loads((tmp_path / "some.json").read_text())["rows"] == rows
    assert (tmp_path / "some.csv").read_text().splitlines() == ["a,b", "1,", ",2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.csv", "some.json"]


def test_a_step_that_overruns_is_stopped_with_its_children(modules, tmp_path):
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run({child})"
    start = time.perf_counter()
    step = modules["report"].run("slow", [sys.executable, "-c", code], tmp_path, 2.0)
    assert time.perf_counter() - start < 20 and step["status"] is None and step["last_line"] == "stopped after 2 s"
    assert (tmp_path / "slow.log").read_text().startswith("begun\n")


def test_a_step_that_fails_or_is_not_there(modules, tmp_path):
    report = modules["report"]
    assert report.run("bad", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path, 20)["status"] == 3
    missing = report.run("none", [str(tmp_path / "no-such-program")], tmp_path, 20)
    assert missing["status"] == 127 and "no-such-program" in missing["last_line"]


def test_a_page_names_files_as_they_stand_beside_it(modules, tmp_path):
    code = f"print('{tmp_path}/some.json, {tmp_path}/some.png')"
    assert (
        modules["report"].run("some", [sys.executable, "-c", code], tmp_path, 20)["last_line"] == "some.json, some.png"
    )


def test_time_is_shared_out(modules):
    report = modules["report"]
    assert report.seconds_for("attn_bench", ["ops_bench", "train_bench"], 300.0) == 120.0
    assert report.seconds_for("train_bench", [], 100.0) == 100.0
    assert report.seconds_for("train_bench", [], -5.0) == 30.0  # late, but it still says what it is


def test_every_benchmark_takes_a_time_limit(modules):
    report = modules["report"]
    names = [name for name in report.steps(Path("out")) if name not in report.LIMIT_SECONDS]
    assert set(report.SHARES) == set(names)
    for name in names:
        assert '"--minutes"' in (FOLDER / f"{name}.py").read_text(), name


def test_the_sanitizer_looks_at_our_kernels(modules):
    found = modules["report"].sanitizer_steps()
    assert list(found) == ["memcheck", "racecheck", "synccheck"]
    for name, command in found.items():
        assert command[1:3] == ["--tool", name] and "kernel_substring=mimo" in command
        assert command[-1] == "tests/gpu/test_every_kernel.py" and (FOLDER.parent / command[-1]).is_file()
