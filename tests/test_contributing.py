"""CONTRIBUTING.md holds: its examples are built in a copy of the tree, word for word."""

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from . import processes

ROOT = Path(__file__).resolve().parents[1]


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def steps(title: str) -> list[tuple[str, str]]:
    """(the line above, the code) of every code block."""
    return re.findall(r"^([^\n]+):\n\n```\w+\n(.*?)^```$", section(title), re.M | re.S)


def copy(folder: Path) -> Path:
    """The packages, without what tests and builds leave."""
    for package in ("mimo", "mimo_kernels"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def follow(tree: Path, where: str, code: str) -> None:
    """Do what a line says with the code below it: create a file, or add to a table."""
    if created := re.fullmatch(r"Create `(.+)`", where):
        path = tree / created[1]
        assert not path.exists()
        path.write_text(code)
    elif added := re.fullmatch(r"In `(.+)`, add to `(.+)`", where):
        path = tree / added[1]
        table = re.search(rf"^{added[2]} = [{{(\[].*?\n(?=[}})\]])", path.read_text(), re.M | re.S)
        path.write_text(path.read_text().replace(table[0], table[0] + code))
    else:
        raise AssertionError(where)


@contextlib.contextmanager
def programs_in(tree: Path) -> Iterator[Callable[..., str]]:
    """Inside, runs Python there and gives what it says; this run of pytest is none of its business."""
    names = ("PYTHONPATH", *(name for name in os.environ if name.startswith("PYTEST_")))
    environment = processes.environment(*names, PYTHONPATH=tree)
    with contextlib.closing(processes.Server(environment)) as server:

        def program(*words: object) -> str:
            options = {"cwd": tree, "env": environment, "server": server, "timeout": 600}
            done = processes.run([sys.executable, *words], capture_output=True, text=True, **options)
            assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
            return done.stdout

        yield program


def test_an_operator_in_a_day(tree):
    for folder in ("csrc", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    *files, (_, commands) = steps("An operator in a day")
    assert [where for where, _ in files] == [
        "Create `csrc/scale_rows.cu`",
        "Create `mimo_kernels/ops/scale_rows.py`",
        "In `mimo_kernels/core/operators.py`, add to `OPERATORS`",
        "Create `tests/kernels/test_scale_rows.py`",
    ]
    for where, code in files:
        follow(tree, where, code)
        assert max(map(len, code.splitlines())) <= 120
    code = "import torch, mimo_kernels as m; print(m.scale_rows(torch.ones(2, 3), torch.tensor([2.0, 3.0])).tolist())"
    test, report = (shlex.split(line)[1:] for line in commands.splitlines())
    with programs_in(tree) as program:
        assert program("-c", code) == "[[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]\n"
        assert re.search(r"^  scale_rows +reference$", program(*report), re.M)
        told = program(*test, "-n0", "-p", "no:cacheprovider", "-rA")
    passed = set(re.findall(r"^PASSED tests/\S+::(\w+)", told, re.M))
    assert passed >= {
        "test_output_and_gradient",
        "test_bad_input",
        "test_is_well_formed",
        "test_forward_mode_is_refused_for_every_argument",
        "test_compiles_whole",
        "test_no_rows",
        "test_shapes_without_values",
        "test_public_names_load",
        "test_every_operator_is_served_on_the_cpu_by_its_reference",
    }


@pytest.fixture
def tree(tmp_path):
    return copy(tmp_path)


def test_a_system_in_a_day(tree):
    from mimo.data import write_video

    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (8, 48, 48, 3), dtype=np.uint8)
        write_video(tree / "clips" / f"{number}.mp4", noise)
    *files, (where, commands) = steps("A system in a day")
    assert [where.split()[0] for where, _ in files] == ["Create", "In"] and where.startswith("Train")
    for where, code in files:
        follow(tree, where, code)
    check = """
        import sys
        sys.path.insert(0, {tests!r})
        import torch, test_systems as t
        t.SYSTEMS["last_frame"] = t.ONE_COPY | {{"recipe": "last_frame"}}
        t.test_every_parameter_learns("last_frame")
        recipe = t.build_recipe(t.config("last_frame"))
        prepared = t.drawn(recipe)
        assert prepared.weight[:, :-1].eq(0).all() and abs(prepared.weight.sum() * 6 * 5 - 1) < 1e-6
        assert prepared.batch.timestep.view(2, -1)[:, :-1].eq(0).all()
    """
    code = "\n".join(line[8:] for line in check.format(tests=str(ROOT / "tests" / "mimo")).splitlines())
    with programs_in(tree) as program:
        for words in map(shlex.split, commands.splitlines()):
            assert words[0] == "mimo"
            program("-m", *words)
        program("-c", code)
    assert (tree / "samples" / "sample.mp4").stat().st_size > 0
    config = (tree / "runs" / "last_frame" / "checkpoints" / "step_00000010" / "state.json").read_text()
    assert '"last_frame"' in config
