"""FrameCache against a plain-Python model of it, its errors, and saving."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from safetensors.torch import load_file, save_file

from mimo_kernels import AxialRoPE, FrameCache, qk_norm_rope
from mimo_kernels.ops.rope import qk_norm_rope_cache

LAYERS, HEADS, DIM, PAGE = 2, 1, 8, 4


def make(num_pages: int = 8, **options) -> FrameCache:
    return FrameCache(LAYERS, HEADS, DIM, num_pages=num_pages, page_size=PAGE, **options)


def frame(value: float, tokens: int, seqs: int = 1) -> tuple[list, list]:
    """Keys and values of one frame per layer; every row of every layer is different."""
    shape = (seqs, tokens, HEADS, DIM)
    rows = value + torch.arange(seqs * tokens).view(seqs, tokens, 1, 1) / 1000
    keys = [(rows + 0.5 * layer).expand(shape) for layer in range(LAYERS)]
    return keys, [-k for k in keys]


def content(cache: FrameCache, seq: int) -> list[torch.Tensor]:
    """What a kernel reads through the device page table: per layer, keys and values of all cached tokens."""
    view = cache.view([None, seq])
    assert view.num_pages[0] == 0
    pages, used = view.page_table[1].tolist(), view.page_rows[1].tolist()
    assert len(pages) == view.num_pages[1] and sum(used) == view.lengths[1] == len(view.rows()) == cache.num_tokens(seq)
    seen = torch.cat([cache.pool[:, :, page, :rows] for page, rows in zip(pages, used)] or [cache.pool[:, :, 0, :0]], 2)
    assert torch.equal(seen, cache.pool.flatten(2, 3)[:, :, view.rows()])
    return list(seen.unbind(1))


class Machine(RuleBasedStateMachine):
    """Random sequences of operations; `frames` says what every sequence must hold, written without pages."""

    seqs = Bundle("seqs")

    def __init__(self):
        super().__init__()
        self.cache = make()
        self.frames: dict[int, list[tuple[int, torch.Tensor, torch.Tensor, object]]] = {}
        self.appended: dict[int, int] = {}
        self.slot = None
        self.count = 0

    def stored(self) -> int:
        """Pages in use: frames that sequences share are the same object and count once."""
        frames = {id(f[3]): f[1].shape[1] for frames in self.frames.values() for f in frames}
        return sum(-(-tokens // PAGE) for tokens in frames.values())

    def pages(self) -> int:
        return self.stored()

    def reserved(self) -> int:
        return 0 if self.slot is None else len(self.slot[0].seqs) * -(-self.slot[0].num_tokens // PAGE)

    def fits(self, need: int) -> bool:
        return need <= self.cache.num_pages - self.pages() - self.reserved()

    def open(self, seq: int) -> bool:
        return self.slot is not None and seq in self.slot[0].seqs

    def put(self, seqs, keys, values) -> None:
        for place, seq in enumerate(seqs):
            k, v = (torch.stack([x[place] for x in layers]) for layers in (keys, values))
            self.frames[seq].append((self.appended[seq], k, v, object()))
            self.appended[seq] += 1

    def new_values(self, tokens: int, seqs: int):
        self.count += 1
        return frame(10.0 * self.count, tokens, seqs)

    @rule(target=seqs)
    def new(self):
        seq = self.cache.new_sequence()
        assert seq not in self.appended
        self.frames[seq], self.appended[seq] = [], 0
        return seq

    @rule(chosen=st.lists(seqs, min_size=1, max_size=3, unique=True), tokens=st.integers(1, 9))
    def append(self, chosen, tokens):
        keys, values = self.new_values(tokens, len(chosen))
        if any(map(self.open, chosen)) or not self.fits(len(chosen) * -(-tokens // PAGE)):
            with pytest.raises(ValueError, match="open frame|full"):
                self.cache.append(chosen, keys, values)
            return
        self.cache.append(chosen, keys, values)
        self.put(chosen, keys, values)

    @rule(chosen=st.lists(seqs, min_size=1, max_size=2, unique=True), tokens=st.integers(1, 9))
    def begin(self, chosen, tokens):
        if self.slot is None and self.fits(len(chosen) * -(-tokens // PAGE)):
            slot = self.cache.begin_frame(chosen, tokens)
            keys, values = self.new_values(tokens, len(chosen))
            for layer in range(LAYERS):
                self.cache.write(slot, layer, keys[layer], values[layer])
            self.slot = slot, keys, values

    @rule(commit=st.booleans())
    def close(self, commit):
        if self.slot is not None:
            slot, keys, values = self.slot
            self.slot = None
            if commit:
                self.cache.commit(slot)
                self.put(slot.seqs, keys, values)
            else:
                self.cache.cancel(slot)

    @rule(target=seqs, seq=seqs)
    def fork(self, seq):
        child = self.cache.fork(seq)
        self.frames[child], self.appended[child] = list(self.frames[seq]), self.appended[seq]
        return child

    @rule(seq=seqs, window=st.integers(0, 3), sink=st.integers(0, 2))
    def evict(self, seq, window, sink):
        before = self.frames[seq]
        kept = [f for i, f in enumerate(before) if i < sink or i >= len(before) - window]
        assert self.cache.evict(seq, window=window, sink=sink) == len(before) - len(kept)
        self.frames[seq] = kept

    @rule(target=seqs, seq=consumes(seqs))
    def free(self, seq):
        if self.open(seq):
            with pytest.raises(ValueError, match="open frame"):
                self.cache.free(seq)
            return seq
        self.cache.free(seq)
        del self.frames[seq]
        with pytest.raises(ValueError, match=f"no sequence {seq} in the cache: it was freed"):
            self.cache.fork(seq)
        return multiple()

    @rule(more=st.integers(0, 4))
    def save_and_load(self, more):
        if self.slot is not None:
            with pytest.raises(ValueError, match="open frame"):
                self.cache.state_dict()
            return
        restored = make(max(1, self.stored()) + more)
        restored.load_state_dict(self.cache.state_dict())
        assert restored.num_free_pages == restored.num_pages - self.stored()
        if restored.num_pages >= self.cache.num_pages:
            self.cache = restored

    @invariant()
    def holds_what_was_written(self):
        assert self.cache.num_free_pages == self.cache.num_pages - self.pages() - self.reserved()
        for seq, frames in self.frames.items():
            assert self.cache.frame_indices(seq) == [f[0] for f in frames]
            assert self.cache.position(seq) == self.appended[seq] and self.cache.num_frames(seq) == len(frames)
            k, v = content(self.cache, seq)
            empty = torch.empty(LAYERS, 0, HEADS, DIM)
            assert torch.equal(k, torch.cat([empty, *(f[1] for f in frames)], 1))
            assert torch.equal(v, torch.cat([empty, *(f[2] for f in frames)], 1))


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_shared_pages_are_stored_once():
    cache = make(7)
    parent = cache.new_sequence()
    cache.append([parent], *frame(1, 10))
    children = [cache.fork(parent) for _ in range(4)]
    assert cache.num_free_pages == 4
    cache.append(children, *frame(2, 3, seqs=4))
    assert cache.num_free_pages == 0
    cache.free(parent)
    for place, child in enumerate(children):
        assert torch.equal(content(cache, child)[0][0, 10:], frame(2, 3, seqs=4)[0][0][place])
        assert cache.num_free_pages == place
        cache.free(child)
    assert cache.num_free_pages == 7


def test_view_keeps_its_addresses():
    cache = make()
    a, b = cache.new_sequence(), cache.new_sequence()
    view = cache.view([a, None, a], max_pages=3)
    tensors = view.page_table, view.page_rows, view.num_pages
    slot = cache.begin_frame([a, b], 6)
    rows = slot.rows
    cache.commit(slot)
    assert view.num_pages.tolist() == [0, 0, 0]  # a view follows when it is told to
    view.refresh()
    assert tensors[2].tolist() == [2, 0, 2] and tensors[1].tolist()[0][:2] == [4, 2]
    assert tensors[0][0].tolist() == tensors[0][2].tolist()
    again = cache.begin_frame([b, a], 6, reuse=slot)
    assert again.rows.data_ptr() == rows.data_ptr() and again.rows.tolist() != list(range(12))
    cache.commit(again)
    with pytest.raises(ValueError, match="sequence of 4 pages does not fit into a view of max_pages = 3"):
        view.refresh([b, b, b])
    with pytest.raises(ValueError, match="^CacheView.refresh: seqs has length 1, expected 3, one per row$"):
        view.refresh([b])


def test_full_pool_names_need_and_budget_and_harms_nobody():
    cache = make(3)
    a, b = cache.new_sequence(), cache.new_sequence()
    cache.append([a], *frame(1, 5))
    before = content(cache, a)
    with pytest.raises(ValueError, match=r"full: 2 frames of 3 tokens need 2 pages \(.* MiB\), 1 of 3 are free"):
        cache.append([a, b], *frame(2, 3, seqs=2))
    assert cache.num_free_pages == 1 and cache.num_frames(b) == 0
    assert all(torch.equal(x, y) for x, y in zip(before, content(cache, a)))
    cache.append([b], *frame(3, 4))
    assert cache.num_free_pages == 0


def test_misuse_harms_no_other_sequence():
    cache = make(6)
    a, b, freed = (cache.new_sequence() for _ in range(3))
    cache.append([a, b], *frame(1, 5, seqs=2))
    cache.append([freed], *frame(2, 5))
    cache.free(freed)
    before = [content(cache, seq) for seq in (a, b)]
    mistakes = {
        "it was freed": [
            lambda: cache.append([a, freed], *frame(3, 3, seqs=2)),
            lambda: cache.fork(freed),
            lambda: cache.free(freed),
            lambda: cache.evict(freed, window=0),
            lambda: cache.view([a, freed]),
            lambda: cache.frame(freed, 0),
            lambda: cache.compress([freed], lambda *_: None, window=0),
        ],
        "the cache is full": [
            lambda: cache.append([a, b], *frame(3, 5, seqs=2)),
            lambda: cache.append([a], *frame(3, 9)),
        ],
    }
    for message, calls in mistakes.items():
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()
            assert cache.num_free_pages == 2
            for seq, old in zip((a, b), before):
                assert all(map(torch.equal, content(cache, seq), old)) and cache.position(seq) == 1
    cache.append([a], *frame(4, 8))  # every free page is still to be had
    assert cache.num_free_pages == 0 and all(map(torch.equal, content(cache, b), before[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_place_is_where_write_writes(dtype):
    """The fused kernel against QK-norm and RoPE, then `write`: the same pages bit for bit."""
    caches = [make(10, dtype=dtype) for _ in range(2)]
    torch.manual_seed(0)
    rope, weights = AxialRoPE(DIM), [torch.randn(DIM) for _ in range(2)]
    for cache in caches:
        seqs = [cache.new_sequence() for _ in range(2)]
        cache.append(seqs[:1], *([x.to(dtype) for x in layers] for layers in frame(1, 3)))
    for t in range(2):
        slots = [cache.begin_frame(seqs, 6) for cache in caches]
        coords = torch.tensor([[t, i // 3, i % 3] for i in range(6)], dtype=torch.int32).repeat(2, 1)
        for layer in range(LAYERS):
            qkv = torch.randn(12, 3, HEADS, DIM).to(dtype)
            q, k = qk_norm_rope(qkv, *weights, coords, rope)
            caches[0].write(slots[0], layer, *(x.unflatten(0, (2, 6)) for x in (k, qkv[:, 2])))
            fused = qk_norm_rope_cache(qkv, *weights, coords, rope, *caches[1].place(slots[1], layer))
            assert torch.equal(fused[0], q) and torch.equal(fused[1], k)
        for cache, slot in zip(caches, slots):
            cache.commit(slot)
    assert torch.equal(caches[0].pool, caches[1].pool)
    with pytest.raises(ValueError, match="already committed or cancelled"):
        caches[0].place(slots[0], 0)
    with pytest.raises(ValueError, match="^FrameCache.place: layer is 2, expected a whole number in 0..1$"):
        caches[0].place(slots[0], 2)


def test_budget_is_known_before_the_run():
    sizes = {"num_pages": 10, "page_size": 64, "dtype": torch.bfloat16}
    assert FrameCache.bytes(28, 16, 72, **sizes) == 2 * 28 * 10 * 64 * 16 * 72 * 2
    assert FrameCache.bytes(np.int64(28), 16, 72, **sizes) == FrameCache.bytes(28, 16, 72, **sizes)
    assert FrameCache(2, 2, 8, **sizes).pool.nbytes == FrameCache.bytes(2, 2, 8, **sizes)
    assert FrameCache.pages_for(5, 256, sequences=3, page_size=64) == 60
    assert FrameCache.pages_for(5, 65, page_size=64) == 10
    with pytest.raises(ValueError, match=r"needs 0.04 MiB for 10 pages, the budget is 0.02 MiB"):
        FrameCache(2, 1, 8, **sizes, budget=20000)


def test_wrong_use_is_named():
    cache = make()
    a, b = cache.new_sequence(), cache.new_sequence()
    keys, values = frame(1, 3)
    with pytest.raises(ValueError, match=r"^FrameCache.write: k is torch.float16, expected torch.float32 \(as"):
        cache.append([a], [k.half() for k in keys], values)
    with pytest.raises(ValueError, match=r"^FrameCache.write: v has shape \[1, 2, 1, 8\], expected \[1, 3, 1, 8\]$"):
        cache.append([a], keys, [v[:, :2] for v in values])
    with pytest.raises(ValueError, match=r"^FrameCache.write: v is on meta, expected cpu$"):
        cache.append([a], keys, [v.to("meta") for v in values])
    with pytest.raises(ValueError, match="^FrameCache.append: k_layers has 1 layers, expected 2$"):
        cache.append([a], keys[:1], values)
    assert cache.num_free_pages == 8
    cache.append([a], keys, values)  # the failed ones left no open frame behind
    with pytest.raises(ValueError, match="^FrameCache.begin_frame: num_tokens is 0, expected a whole number"):
        cache.begin_frame([a], 0)
    with pytest.raises(ValueError, match="^FrameCache.begin_frame: the number of seqs is 0, expected a whole number"):
        cache.begin_frame([], 3)
    with pytest.raises(ValueError, match=r"^FrameCache.begin_frame: seqs is \[0, 0\], expected every sequence once"):
        cache.begin_frame([a, a], 3)
    with pytest.raises(ValueError, match="no sequence 7 in the cache: it was never made"):
        cache.view([a, 7])
    with pytest.raises(ValueError, match="^FrameCache.evict: window is -1, expected a whole number of at least 0$"):
        cache.evict(a, window=-1)
    with pytest.raises(ValueError, match=r"frame 4 of sequence 0 is not resident, only \[0\]"):
        cache.frame(a, 4)
    slot = cache.begin_frame([b], 3)
    with pytest.raises(ValueError, match="^FrameCache.write: layer is 2, expected a whole number in 0..1$"):
        cache.write(slot, 2, keys[0], values[0])
    with pytest.raises(ValueError, match="cannot reuse a slot of 1 x 3 tokens, open: True"):
        cache.begin_frame([a], 3, reuse=slot)
    cache.commit(slot)
    for late in (cache.commit, cache.cancel, lambda s: cache.write(s, 0, keys[0], values[0])):
        with pytest.raises(ValueError, match="already committed or cancelled"):
            late(slot)
    for name in ("num_pages", "page_size"):
        with pytest.raises(ValueError, match=f"^FrameCache: {name} is 0, expected a whole number of at least 1$"):
            FrameCache(1, 1, 8, **{"num_pages": 1, "page_size": 1, name: 0})
    with pytest.raises(ValueError, match="^FrameCache: dtype is torch.int8, expected float32, .*, or float8_e4m3fn$"):
        make(dtype=torch.int8)


def test_a_closed_slot_is_reused_once_and_only_by_its_own_cache():
    cache, other = make(), make()
    a, b, c = (cache.new_sequence() for _ in range(3))
    seq = other.new_sequence()
    first = cache.begin_frame([a], 3)
    cache.commit(first)
    second = cache.begin_frame([b], 3, reuse=first)
    rows = second.rows.tolist()
    with pytest.raises(ValueError, match="cannot reuse a slot of 1 x 3 tokens, open: False, reused before: True"):
        cache.begin_frame([c], 3, reuse=first)
    assert second.rows.tolist() == rows and cache.num_free_pages == 6
    cache.cancel(second)
    foreign = other.begin_frame([seq], 3)
    keys, values = frame(1, 3)
    for use in (cache.commit, cache.cancel, lambda slot: cache.write(slot, 0, keys[0], values[0])):
        with pytest.raises(ValueError, match=r"the slot of sequences \[0\] belongs to another cache"):
            use(foreign)
    other.cancel(foreign)
    with pytest.raises(ValueError, match="belongs to another cache"):
        cache.begin_frame([c], 3, reuse=foreign)
    assert cache.num_frames(a) == 1 and cache.num_free_pages == 7 and other.num_free_pages == 8


def test_pages_take_constants_only():
    cache = make()
    a = cache.new_sequence()
    keys, values = frame(1, 6)
    wanted = [k.clone().requires_grad_() for k in keys]
    with pytest.raises(ValueError, match=r": k requires a gradient, which pages do not keep, expected k.detach\(\)"):
        cache.append([a], wanted, values)
    assert cache.num_frames(a) == 0 and cache.num_free_pages == 8
    with torch.no_grad():
        cache.append([a], wanted, values)

    def coarse(seq, index):
        return tuple(x[:, :2].clone().requires_grad_() for x in cache.frame(seq, index))

    with pytest.raises(ValueError, match="coarse k requires a gradient"):
        cache.compress([a], coarse, window=0)
    assert cache.num_tokens(a) == 6 and cache.num_free_pages == 6 and not cache.pool.requires_grad


def test_a_compression_that_fails_leaks_nothing():
    cache = make()
    a = cache.new_sequence()
    for value in range(2):
        cache.append([a], *frame(value, 6))
    before, free = content(cache, a), cache.num_free_pages

    def wrong(make_wrong):
        def coarse(seq, index):
            return make_wrong(*(x[:, :2] for x in cache.frame(seq, index)))

        return coarse

    for message, broken in {
        "^FrameCache.compress: coarse k and v have shapes": wrong(lambda k, v: (k, v[:, :1])),
        "no number": wrong(lambda k, v: (_ for _ in ()).throw(RuntimeError("no number"))),
        "was changed by the function": wrong(lambda k, v: cache.new_sequence() and (k, v)),
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            cache.compress([a], broken, window=0)
    with pytest.raises(Exception):  # noqa: B017  # torch cannot copy what has no numbers
        cache.compress([a], wrong(lambda k, v: (k.to("meta"), v.to("meta"))), window=0)
    for window, sink in ((-1, 0), (0, -1), (1.5, 0)):
        with pytest.raises(ValueError, match="^FrameCache.compress: (window|sink) is .*, expected a whole number"):
            cache.compress([a], wrong(lambda k, v: (k, v)), window=window, sink=sink)
    assert cache.num_free_pages == free and all(map(torch.equal, content(cache, a), before))
    for _ in range(free):  # every free page is still to be had
        cache.append([cache.new_sequence()], *frame(7, 4))


def saved() -> dict[str, torch.Tensor]:
    """Sequence 0 of frames 0 (two pages), 1; sequence 1 forked after frame 0; sequence 3 empty, 2 freed."""
    cache = make()
    a = cache.new_sequence()
    cache.append([a], *frame(1, 6))
    cache.fork(a)
    cache.append([a], *frame(2, 4))
    cache.free(cache.new_sequence())
    cache.new_sequence()
    return cache.state_dict()


def other(state, key, *place, value):
    changed = state[key].clone()
    changed[place] = value
    return {**state, key: changed}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((lambda s, key=key: {k: v for k, v in s.items() if k != key}, key) for key in
          ("pages", "sequences", "frames", "frame_pages", "next_id")),
        (lambda s: {**s, "pages": s["pages"][0]}, r"pages has shape .*, expected \[2, 2, pages, 4, 1, 8\]$"),
        (lambda s: {**s, "frames": s["frames"].float()}, r"frames is torch.float32 \[3, 4\], expected int64 \[n, 4\]"),
        (lambda s: {**s, "next_id": torch.zeros(2, dtype=torch.int64)}, r"next_id has shape \[2\], expected \[1\]$"),
        (lambda s: other(s, "next_id", 0, value=0), "sequence 0 with 2 frames appended is there twice or is none of"),
        (lambda s: other(s, "next_id", 0, value=-1), "next_id is -1"),
        (lambda s: other(s, "sequences", 1, 0, value=0), "is there twice"),
        (lambda s: other(s, "sequences", 1, 1, value=-1), "is there twice or is none"),
        (lambda s: other(s, "sequences", 0, 1, value=1), "expected times that ascend below 1"),
        (lambda s: other(s, "frames", 0, 0, value=2), "there is no such sequence"),
        (lambda s: other(s, "frames", 0, 1, value=1), "expected times that ascend"),
        (lambda s: other(s, "frames", 0, 2, value=0), "expected 1 to 12 tokens"),
        (lambda s: other(s, "frames", 0, 2, value=2**62), "expected 1 to 12 tokens"),
        (lambda s: other(s, "frames", 0, 3, value=2), "coarse 0 or 1"),
        (lambda s: other(s, "frames", 2, 2, value=4), "its pages|pages belong to frames"),
        (lambda s: other(s, "frame_pages", 0, value=9), "are not 2 of the 3 saved ones"),
        (lambda s: other(s, "frame_pages", 0, value=-1), "are not 2 of the 3 saved ones"),
        (lambda s: other(s, "frame_pages", 1, value=0), "are not 2 of the 3 saved ones"),
        (lambda s: other(s, "frame_pages", 2, value=0), "belong to another frame too"),
        (lambda s: {**s, "frame_pages": s["frame_pages"][:-1]}, "are not 2 of the 3 saved ones"),
        (lambda s: {**s, "frame_pages": torch.cat([s["frame_pages"]] * 2)}, "3 of 3 pages belong to frames"),
        (lambda s: {**s, "pages": s["pages"][:, :, [0, 1, 2, 2]]}, "3 of 4 pages belong to frames, expected all"),
    ],
)  # fmt: skip
def test_a_malformed_state_is_refused_whole(damage, message):
    state = saved()
    cache = make()
    a = cache.new_sequence()
    cache.append([a], *frame(5, 7))
    view, pool = cache.view([a]), cache.pool.clone()
    with pytest.raises(ValueError, match=message) as error:
        cache.load_state_dict(damage(state))
    assert "\n" not in str(error.value)
    assert torch.equal(cache.pool, pool) and cache.num_free_pages == 6 and cache.frame_indices(a) == [0]
    cache.check_view(view)  # as if nothing had been asked
    assert cache.new_sequence() == 1
    cache.load_state_dict(state)
    assert cache.num_free_pages == 5 and cache.new_sequence() == 4
    with pytest.raises(ValueError, match="the view is older than the cache: sequence 0 has other frames since"):
        cache.check_view(view)
    cache.check_view(view.refresh([0]) if view.max_pages > 2 else cache.view([0]))


def test_a_cache_that_cannot_be_is_refused_at_once():
    with pytest.raises(ValueError, match="^FrameCache: head_dim is 20, expected a multiple of 8 from 8 to 256$"):
        FrameCache(1, 1, 20, num_pages=1)
    with pytest.raises(ValueError, match="^FrameCache: head_dim is 264, expected a multiple of 8 from 8 to 256$"):
        FrameCache(1, 1, 264, num_pages=1)
    with pytest.raises(ValueError, match=r"needs [\d.]+ GiB for 1000000000000 pages, the budget is"):
        FrameCache(28, 16, 72, num_pages=10**12)
    with pytest.raises(ValueError, match="^FrameCache: num_layers is 1.5, expected a whole number of at least 1$"):
        FrameCache(1.5, 16, 72, num_pages=1)
    with pytest.raises(ValueError, match="device is 'nowhere': "):
        make(device="nowhere")
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=rf"device is {missing}, torch sees \d CUDA devices"):
        make(device=missing)


def test_a_view_that_is_older_than_its_sequences_is_refused():
    cache = make(20)
    a, b, c = (cache.new_sequence() for _ in range(3))
    cache.append([a, b, c], *frame(1, 4, seqs=3))
    view = cache.view([a, None, b], max_pages=9)
    head = view.first(2)
    cache.append([c], *frame(2, 4))  # not shown
    child = cache.fork(a)  # neither, and a stays as it is
    assert cache.evict(a, window=5) == 0
    slot = cache.begin_frame([a], 4)  # not committed: nothing to see yet
    for shown in (view, head):
        cache.check_view(shown)
    cache.cancel(slot)
    cache.append([b], *frame(3, 4))
    cache.check_view(head)
    with pytest.raises(
        ValueError, match=rf"older than the cache: sequence {b} has other frames since; call view.refresh"
    ):
        cache.check_view(view)
    for change in (
        lambda: cache.evict(b, window=1),
        lambda: cache.compress([a], lambda *_: tuple(x[:, :1] for x in cache.frame(a, 0)), window=0),
        lambda: cache.append([a], *frame(4, 4)),
    ):
        cache.check_view(view.refresh())
        change()
        with pytest.raises(ValueError, match="has other frames since"):
            cache.check_view(view)
    view.refresh([child, None, b])
    cache.check_view(view)
    cache.free(child)
    for shown in (view, head):
        with pytest.raises(ValueError, match=f"sequence {child} was freed since"):
            cache.check_view(shown)
    with pytest.raises(ValueError, match=f"no sequence {child} in the cache: it was freed"):
        view.refresh()
    with pytest.raises(ValueError, match="the view belongs to another cache"):
        make().check_view(view)
    with pytest.raises(ValueError, match="count is 4, expected 0 to 3"):
        view.first(4)


def test_save_and_restore_through_safetensors(tmp_path):
    cache = make()
    a = cache.new_sequence()
    cache.append([a], *frame(1, 6))
    b = cache.fork(a)
    cache.append([a, b], *frame(2, 4, seqs=2))
    cache.evict(b, window=1)
    empty = cache.new_sequence()
    cache.free(cache.new_sequence())
    save_file(cache.state_dict(), tmp_path / "cache.safetensors")
    restored = make(5)
    restored.new_sequence()  # is replaced
    restored.load_state_dict(load_file(tmp_path / "cache.safetensors"))
    assert restored.num_free_pages == 1
    for seq in (a, b, empty):
        assert restored.frame_indices(seq) == cache.frame_indices(seq)
        assert restored.position(seq) == cache.position(seq)
        assert all(torch.equal(x, y) for x, y in zip(content(restored, seq), content(cache, seq)))
    assert restored.new_sequence() == cache.new_sequence()
    with pytest.raises(ValueError, match="saved cache has 4 pages, this one only 3"):
        make(3).load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match=r"pages has shape \[2, 2, 4, 4, 1, 8\], expected \[2, 2, pages, 4, 2, 8\]$"):
        FrameCache(LAYERS, 2, DIM, num_pages=9, page_size=PAGE).load_state_dict(cache.state_dict())


def test_caches_are_independent():
    one, two = make(), make()
    a, b = one.new_sequence(), two.new_sequence()
    one.append([a], *frame(1, 4))
    two.append([b], *frame(2, 4))
    assert content(one, a)[0][0, 0, 0, 0] == 1 and content(two, b)[0][0, 0, 0, 0] == 2


def test_compress_keeps_old_frames_coarse():
    cache = make(20)
    a = cache.new_sequence()
    for value in range(5):
        cache.append([a], *frame(value, 8))
    b = cache.fork(a)
    calls = []

    def coarse(seq, index):
        calls.append((seq, index))
        return tuple(x.unflatten(1, (2, 4)).mean(2) for x in cache.frame(seq, index))

    before = content(cache, a)
    cache.compress([a, b], coarse, window=2, sink=1)
    assert calls == [(a, 1), (a, 2)]  # shared frames once
    assert cache.num_free_pages == 20 - 3 * 2 - 2 * 1
    for seq in (a, b):
        assert cache.frame_indices(seq) == [0, 1, 2, 3, 4] and cache.num_tokens(seq) == 3 * 8 + 2 * 2
        for x, y in zip(content(cache, seq), before):
            pooled = y[:, 8:24].unflatten(1, (4, 4)).mean(2)
            assert torch.equal(x, torch.cat([y[:, :8], pooled, y[:, 24:]], 1))
    cache.compress([a], coarse, window=2, sink=1)
    assert len(calls) == 2  # coarse frames stay as they are
    restored = make(20)
    restored.load_state_dict(cache.state_dict())
    restored.compress([a, b], coarse, window=2, sink=1)
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"have shapes \[2, 8, 1, 8\] .*, expected \[2, fewer than 8, 1, 8\]"):
        cache.compress([a], lambda seq, index: cache.frame(seq, index), window=0, sink=1)
    cache.free(a)
    cache.free(b)
    assert cache.num_free_pages == 20
