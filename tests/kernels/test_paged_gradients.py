"""paged_frame_attention with all of its options and its gradients, against dense attention in double precision; and the
pages, which stay until the backward has run."""

import copy
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mimo_kernels import FrameCache, FrameMask, paged_attention, paged_frame_attention
from mimo_kernels.core import page_tables
from mimo_kernels.testing import assert_within_budget, poisoned_memory

from .test_paged_attention import Clips, ragged

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="interpreted; with a GPU, tests/gpu runs them compiled"
)
BACKENDS = ("reference", "triton")


def outputs_and_gradients(run, q, k, v, dout, dlse) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv of run(q, k, v) -> (out, lse)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    results = run(*leaves)
    wanted = [(y, dy.to(y.dtype)) for y, dy in zip(results, (dout, dlse)) if y.requires_grad]
    return [*results, *torch.autograd.grad([y for y, _ in wanted], leaves, [dy for _, dy in wanted])]


def check_call(run, clips, seqs, q, k, v, layer: int, **options) -> None:
    """run(q, k, v) -> (out, lse), forward and backward, against the dense computation."""
    dout = torch.randn(q.shape, generator=clips.random).to(q.dtype)
    dlse = torch.randn(len(seqs), q.shape[2], q.shape[1], generator=clips.random)
    _, lse = clips.plain(seqs, q, k, v, layer, torch.float64, **options)
    dlse[lse == -torch.inf] = 0.0  # of a row without keys, which has no gradient
    with poisoned_memory():
        actual = outputs_and_gradients(run, q, k, v, dout, dlse)
    found = []
    for dtype in (clips.dtype, torch.float64):
        dense = partial(clips.plain, seqs, layer=layer, dtype=dtype, **options)
        found.append(outputs_and_gradients(dense, *(x.to(dtype) for x in (q, k, v)), dout, dlse))
    for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv"), actual, *found, strict=True):
        assert_within_budget(a, p, e, name=name, atol=2e-3 if name == "lse" and a.dtype != q.dtype else 1e-5)
        assert a.is_contiguous()


MASKS = {
    "causal": lambda n: FrameMask.block_causal([[n - n // 2, n // 2]]),
    "window": lambda n: FrameMask.block_causal([[1] * n], window=2, sink=1),
    "no keys": lambda n: FrameMask.from_table(torch.tensor([[0, n, *(6 * [0])]])),
}


def any_call(data, backends=BACKENDS) -> None:
    """A cache with a history, and a call with whatever options."""
    page_size = data.draw(st.integers(1, 20), label="page size")
    tokens = data.draw(st.sampled_from([1, 5, 9, 33]), label="tokens")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]), label="dtype")
    group = data.draw(st.integers(1, 3), label="heads of q per head of the cache")
    clips = Clips(data.draw(st.integers(1, 2)), data.draw(st.sampled_from([8, 24])), page_size, dtype)
    made = [clips.new(*data.draw(st.lists(st.integers(1, 20), max_size=3))) for _ in range(2)]
    made.append(clips.fork(made[0]))
    clips.append([made[-1]], 3)
    clips.evict(made[0], data.draw(st.integers(0, 3)), data.draw(st.integers(0, 1)))
    seqs = data.draw(st.lists(st.sampled_from([None, *made]), min_size=1, max_size=3), label="rows")
    q, k, v = clips.frame(seqs, tokens, group)
    options = {"scale": data.draw(st.sampled_from([None, 0.5, -0.2]))}
    kind = data.draw(st.sampled_from([None, *MASKS]), label="mask")
    mask = None if kind is None else MASKS[kind](tokens)
    bias = None
    if data.draw(st.booleans(), label="bias"):
        bias = torch.randn(len(seqs), 5, generator=clips.random)
        bias[data.draw(st.integers(0, len(seqs) - 1)), 0] = data.draw(st.sampled_from([0.0, -torch.inf]))
        bias[:, 4] = torch.nan  # of no frame
    view = clips.cache.view(seqs)
    for backend in backends:

        def run(q, k, v, backend=backend):
            more = {"self_mask": mask, "frame_bias": bias, "backend": backend, "return_lse": True, **options}
            return paged_frame_attention(q, k, v, clips.cache, layer=1, view=view, **more)

        check_call(run, clips, seqs, q, k, v, 1, bias=bias, mask=mask, **options)


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_everything_at_once(data):
    any_call(data)


