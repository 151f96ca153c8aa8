"""Imports run one way: csrc <- mimo_kernels <- mimo <- benchmarks, tests. Read from the sources; nothing is imported."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("attention", "cache", "ops")  # and in ops every file is one: op families, strangers to each other
SHARED = ("frame_rows",)  # in ops, but data that several families take: the layout of a batch
# The one file that shows users what belongs together: no code.
DOORS = {"mimo_kernels/attention/__init__.py"}
NEVER = {"mimo_kernels": {"mimo", "benchmarks", "tests"}, "mimo": {"benchmarks", "tests"}, "benchmarks": {"tests"}}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that the file imports anywhere, functions included, with relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def family(module: str) -> str | None:
    """The op family of mimo_kernels that a module name belongs to."""
    package, room, *file = [*module.split("."), "", ""][:3]
    if package != "mimo_kernels" or room not in FAMILIES:
        return None
    return file[0] if room == "ops" else room


def type_checking_only(path: Path) -> set[str]:
    """Modules imported under `if TYPE_CHECKING:`, which never run."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom):
                    names.update(f"{inner.module}.{alias.name}" for alias in inner.names)
    return names


@pytest.mark.parametrize("package", NEVER)
def test_imports_run_one_way(package: str):
    files = sources(package)
    assert files or package == "benchmarks"
    upward = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imported(path)
        if module.split(".")[0] in NEVER[package]
    }
    assert not upward


def test_op_families_do_not_import_each_other():
    crossings = set()
    for path in sources("mimo_kernels"):
        own = family(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imported(path) - type_checking_only(path):
            if own and family(module) not in (None, own, *SHARED) and path.relative_to(ROOT).as_posix() not in DOORS:
                crossings.add(f"{path.relative_to(ROOT)} imports {module}")
    assert not crossings


def test_no_import_goes_in_a_circle():
    """Inside functions and under TYPE_CHECKING neither: what has to be read together belongs into one file."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources("mimo_kernels")}
    graph = {}
    for module, path in files.items():
        named = {name if name in files else name.rpartition(".")[0] for name in imported(path)}
        graph[module] = {name for name in named if name in files and name != module}
    assert graph["mimo_kernels.cache.pages"] >= {"mimo_kernels.cache.view", "mimo_kernels.cache.book"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_importing_the_package_needs_only_the_standard_library():
    assert imported(ROOT / "mimo_kernels" / "__init__.py") == {"importlib", "mimo_kernels.core.operators.OPERATORS"}
    assert imported(ROOT / "mimo_kernels" / "core" / "operators.py") == {"typing.NamedTuple"}
    assert not imported(ROOT / "mimo_kernels" / "core" / "__init__.py")


def test_csrc_includes_no_torch_header():
    files = [path for path in (ROOT / "csrc").iterdir() if path.suffix in {".cpp", ".cu", ".cuh", ".h"}]
    assert files
    included = {
        (path.name, header) for path in files for header in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
    }
    assert ("bindings.cpp", "bindings.h") in included
    assert not {(name, header) for name, header in included if re.match(r"(torch|ATen|c10|caffe2)\b", header)}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("from . import mask", "mimo_kernels.attention.mask"),
        ("from .mask import FrameMask", "mimo_kernels.attention.mask.FrameMask"),
        ("def f():\n    from ..ops import adaln", "mimo_kernels.ops.adaln"),
        ("import mimo.config as c", "mimo.config"),
        ("from mimo import config", "mimo.config"),
    ],
)
def test_the_walk_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "mimo_kernels" / "attention" / "some.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert imported(path) == {expected}
