"""The CUDA kernels as they are shipped in mimo_kernels._C: present for every architecture, and what they cost there."""

import importlib.util
import re
import struct
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import triton

from mimo_kernels.core import backends

CSRC = Path(__file__).parents[2] / "csrc"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
STACK_LIMIT = 16  # bytes per thread; more means that a kernel keeps its values in memory
SHARED_LIMIT = 48 * 1024  # bytes per block, what a launch gets without asking for more


@pytest.fixture(scope="module")
def embed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mimo_embed", CSRC / "embed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """target -> source -> file"""
    if not backends.cuda_archs():
        pytest.skip(backends.extension_reason())
    folder, found = tmp_path_factory.mktemp("images"), {}
    for source, target, contents in backends.extension().device_code():
        path = folder / f"{source}.{target}{'.ptx' if target.startswith('compute_') else '.cubin'}"
        path.write_bytes(contents)
        found.setdefault(target, {})[source] = path
    return found


@pytest.fixture(scope="module")
def usage(images) -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> kernel -> resource -> amount"""
    kernels = {}
    for arch in (target for target in images if target.startswith("sm_")):
        kernels[arch] = {}
        for path in images[arch].values():
            command = [str(CUOBJDUMP), "--dump-resource-usage", str(path)]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for name, facts in re.findall(r"Function (\w+):\s*(.+)", report):
                kernels[arch][name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", facts)}
    return kernels


def test_every_source_is_there_for_every_architecture(images):
    assert tuple(images) == backends.cuda_archs()
    for target, sources in images.items():
        assert set(sources) == {path.name for path in CSRC.glob("*.cu")}, target


def test_images_are_for_their_architectures(images, embed):
    """Machine code is an ELF file of NVIDIA's, PTX says what it is for, and what it is for is what _C says."""
    for target, sources in images.items():
        for path in sources.values():
            contents = path.read_bytes()
            if target.startswith("compute_"):
                assert re.search(rb"^\.target (\w+)", contents, re.M)[1].decode() == target.replace("compute_", "sm_")
                assert re.search(rb"^\.version (\d+)\.", contents, re.M)
            else:
                assert contents[18:20] == b"\xbe\x00" and embed.sections(contents)  # EM_CUDA
                # Which GPU, in e_flags: CUDA 12 writes it into the lowest byte, CUDA 13 (ABI version 8) into the next.
                flags = struct.unpack_from("<I", contents, 48)[0] >> (8 if contents[8] >= 8 else 0)
                assert f"sm_{flags & 255}" == target.rstrip("af"), path.name


def test_every_kernel_is_there_for_every_architecture(images, embed):
    kernels = {
        target: {path.name.split(".")[0]: embed.kernels_in(path) for path in sources.values()}
        for target, sources in images.items()
    }
    first = next(iter(kernels.values()))
    assert all(first.values()) and all(of_target == first for of_target in kernels.values())


def test_no_kernel_spills_or_needs_more_shared_memory_than_a_block_has(usage):
    costly = {
        f"{name} for {arch}: {facts}"
        for arch, kernels in usage.items()
        for name, facts in kernels.items()
        if facts["STACK"] > STACK_LIMIT or facts["LOCAL"] > 0 or facts["SHARED"] > SHARED_LIMIT
    }
    assert not costly