@pytest.mark.parametrize(
    ("dim", "dtype", "page_size", "mask"),
    [(72, torch.float16, 16, "causal"), (40, torch.float32, 7, "window"), (8, torch.float32, 64, "no keys")],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients(backend, dim, dtype, page_size, mask):
    clips, seqs = ragged(page_size, heads=1, dim=dim, dtype=dtype)
    q, k, v = clips.frame(seqs, 9, group=2)
    mask, bias = MASKS[mask](9), torch.randn(5, 4)
    view = clips.cache.view(seqs)

    def run(q, k, v):
        more = {"self_mask": mask, "frame_bias": bias, "backend": backend, "return_lse": True}
        return paged_frame_attention(q, k, v, clips.cache, layer=0, view=view, **more)

    check_call(run, clips, seqs, q, k, v, 0, bias=bias, mask=mask)


def test_splits_of_the_gradient_and_the_same_bits_every_time():
    from mimo_kernels.attention.triton import paged, paged_backward

    clips, seqs = ragged(4, heads=2, dim=24)
    q, k, v = clips.frame(seqs, 9, group=2)
    pages = paged.Pages(*clips.cache.keys_and_values(0), clips.cache.view(seqs).tables, None, None)
    with poisoned_memory():
        out, lse = paged.forward(q, k, v, pages, 0.3)
        dout, own = torch.randn(2, *q.shape)
        once, *others = (
            paged_backward.backward_q(dout, None, q, out, lse, own, pages, 0.3, splits=splits) for splits in (3, 3, 1)
        )
    assert torch.equal(once, others[0])
    for other in others[1:]:
        torch.testing.assert_close(once, other)


class Rollout(torch.nn.Module):
    """A small transformer of attention alone; a frame sees the frames before it as constants."""

    def __init__(self, layers: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 8):
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        width = heads * dim
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, (heads + 2 * kv_heads) * dim) for _ in range(layers))
        self.proj = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))

    def forward(self, x, attend):
        for layer, (qkv, proj) in enumerate(zip(self.qkv, self.proj)):
            q, k, v = (
                qkv(F.layer_norm(x, x.shape[-1:]))
                .unflatten(-1, (-1, self.dim))
                .split([self.heads, self.kv_heads, self.kv_heads], -2)
            )
            x = x + proj(attend(layer, q, k, v).flatten(-2))
        return x

    def cached(self, x, frames: int, window: int, **options):
        """Every frame is made of the output of the one before; what leaves the window is evicted at once."""
        pages = {"num_pages": 2 * 2 * (frames + 1), "page_size": 4}
        cache = FrameCache(len(self.qkv), self.kv_heads, self.dim, **pages, dtype=x.dtype)
        seqs = [cache.new_sequence() for _ in x]
        view, made, free = cache.view(seqs, max_pages=2 * window), [], []
        for _ in range(frames):
            new = {}

            def attend(layer, q, k, v, view=view, new=new):
                new[layer] = k.detach(), v.detach()
                return paged_frame_attention(q, k, v, cache, layer=layer, view=view, **options)

            x = self(x, attend)
            made.append(x)
            cache.append(seqs, *zip(*(new[layer] for layer in range(len(self.qkv)))))
            for seq in seqs:
                cache.evict(seq, window=window)
            view.refresh()
            free.append(cache.num_free_pages)
        return torch.stack(made), cache, free

    def uncached(self, x, frames: int, window: int):
        past, made = [[] for _ in self.qkv], []
        for _ in range(frames):

            def attend(layer, q, k, v):
                seen = past[layer][-window:]
                keys, values = (torch.cat([*(p[i] for p in seen), own], 1) for i, own in ((0, k), (1, v)))
                past[layer].append((k.detach(), v.detach()))
                keys, values = (y.repeat_interleave(q.shape[2] // k.shape[2], 2) for y in (keys, values))
                scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * self.dim**-0.5
                return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)

            x = self(x, attend)
            made.append(x)
        return torch.stack(made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollout_has_the_gradients_of_the_uncached_computation(backend):
    """Four frames with a window of two: frames are evicted while the backward of those that saw them has yet to run."""
    torch.manual_seed(0)
    model, x = Rollout(layers=2 if backend == "reference" else 1), torch.randn(2, 5, 32)
    exact_model = copy.deepcopy(model).double()
    expected = exact_model.uncached(x.double(), 4, 2)
    made, cache, free = model.cached(x, 4, 2, backend=backend)
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-5)
    kept = 2 * 2 * 2  # pages of the window
    held = cache._book.held_alone()
    assert held == 2 * 2 * 2 and free[-1] == cache.num_pages - kept - held  # the first two frames: evicted, not free
    weights = torch.randn(made.shape)
    actual = torch.autograd.grad((weights * made).sum(), list(model.parameters()))
    exact = torch.autograd.grad((weights * expected).sum(), list(exact_model.parameters()))
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-4)
    assert cache.num_free_pages == cache.num_pages - kept and not cache._book.held_alone()  # `made` is still there


