"""The kernels of sampling as machine code: see paged_kernels.py."""

import functools
import json
import sys
from pathlib import Path

import pytest

from .. import processes
from .paged_kernels import CASES, MAIN, SHARED_LIMIT

COMPILER = Path(__file__).with_name("paged_kernels.py")


@functools.cache
def compiled(arch: int) -> dict[tuple, list[dict]]:
    """Every case of an architecture, and ("guided_step", arch)."""
    command, env = [sys.executable, COMPILER, arch], processes.environment("TRITON_INTERPRET")
    done = processes.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {tuple(case): made for case, made in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "sm{}-{}-d{}-page{}-n{}-splits{}-{}-{}-{}".format(*case))
def test_compiles_without_spills_and_fits(case):
    """Pages stream in while the tensor cores work: but for the gradient with more than 128 channels, which has
    registers and shared memory for one block at a time before sm_90."""
    arch, dtype = case[:2]
    kernels = compiled(arch)[case]
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["STL"] == 0
        assert kernel["shared"] <= SHARED_LIMIT[arch] * 1024
        assert kernel["registers"] <= 255
        assert kernel["ATOM"] == kernel["RED"] == 0  # deterministic
    if arch == 90 and dtype == "bf16":
        assert kernels[0]["HGMMA"] > 0 and kernels[0]["HMMA"] == 0
    if dtype == "bf16" and not (case.backward and case.head_dim > 128):
        assert kernels[0]["LDGSTS"] > 0


@pytest.mark.parametrize("arch", MAIN)
def test_guided_step_compiles(arch):
    for kernel in compiled(arch)["guided_step", arch]:
        assert kernel["stack"] == 0 and kernel["STL"] == 0 and kernel["registers"] <= 64
