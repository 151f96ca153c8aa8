"""Imports run one way: csrc <- mimo_kernels <- mimo <- benchmarks, tests. Read from the sources; nothing is
imported."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("attention", "cache", "ops")  # and in ops every file is one: op families, strangers to each other
SHARED = ("frame_rows", "axial_rope")  # in ops, but data that families take: the layout of a batch, frequencies
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
    return file[0].removesuffix("_reference") if room == "ops" else room  # an operator may have two files


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


@pytest.mark.parametrize(
    ("package", "module", "imports"),
    [
        ("mimo_kernels", "mimo_kernels.cache.pages", {"mimo_kernels.cache.view", "mimo_kernels.cache.book"}),
        ("mimo", "mimo.training.loop", {"mimo.training.trainer", "mimo.training.log", "mimo.checkpoint"}),
    ],
)
def test_no_import_goes_in_a_circle(package: str, module: str, imports: set[str]):
    """Inside functions and under TYPE_CHECKING neither: what has to be read together belongs into one file."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources(package)
    }
    graph = {}
    for name, path in files.items():
        named = {other if other in files else other.rpartition(".")[0] for other in imported(path)}
        graph[name] = {other for other in named if other in files and other != name}
    assert graph[module] >= imports
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


# Imports inside functions: (file, what it imports, or all of it: "*") and why it waits until it is needed.
LATE = {
    ("mimo/__main__.py", "mimo.cli"): "what is missing is said before it is imported",
    ("mimo/cli/*", "*"): "--help answers at once: nothing heavy is imported before a command runs",
    ("mimo/demo/page.py", "matplotlib.figure"): "a second of start-up, for one picture",
    ("mimo/encoders/__init__.py", "mimo.encoders.videomae"): "who asks for it, has transformers and its weights",
    ("mimo/encoders/local.py", "transformers"): "seconds of start-up, and it need not be installed",
    ("mimo/encoders/local.py", "transformers.utils"): "the same",
    ("mimo/evaluation/metrics.py", "torchmetrics.functional.image"): "a second of start-up, for what compares pixels",
    ("mimo/evaluation/judges.py", "torchmetrics"): "the same, for who has the weights of LPIPS",
    ("mimo/evaluation/report.py", "matplotlib.figure"): "a second of start-up, for one picture",
    ("mimo/evaluation/maps.py", "umap"): "seconds of start-up, and it need not be installed",
    ("mimo/evaluation/probe_pictures.py", "matplotlib"): "a second of start-up, for pictures",
    ("mimo/evaluation/probe_pictures.py", "matplotlib.figure"): "the same",
    ("mimo/pretrained.py", "huggingface_hub"): "half a second of start-up, for a name on the hub",
    ("mimo/tokenizers/__init__.py", "mimo.tokenizers.dcae"): "who asks for it, has diffusers and its weights",
    ("mimo/tokenizers/__init__.py", "mimo.tokenizers.videovae"): "a big network, for who asks for it",
    ("mimo/tokenizers/dcae.py", "diffusers"): "seconds of start-up, and it need not be installed",
    ("mimo/training/boards.py", "torch.utils.tensorboard"): "seconds of start-up, for runs with a folder",
    ("mimo/training/boards.py", "wandb"): "seconds of start-up, and it need not be installed",
    ("mimo_kernels/attention/frame.py", "mimo_kernels.attention.triton"): "Triton need not be installed",
}
TYPES_ALONE = {  # imports under TYPE_CHECKING
    ("mimo_kernels/attention/paged.py", "mimo_kernels.cache.pages"): "an operator, which has to load without the cache",
    ("mimo_kernels/core/backends.py", "torch"): "the package says what is missing where torch does not load",
}


def late_and_types_alone(path: Path) -> tuple[set[str], set[str]]:
    """The modules named by imports inside functions, and under `if TYPE_CHECKING:`."""

    def named(tree: ast.AST) -> set[str]:
        nodes = list(ast.walk(tree))
        plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}

    late, types_alone = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            late |= named(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            types_alone |= named(node)
    return late, types_alone


def test_imports_wait_for_a_reason():
    """Each import inside a function or for types alone is allowed by name, and no permission is left over."""
    found = set(), set()
    for package in ("mimo", "mimo_kernels"):
        for path in sources(package):
            name = path.relative_to(ROOT).as_posix()
            for kind, modules in zip(found, late_and_types_alone(path), strict=True):
                wild = name.startswith("mimo/cli/")
                kind.update(("mimo/cli/*", "*") if wild else (name, module) for module in modules)
    assert found == (set(LATE), set(TYPES_ALONE))


def test_importing_the_package_needs_only_the_standard_library():
    assert imported(ROOT / "mimo_kernels" / "__init__.py") == {"importlib", "mimo_kernels.core.operators.OPERATORS"}
    assert imported(ROOT / "mimo_kernels" / "core" / "operators.py") == {"typing.NamedTuple"}
    assert not imported(ROOT / "mimo_kernels" / "core" / "__init__.py")


def test_the_planner_needs_numpy_alone():
    """It serves where little else does, and says the same as csrc/ whoever asks."""
    files = sources("mimo_kernels/planner")
    roots = {module.split(".")[0] for path in files for module in imported(path)}
    rooms = {".".join(module.split(".")[:2]) for path in files for module in imported(path) if "mimo" in module}
    assert roots - sys.stdlib_module_names == {"mimo_kernels", "numpy"} and rooms == {"mimo_kernels.planner"}


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
