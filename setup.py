"""Builds the extension module mimo_kernels._C from csrc/, with or without CUDA.

The sources include no torch header, so neither torch nor a GPU nor a driver is needed here. `*.cpp` always compiles;
`*.cu` compiles with the first nvcc that works: CUDA_HOME, the PATH, /usr/local/cuda, or the wheels that pyproject.toml
requires for the build. Without one the host part is built alone, and the reason is printed and kept in the module
(`_C.cuda_reason`). TORCH_CUDA_ARCH_LIST chooses the architectures.

Without a C++ compiler, or with MIMO_EXTENSION=0, the package is pure Python: a wheel for every machine, which plans in
Python and has no CUDA kernels. With MIMO_EXTENSION=1 a missing compiler is an error.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).parent.resolve()
CUDA_ROOTS = ("CUDA_HOME", "CUDA_PATH")
DEFAULT_ARCHS = "8.0;9.0a;10.0+PTX"
OLDEST_ARCH = 80  # bf16 arithmetic and cp.async
HOST_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_LINK = ["-shared", "-cudart", "static", "-nodlink", "-Xlinker", "--exclude-libs,ALL"]
PROBE = "#include <cuda_bf16.h>\n__global__ void probe(__nv_bfloat16* x) { *x = *x + *x; }\n"


@dataclass(frozen=True)
class Arch:
    """9.0a is number 90, suffix 'a'. PTX is code that newer GPUs translate for themselves."""

    number: int
    suffix: str = ""
    ptx: bool = False

    @property
    def targets(self) -> list[str]:
        name = f"{self.number}{self.suffix}"
        return [f"sm_{name}"] + [f"compute_{name}"] * self.ptx


def parse_archs(text: str) -> list[Arch]:
    """'8.0;9.0a 10.0+PTX' in ascending order, each architecture once."""
    ptx = {}
    for word in re.split(r"[;,\s]+", text.strip("; ,")):
        match = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST={text!r}: {word!r} is not an architecture; "
                f"expected a list like {DEFAULT_ARCHS!r}"
            )
        key = 10 * int(match[1]) + int(match[2]), match[3]
        ptx[key] = ptx.get(key, False) or match[4] is not None
    return [Arch(number, suffix, ptx[number, suffix]) for number, suffix in sorted(ptx)]


def keep_supported(archs: list[Arch], supported: set[int], notes: list[str]) -> list[Arch]:
    """What this nvcc and our kernels can do. A +PTX left out moves to the newest one kept: newer GPUs stay served."""
    kept = []
    for arch in archs:
        if arch.number < OLDEST_ARCH:
            notes.append(f"left out {arch.targets[0]}: the kernels need sm_{OLDEST_ARCH} or newer")
        elif arch.number not in supported:
            notes.append(f"left out {arch.targets[0]}: this nvcc cannot compile for it")
        else:
            kept.append(arch)
    if kept and any(arch.ptx for arch in archs) and not any(arch.ptx for arch in kept):
        newest = max(arch.number for arch in kept)
        kept = [arch for arch in kept if arch != Arch(newest)] + [Arch(newest, ptx=True)]
    return kept


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that has compiled a small kernel here."""

    nvcc: Path
    version: str
    supported: set[int]
    origin: str

    def __str__(self) -> str:
        return f"nvcc {self.version} from {self.origin}"


def nvcc_candidates() -> list[tuple[str, Path]]:
    """Where from, and the path."""
    found = [
        (f"{name}={os.environ[name]}", Path(os.environ[name], "bin", "nvcc"))
        for name in CUDA_ROOTS
        if os.environ.get(name)
    ]
    if on_path := shutil.which("nvcc"):
        found.append((on_path, Path(on_path)))
    found.append(("/usr/local/cuda", Path("/usr/local/cuda/bin/nvcc")))
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations if wheels else []:
        found.append(("the nvcc wheels", Path(folder, "cu13", "bin", "nvcc")))
    return found


def find_toolkit(compiler: str, scratch: Path, notes: list[str]) -> Toolkit | None:
    for origin, nvcc in nvcc_candidates():
        if not nvcc.is_file():
            if origin.startswith(CUDA_ROOTS):
                notes.append(f"{origin} holds no bin/nvcc")
            continue
        probe = scratch / "probe.cu"
        probe.write_text(PROBE)
        try:
            run(
                [
                    nvcc,
                    "-ccbin",
                    compiler,
                    *NVCC_FLAGS,
                    *NVCC_LINK,
                    *library_paths(nvcc),
                    probe,
                    "-o",
                    scratch / "probe.so",
                ]
            )
            version = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"])).group(1)
            supported = {int(number) for number in re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))}
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", "") or str(error)
            reason = next((line for line in output.splitlines() if "error" in line.lower()), str(error))
            notes.append(f"nvcc from {origin} does not work: {reason.strip()}")
            continue
        return Toolkit(nvcc, version, supported, origin)
    return None


def library_paths(nvcc: Path) -> list[str]:
    """nvcc looks for the static runtime in lib64, its wheel ships it in lib."""
    folder = nvcc.parent.parent / "lib"
    return [f"-L{folder}"] if (folder / "libcudart_static.a").is_file() else []


def run(command: list) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout


def host_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise CompileError(
        f"no C++17 compiler: {' and '.join(names)} not found; install g++ (Debian and Ubuntu: apt install g++)"
    )


def python_headers() -> str:
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        raise CompileError(
            f"no Python.h in {folder}; install Python's headers (Debian and Ubuntu: apt install python3-dev)"
        )
    return folder


