"""A FrameCache of float8: what it stores, and attention to it, against plain attention over what its bytes mean."""

import pytest
import torch
from safetensors.torch import load, save

from mimo_kernels import FrameCache, paged_frame_attention
from mimo_kernels.attention.paged import _triton_op
from mimo_kernels.attention.paged_reference import operator as reference_op
from mimo_kernels.core import page_tables
from mimo_kernels.testing import assert_within_budget, poisoned_memory

from .test_cache_rotation import turn_to
from .test_paged_attention import Clips

FLOAT8 = torch.float8_e4m3fn
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels compiled")
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])


class Float8Clips(Clips):
    """The frames are what the bytes of the cache mean; every frame has another size of numbers."""

    def __init__(self, heads: int, dim: int, page_size: int, dtype: torch.dtype = torch.float32):
        super().__init__(heads, dim, page_size, dtype)
        self.cache = FrameCache(2, heads, dim, num_pages=60, page_size=page_size, dtype=FLOAT8)
        self.cache.pool.view(torch.uint8).fill_(0x7F)  # NaN: what was never written must not be seen
        self.cache.scales.fill_(float("nan"))

    def append(self, seqs: list[int], tokens: int) -> None:
        size = 0.25 + len(self.frames[seqs[0]])
        k, v = size * self.draw(2, len(seqs), tokens), 3 * size * self.draw(2, len(seqs), tokens)
        self.cache.append(seqs, k, v)
        for seq in seqs:
            self.frames[seq].append(self.cache.frame(seq, self.cache.position(seq) - 1))


@backends
@pytest.mark.parametrize(("page_size", "dim", "dtype"), [(4, 8, torch.float32), (16, 24, torch.float16)])
def test_attention_and_its_gradient(backend, page_size, dim, dtype):
    """Blocks of keys that span pages, and pages that hold whole blocks; grouped queries, a bias, lse."""
    clips = Float8Clips(2, dim, page_size, dtype)
    seqs = [clips.new(9, 4), None, clips.new(17)]
    given = clips.frame(seqs, 5, group=2)
    bias = torch.randn(3, 2, generator=clips.random)
    for options in ({}, {"frame_bias": bias}):
        q, k, v = (x.detach().requires_grad_() for x in given)
        view = clips.cache.view(seqs)
        with poisoned_memory():
            run = paged_frame_attention
            out, lse = run(q, k, v, clips.cache, layer=1, view=view, backend=backend, return_lse=True, **options)
            incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            actual = [out, lse, *torch.autograd.grad(out, (q, k, v), incoming)]
        results = []
        for kind in (dtype, torch.float64):
            inputs = [x.detach().to(kind).requires_grad_() for x in given]
            both = clips.plain(seqs, *inputs, 1, kind, bias=options.get("frame_bias"))
            results.append([*both, *torch.autograd.grad(both[0], inputs, incoming.to(kind))])
        for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv"), actual, *results, strict=True):
            assert_within_budget(a, p, e, name=name)


