"""The paged kernels on a GPU, in the dtypes that sampling uses, and inside a captured graph."""

import pytest
import torch

from mimo_kernels import AxialRoPE, FrameCache, FrameMask, paged_attention, paged_frame_attention, qk_norm_rope
from mimo_kernels.attention.paged import _triton_op
from mimo_kernels.ops.rope import apply_rope, qk_norm_rope_cache
from mimo_kernels.testing import assert_within_budget, poisoned_memory

DEVICE = torch.device("cuda")


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def plain(q, k, v, history, layer: int, dtype: torch.dtype) -> torch.Tensor:
    """history: per row a list of (keys, values) [layers, n, h, d]."""
    out = []
    for place, frames in enumerate(history):
        keys = torch.cat([*(f[0][layer] for f in frames), k[place]]).to(dtype)
        values = torch.cat([*(f[1][layer] for f in frames), v[place]]).to(dtype)
        scores = torch.einsum("qhd,khd->hqk", q[place].to(dtype), keys) * q.shape[-1] ** -0.5
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads, dim", [(4, 64), (16, 72), (2, 96), (4, 128), (1, 256)])
@pytest.mark.parametrize("tokens, page_size", [(256, 64), (64, 64), (16, 16), (196, 64), (1560, 1560)])
def test_equals_plain_attention(dtype, heads, dim, tokens, page_size):
    torch.manual_seed(0)
    per_frame = FrameCache.pages_for(1, tokens, page_size=page_size)
    cache = FrameCache(2, heads, dim, num_pages=8 * per_frame, page_size=page_size, dtype=dtype, device=DEVICE)
    cache.pool.fill_(float("nan"))
    a, b = cache.new_sequence(), cache.new_sequence()
    history: dict = {a: [], b: [], None: []}
    for seqs in ([a, b], [a, b], [a], [a]):
        k, v = (draw(2, len(seqs), tokens, heads, dim, dtype=dtype) for _ in range(2))
        cache.append(seqs, k, v)
        for place, seq in enumerate(seqs):
            history[seq].append((k[:, place], v[:, place]))
    cache.evict(a, window=1, sink=1)
    history[a] = [history[a][0], history[a][-1]]
    seqs = [a, None, b]
    view = cache.view(seqs, max_pages=20 * per_frame)
    q, k, v = draw(3, tokens, 3, heads, dim, dtype=dtype).unbind(2)
    rows = [history[seq] for seq in seqs]
    exact, rough = (plain(q, k, v, rows, 1, kind) for kind in (torch.float64, dtype))
    with poisoned_memory():
        out = paged_frame_attention(q, k, v, cache, layer=1, view=view)
    assert_within_budget(out, rough, exact.float())
    args = (q, k, v, *cache.keys_and_values(1), view.tables, None, None, None, dim**-0.5)
    for splits in (1, 2, 7):
        with poisoned_memory():
            once, again = (_triton_op(*args, splits=splits)[0] for _ in range(2))
        assert_within_budget(once, rough, exact.float(), name=f"{splits} splits")
        assert torch.equal(once, again)


def test_captured_graph_follows_the_cache():
    """One graph, captured on an empty cache, serves every later frame, and writes new ones."""
    torch.manual_seed(0)
    tokens, heads, dim = 64, 4, 72
    cache = FrameCache(1, heads, dim, num_pages=12, dtype=torch.bfloat16, device=DEVICE)
    seqs = [cache.new_sequence(), cache.new_sequence()]
    view = cache.view([*seqs, None], max_pages=8)
    q, k, v = (draw(3, tokens, heads, dim, dtype=torch.bfloat16) for _ in range(3))
    slot = cache.begin_frame(seqs, tokens)

    def frame() -> torch.Tensor:
        cache.write(slot, 0, k[:2], v[:2])
        return paged_frame_attention(q, k, v, cache, layer=0, view=view, backend="triton")

    frame()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = frame()
        with pytest.raises(ValueError, match="a CUDA graph would freeze"):
            paged_frame_attention(q, k, v, cache, layer=0, view=view, backend="reference")
    history = [[], [], []]
    for step in range(5):
        if step:
            slot = cache.begin_frame(seqs, tokens, reuse=slot)
        for x in (q, k, v):
            x.copy_(draw(3, tokens, heads, dim, dtype=torch.bfloat16))
        graph.replay()
        exact, rough = (plain(q, k, v, history, 0, kind) for kind in (torch.float64, torch.bfloat16))
        assert_within_budget(out, rough, exact.float())
        cache.commit(slot)
        for place in range(2):
            history[place].append((k[None, place].clone(), v[None, place].clone()))
            if step == 3:
                cache.evict(seqs[place], window=2)
                history[place] = history[place][-2:]
        view.refresh()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 72])