def test_checkpointed_activations_see_what_the_first_forward_saw():
    torch.manual_seed(0)
    model, x = Rollout(), torch.randn(2, 5, 32)
    cache = FrameCache(2, 2, 8, num_pages=12, page_size=4)
    seqs = [cache.new_sequence() for _ in x]
    history = torch.randn(2, 2, 2, 5, 2, 8).unbind()
    cache.append(seqs, *history)

    def frame(x, view):
        return model(x, lambda layer, q, k, v: paged_frame_attention(q, k, v, cache, layer=layer, view=view))

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), list(model.parameters()))

    live = cache.view(seqs)
    expected = gradients(frame(x, live))
    with pytest.raises(ValueError, match=r"^paged_frame_attention: view may show something else .*pinned=True\)$"):
        checkpoint(frame, x, live, use_reentrant=False)
    view = cache.view(seqs, pinned=True)
    out = checkpoint(frame, x, view, use_reentrant=False)
    for seq in seqs:
        cache.evict(seq, window=0)
    cache.append(seqs, *torch.randn(2, 2, 2, 9, 2, 8).unbind())  # into every page that is free
    assert cache.num_free_pages == 2 and view.check_current() is None
    assert all(map(torch.equal, gradients(out), expected))
    with pytest.raises(ValueError, match="^CacheView.refresh: the view is pinned and stays as it is"):
        view.refresh()
    del view, out
    gc.collect()
    assert cache.num_free_pages == 6


def small(tokens: int = 5, frames: int = 1):
    """A cache of one layer, its sequence of some frames of four tokens, and leaves q, k, v of new rows."""
    cache = FrameCache(1, 1, 8, num_pages=frames + 2, page_size=4)
    seq = cache.new_sequence()
    for _ in range(frames):
        cache.append([seq], *torch.randn(2, 1, 1, 4, 1, 8).unbind())
    return cache, seq, [x.requires_grad_() for x in torch.randn(3, 1, tokens, 1, 8).unbind()]


def test_pages_stay_until_nobody_can_ask_for_the_gradient():
    cache, seq, leaves = small()
    view = cache.view([seq])
    outs = [paged_frame_attention(*leaves, cache, layer=0, view=view).sum() for _ in range(2)]
    state = cache.state_dict()
    cache.free(seq)
    assert cache.num_free_pages == 2 and cache.state_dict()["pages"].shape[2] == 0
    with pytest.raises(ValueError, match=r"full: .* 2 of 3 are free .*; 1 are held by pinned views or by a backward"):
        cache.append([cache.new_sequence()], *torch.randn(2, 1, 1, 9, 1, 8).unbind())
    with pytest.raises(ValueError, match="^the cache cannot be replaced: 1 pinned views or views with a backward"):
        cache.load_state_dict(state)
    first = torch.autograd.grad(outs[0], leaves, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(outs[0], leaves), first)) and cache.num_free_pages == 2
    assert all(map(torch.equal, torch.autograd.grad(outs[1], leaves), first)) and cache.num_free_pages == 3
    cache.load_state_dict(state)
    out = paged_frame_attention(*leaves, cache, layer=0, view=cache.view([seq]))
    cache.free(seq)
    assert cache.num_free_pages == 2
    del out  # a graph that nobody runs
    assert cache.num_free_pages == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_after_everything_changed(backend):
    cache, seq, leaves = small(frames=3)
    view, pages = cache.view([seq], max_pages=5), []

    def attend():
        out = paged_frame_attention(*leaves, cache, layer=0, view=view, backend=backend)
        return out, partial(torch.autograd.grad, out, leaves, torch.ones_like(out))

    _, backward = attend()
    expected = backward()
    _, backward = attend()
    cache.evict(seq, window=1)
    while cache.num_free_pages:
        pages.append(cache.new_sequence())
        cache.append(pages[-1:], *torch.full((2, 1, 1, 4, 1, 8), float("nan")).unbind())
    view.refresh([pages[0]])
    assert all(map(torch.equal, backward(), expected))


def test_what_is_saved_does_not_grow_with_the_history():
    saved = []
    for frames in (1, 40):
        cache, seq, leaves = small(frames=frames)
        view, storages = cache.view([seq], max_pages=40), {}

        def pack(x, storages=storages, cache=cache):
            if x.untyped_storage().data_ptr() != cache.pool.untyped_storage().data_ptr():
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        view.pin()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = paged_frame_attention(*leaves, cache, layer=0, view=view)
        saved.append(sum(storages.values()))
        del out
    own, tables, mask = 4 * 5 * 8 * 4 + 5 * 4, 4 * (1 + 3 * 40), 0
    assert saved[0] == saved[1] == own + tables + mask


