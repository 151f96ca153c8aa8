"""The host part of the extension (tables of masks, planner) under AddressSanitizer and UBSan: whatever it is given, an
answer or an exception.

The sanitized module is loaded by a Python of its own, with the sanitizer's library loaded before everything else; that
process imports neither torch nor numpy and runs host_inputs.py.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from .registry import fuzzer

ROOT = Path(__file__).parents[2]
MASKS = ("frame_mask.cpp", "frame_mask_given.cpp")
PLANNERS = ("plan.cpp", "plan_rows.cpp", "plan_keys.cpp", "plan_sm90.cpp")
SOURCES = ("bindings.cpp", *MASKS, *PLANNERS)
HEADERS = ("arrays.h", "attention_sm90.h", "bindings.h", "frame_mask.h", "frame_table.h", "plan.h", "schedule.h")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
BUILD_INFO = "".join(f'#define MIMO_CUDA_{name} ""\n' for name in ("ARCHS", "REASON", "VERSION", "COMPILER"))
CASES = 1000


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def sanitizer_libraries() -> str | None:
    """What has to be loaded first, or None where the compiler has no sanitizer: its library, and the one whose
    exceptions it watches."""
    if compiler() is None:
        return None
    names = ("libasan.so", "libstdc++.so")
    ask = [[compiler(), f"-print-file-name={name}"] for name in names]
    paths = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in ask]
    return " ".join(paths) if all(map(os.path.isabs, paths)) else None


@functools.cache
def sanitized_module() -> Path:
    """The folder of the sanitized _C, built once per state of its sources."""
    import pybind11

    state = hashlib.sha256(repr((compiler(), FLAGS, sys.version)).encode())
    for name in (*SOURCES, *HEADERS):
        state.update((ROOT / "csrc" / name).read_bytes())
    folder = Path(tempfile.gettempdir()) / f"mimo-sanitized-{os.getuid()}-{state.hexdigest()[:16]}"
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return folder
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        Path(scratch, "build_info.h").write_text(BUILD_INFO)
        includes = [f"-I{x}" for x in (scratch, pybind11.get_include(), sysconfig.get_path("include"))]
        sources = [str(ROOT / "csrc" / name) for name in SOURCES]
        built = Path(scratch, target.name)
        subprocess.run([compiler(), *FLAGS, *includes, "-shared", *sources, "-o", str(built)], check=True)
        os.replace(built, target)  # whole or not there
    return folder


def run_sanitized(script: Path, *arguments: str) -> str:
    """What a script prints in a Python with the sanitized module; AssertionError with the sanitizer's report where it
    ends badly."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    environment |= {
        "LD_PRELOAD": sanitizer_libraries(),
        "PYTHONPATH": str(sanitized_module()),
        "PYTHONMALLOC": "malloc",  # every object of Python is watched too
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=66:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    done = subprocess.run(
        [sys.executable, "-S", str(script), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


if sanitizer_libraries():

    @fuzzer("host", ci_seeds=1)
    def host_part(seed: int) -> int:
        said = run_sanitized(Path(__file__).with_name("host_inputs.py"), str(seed), str(CASES))
        answered, refused = map(int, said.split())
        assert answered > CASES // 20 and refused > CASES // 20  # neither all right nor all wrong
        return answered + refused
