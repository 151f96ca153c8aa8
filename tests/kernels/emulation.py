"""Executes the CUDA kernels of csrc/ on the CPU: compiles them with the host compiler against the block emulator in emulate/."""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulate"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-DMIMO_EMULATE",
    "-DMIMO_WITH_CUDA",
    "-U_FORTIFY_SOURCE",
    "-w",
]
SOURCES = ["tokens.cu", "modulate.cu", "qk_norm_rope.cu", "gelu.cu", "losses.cu", "bind_ops.cpp"]


@functools.cache
def module():
    """The emulated module, built once per state of the sources, by the first of several processes that want it."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    sources = [ROOT / "csrc" / name for name in SOURCES] + [EMULATOR / "module.cpp"]
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.cuh"), EMULATOR / "emulate.h"]
    state = hashlib.sha256(repr((compiler, FLAGS, suffix)).encode())
    for path in sorted([*sources, *headers]):
        state.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"mimo-emulated-{os.getuid()}-{state.hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"emulated_kernels{suffix}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            build(compiler, sources, target)
    spec = importlib.util.spec_from_file_location("emulated_kernels", target)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build(compiler: str, sources: list[Path], target: Path) -> None:
    import pybind11

    folders = (EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    command = [compiler, *FLAGS, *(f"-I{folder}" for folder in folders)]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:

        def compile_one(source: Path) -> str:
            out = f"{scratch}/{source.name}.o"
            subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", out], check=True)
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = f"{scratch}/{target.name}"
        subprocess.run([compiler, "-shared", *objects, "-o", linked], check=True)
        os.replace(linked, target)  # whole or not there


@pytest.fixture
def emulated(monkeypatch):
    """Inside the test, backend="cuda" serves CPU tensors: the emulated kernels stand in for mimo_kernels._C."""
    from mimo_kernels import _dispatch, _launch

    kernels = module()
    monkeypatch.setattr(_dispatch, "extension", lambda: kernels)
    monkeypatch.setattr(_dispatch, "cuda_refusals", lambda device: [])
    _launch._device_refusals.cache_clear()
    yield kernels
    kernels.set_order(0)
    _launch._device_refusals.cache_clear()