def test_saved_elsewhere_the_pages_stay_as_well():
    """torch.autograd.graph.save_on_cpu and its like keep copies of the tables, which own nothing."""
    cache, seq, leaves = small()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        out = paged_frame_attention(*leaves, cache, layer=0, view=cache.view([seq], pinned=True))
    cache.free(seq)
    gc.collect()
    assert cache.num_free_pages == 2
    out.sum().backward()
    del out
    assert cache.num_free_pages == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_the_gradient_follows_the_view_and_keeps_its_pages(backend):
    cache, seq, leaves = small(frames=2)
    view = cache.view([seq], max_pages=4)

    def attend(q, k, v):
        return paged_frame_attention(2 * q, k, v, cache, layer=0, view=view, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected = torch.autograd.grad(attend(*leaves).sum(), leaves)
        out = compiled(*leaves)
        cache.evict(seq, window=1)
        cache.append([seq], *torch.randn(2, 1, 1, 4, 1, 8).unbind())
        assert cache._book.held_alone() == 1
        view.refresh()
        assert all(map(torch.equal, torch.autograd.grad(out.sum(), leaves), expected))
        assert cache._book.held_alone() == 0 and cache.num_free_pages == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_of_chosen_frames(backend):
    clips = Clips(1, 8, 4)
    a, b = clips.new(5, 3, 9, 4), clips.new(7, 2)
    seqs = [a, None, b, a]
    q, k, v = clips.frame(seqs, 3)
    view = clips.cache.view(seqs, [[0, 2], None, None, []], max_pages=9)

    def attend(seqs, places, bias=None):
        out = paged_frame_attention(q, k, v, clips.cache, layer=0, view=view, backend=backend, frame_bias=bias)
        for row, (seq, seen) in enumerate(zip(seqs, places)):
            some = slice(row, row + 1)
            options = {"frames": seen, "bias": None if bias is None else bias[some]}
            clips.check(out[some], [seq], q[some], k[some], v[some], layer=0, **options)

    attend(seqs, ([0, 2], None, None, []))
    attend(seqs, ([0, 2], None, None, []), torch.randn(4, 2))  # a column per frame that is shown
    clips.append([a], 6)  # changes nothing that is seen of a
    attend(seqs, ([0, 2], None, None, []))
    view.refresh(frames=[[4], None, [1], None])
    attend(seqs, ([4], None, [1], None))
    view.refresh([a, b, None, b], [1])
    attend([a, b, None, b], ([1], [1], None, [1]))
    clips.cache.evict(a, window=2)
    with pytest.raises(ValueError, match=rf"older than the cache: sequence {a} has other frames since"):
        attend([a, b, None, b], ([1], [1], None, [1]))
    with pytest.raises(
        ValueError, match=rf"^CacheView.refresh: frame 1 of sequence {a} is not resident, only \[3, 4\]$"
    ):
        view.refresh()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [4, 16])
