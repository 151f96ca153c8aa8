"""Builds the extension module mimo_kernels._C from csrc/, with or without CUDA.

The sources include no torch header, so neither torch nor a GPU nor a driver is needed here. The host's compiler takes
`*.cpp` and the launchers in `*.cu`; the kernels in `*.cu` become device code, which is put into the module
(csrc/embed.py). They are compiled by the first nvcc that works: CUDA_HOME, the PATH, /usr/local/cuda, or the wheels
that pyproject.toml requires for the build. Without one the host part is built alone, and the reason is printed and kept
in the module (`_C.cuda_reason`). TORCH_CUDA_ARCH_LIST chooses the architectures.

MIMO_DEVICE_CODE names a folder of device code that is there already (.ci/wheels.py makes it); nvcc is not used then.

Without a C++ compiler, or with MIMO_EXTENSION=0, the package is pure Python: a wheel for every machine, which plans in
Python and has no CUDA kernels. With MIMO_EXTENSION=1 a missing compiler is an error.
"""

import importlib.util
import json
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
# Said of kernels, which become no code here: pragmas of nvcc, parameters of 64-byte alignment, clang on gnu_inline.
HOST_FLAGS += ["-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-gnu-inline-cpp-without-extern"]
# Nothing that differs from build to build gets into the module.
LINK_FLAGS = ["-Wl,--build-id=none", "-s"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
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


@dataclass(frozen=True)
class DeviceCode:
    """What goes into the module: STEM.TARGET.cubin or .ptx of every source, in `folder`."""

    version: str  # of CUDA; drivers of this major version and newer ones run it
    compiler: str
    targets: list[str]
    folder: Path
    toolkit: Toolkit | None = None  # that makes it first


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
            run([nvcc, "-ccbin", compiler, *NVCC_FLAGS, "-cubin", probe, "-o", scratch / "probe.cubin"])
            version = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"])).group(1)
            supported = {int(number) for number in re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))}
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", "") or str(error)
            reason = next((line for line in output.splitlines() if "error" in line.lower()), str(error))
            notes.append(f"nvcc from {origin} does not work: {reason.strip()}")
            continue
        return Toolkit(nvcc, version, supported, origin)
    return None


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

        compiler, notes = host_compiler(), []
        requested = parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
        if folder := os.environ.get("MIMO_DEVICE_CODE"):
            code = given_code(Path(folder).resolve())
        else:
            code = code_to_compile(find_toolkit(compiler, scratch, notes), requested, scratch, notes)

        write_if_changed(scratch / "build_info.h", build_info(code, "; ".join(notes)))
        what = f"CUDA for {', '.join(code.targets)} with {code.compiler}" if code else "host code only, no CUDA"
        print(f"mimo_kernels._C: {what}", *notes, sep="\n  ", flush=True)

        write_if_changed(scratch / "build.ninja", ninja_file(compiler, code, scratch, target))
        jobs = os.environ.get("MAX_JOBS")
        command = [*ninja_command(), "-C", str(scratch), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, check=False).returncode:
            raise CompileError(
                f"mimo_kernels._C did not compile; the command was: {shlex.join(command)}"
                " (with MIMO_EXTENSION=0 the package is pure Python)"
            )
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


def code_to_compile(
    toolkit: Toolkit | None, requested: list[Arch], scratch: Path, notes: list[str]
) -> DeviceCode | None:
    if toolkit is None:
        notes.append("no working nvcc in CUDA_HOME, on the PATH, in /usr/local/cuda or among the installed wheels")
        return None
    targets = [name for arch in keep_supported(requested, toolkit.supported, notes) for name in arch.targets]
    if not targets:
        notes.append("no architecture is left to compile for")
        return None
    return DeviceCode(toolkit.version, str(toolkit), targets, scratch, toolkit)


