"""Executes the CUDA kernels of csrc/ on the CPU: compiles them with the host compiler against the block emulator in
emulate/."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import Tensor

from mimo_kernels.core.operators import OPERATORS

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulate"
FLAGS = [
    "-std=c++17",
    "-g1",
    "-gdwarf-4",  # addr2line of older binutils mixes up the files of later versions
    "-fPIC",
    "-fvisibility=hidden",
    "-DMIMO_EMULATE",
    "-DMIMO_WITH_CUDA",
    "-U_FORTIFY_SOURCE",
    "-w",
]
# The kernels: before every access to memory a call, which the emulator answers itself; the compiler's own library stays
# out.
WATCHED = ["-O1", "-fsanitize=thread"]
PLAIN = ["-O2"]
SOURCES = [
    *sorted({source for operator in OPERATORS for source in operator.sources}),
    "probe_sm90.cu",
    "bind_launchers.cpp",
]
# Outputs of which a call writes some rows and leaves the others as they are.
WRITTEN_IN_PART = {"k_cache", "v_cache"}


@functools.cache
def module():
    """The emulated module, each source compiled once per state of it, by the first of several processes that want
    it."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    # The emulator first: of an inline function that several files hold the linker takes the first, and these must not
    # be watched.
    sources = [
        *sorted(EMULATOR.glob("*.cpp")),
        *sorted(EMULATOR.glob("*.cu")),
        *(ROOT / "csrc" / name for name in SOURCES),
    ]
    headers = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.cuh"), *EMULATOR.glob("*.h")])
    common = hashlib.sha256(repr((compiler, FLAGS, WATCHED, PLAIN, suffix)).encode())
    for path in headers:
        common.update(path.read_bytes())
    states = {source: hashlib.sha256(common.digest() + source.read_bytes()).hexdigest()[:16] for source in sources}
    whole = hashlib.sha256(repr(list(states.values())).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"mimo-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"emulated_kernels-{whole}{suffix}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            build(compiler, {source: folder / f"{source.name}-{state}.o" for source, state in states.items()}, target)
    spec = importlib.util.spec_from_file_location("emulated_kernels", target)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build(compiler: str, objects: dict[Path, Path], target: Path) -> None:
    """Compiles the sources whose object is not there yet, and links all of them."""
    import pybind11

    folders = (EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    command = [compiler, *FLAGS, *(f"-I{folder}" for folder in folders)]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:

        def compile_one(source: Path) -> None:
            out = f"{scratch}/{source.name}.o"
            options = WATCHED if source.suffix == ".cu" else PLAIN
            subprocess.run([*command, *options, "-x", "c++", "-c", str(source), "-o", out], check=True)
            os.replace(out, objects[source])  # whole or not there

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, (source for source, out in objects.items() if not out.exists())))
        linked = f"{scratch}/{target.name}"
        subprocess.run([compiler, "-shared", *map(str, objects.values()), "-o", linked], check=True)
        os.replace(linked, target)


class Address(int):
    """What Tensor.data_ptr gives while kernels are emulated: a number that knows its tensor, so that an operator's call
    tells how far each of its pointers reaches."""

    tensor: Tensor


_data_ptr = Tensor.data_ptr


def data_ptr(tensor: Tensor) -> Address:
    address = Address(_data_ptr(tensor))
    address.tensor = tensor
    return address


class Emulated:
    """The emulated module as operators see it. For the time of a call the kernels may touch the tensors that it was
    given and no byte beside them: what is const in its launcher to read, the rest to write, and to read what is
    written. Afterwards the rest has to be full. RuntimeError for what a kernel does, AssertionError for what it leaves
    empty."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name: str):
        function = getattr(self._module, name)
        return functools.partial(self._call, name, function) if name in self._module.launchers else function

    def _call(self, name: str, function, **arguments) -> None:
        try:
            for parameter, kind in self._module.launchers[name]:
                value = arguments.get(parameter)
                address = value[0] if kind == "p" else value
                if kind in ("r", "w", "p") and address:
                    assert isinstance(address, Address), f"{name}: {parameter} is not what data_ptr() of a tensor gave"
                    self.lend(parameter, address.tensor, writable=kind == "w")
            function(**arguments)
            empty = set(self.unwritten()) - WRITTEN_IN_PART
            assert not empty, f"{name}: not all of {', '.join(sorted(empty))} was written"
        finally:
            self.take_back()

    def lend(self, name: str, tensor: Tensor, writable: bool) -> None:
        if tensor.numel() == 0:
            return
        size = tensor.element_size()
        if tensor.is_contiguous():
            rows, width, stride = 1, tensor.numel(), 0
        elif tensor.dim() == 2:
            (rows, width), (stride, step) = tensor.shape, tensor.stride()
            assert step == 1, f"{name} has strides {tensor.stride()}"
        else:
            for part in tensor.unbind(0):  # a slice of a wider projection, per batch entry and row
                self.lend(name, part, writable)
            return
        storage = tensor.untyped_storage()
        self._module.lend(
            name, tensor.data_ptr(), rows, width * size, stride * size, writable, storage.data_ptr(), storage.nbytes()
        )


@contextlib.contextmanager
def emulation() -> Iterator[Emulated]:
    """Inside, backend="cuda" serves CPU tensors: the emulated kernels stand in for mimo_kernels._C."""
    from mimo_kernels.attention import sm90
    from mimo_kernels.core import backends

    kernels = Emulated(module())
    with pytest.MonkeyPatch.context() as patch:
        if backends.extension() is None:  # which alone makes the schedules of Hopper's kernels
            patch.setattr(sm90, "extension", lambda: pytest.skip(backends.extension_reason()))
        patch.setattr(Tensor, "data_ptr", data_ptr)
        patch.setattr(backends, "extension", lambda: kernels)
        patch.setattr(backends, "cuda_refusals", lambda device: [])
        yield kernels
        kernels.set_order(0)
        kernels.set_asynchrony(0, 0)


@pytest.fixture
def emulated():
    """The whole test is an `emulation`."""
    with emulation() as kernels:
        yield kernels
