"""Wheels for every CPython that is found, with device code that drivers of CUDA 12 and 13 run; one command:

    python .ci/wheels.py [--out wheels] [--python python3.12 ...] [--twice]

And one of pure Python for every other machine. Nothing but g++, the Pythons with their headers and a package index is
needed: NVRTC comes as a wheel, and is not asked for when a wheel of ours is installed. Device code is compiled once for
all of them, the module per Python, and auditwheel says which manylinux it is. Wheels of equal sources are equal bytes;
--twice builds each a second time, in another folder, and fails where they are not. docs/decisions/wheels.md says why it
is made this way.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = [f"3.{minor}" for minor in range(10, 15)]
NVRTC = ["nvidia-cuda-nvrtc-cu12==12.9.*", "nvidia-cuda-runtime-cu12==12.9.*"]  # 12.8 spills a kernel for sm_100
BUILD = ["setuptools>=77", "wheel>=0.45", "pybind11>=2.13", "ninja"]
AUDIT = ["auditwheel>=6"]


def run(command: list, **options) -> str:
    """Its output; what it wrote to stderr only when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, text=True, capture_output=True, check=False, **options)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def find_pythons() -> list[str]:
    """One of every version: on the PATH, of pyenv, of uv."""
    folders = [*Path.home().glob(".pyenv/versions/*/bin"), *Path.home().glob(".local/share/uv/python/cpython-*/bin")]
    path = os.pathsep.join([os.environ["PATH"], *map(str, sorted(folders, reverse=True))])
    found = []
    for version in VERSIONS:
        for folder in path.split(os.pathsep):
            python = Path(folder, f"python{version}")
            if python.is_file() and has_headers(python):
                found.append(str(python))
                break
        else:
            print(f"no CPython {version} with its headers here: no wheel for it", flush=True)
    return found


def has_headers(python: Path) -> bool:
    code = "import sysconfig, os, sys; sys.exit(not os.path.isfile(sysconfig.get_path('include') + '/Python.h'))"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def environment(python: str, folder: Path, requirements: list[str]) -> str:
    """A virtual environment's Python; an environment that is there is taken as it is."""
    if not (folder / "bin" / "python").exists():
        run([python, "-m", "venv", folder])
        run([folder / "bin" / "python", "-m", "pip", "install", "-q", *requirements])
    return str(folder / "bin" / "python")


def device_code(scratch: Path) -> Path:
    """The folder with it, named after what goes in, so that it is compiled once."""
    state = hashlib.sha256(repr(NVRTC).encode() + Path(__file__).with_name("nvrtc.py").read_bytes())
    for path in sorted((ROOT / "csrc").glob("*")):
        if path.suffix in (".cu", ".cuh", ".h"):
            state.update(path.name.encode() + path.read_bytes())
    folder = scratch / f"device-{state.hexdigest()[:16]}"
    if not (folder / "about.json").exists():
        tools = scratch / "nvrtc"
        if not tools.exists():
            run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch / "download", *NVRTC])
            for wheel in (scratch / "download").glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(scratch / "unpacking")
            (scratch / "unpacking").rename(tools)
        folder.mkdir(parents=True, exist_ok=True)
        print("device code, for all wheels", flush=True)
        run([sys.executable, ROOT / ".ci" / "nvrtc.py", tools, folder])
    return folder


def export_sources(folder: Path) -> None:
    """What git knows of, as it lies here."""
    for name in run(["git", "ls-files", "-z"], cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def epoch() -> str:
    """SOURCE_DATE_EPOCH, or the time of the last commit."""
    return os.environ.get("SOURCE_DATE_EPOCH") or run(["git", "log", "-1", "--format=%ct"], cwd=ROOT).strip()


def build(python: str, code: Path | None, exported: Path, when: str, out: Path) -> Path:
    """The wheel, of a fresh copy of the exported sources; without code one of pure Python."""
    with tempfile.TemporaryDirectory(prefix="mimo-wheel-") as scratch:
        sources, raw = Path(scratch, "sources"), Path(scratch, "raw")
        shutil.copytree(exported, sources)
        settings = {"SOURCE_DATE_EPOCH": when, "PYTHONHASHSEED": "0", "MIMO_EXTENSION": "1" if code else "0"}
        if code:
            settings["MIMO_DEVICE_CODE"] = str(code)
        command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", raw, sources]
        run(command, env=os.environ | settings)
        (wheel,) = raw.iterdir()
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


def tagged(wheel: Path, tools: str) -> Path:
    """The same with the oldest manylinux that it keeps to, which auditwheel knows."""
    report = run([tools, "-m", "auditwheel", "show", wheel])
    match = re.search(r'platform tag:\s*"(manylinux_\w+)"', report)
    if match is None:
        sys.exit(f"{wheel.name} is no manylinux wheel:\n{report}")
    name = run([tools, "-m", "wheel", "tags", "--remove", "--platform-tag", match[1], wheel]).split()[-1]
    return wheel.with_name(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("wheels"), help="folder for the wheels")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "wheels", help="what is kept between runs")
    parser.add_argument("--python", nargs="+", help="interpreters; default: every CPython from 3.10 to 3.14 found here")
    parser.add_argument("--twice", action="store_true", help="build each wheel twice and compare the bytes")
    options = parser.parse_args()
    os.umask(0o022)  # modes of files are kept in a wheel
    scratch = options.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    code = device_code(scratch)
    tools = environment(sys.executable, scratch / "tools", [*AUDIT, *BUILD])

    exported, when = scratch / "sources", epoch()  # once: all wheels are of the same ones
    shutil.rmtree(exported, ignore_errors=True)
    export_sources(exported)

    def make(python: str, code: Path | None, out: Path) -> Path:
        wheel = build(python, code, exported, when, out)
        return tagged(wheel, tools) if code else wheel

    interpreters = options.python or find_pythons()
    for interpreter, contents in [(tools, None), *((interpreter, code) for interpreter in interpreters)]:
        version = run([interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
        python = environment(interpreter, scratch / f"python{version}", BUILD)
        wheel, same = make(python, contents, options.out), ""
        if options.twice:
            with tempfile.TemporaryDirectory(prefix="mimo-again-") as folder:
                if make(python, contents, Path(folder)).read_bytes() != wheel.read_bytes():
                    sys.exit(f"{wheel}: built a second time the bytes differ")
                same = ", the same bytes twice"
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB{same}", flush=True)


if __name__ == "__main__":
    main()