def test_pages_that_somebody_else_owns(backend, page_size):
    """Heads before rows, a table with what is no page behind the length, a length of 0, a bias per page."""
    torch.manual_seed(0)
    lengths, max_pages = [0, 3 * page_size, 2 * page_size + 3], 4
    pool = torch.full((2, 12, 2, page_size, 8), float("nan"))  # [.., pages, heads, rows, D]
    table = torch.full((3, max_pages), 99, dtype=torch.int32)
    clips = Clips(2, 8, page_size)
    free = iter([7, 2, 9, 4, 11, 0])
    for seq, length in enumerate(lengths):
        clips.frames[seq] = []
        for place in range(-(-length // page_size)):
            count = min(page_size, length - place * page_size)
            page = table[seq, place] = next(free)
            pool[:, page, :, :count] = torch.randn(2, 2, count, 8)
            keys, values = pool[:, page, :, :count].transpose(1, 2)
            clips.frames[seq].append((keys[None], values[None]))
    pages, bias = pool.transpose(2, 3).unbind(), torch.randn(3, max_pages)
    seqs, options = [0, 1, 2], {"mask": MASKS["causal"](5), "bias": bias}
    q, k, v = clips.frame(seqs, 5, group=2)
    lens = torch.tensor(lengths, dtype=torch.int32)

    def run(q, k, v, lens=lens, **more):
        more = {"backend": backend, "return_lse": True, **more}
        return paged_attention(q, k, v, *pages, table, lens, page_bias=bias, **more)

    check_call(partial(run, self_mask=options["mask"]), clips, seqs, q, k, v, 0, **options)
    leaf = q.clone().requires_grad_()
    out, lse = run(leaf, None, None)  # the pages hold all keys
    clips.check(out, seqs, q, k[:, :0], v[:, :0], 0, bias=bias)
    assert (lse[0] == -torch.inf).all() and not out[0].any()
    exact = q.double().requires_grad_()
    dense, _ = clips.plain(seqs, exact, k[:, :0].double(), v[:, :0].double(), 0, torch.float64, bias=bias)
    for actual, expected in zip(*(torch.autograd.grad(y.sum(), x) for y, x in ((out, leaf), (dense, exact)))):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_wrong_use_is_named():
    cache, seq, (q, k, v) = small()
    view, op = cache.view([seq]), "^paged_frame_attention: "

    def call(q=q, k=k, v=v, **options):
        return paged_frame_attention(q, k, v, cache, layer=0, view=view, **options)

    for message, options in {
        r"self_mask has 1 clips, 4 queries and 4 keys, expected one clip of 5 tokens, the new rows": {
            "self_mask": FrameMask.block_causal([[4]])
        },
        r"self_mask has 2 clips, 5 queries and 5 keys, expected one clip": {
            "self_mask": FrameMask.block_causal([[2], [3]])
        },
        r"self_mask is a list, expected a FrameMask$": {"self_mask": [5]},
        r"frame_bias has shape \[2, 1\], expected \[1, frames\]$": {"frame_bias": torch.zeros(2, 1)},
        r"frame_bias has 0 columns, expected 1 or more, a column per frame": {"frame_bias": torch.zeros(1, 0)},
        r"frame_bias is torch.float64, expected torch.float32$": {"frame_bias": torch.zeros(1, 1).double()},
        r"frame_bias requires a gradient, expected a constant": {"frame_bias": torch.zeros(1, 1).requires_grad_()},
        r"v_self has shape \[1, 5, 2, 8\], expected \[1, 5, 1, 8\]$": {"v": v.expand(1, 5, 2, 8)},
    }.items():
        with pytest.raises(ValueError, match=op + message):
            call(**options)
    for times, message in {
        (0, 0): r"frames has \[0, 0\] for a sequence, expected every time once$",
        (3,): r"frame 3 of sequence 0 is not resident, only \[0\]$",
        (1.5,): r"frames has \[1.5\] for a sequence, expected the times of frames",
        ((0,), None): r"frames has length 2, expected 1, the times of each sequence",
    }.items():
        with pytest.raises(ValueError, match="^CacheView.refresh: " + message):
            cache.view([seq], times)
    keys, values = cache.keys_and_values(0)
    table, lengths = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([4], dtype=torch.int32)

    def raw(q=q, k=k, v=v, keys=keys, values=values, table=table, lengths=lengths, **options):
        return paged_attention(q, k, v, keys, values, table, lengths, **options)

    for message, options in {
        r"v_pages has strides \[32, 8, 8, 1\], expected \[8, 24, 8, 1\] \(as k_pages\)$": {
            "keys": keys.transpose(0, 1).contiguous().transpose(0, 1)
        },
        r"lengths holds 9, expected values in \[0, 9\)$": {"lengths": lengths + 5},
        r"page_table holds 3, expected values in \[0, 3\)$": {"table": table + 3},
        r"page_table is torch.int64, expected torch.int32$": {"table": table.long()},
        r"self_mask is there without k_self and v_self, expected None$": {
            "k": None, "v": None, "self_mask": FrameMask.block_causal([[5]])
        },
        r"k_self is there alone, expected k_self and v_self, or neither of them$": {"v": None},
        r"k_pages requires a gradient, expected a constant": {"keys": keys.clone().requires_grad_()},
        r"q has shape \[1, 5, 1, 8\], expected \[S, N, heads, 16\]$": {
            "keys": torch.zeros(3, 4, 1, 16), "values": torch.zeros(3, 4, 1, 16)
        },
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match="^paged_attention: " + message):
            raw(**options)


def test_layout_of_the_tables():
    tables = page_tables.empty_tables(2, 3, torch.device("cpu"))
    for number, part in enumerate(page_tables.parts_of(tables)):
        part.fill_(number)
    assert tables.tolist() == [[0, 1, 1, 1, 2, 2, 2, 3, 3, 3]] * 2
    assert page_tables.held_copy(tables, -1).shape == (0,)
