"""Device code by NVRTC 12, for wheels that serve drivers of CUDA 12 and 13 alike.

    python .ci/nvrtc.py TOOLS OUT

TOOLS: folder with the unpacked wheels of NVRTC and of the runtime's headers. OUT: for every source of csrc and every
target STEM.TARGET.cubin or .ptx, and about.json, as setup.py takes them (MIMO_DEVICE_CODE). No nvcc is needed.
"""

import ctypes
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# Machine code for every generation that CUDA 12 knows. A driver translates PTX of its own CUDA version or an older one:
# GPUs newer than these came with CUDA 13.
TARGETS = ["sm_80", "sm_90a", "sm_100", "compute_100", "sm_120"]
# Launchers are read as functions of the device: nobody calls them, and they say which instances of a kernel there are.
OPTIONS = ["-std=c++17", "-default-device", "-DMIMO_WITH_CUDA"]
# What the sources use of the standard library, which NVRTC has not.
HEADERS = {
    "cassert": 'extern "C" __device__ void __assert_fail(const char*, const char*, unsigned, const char*);',
    "cmath": "#define INFINITY __int_as_float(0x7f800000)",
    "cstddef": "",
    "cstdint": """
        using int8_t = signed char; using uint8_t = unsigned char; using int16_t = short;
        using uint16_t = unsigned short; using int32_t = int; using uint32_t = unsigned; using int64_t = long;
        using uint64_t = unsigned long; using uintptr_t = unsigned long;
        #define INT32_MAX 2147483647
    """,
    "limits": """
        namespace std {
        template <class T> struct numeric_limits;
        template <> struct numeric_limits<int> { static constexpr int max() { return 2147483647; } };
        }
    """,
    "type_traits": """
        namespace std {
        template <class T, T v> struct integral_constant { static constexpr T value = v; };
        template <class T, class U> inline constexpr bool is_same_v = false;
        template <class T> inline constexpr bool is_same_v<T, T> = true;
        }
    """,
}


class Nvrtc:
    """The library, whose functions raise RuntimeError."""

    def __init__(self, tools: Path):
        (path,) = (tools / "nvidia" / "cuda_nvrtc" / "lib").glob("libnvrtc.so.*")
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self._include = tools / "nvidia" / "cuda_runtime" / "include"
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name}: {self._library.nvrtcGetErrorString(status).decode()}")

    def _text(self, program: ctypes.c_void_p, name: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{name}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{name}", program, text)
        return text.raw

    def compile(self, source: Path, target: str) -> bytes:
        """Machine code or PTX, without the zero byte behind the latter."""
        options = [*OPTIONS, f"-arch={target}", f"-I{CSRC}", f"-I{self._include}", "-include=type_traits"]
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.read_bytes(),
            source.name.encode(),
            len(HEADERS),
            _strings(HEADERS.values()),
            _strings(HEADERS),
        )
        try:
            self._call("nvrtcCompileProgram", program, len(options), _strings(options))
        except RuntimeError as error:
            log = self._text(program, "ProgramLog").rstrip(b"\0").decode()
            raise RuntimeError(f"{source.name} for {target}: {error}\n{log}") from None
        ptx = target.startswith("compute_")
        contents = self._text(program, "PTX" if ptx else "CUBIN")
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        return contents.rstrip(b"\0") if ptx else contents


def _strings(texts) -> ctypes.Array:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def compile_all(tools: Path, out: Path, jobs: int | None = None) -> None:
    """Every source for every target."""
    nvrtc = Nvrtc(tools)

    def compile_one(source: Path, target: str) -> None:
        suffix = "ptx" if target.startswith("compute_") else "cubin"
        (out / f"{source.stem}.{target}.{suffix}").write_bytes(nvrtc.compile(source, target))

    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(compile_one, path, target) for path in sorted(CSRC.glob("*.cu")) for target in TARGETS]
        for run in runs:
            run.result()
    about = {"version": nvrtc.version, "compiler": f"NVRTC {nvrtc.version}", "targets": TARGETS}
    (out / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), Path(sys.argv[2]))
