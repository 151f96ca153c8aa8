"""What every test shares: which copy of the packages is tested, how many threads, where data lies, what needs a GPU."""

import os
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, min(4, (os.cpu_count() or 1) // WORKERS))

# Before torch loads. The tensors here are small: more threads than cores per worker only wait for each other.
os.environ["OMP_NUM_THREADS"] = str(THREADS)
# mimo's command line says this where nobody has: also to the tests that call it, and programs that they start later are
# to have the environment of those before (tests/processes.py).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this when a kernel is decorated, so it has to stand before any test imports one. Tests that compile
    # ahead of time need it unset and run in processes of their own.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread; and another number of threads sums in another order, which
    tells runs apart that are compared with a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--installed", action="store_true", help="test the installed packages, not the sources")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Use all cores where pytest-xdist is installed, unless -n says otherwise; processes would only share one GPU."""
    several = min(8, os.cpu_count() or 1)
    asked = getattr(config.option, "numprocesses", 0) is not None or config.option.usepdb or config.option.collectonly
    if several > 1 and not (asked or HAS_GPU or hasattr(config, "workerinput")):
        config.option.numprocesses, config.option.dist = several, "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """Test the sources in this folder where the module is built (`pip install .` leaves it beside them), else, or with
    --installed, what pip installed. Sources without it must not hide the installed packages: `python -m pytest` puts
    the current folder on the path."""
    built = any((ROOT / "mimo_kernels" / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
    first = [str(ROOT)] if built and not config.getoption("--installed") else []
    sys.path[:] = first + [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.environ["PYTHONPATH"] = os.pathsep.join(first + [entry for entry in inherited if Path(entry).resolve() != ROOT])


def pytest_report_header() -> str:
    import mimo_kernels
    from mimo_kernels.core import backends

    archs = ", ".join(backends.cuda_archs()) or backends.extension_reason()
    return f"mimo_kernels {mimo_kernels.__version__} from {Path(mimo_kernels.__file__).parent}, compiled for: {archs}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ROOT / "tests" / "gpu" in item.path.parents:
            item.add_marker("gpu")
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def outside_the_sources(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Run in an empty folder: `python -m mimo` in a test finds the packages under test, and nothing litters ROOT."""
    os.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real clips that lies beside a checkout, ../shared/data."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real clips at {folder}")
    return folder
