"""What a call costs the host, on any machine: masks, plans, operator calls, and the CPU attention.

pytest benchmarks/test_host_costs.py --benchmark-save=NAME, later --benchmark-compare shows what became slower.
"""

import random

import pytest
import torch

from mimo_kernels import planner as python_planner
from mimo_kernels.attention import FrameMask, frame_attention
from mimo_kernels.attention.triton import backward as triton_bwd
from mimo_kernels.attention.triton import forward as triton_fwd
from mimo_kernels.attention.triton import schedule as triton_plan
from mimo_kernels.attention.triton.schedule import PASSES, plan_for
from mimo_kernels.core import backends, host

RANDOM = random.Random(0)

LENS = {
    "k600": ([[160] * 5] * 32, [[256] * 5] * 32),
    "ucf101": ([[40] * 16] * 32, [[64] * 16] * 32),
    "minecraft": ([[40] * 300], [[64] * 300]),
    "ragged": ([[128 + clip] * (2 + clip % 4) for clip in range(32)], [[256] * (2 + clip % 4) for clip in range(32)]),
    "ragged_16_frames": ([[RANDOM.randint(20, 44) for _ in range(16)] for _ in range(32)], [[64] * 16] * 32),
}
by_lens = pytest.mark.parametrize("lens", LENS.values(), ids=LENS)


@pytest.fixture(params=["cpp", "python"])
def planner(request, monkeypatch):
    """Both that make masks and schedules: the extension, and Python, which serves where the extension does not load."""
    module = backends.extension() if request.param == "cpp" else python_planner
    if module is None:
        pytest.skip(backends.extension_reason())
    monkeypatch.setattr(host, "_planner", module)


@pytest.mark.filterwarnings("ignore:masks are planned in Python:RuntimeWarning")
@by_lens
def test_make_and_plan(benchmark, lens, planner, sm90):
    """What a new batch costs: its mask and the schedules of all passes."""

    def make_and_plan():
        mask = FrameMask.teacher_forcing(*lens)
        device = torch.device("cpu")
        return [plan_for(name, mask.pattern, mask.repeats, device, torch.bfloat16, 12, 64) for name in PASSES]

    assert all(plan.num_tiles > 0 for plan in benchmark(make_and_plan))


@by_lens
def test_build_mask(benchmark, lens):
    mask = benchmark(FrameMask.teacher_forcing, *lens)
    assert mask.num_tokens == sum(map(sum, lens[0])) + sum(map(sum, lens[1]))


def test_build_mask_from_tensors(benchmark):
    lens = [torch.tensor(copy) for copy in LENS["ucf101"]]
    assert benchmark(FrameMask.teacher_forcing, *lens).uniform == (32, 16 * 104)


def test_build_mask_with_everything(benchmark):
    lens = LENS["ucf101"]
    drop = [[RANDOM.random() < 0.1 for _ in clip] for clip in lens[0]]
    mask = benchmark(FrameMask.teacher_forcing, *lens, drop_history=drop, window=4, sink=1)
    assert mask.uniform is None and mask.num_tokens == 32 * 16 * 104


def sparse_video() -> FrameMask:
    """Slices as users of block-sparse kernels write them: every one of 64 blocks of rows sees 12 of 64 blocks."""
    seen = [[(17 * row + 5 * i) % 64 for i in range(12)] for row in range(64)]
    q_ranges = [(128 * row, 128 * row + 128) for row in range(64) for _ in range(12)]
    k_ranges = [(128 * key, 128 * key + 128) for row in seen for key in row]
    return FrameMask.from_slices(q_ranges, k_ranges, num_queries=8192)


def test_build_mask_from_slices(benchmark):
    assert benchmark(sparse_video).num_pairs == 64 * 12 * 128**2


def test_build_mask_of_the_last_frames(benchmark):
    mask = benchmark(FrameMask.block_causal, [[1560] * 21] * 4, queries=slice(-3, None))
    assert mask.num_queries == 12 * 1560 and mask.num_keys == 84 * 1560


@pytest.fixture
def sm90(monkeypatch):
    """The tile sizes of an H100."""
    monkeypatch.setattr(triton_plan, "architecture", lambda device: 90)


@by_lens
@pytest.mark.parametrize("names", [*((name,) for name in PASSES), PASSES], ids=[*PASSES, "all"])
def test_plan(benchmark, lens, names, sm90):
    mask = FrameMask.teacher_forcing(*lens)

    def plan():
        # A table that has no plans yet: they are kept on it.
        table = mask.pattern.view(-1, 8)
        return [plan_for(name, table, mask.repeats, torch.device("cpu"), torch.bfloat16, 12, 64) for name in names]

    assert all(plan.executed_pairs >= mask.num_pairs for plan in benchmark(plan))


@pytest.mark.parametrize("name", PASSES)
def test_plan_of_slices(benchmark, name, sm90):
    mask = sparse_video()

    def plan():
        table = mask.pattern.view(mask.pattern.shape)  # that has no plans yet
        return plan_for(name, table, 1, torch.device("cpu"), torch.bfloat16, 12, 64, mask.num_keys)

    assert benchmark(plan).executed_pairs == mask.num_pairs  # blocks of the mask are whole tiles


class NoLaunch:
    """Stands where a Triton kernel does and takes its arguments: what is left is our share of a call."""

    calls = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        NoLaunch.calls += 1


@pytest.fixture
def triton_call(monkeypatch, sm90):
    """attention(mask) as frame_attention makes it on a GPU, without the launches; and its inputs."""
    for module in (triton_fwd, triton_bwd):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoLaunch())
    monkeypatch.setattr("mimo_kernels.attention.frame._serving_backend", lambda *args: "triton")
    monkeypatch.setattr(NoLaunch, "calls", 0)
    inputs = [torch.zeros(64, 2, 64, dtype=torch.bfloat16) for _ in range(3)]
    return lambda mask: frame_attention(*inputs, mask), inputs


def test_triton_call(benchmark, triton_call):
    attention, _ = triton_call
    mask = FrameMask.teacher_forcing([[8] * 4], [[8] * 4])
    benchmark(attention, mask)
    assert NoLaunch.calls > 0


def test_triton_call_with_a_fresh_mask(benchmark, triton_call):
    attention, _ = triton_call
    benchmark(lambda: attention(FrameMask.teacher_forcing([[8] * 4], [[8] * 4])))
    assert NoLaunch.calls > 0


def test_triton_call_for_training(benchmark, triton_call):
    attention, inputs = triton_call
    mask = FrameMask.teacher_forcing([[8] * 4], [[8] * 4])
    for x in inputs:
        x.requires_grad_()
    assert benchmark(attention, mask).requires_grad and NoLaunch.calls > 0


def test_triton_backward(benchmark, triton_call):
    attention, inputs = triton_call
    for x in inputs:
        x.requires_grad_()
    out = attention(FrameMask.teacher_forcing([[8] * 4], [[8] * 4]))
    benchmark(torch.autograd.grad, out, inputs, torch.zeros_like(out), retain_graph=True)
    assert NoLaunch.calls > 3


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
