"""setup.py: which architectures are compiled, and that the module builds without CUDA, and the package without the
module, and say why."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution, Extension
from setuptools.errors import CompileError, ModuleError, OptionError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("mimo_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mimo_setup"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mimo_setup"]


@pytest.mark.parametrize(
    "text, targets",
    [
        ("8.0;9.0a;10.0+PTX", "sm_80 sm_90a sm_100 compute_100"),
        ("8.0 9.0", "sm_80 sm_90"),
        (" 10.0f, 8.6+PTX;", "sm_86 compute_86 sm_100f"),
        ("9.0;9.0+PTX;9.0a;9.0", "sm_90 compute_90 sm_90a"),
    ],
)
def test_arch_list(build: types.ModuleType, text: str, targets: str):
    assert " ".join(name for arch in build.parse_archs(text) for name in arch.targets) == targets


@pytest.mark.parametrize("text, word", [("Hopper", "Hopper"), ("8.0;9", "9"), ("8.0+ptx", "8.0+ptx"), ("9.0b", "9.0b")])
def test_bad_arch_list(build: types.ModuleType, text: str, word: str):
    with pytest.raises(OptionError) as error:
        build.parse_archs(text)
    assert str(error.value).startswith(
        f"TORCH_CUDA_ARCH_LIST={text!r}: {word!r} is not an architecture; expected a list"
    )


@pytest.mark.parametrize(
    "text, supported, targets, left_out",
    [
        ("8.0;9.0a;10.0+PTX", {75, 80, 90, 100}, "sm_80 sm_90a sm_100 compute_100", []),
        ("8.0;9.0a;10.0+PTX", {75, 80, 90}, "sm_80 sm_90a sm_90 compute_90", ["sm_100"]),
        ("8.0;10.0+PTX", {75, 80, 90}, "sm_80 compute_80", ["sm_100"]),
        ("7.5;9.0", {75, 80, 90}, "sm_90", ["sm_75"]),
        ("10.0+PTX", {80}, "", ["sm_100"]),
    ],
)
def test_what_an_nvcc_cannot_do_is_left_out_and_said(
    build: types.ModuleType, text: str, supported: set[int], targets: str, left_out: list[str]
):
    notes = []
    kept = build.keep_supported(build.parse_archs(text), supported, notes)
    assert " ".join(name for arch in kept for name in arch.targets) == targets
    assert [note.split(":")[0] for note in notes] == [f"left out {name}" for name in left_out]


def test_without_a_working_nvcc_the_host_part_is_built(
    build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    broken = tmp_path / "cuda" / "bin" / "nvcc"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\necho 'nvcc fatal error: no licence to compile' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", "/no/such/toolkit")
    candidates = [("CUDA_HOME=/no/such/toolkit", Path("/no/such/toolkit/bin/nvcc")), ("a broken toolkit", broken)]
    monkeypatch.setattr(build, "nvcc_candidates", lambda: candidates)
    module = build_in(tmp_path, build, monkeypatch, {"kernel.cu": "this file is not compiled"})

    reasons = (
        "CUDA_HOME=/no/such/toolkit holds no bin/nvcc",
        "nvcc from a broken toolkit does not work: nvcc fatal error: no licence to compile",
        "no working nvcc in CUDA_HOME, on the PATH, in /usr/local/cuda or among the installed wheels",
    )
    printed = capfd.readouterr().out
    assert "mimo_kernels._C: host code only, no CUDA\n" + "".join(f"  {reason}\n" for reason in reasons) in printed
    code = "import _C; print(_C.cuda_archs, repr(_C.cuda_version)); print(_C.cuda_reason)"
    run = subprocess.run([sys.executable, "-c", code], cwd=module.parent, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["() ''", "; ".join(reasons)]


def test_a_function_nobody_defines_stops_the_build(
    build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build, "nvcc_candidates", list)
    with pytest.raises(CompileError, match="does not load: .*undefined symbol: .*missing"):
        build_in(tmp_path, build, monkeypatch, {"caller.cpp": "int missing();\nint caller = missing();\n"})


PURE = "mimo_kernels._C: left out of the build: "


def wheel_without_compiler(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """setup.py builds a wheel of the sources into folder/dist where no program is on the PATH."""
    try:
        Distribution().get_command_class("bdist_wheel")
    except ModuleError as error:  # setuptools before 70.1 leaves it to the package wheel
        pytest.skip(str(error))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for package in ("mimo", "mimo_kernels"):
        (folder / package).mkdir()
        shutil.copy(ROOT / package / "__init__.py", folder / package)
    (folder / "csrc").mkdir()
    inherited = {name: value for name, value in os.environ.items() if name not in ("CXX", "MIMO_EXTENSION")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist"],
        cwd=folder,
        env=inherited | {"PATH": str(folder / "bin")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_the_package_is_pure_python_and_says_why(tmp_path: Path):
    built = wheel_without_compiler(tmp_path)
    reason = "no C++17 compiler: g++ and c++ and clang++ not found; install g++ (Debian and Ubuntu: apt install g++)"
    assert built.returncode == 0, built.stderr
    assert [line for line in built.stdout.splitlines() if "_C" in line] == [PURE + reason]
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        source = files.read("mimo_kernels/_C.py")
        assert not [name for name in files.namelist() if name.endswith(".so")]
    with pytest.raises(ImportError) as error:
        exec(compile(source, "_C.py", "exec"), {})
    assert str(error.value) == f"left out of the build: {reason}"


@pytest.mark.parametrize("asked", [{"MIMO_EXTENSION": "1"}, {"CXX": "/no/such/compiler"}])
def test_an_extension_that_was_asked_for_is_built_or_an_error(asked: dict[str, str], tmp_path: Path):
    built = wheel_without_compiler(tmp_path, **asked)
    assert built.returncode != 0
    assert "error: no C++17 compiler: " in built.stderr and not (tmp_path / "dist").exists()


def test_the_extension_may_be_left_out_by_name(build: types.ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    for wish, reason in (("0", "MIMO_EXTENSION=0"), ("1", "")):
        monkeypatch.setenv("MIMO_EXTENSION", wish)
        assert build.left_out() == reason
    monkeypatch.setenv("MIMO_EXTENSION", "no")
    with pytest.raises(OptionError, match="^MIMO_EXTENSION='no'; expected 0 .* or 1 "):
        build.left_out()
    monkeypatch.delenv("MIMO_EXTENSION")
    monkeypatch.setattr(build.sys, "platform", "darwin")
    assert build.left_out() == "it is built on Linux alone, and this is darwin"


KERNELS = """
#include "launch.h"
namespace mimo::here {
template <class T> __global__ void fill_kernel(T* y, T value) { y[threadIdx.x] = value; }
int fill(float* y, void* stream) { return launch(fill_kernel<float>, dim3(1), dim3(32), 0, stream, y, 1.f); }
}
"""
FILL = "_ZN4mimo4here11fill_kernelIfEEvPT_S2_"


@pytest.fixture
def embed() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("mimo_embed", ROOT / "csrc" / "embed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def host_objects(folder: Path, build: types.ModuleType) -> dict[str, bytes]:
    """What the host's compiler makes of KERNELS, and of the driver, which it calls."""
    (folder / "here.cu").write_text(KERNELS)
    objects = {}
    for path in (folder / "here.cu", ROOT / "csrc" / "driver.cpp"):
        command = [build.host_compiler(), *build.HOST_FLAGS, "-O0", "-DMIMO_WITH_CUDA", f"-I{ROOT / 'csrc'}"]
        out = folder / f"{path.name}.o"
        subprocess.run([*command, "-x", "c++", "-c", path, "-o", out], check=True)
        objects[out.name] = out.read_bytes()
    return objects


