"""The planner in Python and what a machine without the extension has: the same tables and schedules as with it, byte
for byte, attention, the cache, and a word about it.

Masks and schedules themselves: test_frame_mask.py and test_plan.py, which ask both planners.
"""

import random
import warnings

import pytest
import torch

from mimo_kernels import FrameCache, gather_tokens, paged_frame_attention, scatter_tokens
from mimo_kernels.attention import FrameMask, frame_attention
from mimo_kernels.core import backends, host
from mimo_kernels.planner import schedule_layout

from .planners import comparing, without_extension
from .plans import schedule

pytestmark = pytest.mark.filterwarnings("ignore:masks are planned in Python:RuntimeWarning")


@pytest.fixture
def no_extension():
    with without_extension():
        yield


def test_the_layout_is_that_of_the_kernels():
    if backends.extension() is None:
        pytest.skip(backends.extension_reason())
    assert schedule_layout == backends.extension().schedule_layout


def long_masks() -> dict[str, FrameMask]:
    """Of the sizes of training, of tiny frames, of rows with many intervals, of nearly as many tokens as int32 has."""
    r = random.Random(0)
    lens = [[r.randint(20, 44) for _ in range(16)] for _ in range(16)]
    drop = [[r.random() < 0.1 for _ in clip] for clip in lens]
    blocks = [(17 * row + 5 * i) % 40 for row in range(40) for i in range(12)]
    return {
        "training": FrameMask.teacher_forcing(lens, [[64] * 16] * 16, drop_history=drop, window=6, sink=1),
        "wide": FrameMask.teacher_forcing([[1560] * 9] * 2, [[1560] * 9] * 2),
        "tiny frames": FrameMask.block_causal([[3] * 150, [2] * 99]),
        "last frames": FrameMask.block_causal([[160] * 21] * 3, queries=slice(-3, None)),
        "sparse": FrameMask.from_slices(
            [(70 * row, 70 * row + 70) for row in range(40) for _ in range(12)],
            [(70 * key, 70 * key + 66) for key in blocks],
            num_queries=2800,
        ),
        # Frames that never end where a tile does; as many frames, or intervals, as are searched for early ends at most.
        "one row more": FrameMask.block_causal([[129] * 70]),
        "32 groups a tile": FrameMask.block_causal([[1] * 40 + [7] * 40]),
        "8 spans a tile": FrameMask.teacher_forcing([[29] * 20 + [3] * 20], [[29] * 20 + [3] * 20]),
        "8 intervals a group": FrameMask.from_slices(
            [(90 * row, 90 * row + 90) for row in range(8) for _ in range(8)],
            [(100 * key + 11 * row, 100 * key + 95) for row in range(8) for key in range(8)],
            num_queries=800,
        ),
        "huge": FrameMask.block_causal([[2**24 + 5] * 9]),
    }


def test_schedules_of_long_masks_have_the_same_bytes():
    with comparing() as both:
        for name, mask in long_masks().items():
            sizes = (2**16, 2**15) if name == "huge" else (128, 64)
            for kind in ("rows", "keys"):
                assert schedule(kind, mask, *sizes)[2] >= mask.num_pairs
    assert both.compared == 3 * len(long_masks())  # a table and two schedules


def heads(tokens: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, 2, 16, generator=generator, requires_grad=True) for _ in range(count)]


def attention(q, k, v, seen) -> torch.Tensor:
    """softmax(q K^T / sqrt(d)) V in double precision; seen: bool [queries, keys]."""
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v.double())


def check_gradients(out: torch.Tensor, exact: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    for actual, expected in zip(
        (out, *torch.autograd.grad((out * weights).sum(), inputs)),
        (exact, *torch.autograd.grad((exact * weights).sum(), inputs)),
    ):
        assert (actual - expected).abs().max() < 1e-5


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton" and backends.triton_refusals(torch.device("cpu")):
        pytest.skip("Triton does not interpret its kernels here")
    return request.param


def test_attention_and_its_gradients(backend, no_extension):
    mask = FrameMask.teacher_forcing([[5, 20], [9]], [[16, 3], [33]])
    inputs = [torch.randn(mask.num_tokens, 2, 16, requires_grad=True) for _ in range(3)]
    out = frame_attention(*inputs, mask, backend=backend)
    check_gradients(out, attention(*inputs, mask.to_dense()), inputs)


def test_attention_to_a_cache_and_its_gradients(backend, no_extension):
    cache = FrameCache(1, 2, 16, num_pages=4, page_size=16)
    seq, (k, v) = cache.new_sequence(), torch.randn(2, 1, 1, 20, 2, 16)
    cache.append([seq], k, v)
    own = FrameMask.block_causal([[3, 6]])
    inputs = [torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3)]
    options = {"layer": 0, "view": cache.view([seq]), "self_mask": own, "backend": backend}
    out = paged_frame_attention(*inputs, cache, **options)[0]
    both = [torch.cat([old[0, 0], new[0]]) for old, new in ((k, inputs[1]), (v, inputs[2]))]
    seen = torch.cat([torch.ones(9, 20, dtype=torch.bool), own.to_dense()], 1)
    check_gradients(out, attention(inputs[0][0], *both, seen), inputs)


def test_tokens_are_dropped_and_put_back(no_extension):
    x, kept, query = torch.randn(6, 8), torch.tensor([4, 0, 5]), torch.randn(8)
    whole = scatter_tokens(gather_tokens(x, kept), kept, 6, query)
    assert torch.equal(whole[kept], x[kept]) and torch.equal(whole[[1, 2, 3]], query.expand(3, 8))


def test_cuda_kernels_are_refused_and_the_reason_told(no_extension):
    x = torch.zeros(2, 2, 16)
    with pytest.raises(ValueError, match="mimo_kernels._C does not load .hidden by a test."):
        frame_attention(x, x, x, FrameMask.bidirectional([[2]]), backend="cuda")


def test_that_python_plans_is_said_once_and_why(no_extension):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            FrameMask.bidirectional([[2]])
    (note,) = [str(warning.message) for warning in told if "planned in Python" in str(warning.message)]
    assert "hidden by a test" in note and "collect_env" in note


def test_with_the_extension_nothing_is_said():
    if backends.extension() is None:
        pytest.skip(backends.extension_reason())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert host.planner() is backends.extension()
        FrameMask.bidirectional([[2]])


def test_without_either_planner_both_reasons_are_told(no_extension, monkeypatch):
    monkeypatch.setattr(host, "_planner", None)
    monkeypatch.setattr(host, "_refusal", "mimo_kernels.planner does not load (no numpy)")
    with pytest.raises(ImportError, match="hidden by a test.*no numpy"):
        FrameMask.bidirectional([[2]])
