"""paged_frame_attention, reference and interpreted Triton kernel, against plain attention over lists of frames."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from mimo_kernels import FrameCache, paged_frame_attention
from mimo_kernels.attention.paged import _triton_op
from mimo_kernels.testing import assert_within_budget, poisoned_memory

triton_paged = pytest.importorskip("mimo_kernels.attention.triton.paged")
# Kernels are interpreted or compiled, not both in one process.
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="interpreted; with a GPU, tests/gpu runs them compiled"
)


class Clips:
    """A cache and, beside it, the frames that every sequence sees, as plain tensors."""

    def __init__(self, heads: int, dim: int, page_size: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        self.cache = FrameCache(2, heads, dim, num_pages=400, page_size=page_size, dtype=dtype)
        self.cache.pool.fill_(float("nan"))  # what was never written must not be seen
        self.shape, self.dtype = (heads, dim), dtype
        self.frames: dict[int | None, list[tuple[torch.Tensor, torch.Tensor]]] = {None: []}
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, *self.shape, generator=self.random).to(self.dtype)

    def new(self, *lens: int) -> int:
        seq = self.cache.new_sequence()
        self.frames[seq] = []
        for tokens in lens:
            self.append([seq], tokens)
        return seq

    def append(self, seqs: list[int], tokens: int) -> None:
        k, v = self.draw(2, len(seqs), tokens), self.draw(2, len(seqs), tokens)
        self.cache.append(seqs, k, v)
        for place, seq in enumerate(seqs):
            self.frames[seq].append((k[:, place], v[:, place]))

    def fork(self, seq: int) -> int:
        child = self.cache.fork(seq)
        self.frames[child] = list(self.frames[seq])
        return child

    def evict(self, seq: int, window: int, sink: int) -> None:
        frames = self.frames[seq]
        self.cache.evict(seq, window=window, sink=sink)
        self.frames[seq] = [f for i, f in enumerate(frames) if i < sink or i >= len(frames) - window]

    def frame(self, seqs: list[int | None], tokens: int, group: int = 1) -> tuple[torch.Tensor, ...]:
        """q, k, v of new rows as a network has them: slices of one projection; `group` heads of q to one of k and v."""
        heads = self.shape[0]
        drawn = torch.randn(len(seqs), tokens, (group + 2) * heads, self.shape[1], generator=self.random)
        return drawn.to(self.dtype).split([group * heads, heads, heads], 2)

    def plain(self, seqs, q, k, v, layer: int, dtype: torch.dtype, scale=None, bias=None, mask=None, frames=None):
        """softmax(scale q K^T + b) V for each sequence over the concatenation of its frames and the new rows, and the
        log-sum-exp. frames: the places of those that are seen."""
        outs, lses = [], []
        for place, seq in enumerate(seqs):
            seen = self.frames[seq] if frames is None or seq is None else [self.frames[seq][i] for i in frames]
            group = q.shape[2] // k.shape[2]
            keys, values = (
                torch.cat([*(f[i][layer] for f in seen), own[place]]).to(dtype).repeat_interleave(group, 1)
                for i, own in ((0, k), (1, v))
            )
            scores = torch.einsum("qhd,khd->hqk", q[place].to(dtype), keys) * (scale or q.shape[-1] ** -0.5)
            length = len(keys) - k.shape[1]
            if bias is not None:
                counts = torch.tensor([f[0].shape[1] for f in seen], dtype=torch.int64)
                scores[..., :length] += bias[place, : len(seen)].to(dtype).repeat_interleave(counts)
            if mask is not None:
                scores[..., length:].masked_fill_(~mask.to_dense(), -torch.inf)
            scores = scores.masked_fill(scores == -torch.inf, -torch.inf)  # no gradient goes there
            lse = scores.logsumexp(-1)
            probabilities = (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
            outs.append(torch.einsum("hqk,khd->qhd", probabilities, values))
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses)

    def check(self, out, seqs, q, k, v, layer: int, **options) -> None:
        exact, _ = self.plain(seqs, q, k, v, layer, torch.float64, **options)
        assert_within_budget(out, self.plain(seqs, q, k, v, layer, self.dtype, **options)[0], exact)


def ragged(page_size: int, heads: int = 2, dim: int = 8, dtype=torch.float32) -> tuple[Clips, list[int | None]]:
    """Five rows: a forked pair that went on differently, no history, an evicted middle, a repeat."""
    clips = Clips(heads, dim, page_size, dtype)
    a, b = clips.new(9, 9), clips.new(9, 4, 9, 9)
    c = clips.fork(a)
    clips.append([a, c], 9)
    clips.append([c], 17)
    clips.evict(b, window=1, sink=1)
    return clips, [a, c, None, b, a]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("page_size", [1, 4, 9, 64])
def test_equals_plain_attention(backend, page_size):
    clips, seqs = ragged(page_size)
    q, k, v = clips.frame(seqs, 9)
    view = clips.cache.view(seqs)
    with poisoned_memory():
        out = paged_frame_attention(q, k, v, clips.cache, layer=1, view=view, backend=backend)
    clips.check(out, seqs, q, k, v, layer=1)
    assert out.is_contiguous()


@pytest.mark.parametrize(
    "dim, dtype",
    [(8, torch.float32), (24, torch.float16), (64, torch.float32)]
    + [(72, torch.float32), (72, torch.float16), (96, torch.float16), (112, torch.float32)],
)
def test_head_dims_and_splits(dim, dtype):
    clips, seqs = ragged(16, heads=1, dim=dim, dtype=dtype)
    q, k, v = clips.frame(seqs, 9)
    view = clips.cache.view(seqs)
    args = (q, k, v, *clips.cache.keys_and_values(0), view.tables, None, None, None, dim**-0.5)
    with poisoned_memory():
        for splits in (1, 3, 16):  # 16: more splits than key blocks
            clips.check(_triton_op(*args, splits=splits)[0], seqs, q, k, v, layer=0)


def test_every_head_dim_has_a_configuration():
    for dim in range(8, 257, 8):
        for itemsize in (2, 4):
            for tokens in (1, 16, 64, 1560):
                for capability in (80, 89, 90, 100):
                    config = triton_paged.config_for(dim, itemsize, tokens, capability)
                    assert config.block_m >= 16 and config.block_n >= 16


def test_splits_fill_the_device_and_no_more():
    choose = triton_paged.choose_splits
    assert choose(tiles=500, max_keys=10**5, block_n=64, num_sms=132) == 1
    assert choose(tiles=64, max_keys=10**5, block_n=64, num_sms=132) == 2
    assert choose(tiles=4, max_keys=10**5, block_n=64, num_sms=132) == 16
    assert choose(tiles=4, max_keys=512, block_n=64, num_sms=132) == 2


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_fuzzed_histories(data):
    page_size = data.draw(st.integers(1, 40), label="page size")
    tokens = data.draw(st.sampled_from([1, 5, 16, 33]), label="tokens")
    clips = Clips(1, 8, page_size, seed=data.draw(st.integers(0, 99)))
    lens = st.lists(st.sampled_from([1, 2, 7, 16, tokens]), max_size=3)
    made = []
    for _ in range(data.draw(st.integers(1, 2))):
        made.append(clips.new(*data.draw(lens, label="frames")))
    if data.draw(st.booleans()):
        made.append(clips.fork(made[0]))
        clips.append([made[-1]], 3)
    clips.evict(made[0], data.draw(st.integers(0, 3)), data.draw(st.integers(0, 1)))
    seqs = data.draw(st.lists(st.sampled_from([None, *made]), min_size=1, max_size=3), label="rows")
    q, k, v = clips.frame(seqs, tokens)
    view = clips.cache.view(seqs, max_pages=30 * 3)
    scale = data.draw(st.sampled_from([None, 0.5]))
    for backend in ("reference", "triton"):
        with poisoned_memory():
            out = paged_frame_attention(q, k, v, clips.cache, layer=0, view=view, scale=scale, backend=backend)
        clips.check(out, seqs, q, k, v, layer=0, scale=scale)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_follows_a_refreshed_view(backend):
    """What a captured graph relies on: the same tensors, only their content changes."""
    clips = Clips(1, 8, 4)
    a = clips.new()
    view = clips.cache.view([a], max_pages=8)
    slot = None
    for tokens in (4, 4, 4):
        q, k, v = clips.frame([a], tokens)
        clips.check(paged_frame_attention(q, k, v, clips.cache, layer=1, view=view, backend=backend), [a], q, k, v, 1)
        keys, values = clips.draw(2, 1, tokens), clips.draw(2, 1, tokens)
        slot = clips.cache.begin_frame([a], tokens, reuse=slot)
        for layer in range(2):
            clips.cache.write(slot, layer, keys[layer], values[layer])
        clips.cache.commit(slot)
        clips.frames[a].append((keys[:, 0], values[:, 0]))
        view.refresh()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_view_through_everything_a_cache_does(data):
    follow_a_cache(data)


def follow_a_cache(data):
    """The reference keeps what it took out of the pages, per layer, and adds to it: it must never show what is gone."""
    clips = Clips(1, 8, data.draw(st.integers(1, 9), label="page size"))
    seqs = [clips.new(3, 4), clips.new(3), None]
    view = clips.cache.view(seqs, max_pages=400)
    head = view.first(2)
    for _ in range(data.draw(st.integers(1, 8), label="actions")):
        place = data.draw(st.integers(0, 2))
        match data.draw(st.sampled_from(["append", "evict", "fork", "free", "swap", "nothing"])):
            case "append" if seqs[place] is not None:
                clips.append([seqs[place]], data.draw(st.integers(1, 9)))
            case "evict" if seqs[place] is not None:
                clips.evict(seqs[place], data.draw(st.integers(0, 2)), data.draw(st.integers(0, 1)))
            case "fork" if seqs[place] is not None:
                seqs[data.draw(st.integers(0, 2))] = clips.fork(seqs[place])
            case "free" if seqs[place] is not None and seqs.count(seqs[place]) == 1:
                clips.cache.free(seqs[place])
                seqs[place] = clips.new(2)  # in the pages that came back
            case "swap":
                seqs.reverse()
        view.refresh(seqs)
        tokens, layer = data.draw(st.sampled_from([1, 5]), label="tokens"), data.draw(st.integers(0, 1), label="layer")
        for rows, shown in ((seqs, view), (seqs[:2], head)):
            q, k, v = clips.frame(rows, tokens)
            out = paged_frame_attention(q, k, v, clips.cache, layer=layer, view=shown, backend="reference")
            clips.check(out, rows, q, k, v, layer=layer)


def test_a_view_serves_inside_and_outside_inference_mode():
    clips, seqs = ragged(4)
    view = clips.cache.view(seqs, max_pages=40)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            q, k, v = clips.frame(seqs, 9)
            clips.check(paged_frame_attention(q, k, v, clips.cache, layer=0, view=view), seqs, q, k, v, layer=0)
            view.refresh()


def test_same_result_every_time():
    clips, seqs = ragged(4)
    q, k, v = clips.frame(seqs, 9)
    view = clips.cache.view(seqs)
    args = (q, k, v, *clips.cache.keys_and_values(0), view.tables, None, None, None, 0.3)
    assert all(map(torch.equal, _triton_op(*args, splits=5), _triton_op(*args, splits=5)))


def test_operator_is_registered_in_full():
    clips, seqs = ragged(4)
    q, k, v = clips.frame(seqs, 9)
    view = clips.cache.view(seqs)
    pages = clips.cache.pool[0].nan_to_num()
    checks = ("test_schema", "test_faketensor")
    triton = (q, k, v, *pages, view.tables, None, None, None, 0.3)
    torch.library.opcheck(_triton_op, (*triton, -1, 2), test_utils=checks)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_torch_compile_without_a_graph_break(backend):
    clips, seqs = ragged(4)
    view = clips.cache.view(seqs, max_pages=40)

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def doubled(q, k, v):
        return 2 * paged_frame_attention(q, k, v, clips.cache, layer=0, view=view, scale=0.3, backend=backend)

    for _ in range(2):
        q, k, v = clips.frame(seqs, 9)
        clips.check(doubled(q, k, v) / 2, seqs, q, k, v, layer=0, scale=0.3)
        clips.append([seqs[0]], 5)
        view.refresh()


def test_wrong_use_is_named():
    clips, seqs = ragged(4)
    q, k, v = clips.frame(seqs, 9)
    cache, view = clips.cache, clips.cache.view(seqs)

    def call(q=q, k=k, v=v, cache=cache, layer=0, **options):
        return paged_frame_attention(q, k, v, cache, layer=layer, view=view, **options)

    with pytest.raises(ValueError, match=r"attention: k_self has shape \[5, 8, 2, 8\], expected \[5, 9, 2, 8\]$"):
        call(k=k[:, :8])
    with pytest.raises(ValueError, match=r": q has shape \[9, 2, 8\], expected \[5, N, heads, 8\]$"):
        call(q=q[0])
    with pytest.raises(ValueError, match=r": q has 3 heads, expected a multiple of 2, the heads of the pages$"):
        call(q=q[:, :, [0, 1, 0]])
    with pytest.raises(ValueError, match=r": v_self is torch.float16, expected torch.float32 \(as q\)$"):
        call(v=v.half())
    with pytest.raises(ValueError, match=r": q is torch.float16, expected torch.float32 \(as the cache\)$"):
        call(q=q.half())
    with pytest.raises(ValueError, match=r": k_self is on meta, expected cpu$"):
        call(k=k.to("meta"))
    with pytest.raises(ValueError, match="the view belongs to another cache"):
        call(cache=Clips(2, 8, 4).cache)
    with pytest.raises(ValueError, match="view is a list, expected what cache.view\\(seqs\\) returns"):
        paged_frame_attention(q, k, v, cache, layer=0, view=seqs)
    with pytest.raises(ValueError, match=": layer is -1, expected a whole number in 0..1$"):
        call(layer=-1)
    with pytest.raises(ValueError, match="^paged_frame_attention: scale is nan, expected a finite number"):
        call(scale=float("nan"))
    with pytest.raises(ValueError, match="unknown backend 'cutlass'"):
        call(backend="cutlass")
    strided = torch.empty(5, 9, 8, 2).transpose(2, 3)
    with pytest.raises(ValueError, match="'triton' cannot serve: strides are not 1 for channels"):
        call(q=strided, backend="triton")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_view_older_than_its_sequences_is_refused(backend):
    clips, seqs = ragged(4)
    q, k, v = clips.frame(seqs, 9)
    view = clips.cache.view(seqs, max_pages=40)

    def attend():
        return paged_frame_attention(q, k, v, clips.cache, layer=0, view=view, backend=backend)

    clips.check(attend(), seqs, q, k, v, layer=0)
    clips.append([seqs[0]], 5)
    with pytest.raises(
        ValueError, match=f"the view is older than the cache: sequence {seqs[0]} has other frames since"
    ):
        attend()
    view.refresh()
    clips.check(attend(), seqs, q, k, v, layer=0)
    clips.cache.free(seqs[3])
    with pytest.raises(ValueError, match=f"sequence {seqs[3]} was freed since"):
        attend()


def test_compiled_code_follows_a_view_without_compiling_anew():
    clips, seqs = ragged(4)
    view = clips.cache.view(seqs, max_pages=80)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q, k, v):
        return paged_frame_attention(q, k, v, clips.cache, layer=0, view=view, backend="triton")

    for _ in range(6):
        q, k, v = clips.frame(seqs, 9)
        clips.check(attend(q, k, v), seqs, q, k, v, layer=0)
        clips.append([seqs[0]], 5)
        view.refresh()
    assert counter.frame_count <= 2