def test_a_kernel_is_its_name(build: types.ModuleType, embed: types.ModuleType, tmp_path: Path):
    """Of a kernel the host's compiler leaves a symbol, which is what device code calls it, and no code."""
    objects = host_objects(tmp_path, build)
    assert [symbol for symbol in embed.symbols(objects["here.cu.o"]) if "fill_kernel" in symbol.name] == [
        embed.Symbol(FILL, 0, False)
    ]
    ptx = tmp_path / "here.compute_80.ptx"
    ptx.write_text(f".visible .entry {FILL}(")
    assert f'Kernel kernel_0 = {{"{FILL}", &source_here, {{}}}};' in embed.table(objects, tmp_path, ["compute_80"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("_ZN4mimo4here11fill_kernelIdEEvPT_S2_", f"here.cu names {FILL}, which no device code for compute_80 defines"),
        ("_ZN4mimo12_GLOBAL__N_11fill_kernelIfEEvPT_S2_", "here.cu has a kernel in an anonymous namespace: "),
    ],
)
def test_a_kernel_without_device_code_stops_the_build(
    build: types.ModuleType, embed: types.ModuleType, tmp_path: Path, entry: str, message: str
):
    objects = host_objects(tmp_path, build)
    (tmp_path / "here.compute_80.ptx").write_text(f".visible .entry {entry}(")
    with pytest.raises(ValueError, match=re.escape(message)):
        embed.table(objects, tmp_path, ["compute_80"])


def build_in(folder: Path, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> Path:
    """Build _C in `folder` from bindings.cpp and some files; the module's path."""
    (folder / "csrc").mkdir()
    (folder / "mimo_kernels").mkdir()
    for name in ("bindings.cpp", "bindings.h"):
        shutil.copy(ROOT / "csrc" / name, folder / "csrc")
    for name, text in files.items():
        (folder / "csrc" / name).write_text(text)
    monkeypatch.setattr(build, "ROOT", folder)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    extension = Extension("mimo_kernels._C", sources=["csrc/bindings.cpp"])
    command = build.BuildExtension(Distribution({"ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    (beside,) = (folder / "mimo_kernels").iterdir()
    (module,) = (folder / "lib" / "mimo_kernels").iterdir()
    assert beside.name == module.name and beside.read_bytes() == module.read_bytes()
    return module
