"""How kernels are launched through the NVIDIA driver (csrc/driver.cpp), asked of a driver that writes down what it is
told (fake_driver/libcuda.c). Every scenario has a process of its own, because a driver is looked up once."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_kernels.core import backends

FAKE = Path(__file__).parent / "fake_driver"
GELU = "_ZN4mimo4gelu16bias_gelu_kernelINS_8bfloat_tELb0EEEvPT_PfPKS3_S7_PKvblii"
FORWARD = {"y": 4096, "x": 8192, "bias": 12288, "bias_float": True, "rows": 1000, "dim": 768, "dtype": 2, "stream": 77}
PROBE = {"out": 64, "a": 4096, "b": 8192, "head_dim": 72, "block": 64, "dtype": 2, "stream": 5}
PROBED = "_ZN4mimo4sm9017probe_sm90_kernelILNS0_4StepE1ENS_8bfloat_tELi80ELi64EEEvNS0_10TensorMapsES4_Pf"


@pytest.fixture(scope="module")
def extension():
    if not backends.cuda_archs():
        pytest.skip(backends.extension_reason())
    return backends.extension()


@pytest.fixture(scope="module")
def drivers(tmp_path_factory) -> dict[str, Path]:
    """name -> library. What loads libcuda.so.1 gets the library of that name which the process has."""
    folder, found = tmp_path_factory.mktemp("drivers"), {}
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("g++")
    for name, options in {"new": [], "old": ["-DFAKE_OLD"]}.items():
        found[name] = folder / f"{name}.so"
        source = FAKE / "libcuda.c"
        command = [compiler, "-shared", "-fPIC", "-w", *options, str(source), "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", str(found[name])], check=True)
    return found


@pytest.fixture
def ask(extension, drivers):
    def ask(*calls: tuple[str, dict, str], driver: str = "new", **environment: object) -> dict:
        program = [
            sys.executable,
            str(FAKE / "scenario.py"),
            extension.__file__,
            str(drivers[driver]) if driver else "",
        ]
        pretended = {name: str(value) for name, value in environment.items()}
        run = subprocess.run(
            [*program, json.dumps(calls)], env=os.environ | pretended, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    return ask


def test_what_a_launch_tells_the_driver(ask):
    """The first one retains the context, loads the code while streams may be captured, and finds the kernel; the next
    one launches."""
    call = ("bias_gelu_forward", FORWARD | {"device": 0}, GELU)
    result = ask(call, call, FAKE_CAPABILITIES=90)
    assert result["errors"] == ["", ""]
    log = result["log"]
    first = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent"]
    loading = ["cuThreadExchangeStreamCaptureMode", "cuLibraryLoadData", "cuLibraryGetKernel"]
    launch = ["cuLaunchKernel", "cuCtxPopCurrent"]
    names = [line[0] for line in log]
    assert names == [*first, *loading, "cuThreadExchangeStreamCaptureMode", *launch, "cuCtxPushCurrent", *launch]
    modes = [line[1] for line in log if line[0] == "cuThreadExchangeStreamCaptureMode"]
    assert modes == ["2", "0"]  # relaxed, and as before
    launches = [line[1:] for line in log if line[0] == "cuLaunchKernel"]
    name, grid, block, shared, stream, *parameters = launches[0]
    assert launches[0] == launches[1] and (name, stream, shared) == (GELU, "77", "0")
    assert (grid, block) == ("250,1,1", "96,1,1")  # 4 rows, 8 columns a thread
    expected = [struct.pack("<Q", 4096), bytes(8), bytes(8), struct.pack("<Q", 8192), struct.pack("<Q", 12288)]
    expected += [b"\1", struct.pack("<q", 1000), struct.pack("<i", 768), struct.pack("<i", 4)]
    assert [bytes.fromhex(parameter) for parameter in parameters] == expected


def test_wide_blocks_tensor_maps_and_structures(ask, extension):
    """Shared memory beyond 48 KiB is asked for; maps lie in the parameters as the driver has written them."""
    if "sm_90a" not in extension.cuda_archs:
        pytest.skip("not compiled for sm_90a")
    wide = {"head_dim": 128, "block": 128, "dtype": 1, "step": 1, "device": 0}
    result = ask(
        ("probe_sm90", PROBE | {"step": 1, "device": 0}, PROBED), ("probe_sm90", PROBE | wide, ""), FAKE_CAPABILITIES=90
    )
    assert result["errors"] == ["", ""]
    maps = [line[1:] for line in result["log"] if line[0] == "cuTensorMapEncodeTiled"]
    # uint16, rank 4, address; channels, heads, rows, clips; bytes between; box; steps; swizzle of 128 or 32 bytes, the
    # cache lines of 128 bytes.
    strides = "144,144,9216"
    wide_map = ["1", "4", "4096", "72,1,64,1", strides, "64,1,64,1", "1,1,1,1", "0", "3", "2", "0"]
    assert maps[0] == wide_map
    assert maps[1] == [*wide_map[:5], "16,1,64,1", "1,1,1,1", "0", "1", "2", "0"]
    first, second = (line for line in result["log"] if line[0] == "cuLaunchKernel")
    assert first[2:4] == ["1,1,1", "384,1,1"]
    assert [bytes.fromhex(p) for p in first[6:]] == [
        bytes([1]) * 128 + bytes([2]) * 128,
        bytes([3]) * 128 + bytes([4]) * 128,
        struct.pack("<Q", 64),
    ]
    asked = [line for line in result["log"] if line[0] == "cuKernelSetAttribute"]
    bytes_of_second = (64 + 128) * 128 * 2 + 16
    assert second[4] == str(bytes_of_second) and asked == [
        ["cuKernelSetAttribute", "8", str(bytes_of_second), second[1], "100"]
    ]


CAPABILITIES = [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]


def test_every_gpu_gets_code_that_it_runs(ask, extension):
    """Machine code of its own where there is some, else PTX, else a refusal; as `cuda_refusals` says."""
    calls = [("bias_gelu_forward", FORWARD | {"device": i}, "") for i in range(len(CAPABILITIES))]
    result = ask(*calls, FAKE_CAPABILITIES=" ".join(f"{major}{minor}" for major, minor in CAPABILITIES))
    loaded = [line[1] for line in result["log"] if line[0] in ("cuLibraryLoadData", "cuLibraryGetKernel")]
    used = iter(dict.fromkeys(loaded))
    taken = {}
    for capability, error in zip(CAPABILITIES, result["errors"]):
        runs = [arch for arch in extension.cuda_archs if backends._runs_on(capability, (arch,))]
        assert bool(error) is not bool(runs), (capability, error)
        if not runs:
            assert error.endswith(": fake error 209")
            continue
        best = max(runs, key=lambda arch: (arch.startswith("sm_"), int(arch.split("_")[1].rstrip("af"))))
        if best not in taken:
            taken[best] = result["heads"][next(used)]
        assert best in taken[best]


def test_contexts_of_several_devices(ask, extension):
    """Every device's own context is current for its launch, and the one before afterwards."""
    calls = [("bias_gelu_forward", FORWARD | {"device": device}, "") for device in (1, 0, 1)]
    result = ask(*calls, FAKE_CAPABILITIES="90 90")
    pushed = [line[1] for line in result["log"] if line[0] == "cuCtxPushCurrent"]
    popped = [line[1] for line in result["log"] if line[0] == "cuCtxPopCurrent"]
    assert result["errors"] == [""] * 3 and pushed == popped == ["1", "0", "1"]
    assert sum(line[0] == "cuLibraryLoadData" for line in result["log"]) == 1  # code belongs to no context


