"""What a call costs the host, on any machine: masks, plans, operator calls, and the CPU attention.

pytest benchmarks/test_host_costs.py --benchmark-save=NAME, later --benchmark-compare shows what became slower.
"""

import pytest
import torch

from mimo_kernels.attention import FrameMask, frame_attention
from mimo_kernels.attention.triton_plan import plan_for

LENS = {
    "k600": ([[160] * 5] * 32, [[256] * 5] * 32),
    "ucf101": ([[40] * 16] * 32, [[64] * 16] * 32),
    "minecraft": ([[40] * 300], [[64] * 300]),
    "ragged": ([[128 + clip] * (2 + clip % 4) for clip in range(32)], [[256] * (2 + clip % 4) for clip in range(32)]),
}
by_lens = pytest.mark.parametrize("lens", LENS.values(), ids=LENS)


@by_lens
def test_build_mask(benchmark, lens):
    mask = benchmark(FrameMask.teacher_forcing, *lens)
    assert mask.num_tokens == sum(map(sum, lens[0])) + sum(map(sum, lens[1]))


@by_lens
@pytest.mark.parametrize("name", ["forward", "dq", "dkv"])
def test_plan(benchmark, lens, name):
    table = FrameMask.teacher_forcing(*lens)

    def plan():
        # A table that has no plans yet: they are kept on it.
        return plan_for(name, table.pattern.view(-1, 8), table.repeats, torch.device("cpu"), torch.float32, 64)

    assert benchmark(plan).executed_pairs >= table.num_pairs


def test_call_of_a_tiny_attention(benchmark):
    mask = FrameMask.block_causal([[1]])
    x = torch.zeros(1, 1, 8)
    assert torch.equal(benchmark(frame_attention, x, x, x, mask), x)


CPU_MASKS = {
    "teacher_forcing": FrameMask.teacher_forcing([[64] * 16] * 2, [[64] * 16] * 2),
    "block_causal": FrameMask.block_causal([[64] * 16] * 2),
    "ragged": FrameMask.teacher_forcing([[40] * 16, [24] * 9], [[64] * 16, [64] * 9]),
}


@pytest.fixture(params=CPU_MASKS)
def case(request):
    mask = CPU_MASKS[request.param]
    generator = torch.Generator().manual_seed(0)
    return mask, [torch.randn(mask.num_tokens, 4, 64, generator=generator, requires_grad=True) for _ in range(3)]


def test_cpu_forward(benchmark, case):
    mask, inputs = case
    with torch.no_grad():
        assert benchmark(frame_attention, *inputs, mask).isfinite().all()


def test_cpu_backward(benchmark, case):
    mask, inputs = case
    out = frame_attention(*inputs, mask)
    gradients = benchmark(torch.autograd.grad, out, inputs, torch.ones_like(out), retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
