"""Hopper's instructions on the hardware: the first thing to run there, some seconds.

Each wrapper of csrc/sm90.cuh alone, in processes of their own, since a kernel that traps or faults leaves its process
without a GPU; then the attention kernels on one tile.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimo_kernels.attention import FrameMask, frame_attention
from mimo_kernels.attention.sm90 import device_refusals

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def hopper():
    if reasons := device_refusals(torch.device("cuda", 0)):
        pytest.skip("; ".join(reasons))


def alone(code: str) -> None:
    """A wait that does not end traps after some seconds; a kernel that hangs all the same does not hang the tests."""
    setup = "from tests.kernels import test_sm90_probe as p\n"
    setup += "from mimo_kernels.core.backends import extension as e\nk = e()\n"
    done = subprocess.run([sys.executable, "-c", setup + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_copies_are_swizzled():
    alone("for case in p.CASES: p.check_copy(k, *case, 'cuda')")


@pytest.mark.parametrize("step", ["SCORES", "SCORES_FROM_SHARED", "SUMS"])
def test_products(step):
    alone(f"for case in p.CASES: p.check_product(k, p.{step}, *case, 'cuda')")


@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
def test_attention_on_one_tile(head_dim):
    """Equal to the reference; every shape that matters, 20 bitwise runs and graphs stand in test_attention_gpu.py."""
    mask = FrameMask.teacher_forcing([[40, 24]], [[64, 64]])
    generator = torch.Generator("cuda").manual_seed(0)
    shape = mask.num_tokens, 2, head_dim
    q, k, v, dout = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(4))
    results = {}
    for backend in ("cuda", "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = frame_attention(*inputs, mask, backend=backend)
        results[backend] = [out, *torch.autograd.grad(out, inputs, dout)]
    for ours, theirs in zip(*results.values()):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=3e-2, atol=3e-2)