def test_captured_write_of_keys_and_values_into_pages(dtype, dim):
    """The fused kernel writes where the slot says at the time of the replay: what is written apart is the same, bit for
    bit."""
    torch.manual_seed(0)
    tokens, heads, layers = 64, 4, 2
    caches = [FrameCache(layers, heads, dim, num_pages=8, page_size=32, dtype=dtype, device=DEVICE) for _ in range(2)]
    for cache in caches:
        cache.append(
            [cache.new_sequence()], *(2 * [torch.zeros(layers, 1, 10, heads, dim, dtype=dtype, device=DEVICE)])
        )
        cache.new_sequence()
    qkv = draw(2 * tokens, 3, heads, dim, dtype=dtype)
    weights = [1 + draw(dim, dtype=torch.float32) / 4 for _ in range(2)]
    rope = AxialRoPE(dim)
    coords = torch.zeros(2 * tokens, 3, dtype=torch.int32, device=DEVICE)
    slot = caches[0].begin_frame([0, 1], tokens)

    def write() -> None:
        for layer in range(layers):
            qk_norm_rope_cache(qkv, *weights, coords, rope, *caches[0].place(slot, layer), backend="cuda")

    write()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write()
    caches[0].cancel(slot)
    for moment in range(2):
        qkv.copy_(draw(2 * tokens, 3, heads, dim, dtype=dtype))
        coords.fill_(moment)
        slot = caches[0].begin_frame([0, 1] if moment else [1, 0], tokens, reuse=slot)
        other = caches[1].begin_frame(slot.seqs, tokens)
        graph.replay()
        _, k, v = qk_norm_rope(qkv, *weights, coords, rope, return_v=True, backend="cuda")
        for layer in range(layers):
            caches[1].write(other, layer, *(x.unflatten(0, (2, tokens)) for x in (k, v)))
        caches[0].commit(slot)
        caches[1].commit(other)
        for cache in caches:
            cache.evict(0, window=1)
    for seq in (0, 1):
        for index in caches[1].frame_indices(seq):
            assert all(map(torch.equal, caches[0].frame(seq, index), caches[1].frame(seq, index)))


