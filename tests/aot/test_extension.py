"""The CUDA kernels as they are shipped in mimo_kernels._C: present for every architecture, and what they cost there."""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import triton

from mimo_kernels.core import backends

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
STACK_LIMIT = 16  # bytes per thread; more means that a kernel keeps its values in memory
SHARED_LIMIT = 48 * 1024  # bytes per block, what a launch gets without asking for more


def cuobjdump(*arguments: str) -> str:
    command = [str(CUOBJDUMP), *arguments, backends.extension().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> kernel -> resource -> amount"""
    if not backends.cuda_archs():
        pytest.skip(backends.extension_reason())
    kernels = defaultdict(dict)
    for section in cuobjdump("--dump-resource-usage").split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", section)[1]
        for name, facts in re.findall(r"Function (\w+):\s*(.+)", section):
            kernels[arch][name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", facts)}
    return kernels


def test_every_kernel_is_there_for_every_architecture(usage):
    compiled = [arch for arch in backends.cuda_archs() if arch.startswith("sm_")]
    assert sorted(usage) == sorted(compiled)
    first = set(usage[compiled[0]])
    assert first and all(set(kernels) == first for kernels in usage.values())


def test_newer_gpus_find_code_to_translate(usage):
    wanted = {arch.replace("compute_", "sm_") for arch in backends.cuda_archs() if arch.startswith("compute_")}
    assert set(re.findall(r"(sm_\w+)\.ptx", cuobjdump("--list-ptx"))) == wanted


def test_no_kernel_spills_or_needs_more_shared_memory_than_a_block_has(usage):
    costly = {
        f"{name} for {arch}: {facts}"
        for arch, kernels in usage.items()
        for name, facts in kernels.items()
        if facts["STACK"] > STACK_LIMIT or facts["LOCAL"] > 0 or facts["SHARED"] > SHARED_LIMIT
    }
    assert not costly
