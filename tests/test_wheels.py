"""What .ci/wheels.py relies on: sources that NVRTC can read, and wheels whose bytes follow from the sources."""

import importlib.util
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def headers(tmp_path_factory) -> Path:
    """The standard library as NVRTC is told of it, and empty headers of CUDA."""
    folder = tmp_path_factory.mktemp("headers")
    for name, text in script("nvrtc").HEADERS.items():
        (folder / name).write_text(text)
    for name in ("cuda_fp16.h", "cuda_bf16.h"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc").glob("*.cu")))
def test_kernels_include_nothing_that_nvrtc_has_not(headers: Path, source: str):
    """Also no header of the host, and no launcher becomes a function of Python there."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    command = [compiler, "-E", "-P", "-x", "c++", "-nostdinc", "-D__CUDACC__", "-DMIMO_WITH_CUDA", f"-I{headers}"]
    read = subprocess.run([*command, ROOT / "csrc" / source], capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    assert "__global__" in read.stdout and "LauncherRow" not in read.stdout and "dlopen" not in read.stdout


def test_machine_code_for_every_generation_and_ptx_for_those_to_come():
    targets = script("nvrtc").TARGETS
    assert {target for target in targets if target.startswith("sm_")} == {"sm_80", "sm_90a", "sm_100", "sm_120"}
    assert [target for target in targets if target.startswith("compute_")] == ["compute_100"]


def packed(folder: Path, when: int) -> bytes:
    """A wheel of a few files of the sources, which were written at that time, in that folder."""
    for name in ("setup.py", "pyproject.toml", "README.md", "mimo/__init__.py", "mimo_kernels/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
        os.utime(folder / name, (when, when))
    settings = {"MIMO_EXTENSION": "0", "SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist"]
    subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, check=True)
    (wheel,) = (folder / "dist").iterdir()
    return wheel.read_bytes()


def test_the_same_sources_are_packed_to_the_same_bytes(tmp_path: Path):
    first, second = (packed(tmp_path / name, when) for name, when in (("a", 1600000000), ("b", 1650000000)))
    assert first == second
    with zipfile.ZipFile(tmp_path / "a" / "dist" / os.listdir(tmp_path / "a" / "dist")[0]) as wheel:
        assert {entry.date_time[0] for entry in wheel.infolist()} == {2023}  # not the files' own