def test_nothing_waits_for_the_device():
    cache = FrameCache(1, 2, 64, num_pages=64, dtype=torch.bfloat16, device=DEVICE)
    seq = cache.new_sequence()
    view = cache.view([seq], max_pages=16)
    q, k, v = (draw(1, 64, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    paged_frame_attention(q, k, v, cache, layer=0, view=view)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            slot = cache.begin_frame([seq], 64)
            cache.write(slot, 0, k, v)
            cache.commit(slot)
            cache.evict(seq, window=3)
            view.refresh()
            paged_frame_attention(q, k, v, cache, layer=0, view=view, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_pool_beyond_the_free_memory_is_refused():
    with pytest.raises(ValueError, match=r"the cache needs .* GiB for .* pages, the budget is"):
        FrameCache(28, 16, 72, num_pages=10**7, dtype=torch.bfloat16, device=DEVICE)


def dense(q, k, v, history, bias, mask, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one layer, with grouped heads; history: per row a list of (keys, values) [n, kv_heads, d]."""
    outs, lses = [], []
    for place, frames in enumerate(history):
        group = q.shape[2] // k.shape[2]
        keys, values = (
            torch.cat([*(f[i] for f in frames), own[place]]).to(dtype).repeat_interleave(group, 1)
            for i, own in ((0, k), (1, v))
        )
        scores = torch.einsum("qhd,khd->hqk", q[place].to(dtype), keys) * q.shape[-1] ** -0.5
        length = len(keys) - k.shape[1]
        counts = torch.tensor([len(f[0]) for f in frames], device=DEVICE, dtype=torch.int64)
        added = bias[place, : len(frames)].to(dtype).repeat_interleave(counts)
        seen = torch.cat([torch.ones(q.shape[1], length, dtype=torch.bool), mask.to_dense()], 1).to(DEVICE)
        scores = torch.cat([scores[..., :length] + added, scores[..., length:]], -1).masked_fill(~seen, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kv_heads, group, dim", [(2, 1, 72), (1, 4, 128), (2, 3, 64), (1, 1, 208)])
@pytest.mark.parametrize("tokens, page_size", [(256, 64), (24, 16), (196, 196)])
def test_gradients_of_everything_at_once(dtype, kv_heads, group, dim, tokens, page_size):
    """Grouped heads, a bias per frame, a mask over the new rows, lse; twice the same bits."""
    torch.manual_seed(0)
    pages = 4 * FrameCache.pages_for(1, tokens, page_size=page_size)
    cache = FrameCache(1, kv_heads, dim, num_pages=pages, page_size=page_size, dtype=dtype, device=DEVICE)
    cache.pool.fill_(float("nan"))
    a, b = cache.new_sequence(), cache.new_sequence()
    history: list = [[], [], []]
    for seqs in ([a, b], [a]):
        k, v = draw(2, len(seqs), tokens, kv_heads, dim, dtype=dtype).unbind()
        cache.append(seqs, [k], [v])
        for place in range(len(seqs)):
            history[place].append((k[place], v[place]))
    view = cache.view([a, b, None])
    leaves = [draw(3, tokens, heads, dim, dtype=dtype) for heads in (kv_heads * group, kv_heads, kv_heads)]
    bias, mask = draw(3, 2, dtype=torch.float32), FrameMask.block_causal([[tokens // 2, tokens - tokens // 2]])
    dout, dlse = draw(*leaves[0].shape, dtype=dtype), draw(3, kv_heads * group, tokens, dtype=torch.float32)

    def gradients(run, kind):
        given = [x.to(kind).requires_grad_() for x in leaves]
        results = run(*given)
        return [*results, *torch.autograd.grad(results, given, [dout.to(results[0].dtype), dlse.to(results[1].dtype)])]

    def attend(q, k, v):
        more = {"frame_bias": bias, "self_mask": mask, "return_lse": True, "backend": "triton"}
        return paged_frame_attention(q, k, v, cache, layer=0, view=view, **more)

    with poisoned_memory():
        once, again = (gradients(attend, dtype) for _ in range(2))
    assert all(map(torch.equal, once, again))
    exact, rough = (
        gradients(lambda q, k, v, kind=kind: dense(q, k, v, history, bias, mask, kind), kind)
        for kind in (torch.float64, dtype)
    )
    for name, x, r, e in zip(("out", "lse", "dq", "dk", "dv"), once, rough, exact):
        assert_within_budget(x, r, e, name=name, atol=1e-3 if name == "lse" else 1e-5)


def test_captured_forward_and_backward_follow_the_view():
    """One graph of a call and its gradients, replayed as the cache goes on."""
    torch.manual_seed(0)
    tokens, dtype = 64, torch.bfloat16
    cache = FrameCache(1, 2, 72, num_pages=12, dtype=dtype, device=DEVICE)
    seq = cache.new_sequence()
    view = cache.view([seq], max_pages=10)
    leaves = [draw(1, tokens, heads, 72, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]
    dout, mask = draw(1, tokens, 4, 72, dtype=dtype), FrameMask.block_causal([[32, 32]])

    def step() -> list[torch.Tensor]:
        out = paged_frame_attention(*leaves, cache, layer=0, view=view, self_mask=mask, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        cache.append([seq], *draw(2, 1, 1, tokens, 2, 72, dtype=dtype).unbind())
        view.refresh()
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(draw(*leaf.shape, dtype=dtype))
        graph.replay()
        assert all(map(torch.equal, captured, step()))
    assert not cache._book.held_alone()


def test_captured_attention_to_the_pages_of_others():
    """Page table and lengths are read on the device: the graph follows what is written to them."""
    torch.manual_seed(0)
    pool = draw(2, 9, 16, 2, 64, dtype=torch.bfloat16)
    q, k, v = (draw(2, 16, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2))
    table = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(2, dtype=torch.int32, device=DEVICE)

    def attend() -> torch.Tensor:
        return paged_attention(q, k, v, *pool, table, lengths, backend="triton")

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for lens, pages in (([0, 5], [8, 1, 2, 3]), ([64, 33], [4, 0, 7, 2]), ([17, 16], [1, 2, 3, 4])):
        lengths.copy_(torch.tensor(lens, dtype=torch.int32))
        table.copy_(torch.tensor([pages, pages[::-1]], dtype=torch.int32))
        graph.replay()
        history = [
            [[x[page[: -(-n // 16)]].flatten(0, 1)[:n] for x in pool]] if n else []
            for n, page in zip(lens, table.long().cpu())
        ]
        bias, mask = torch.zeros(2, 1, device=DEVICE), FrameMask.bidirectional([[16]])
        exact, rough = (dense(q, k, v, history, bias, mask, kind)[0] for kind in (torch.float64, torch.bfloat16))
        assert_within_budget(out, rough, exact.float())


@pytest.mark.parametrize("page_size", [64, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pages_of_float8(dtype, page_size):
    """Kernels against the reference over the same bytes, forward and backward; a frame is rotated in between."""
    rope = AxialRoPE(128)
    coords = torch.zeros(100, 3, dtype=torch.int32, device="cuda")
    cache = FrameCache(1, 2, 128, num_pages=24, page_size=page_size, dtype=torch.float8_e4m3fn, device="cuda")
    seq = cache.new_sequence()
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(3):
        k, v = torch.randn(2, 1, 1, 100, 2, 128, generator=generator, device="cuda").to(dtype)
        cache.append([seq], k, v, k)
    cache.rotate([seq], 0, lambda keys: apply_rope(keys, coords + 5, rope))
    given = torch.randn(1, 70, 8, 128, generator=generator, device="cuda").to(dtype)
    results = []
    for backend in ("triton", "reference"):
        q, k, v = (x.detach().requires_grad_() for x in (given[:, :, :4], given[:, :, 4:6], given[:, :, 6:]))
        out = paged_frame_attention(q, k, v, cache, layer=0, view=cache.view([seq]), backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for actual, expected in zip(*results, strict=True):
        difference = (actual.float() - expected.float()).norm() / expected.float().norm()
        assert difference < 2e-2