def given_code(folder: Path) -> DeviceCode:
    """Device code of .ci/wheels.py, which says in about.json what it is."""
    try:
        about = json.loads((folder / "about.json").read_text())
    except OSError as error:
        raise OptionError(f"MIMO_DEVICE_CODE={folder}: no device code there ({error})") from None
    return DeviceCode(about["version"], about["compiler"], about["targets"], folder)


def build_info(code: DeviceCode | None, notes: str) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    return (
        "// Written by setup.py.\n"
        f"#define MIMO_CUDA_ARCHS {quoted(' '.join(code.targets if code else []))}\n"
        f"#define MIMO_CUDA_REASON {quoted(notes)}\n"
        f"#define MIMO_CUDA_VERSION {quoted(code.version if code else '')}\n"
        f"#define MIMO_CUDA_COMPILER {quoted(code.compiler if code else '')}\n"
    )


def ninja_file(compiler: str, code: DeviceCode | None, scratch: Path, target: Path) -> str:
    import pybind11

    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def rule(name: str, command: list, depends: bool = True) -> list[str]:
        variables = {"$in", "$out", "$out.d", "-arch=$target"}  # ninja's; it quotes them itself
        words = (str(part) for part in command)
        text = " ".join(word if word in variables else shlex.quote(word).replace("$", "$$") for word in words)
        return [f"rule {name}", f"  command = {text}", *(["  depfile = $out.d", "  deps = gcc"] if depends else [])]

    csrc, tracked = ROOT / "csrc", ["-MMD", "-MF", "$out.d"]
    sources = sorted([*csrc.glob("*.cpp"), *(csrc.glob("*.cu") if code else ())])
    folders = (scratch, csrc, pybind11.get_include(), python_headers())
    includes = [f"-I{folder}" for folder in folders] + [f"-ffile-prefix-map={folder}=." for folder in (ROOT, *folders)]
    flags = [*HOST_FLAGS, *(["-DMIMO_WITH_CUDA"] if code else []), *includes]
    link = [compiler, "-shared", "-Wl,--exclude-libs,ALL", *LINK_FLAGS]
    lines = [
        *rule("host", [compiler, *flags, *tracked, "-x", "c++", "-c", "$in", "-o", "$out"]),
        *rule("link", [*link, "$in", *(["-ldl"] if code else []), "-o", "$out"], depends=False),
    ]
    objects = [escape(f"{source.name}.o") for source in sources]
    lines += [f"build {name}: host {escape(source)}" for source, name in zip(sources, objects)]
    if code:
        images = []
        if code.toolkit:
            nvcc = [code.toolkit.nvcc, "-ccbin", compiler]
            lines += rule(
                "ptx", [*nvcc, *NVCC_FLAGS, "-DMIMO_WITH_CUDA", "-arch=$target", *tracked, "-ptx", "$in", "-o", "$out"]
            )
            lines += rule("cubin", [*nvcc, "-O3", "-arch=$target", "-cubin", "$in", "-o", "$out"], depends=False)
        for source in (source for source in sources if source.suffix == ".cu"):
            built = set()
            for name in code.targets:
                suffix = "cubin" if name.startswith("sm_") else "ptx"
                image, ptx = f"{source.stem}.{name}.{suffix}", f"{source.stem}.{name.replace('sm_', 'compute_')}.ptx"
                images.append(escape(image if code.toolkit else code.folder / image))
                if code.toolkit and ptx not in built:
                    lines += [f"build {ptx}: ptx {escape(source)}", f"  target = {name.replace('sm_', 'compute_')}"]
                    built.add(ptx)
                if code.toolkit and image != ptx:
                    lines += [f"build {image}: cubin {ptx}", f"  target = {name}"]
        embed = [sys.executable, csrc / "embed.py", "$out", code.folder, " ".join(code.targets), "$in"]
        lines += [*rule("embed", embed, depends=False)]
        needed = " ".join([*images, escape(csrc / "embed.py")])
        lines += [f"build kernels.cpp: embed {' '.join(objects)} | {needed}", "build kernels.o: host kernels.cpp"]
        objects.append("kernels.o")
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
