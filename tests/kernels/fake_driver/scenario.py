"""Loads the extension module beside a driver, makes calls and prints as JSON what became of them. Without torch, which
takes seconds to load and has drivers of its own.

    python scenario.py MODULE LIBRARY CALLS

LIBRARY: made of libcuda.c, or nothing. CALLS: JSON, a list of [launcher, arguments, kernel]; the parameters of that
kernel are written down.
"""

import ctypes
import importlib.util
import json
import struct
import sys
from pathlib import Path


def main(module: str, library: str, calls: str) -> None:
    driver = ctypes.CDLL(library, ctypes.RTLD_GLOBAL) if library else None
    spec = importlib.util.spec_from_file_location("_C", module)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    if driver:
        driver.fake_log.restype = ctypes.c_char_p
    result = {"version": kernels.driver_version(), "errors": [], "heads": {}}
    for name, arguments, kernel in json.loads(calls):
        if kernel and driver:
            images = {(s, t): c for s, t, c in kernels.device_code()}
            listed = next((p for (_, t), c in images.items() if (p := parameter_sizes(c, kernel))), [])
            driver.fake_sizes(kernel.encode(), "".join(f" {size}" for size in listed).encode())
        try:
            getattr(kernels, name)(**arguments)
            result["errors"].append("")
        except RuntimeError as error:
            result["errors"].append(str(error))
    result["log"] = [line.split() for line in driver.fake_log().decode().splitlines()] if driver else []
    images = [(target, contents[:64]) for _, target, contents in kernels.device_code()]
    for line in result["log"]:
        if line[0] == "cuLibraryLoadData":
            head = ctypes.string_at(int(line[1]), 64)
            result["heads"][line[1]] = [target for target, begin in images if begin == head]
    print(json.dumps(result))


def parameter_sizes(cubin: bytes, kernel: str) -> list[int]:
    """Bytes of a kernel's parameters, as machine code tells the driver of them (EIATTR_KPARAM_INFO in .nv.info)."""
    if cubin[:4] != b"\x7fELF":
        return []
    spec = importlib.util.spec_from_file_location("embed", Path(__file__).parents[3] / "csrc" / "embed.py")
    embed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(embed)
    section = next((s for s in embed.sections(cubin) if s.name == f".nv.info.{kernel}"), None)
    if section is None:
        return []
    at, end, sizes = section.offset, section.offset + section.size, {}
    while at < end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form == 4:  # EIFMT_SVAL: so many bytes follow
            if attribute == 0x17:
                _, ordinal, _, packed = struct.unpack_from("<IHHI", cubin, at)
                sizes[ordinal] = packed >> 18
            at += size
    return [sizes[i] for i in range(len(sizes))]


if __name__ == "__main__":
    main(*sys.argv[1:])
