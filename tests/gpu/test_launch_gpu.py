"""Launches through the driver (csrc/driver.cpp) on a GPU: what tests/kernels/test_driver.py asks of a made-up one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimo_kernels import gather_tokens
from mimo_kernels.core import backends

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
CAPTURE = """
import torch
from mimo_kernels import gather_tokens
x, index = torch.randn(64, 32, device="cuda"), torch.arange(0, 64, 2, device="cuda")
graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
with torch.cuda.graph(graph, stream=stream):
    y = gather_tokens(x, index, backend="cuda")
x.normal_()
graph.replay()
torch.cuda.synchronize()
assert torch.equal(y, x[index])
"""


@pytest.fixture(autouse=True, scope="module")
def compiled():
    if reasons := backends.cuda_refusals(torch.device("cuda", 0)):
        pytest.skip("; ".join(reasons))


def test_the_first_launch_of_a_process_may_be_captured():
    """Loading code does not break a stream's capture."""
    done = subprocess.run([sys.executable, "-c", CAPTURE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_current_device_stays():
    """Of torch, and for launches on every other one."""
    for index in range(torch.cuda.device_count()):
        x = torch.randn(16, 8, device=f"cuda:{index}")
        kept = torch.arange(15, -1, -2, device=x.device)
        assert torch.equal(gather_tokens(x, kept, backend="cuda"), x[kept])
        assert torch.cuda.current_device() == 0


def test_streams_are_torchs():
    """A launch waits for what its stream does before, and for nothing else."""
    x, stream = torch.zeros(1 << 16, 64, device="cuda"), torch.cuda.Stream()
    kept = torch.arange(1 << 16, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        x.fill_(1.0)
        y = gather_tokens(x, kept, backend="cuda")
        early = stream.query()
    stream.synchronize()
    assert not early and bool((y == 1.0).all())