def test_a_buffer_is_filled_on_the_stream(ask):
    arguments = {"y": 4096, "inverse": 64, "x": 8192, "index": 32, "wide_index": False, "fill": 0, "kept": 5}
    result = ask(("scatter_rows", arguments | {"rows": 9, "row_bytes": 32, "device": 0, "stream": 3}, ""))
    assert ["cuMemsetD8Async", "64", "255", "36", "3"] in result["log"] and result["errors"] == [""]


@pytest.mark.parametrize(
    "function",
    [
        "cuInit",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent",
        "cuLibraryLoadData",
        "cuLibraryGetKernel",
        "cuLaunchKernel",
    ],
)
def test_what_the_driver_refuses_is_said(ask, function):
    result = ask(("bias_gelu_forward", FORWARD | {"device": 0}, ""), FAKE_FAILURE=f"{function} 719")
    assert result["errors"] == ["bias_gelu_forward: fake error 719"]
    modes = [line[1] for line in result["log"] if line[0] == "cuThreadExchangeStreamCaptureMode"]
    assert modes in ([], ["2", "0"])  # and streams are captured as before
    assert ("cuLaunchKernel" in [line[0] for line in result["log"]]) is (function == "cuLaunchKernel")


@pytest.mark.parametrize("version", [12000, 12080, 13000])
def test_the_version_is_the_drivers(ask, version):
    assert ask(FAKE_VERSION=version)["version"] == version


def test_an_old_driver_and_none(ask):
    call = ("bias_gelu_forward", FORWARD | {"device": 0}, "")
    old = ask(call, driver="old", FAKE_VERSION=11080)
    assert old["version"] == 11080
    assert old["errors"] == [
        "bias_gelu_forward: the NVIDIA driver has no cuLibraryLoadData; CUDA 12.0 or newer is needed"
    ]
    none = ask(call, driver="")
    if none["version"]:
        pytest.skip("there is a driver")
    assert none["errors"][0].startswith("bias_gelu_forward: no NVIDIA driver: libcuda.so.1: ")