@backends
def test_every_byte_is_read_as_what_it_means(backend):
    """One key per sequence, so that out is its value: all 254 finite numbers of the format, and a scale."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers % 128 != 127].view(2, 127)
    pages = torch.zeros(16, 16, 1, 16, dtype=torch.uint8)
    pages[:, 0, 0] = torch.nn.functional.pad(numbers.flatten(), (0, 2)).view(16, 16)
    tables = page_tables.empty_tables(16, 1, torch.device("cpu"))
    parts = page_tables.parts_of(tables)
    parts.num_pages.fill_(1)
    parts.rows.fill_(1)
    parts.pages.copy_(torch.arange(16)[:, None])
    scales = torch.full((2, 16, 1), 3.0)
    q, none = torch.zeros(16, 1, 1, 16), torch.zeros(16, 0, 1, 16)
    run = _triton_op if backend == "triton" else reference_op
    both = pages.view(FLOAT8), pages.view(FLOAT8)
    out, *_ = run(q, none, none, *both, tables, None, None, None, 1.0, -1, None, scales)
    assert torch.equal(out[:, 0, 0], 3 * pages[:, 0, 0].view(FLOAT8).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_stored(dtype):
    """A scale for each page, head and layer makes the largest number 448; the others err by half of their last bit."""
    cache = FrameCache(2, 3, 8, num_pages=6, page_size=4, dtype=FLOAT8)
    seq = cache.new_sequence()
    size = torch.tensor([1e-3, 1.0, 100.0])[:, None]
    k, v = (size * torch.randn(2, 2, 1, 10, 3, 8)).to(dtype)
    cache.append([seq], k, v)
    for which, (x, found) in enumerate(zip((k, v), cache.frame(seq, 0), strict=True)):
        x = torch.nn.functional.pad(x[:, 0].float(), (0, 0, 0, 0, 0, 2)).view(2, 3, 4, 3, 8)
        most = x.abs().amax((2, 4))
        torch.testing.assert_close(cache.scales[:, which, :3], most / 448)
        error = (found - x.flatten(1, 2)[:, :10]).abs()
        bound = torch.maximum(x.abs() / 16, most[:, :, None, :, None] / 448 / 1024).flatten(1, 2)[:, :10]
        assert (error <= 1.001 * bound).all() and error.any()
    one_byte = FrameCache.bytes(2, 3, 8, num_pages=6, page_size=4, dtype=FLOAT8)
    assert one_byte == cache.pool.nbytes + cache.scales.nbytes == 2 * 2 * 6 * 3 * (4 * 8 + 4)


def test_zeros_stay_and_what_is_not_finite_shows():
    cache = FrameCache(1, 2, 8, num_pages=4, page_size=4, dtype=FLOAT8)
    seq = cache.new_sequence()
    for index, bad in enumerate((0.0, float("nan"), float("inf"), 1e-44)):
        x = torch.zeros(1, 1, 4, 2, 8)
        x[..., 2, 1, 3] = bad
        cache.append([seq], x, x)
        k, v = cache.frame(seq, index)
        assert torch.equal(k[:, :, 0], torch.zeros(1, 4, 8)) and torch.equal(v[:, :, 0], torch.zeros(1, 4, 8))
        if bad == bad and abs(bad) < 1:
            assert torch.equal(k, torch.zeros_like(k))
        else:
            assert not k[:, 2, 1, 3].isfinite().any() and not v[:, 2, 1, 3].isfinite().any()


def test_rotation_forks_coarse_frames_and_saving():
    clips = Float8Clips(2, 16, 4)
    cache = clips.cache
    seq = cache.new_sequence()
    keys, values = torch.randn(2, 2, 1, 6, 2, 16)
    cache.append([seq], keys, values, keys.bfloat16())
    fork = cache.fork(seq)
    before = cache.frame(seq, 0)
    for time in (1, 2, 9, 5):
        cache.rotate([seq], 0, turn_to(time))
    turned = torch.stack([turn_to(5)(layer[0].bfloat16().float()) for layer in keys])
    direct = FrameCache(2, 2, 16, num_pages=4, page_size=4, dtype=FLOAT8)
    direct.append([direct.new_sequence()], turned[:, None], values)
    for a, b in zip(cache.frame(seq, 0), direct.frame(0, 0), strict=True):
        assert torch.equal(a, b)
    assert all(map(torch.equal, cache.frame(fork, 0), before))
    state = load(save(cache.state_dict()))
    other = FrameCache(2, 2, 16, num_pages=9, page_size=4, dtype=FLOAT8)
    other.load_state_dict(state)
    for one in (seq, fork):
        assert all(map(torch.equal, other.frame(one, 0), cache.frame(one, 0)))
    for wrong, message in (
        ({"scales": state["scales"][:1]}, r"scales has shape \[1, 2, 4, 2\], expected \[2, 2, 4, 2\]"),
        ({"scales": state["scales"].double()}, "scales is torch.float64, expected torch.float32"),
        ({"pages": state["pages"].float()}, "pages is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict({**state, **wrong})


def test_wrong_use_is_named():
    cache = FrameCache(1, 2, 8, num_pages=4, page_size=4, dtype=FLOAT8)
    seq = cache.new_sequence()
    slot = cache.begin_frame([seq], 3)
    with pytest.raises(ValueError, match="^FrameCache.place: the cache is torch.float8_e4m3fn, expected .*, or write$"):
        cache.place(slot, 0)
    x = torch.zeros(1, 3, 2, 8)
    with pytest.raises(
        ValueError, match="^FrameCache.write: k is torch.float64, expected torch.float32, torch.float16 or"
    ):
        cache.write(slot, 0, x.double(), x)
    cache.cancel(slot)
    with pytest.raises(ValueError, match="^paged_frame_attention: q is torch.float8_e4m3fn, expected torch.float32"):
        paged_frame_attention(x.to(FLOAT8), x, x, cache, layer=0, view=cache.view([seq]))
    with pytest.raises(ValueError, match="dtype is torch.float8_e5m2, expected float32, .*, or float8_e4m3fn"):
        FrameCache(1, 2, 8, num_pages=4, dtype=torch.float8_e5m2)