def left_out() -> str:
    """Why the extension is not built; "" where it is. What somebody asked for by name is built, or is an error."""
    wish = os.environ.get("MIMO_EXTENSION", "")
    if wish not in ("", "0", "1"):
        raise OptionError(f"MIMO_EXTENSION={wish!r}; expected 0 (left out) or 1 (an error where it cannot be built)")
    if wish == "0":
        return "MIMO_EXTENSION=0"
    if wish == "1" or os.environ.get("CXX"):
        return ""
    if sys.platform != "linux":
        return f"it is built on Linux alone, and this is {sys.platform}"
    try:
        host_compiler(), python_headers()
    except CompileError as error:
        return str(error)
    return ""


def ninja_command() -> list[str]:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if path := shutil.which("ninja"):
        return [path]
    raise CompileError("ninja not found; install it with: pip install ninja")


class Build(build):
    """Starts from an empty build/lib: a module deleted since the last build does not get into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildPackages(build_py):
    """Where the extension is left out, a module in its place tells everybody who imports it why."""

    def run(self) -> None:
        super().run()
        if self.distribution.has_ext_modules() or self.editable_mode:
            return
        reason = f"left out of the build: {left_out()}"
        print(f"mimo_kernels._C: {reason}", flush=True)
        Path(self.build_lib, "mimo_kernels", "_C.py").write_text(
            f'"""Written by setup.py."""\n\nraise ImportError({reason!r})\n'
        )


class BuildExtension(build_ext):
    """Compiles one object per source with ninja and links them into one module."""

    def build_extension(self, ext: Extension) -> None:
        scratch = Path(self.build_temp).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        compiler, notes, archs = host_compiler(), [], []
        requested = parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
        toolkit = find_toolkit(compiler, scratch, notes)
        if toolkit is None:
            notes.append("no working nvcc in CUDA_HOME, on the PATH, in /usr/local/cuda or among the installed wheels")
        else:
            archs = keep_supported(requested, toolkit.supported, notes)
        targets = [name for arch in archs for name in arch.targets]
        if toolkit is not None and not targets:
            notes.append("no architecture is left to compile for")
            toolkit = None

        write_if_changed(scratch / "build_info.h", build_info(toolkit, targets, "; ".join(notes)))
        what = f"CUDA for {', '.join(targets)} with {toolkit}" if toolkit else "host code only, no CUDA"
        print(f"mimo_kernels._C: {what}", *notes, sep="\n  ", flush=True)

        write_if_changed(scratch / "build.ninja", ninja_file(compiler, toolkit, archs, scratch, target))
        jobs = os.environ.get("MAX_JOBS")
        command = [*ninja_command(), "-C", str(scratch), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, check=False).returncode:
            raise CompileError(f"mimo_kernels._C did not compile; the command was: {shlex.join(command)}")
        try:  # a symbol that no source defines shows only when the module loads
            run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import _C", target.parent])
        except subprocess.CalledProcessError as error:
            raise CompileError(f"mimo_kernels._C does not load: {error.output.strip().splitlines()[-1]}") from None
        if not self.inplace:
            # Also beside the sources: they shadow the installed package for whoever runs Python in this folder.
            beside = ROOT / "mimo_kernels" / target.name
            shutil.copy2(target, beside.with_suffix(".new"))
            os.replace(beside.with_suffix(".new"), beside)

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").iterdir())]


def build_info(toolkit: Toolkit | None, targets: list[str], notes: str) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    return (
        "// Written by setup.py.\n"
        f"#define MIMO_CUDA_ARCHS {quoted(' '.join(targets))}\n"
        f"#define MIMO_CUDA_REASON {quoted(notes)}\n"
        f"#define MIMO_CUDA_VERSION {quoted(toolkit.version if toolkit else '')}\n"
        f"#define MIMO_CUDA_COMPILER {quoted(str(toolkit or ''))}\n"
    )


def ninja_file(compiler: str, toolkit: Toolkit | None, archs: list[Arch], scratch: Path, target: Path) -> str:
    import pybind11

    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def flags(parts: list) -> str:
        return shlex.join(str(part) for part in parts).replace("$", "$$")

    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    includes = [f"-I{folder}" for folder in (scratch, pybind11.get_include(), python_headers())]
    defines = ["-DMIMO_WITH_CUDA"] if toolkit else []
    gencode = [f"-gencode=arch=compute_{arch.number}{arch.suffix},code=[{','.join(arch.targets)}]" for arch in archs]
    lines = [
        "rule host",
        f"  command = {flags([compiler, *HOST_FLAGS, *defines, *includes])} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    if toolkit:
        sources += sorted((ROOT / "csrc").glob("*.cu"))
        nvcc = [toolkit.nvcc, "-ccbin", compiler]
        link = [*nvcc, *NVCC_LINK, *library_paths(toolkit.nvcc)]
        lines += [
            "rule cuda",
            f"  command = {flags([*nvcc, *NVCC_FLAGS, *defines, *gencode])} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    else:
        link = [compiler, "-shared", "-Wl,--exclude-libs,ALL"]
    lines += ["rule link", f"  command = {flags(link)} $in -o $out"]
    objects = [escape(f"{source.name}.o") for source in sources]
    for source, name in zip(sources, objects):
        lines.append(f"build {name}: {'cuda' if source.suffix == '.cu' else 'host'} {escape(source)}")
    lines += [f"build {escape(target)}: link {' '.join(objects)}", f"default {escape(target)}", ""]
    return "\n".join(lines)


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    setup(
        ext_modules=[] if left_out() else [Extension("mimo_kernels._C", sources=["csrc/bindings.cpp"])],
        cmdclass={"build": Build, "build_py": BuildPackages, "build_ext": BuildExtension},
    )
