"""Frame-level K/V cache in pages.

One pool of pages per layer holds the keys and values of every cached frame of every sequence; the same page numbers
are used in all layers. A frame takes ``ceil(tokens / page_size)`` pages, is written once and never moves:

    sequence 0   [ frame 0: pages 4 7 ][ frame 1: pages 2 9 ]          page table, oldest frame first
    sequence 1   [ frame 0: pages 4 7 ][ frame 1: pages 5 3 ]     forked after frame 0: pages 4 and 7 have two owners

so sharing needs no copy, and dropping a frame is dropping a reference. All bookkeeping is on the host; the device sees
a page table per sequence (``CacheView``), uploaded once per frame into buffers whose addresses never change, and the
rows that a new frame is written to (``FrameSlot``). Nothing is ever read back from the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mimo_kernels.cache.book import Book, Frame
from mimo_kernels.cache.float8 import FLOAT8, to_float8
from mimo_kernels.cache.memory import device_of, in_words, memory_of
from mimo_kernels.cache.view import CacheView, Times, ViewHead, upload
from mimo_kernels.core import checks

__all__ = ["CacheView", "FrameCache", "FrameSlot", "ViewHead"]

MAX_HEAD_DIM = 256


@dataclass(eq=False)
class FrameSlot:
    """Pages reserved for one more frame in each of some sequences, until `FrameCache.commit` or `FrameCache.cancel`.

    ``rows`` (int64 ``[sequences * num_tokens]``, on the device) are the pool rows of the frame's tokens. They go over
    to the slot that reuses this one, and so does the memory of ``unrotated``.
    """

    seqs: tuple[int, ...]
    num_tokens: int
    rows: Tensor
    book: Book
    pages: list[tuple[int, ...]] = field(default_factory=list)
    open: bool = True
    reused: bool = False
    unrotated: Tensor | None = None  # [sequences, num_tokens, layers, heads, head_dim], of frames to be rotated again


class FrameCache:
    """Keys and values of finished frames, in pages shared between sequences.

    Keys are stored as attention uses them: after QK-norm and RoPE at absolute positions. Frames that are `rotatable`
    keep them from before RoPE as well, outside of the pool, and `rotate` gives such a frame another position.

    Args:
        num_layers, num_kv_heads, head_dim: of the network's keys and values (queries may have more heads); head_dim is
            a multiple of 8 up to 256, as attention wants it.
        num_pages: pages in the pool; `pages_for` counts what a run needs.
        page_size: tokens per page. Best equal to the tokens of a frame, or a divisor of them, up to 64 or 128.
        dtype: float32, float16 or bfloat16; or float8_e4m3fn, a byte per number, with a scale for each page, head and
            layer, apart for keys and values: half the memory of bfloat16, and errors of some per cent (docs/cache.md).
            Keys and values are then handed over in any of the others. device: where the pool lives.
        budget: bytes that the pool may take; default: on a GPU what is free there, on the CPU the machine's memory.

    Raises ValueError when the pool does not fit into the budget, and for a device that is not there. All methods raise
    ValueError for a sequence that is not there (never made, or freed), and leave the cache as it was whenever they
    raise; `compress` may have compressed some frames by then.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        budget: int | None = None,
    ):
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.num_pages, self.page_size = num_pages, page_size
        self.dtype, self.device = dtype, device_of(device)
        need = self.bytes(num_layers, num_kv_heads, head_dim, num_pages=num_pages, page_size=page_size, dtype=dtype)
        if budget is None:
            budget = memory_of(self.device)
        if budget is not None and need > budget:
            raise ValueError(
                f"the cache needs {in_words(need)} for {num_pages} pages, the budget is {in_words(budget)}"
            )
        # Zeroed, so that what `state_dict` saves of a partly used page is the same every time.
        shape = (num_layers, 2, num_pages, page_size, num_kv_heads, head_dim)
        with torch.inference_mode(False):  # a tensor made in it could not serve a backward later
            self.pool = torch.zeros(shape, dtype=dtype, device=self.device)
            # Of float8: the numbers of a page are those stored times its scale.
            of_scales = num_layers, 2, num_pages, num_kv_heads
            self.scales = torch.ones(of_scales, device=self.device) if dtype == FLOAT8 else None
            # The same memory for readers. Autograd refuses to go on with what was written to since it was saved: of the
            # pool it cannot know that the pages in question were not. `CacheView.hold` sees to that.
            self._layers = [tuple(x.data for x in layer.unbind()) for layer in self.pool]
            self._layer_scales = None if self.scales is None else [layer.data for layer in self.scales]
        self._book = Book(num_pages, page_size)

    @staticmethod
    def bytes(
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes of the pool: ``2 * layers * pages * page_size * heads * head_dim * itemsize``, and of float8's scales.

        The reference backend of `paged_frame_attention` takes more beside it (see `CacheView.joined`), the kernels do
        not.
        """
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "page_size": page_size}
        sizes["num_pages"] = num_pages
        for name, value in sizes.items():
            checks.expect_count("FrameCache", name, value, low=1)
        if head_dim % 8 or head_dim > MAX_HEAD_DIM:
            checks.refuse("FrameCache", "head_dim", f"is {head_dim}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM}")
        if dtype not in (*checks.FLOATS, FLOAT8):
            checks.refuse("FrameCache", "dtype", f"is {dtype}", f"{checks.FLOAT_NAMES}, or float8_e4m3fn")
        scales = 4 if dtype == FLOAT8 else 0  # of a page and head
        return 2 * num_layers * num_pages * num_kv_heads * (page_size * head_dim * dtype.itemsize + scales)

    @property
    def row_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of keys and values that are written, and of the queries that ask for them."""
        return (self.dtype,) if self.scales is None else checks.FLOATS

    @staticmethod
    def pages_for(num_frames: int, tokens_per_frame: int, *, sequences: int = 1, page_size: int = 64) -> int:
        """Pages of `sequences` sequences of `num_frames` frames each that share nothing."""
        return sequences * num_frames * -(-tokens_per_frame // page_size)

    # Sequences

    def new_sequence(self) -> int:
        """An empty sequence; its number is never used again."""
        return self._book.add()

    def fork(self, seq: int) -> int:
        """A new sequence with the same committed frames, in the same pages."""
        source = self._book.sequence(seq)
        return self._book.add(source.frames, source.appended)

    def free(self, seq: int) -> None:
        """Forget a sequence; pages that nobody else uses return to the pool."""
        self._book.closed(seq, "be freed")
        self._book.remove(seq)

    def evict(self, seq: int, *, window: int, sink: int = 0) -> int:
        """Keep the first `sink` and the latest `window` of the resident frames, drop the rest; returns how many.

        Frames are counted as they stand in the sequence now; nothing is copied or moved.
        """
        checks.expect_count("FrameCache.evict", "window", window)
        checks.expect_count("FrameCache.evict", "sink", sink)
        frames = self._book.sequence(seq).frames
        first, last = sink, max(sink, len(frames) - window)
        dropped = len(frames[first:last])
        if dropped:
            self._book.set_frames(seq, frames[:first] + frames[last:])
        return dropped

    def num_frames(self, seq: int) -> int:
        """Frames that are resident now."""
        return len(self._book.sequence(seq).frames)

    def num_tokens(self, seq: int) -> int:
        """Tokens that are resident now."""
        return sum(frame.num_tokens for frame in self._book.sequence(seq).frames)

    def position(self, seq: int) -> int:
        """Frames ever appended: the time of the next one."""
        return self._book.sequence(seq).appended

    def frame_indices(self, seq: int) -> list[int]:
        """The times of the resident frames, ascending."""
        return [frame.index for frame in self._book.sequence(seq).frames]

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody has: no sequence, no open frame, no pinned view and no backward that has yet to run."""
        self._book.collect()
        return len(self._book.free)

    # Writing

    def begin_frame(
        self, seqs: Sequence[int], num_tokens: int, *, reuse: FrameSlot | None = None, rotatable: bool = False
    ) -> FrameSlot:
        """Reserve pages for one more frame of `num_tokens` tokens in each of `seqs`: in all of them or in none.

        `rotatable`: keep the frame's keys as they were before RoPE too, beside the pool, for `rotate`.

        `reuse`: a slot of the same size that is no longer open; its ``rows`` keep their address, so that a captured
        CUDA graph writes the new frame. A slot is reused once: its rows are the new slot's from then on.
        """
        seqs = tuple(seqs)
        op = "FrameCache.begin_frame"
        checks.expect_count(op, "the number of seqs", len(seqs), low=1)
        checks.expect_count(op, "num_tokens", num_tokens, low=1)
        if len(set(seqs)) != len(seqs):
            checks.refuse(op, "seqs", f"is {list(seqs)}", "every sequence once, it can have one open frame")
        for seq in seqs:
            self._book.closed(seq, "begin another")
        if reuse is not None:
            self._own(reuse)
            alike = reuse.rows.numel() == len(seqs) * num_tokens and (reuse.unrotated is not None) == rotatable
            if reuse.open or reuse.reused or not alike:
                raise ValueError(
                    f"cannot reuse a slot of {len(reuse.seqs)} x {reuse.num_tokens} tokens, open: {reuse.open}, "
                    f"reused before: {reuse.reused}, rotatable: {reuse.unrotated is not None}, for {len(seqs)} x "
                    f"{num_tokens} tokens, rotatable: {rotatable}"
                )
        pages = self._reserve(len(seqs), num_tokens)
        rows = upload(self._book.rows_of(pages, num_tokens), self.device, None if reuse is None else reuse.rows)
        for seq in seqs:
            self._book.sequences[seq].open = True
        if reuse is not None:
            reuse.reused = True
        unrotated = None
        if rotatable:
            shape = len(seqs), num_tokens, self.num_layers, self.num_kv_heads, self.head_dim
            dtype = self.dtype if self.scales is None else torch.float32
            before = None if reuse is None else reuse.unrotated
            made = torch.zeros(shape, dtype=dtype, device=self.device) if before is None else before
            unrotated = made.view(shape)
        return FrameSlot(seqs, num_tokens, rows, self._book, pages, unrotated=unrotated)

    def write(self, slot: FrameSlot, layer: int, k: Tensor, v: Tensor, unrotated: Tensor | None = None) -> None:
        """Store one layer's keys and values of the frame: k, v ``[sequences, num_tokens, heads, head_dim]``.

        unrotated: the keys before RoPE, of k's shape; of a rotatable frame, and of no other.
        """
        op = "FrameCache.write"
        if (unrotated is None) != (slot.unrotated is None):
            found, expected = ("is missing", "the keys before RoPE") if unrotated is None else ("is given", "None")
            checks.refuse(op, "unrotated", found, f"{expected}: the slot's rotatable is {slot.unrotated is not None}")
        for name, x in (("k", k), ("v", v), ("unrotated", unrotated)):
            if x is not None:
                checks.expect_shape(op, name, x, len(slot.seqs), slot.num_tokens, self.num_kv_heads, self.head_dim)
                checks.expect_dtype(op, name, x, *self.row_dtypes, why="as the cache")
                _constant(op, name, x)
        checks.expect_device(op, self.pool, k=k, v=v, unrotated=unrotated)
        checks.expect_count(op, "layer", layer, high=self.num_layers - 1)
        self._opened(slot)
        if slot.unrotated is not None and unrotated is not None:
            slot.unrotated[:, :, layer].copy_(unrotated)
        self._store(layer, slot.rows, k, v)

    def _store(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Frames in their rows of a layer: k, v ``[frames, num_tokens, heads, head_dim]``, rows int64
        ``[frames * num_tokens]``."""
        for which, x in enumerate((k, v)):
            self._store_half(layer, which, rows, x)

    def _store_half(self, layer: int, which: int, rows: Tensor, x: Tensor) -> None:
        """`_store` of the keys, which 0, or of the values, which 1."""
        pool = self._bytes()[layer, which].flatten(0, 1)
        if self.scales is not None:
            x, scales = to_float8(x, self.page_size)
            x = x.view(torch.uint8)
            pages = rows.view(x.shape[:2])[:, :: self.page_size].flatten() // self.page_size
            self.scales[layer, which].index_copy_(0, pages, scales.flatten(0, 1))
        pool.index_copy_(0, rows, x.flatten(0, 1))

    def place(self, slot: FrameSlot, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where `write` puts one layer's keys and values, for a kernel that makes them there (`qk_norm_rope_cache`):
        the layer's keys and its values, each a view ``[num_pages * page_size, heads, head_dim]``, and the row in them
        of every token, int64 ``[sequences * num_tokens]``. Rows that are not named belong to others. Not of float8,
        whose scales come from whole pages.
        """
        if self.scales is not None:
            checks.refuse("FrameCache.place", "the cache", f"is {self.dtype}", f"{checks.FLOAT_NAMES}, or write")
        checks.expect_count("FrameCache.place", "layer", layer, high=self.num_layers - 1)
        self._opened(slot)
        keys, values = self.pool[layer].flatten(1, 2)
        return keys, values, slot.rows

    def commit(self, slot: FrameSlot) -> None:
        """Make the frame visible to views that are refreshed from now on."""
        self._opened(slot)
        for place, (seq, pages) in enumerate(zip(slot.seqs, slot.pages, strict=True)):
            sequence = self._book.sequences[seq]
            own = None if slot.unrotated is None else slot.unrotated[place].clone()  # the slot's memory is used again
            self._book.append(seq, Frame(sequence.appended, pages, slot.num_tokens, unrotated=own))
            sequence.open = False
        slot.open = False

    def cancel(self, slot: FrameSlot) -> None:
        """Give the reserved pages back; the sequences are as before `begin_frame`."""
        self._opened(slot)
        for seq in slot.seqs:
            self._book.sequences[seq].open = False
        self._book.give_back(slot.pages)
        slot.open = False

    def append(
        self,
        seqs: Sequence[int],
        k_layers: Sequence[Tensor],
        v_layers: Sequence[Tensor],
        unrotated: Sequence[Tensor] | None = None,
    ) -> None:
        """`begin_frame`, `write` every layer and `commit`. k_layers, v_layers and, for frames that can be rotated
        again, unrotated: per layer [S, N, heads, head_dim]."""
        for name, layers in (("k_layers", k_layers), ("v_layers", v_layers), ("unrotated", unrotated)):
            if layers is not None and len(layers) != self.num_layers:
                checks.refuse("FrameCache.append", name, f"has {len(layers)} layers", f"{self.num_layers}")
        num_tokens = k_layers[0].shape[1] if k_layers[0].ndim == 4 else 1
        slot = self.begin_frame(seqs, num_tokens, rotatable=unrotated is not None)
        try:
            for layer, (k, v) in enumerate(zip(k_layers, v_layers, strict=True)):
                self.write(slot, layer, k, v, None if unrotated is None else unrotated[layer])
        except Exception:
            self.cancel(slot)
            raise
        self.commit(slot)

    # Reading

    def view(
        self,
        seqs: Sequence[int | None],
        frames: Times = None,
        *,
        max_pages: int | None = None,
        pinned: bool = False,
    ) -> CacheView:
        """What attention sees of `seqs`; ``None`` is a sequence without history, repeats are allowed.

        Args:
            frames: the times of the resident frames that are seen: a list for all sequences alike, or a list with one
                for each, ``None`` there for all frames of that sequence. Default: all frames of all.
            max_pages: pages per sequence that the view can ever show; default what the longest sequence has now.
            pinned: the view stays as it is. It is never older than the cache, and its pages are given to nobody as long
                as it lives. For activation checkpointing, where the second forward must see what the first one saw.
        """
        op = "FrameCache.view"
        seqs = tuple(seqs)
        if max_pages is None:
            max_pages = max((self._book.table(seq).shape[1] for seq in seqs), default=0)
        checks.expect_count(op, "max_pages", max_pages)
        view = CacheView(self._book, self.pool, seqs, max_pages).refresh(frames=frames)
        return view.pin() if pinned else view

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's pages to read from, each ``[num_pages, page_size, heads, head_dim]``: `pool` without its count of
        writes."""
        checks.expect_count("FrameCache.keys_and_values", "layer", layer, high=self.num_layers - 1)
        return self._layers[layer]

    def scales_of(self, layer: int) -> Tensor | None:
        """Of float8: fp32 ``[2, num_pages, heads]``, by what the layer's keys and values are multiplied; else None."""
        return None if self._layer_scales is None else self._layer_scales[layer]

    def check_view(self, view: CacheView | ViewHead) -> None:
        """ValueError unless the view is one of this cache and shows its sequences as they are now."""
        if view.book is not self._book:
            raise ValueError("the view belongs to another cache")
        view.check_current()

    def frame(self, seq: int, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the resident frame of time `index`: copies, each ``[layers, tokens, heads, head_dim]``; of
        float8 what the bytes mean, in float32."""
        frame = self._frame(seq, index)
        pages = upload(torch.tensor(frame.pages), self.device)
        if self.scales is None:
            found = self.pool[:, :, pages]
        else:
            found = self._bytes()[:, :, pages].view(self.dtype).float() * self.scales[:, :, pages, None, :, None]
        k, v = found.flatten(2, 3)[:, :, : frame.num_tokens].unbind(1)
        return k, v

    def _bytes(self) -> Tensor:
        """The pool in numbers that torch copies everywhere: of float8 it copies on some devices only."""
        return self.pool if self.scales is None else self.pool.view(torch.uint8)

    # Rotation

    def rotate(self, seqs: Sequence[int], index: int, turn: Callable[[Tensor], Tensor]) -> None:
        """Give the frame of time `index` in each of `seqs` keys of another position: those that it was appended with
        before RoPE, turned anew. However often, they are exactly what one rotation makes of them.

        turn: keys ``[num_tokens, layers, heads, head_dim]`` -> the same, rotated; ``lambda k: apply_rope(k, coords,
            rope)`` with the coords of the frame's tokens.

        The frame keeps its time in `frame_indices`; views have to be refreshed. Frames that forked sequences share are
        turned once and stay shared. Pages are written once, so the frame moves to new ones, which have to be free: who
        still sees the old ones, a pinned view or a backward, sees what was there.
        """
        op = "FrameCache.rotate"
        for seq in seqs:
            self._book.closed(seq, "have a frame rotated")
        frames = list(dict.fromkeys(self._frame(seq, index) for seq in seqs))
        for frame in frames:
            if frame.unrotated is None:
                checks.refuse(op, f"frame {index}", "was appended without its unrotated keys", "a rotatable one")
        turned: dict[Frame, Frame] = {}
        try:
            for frame in frames:
                turned[frame] = self._store_turned(frame, turn)
        except Exception:
            self._book.give_back([frame.pages for frame in turned.values()])
            raise
        for seq in dict.fromkeys(seqs):
            now = [turned.get(frame, frame) for frame in self._book.sequence(seq).frames]
            self._book.set_frames(seq, now)

    def _store_turned(self, frame: Frame, turn: Callable[[Tensor], Tensor]) -> Frame:
        """The frame in pages of its own that belong to nobody yet, with its keys turned, and its values."""
        op = "FrameCache.rotate"
        assert frame.unrotated is not None
        keys = turn(frame.unrotated)
        checks.expect_shape(op, "what turn returns", keys, *frame.unrotated.shape)
        checks.expect_dtype(op, "what turn returns", keys, frame.unrotated.dtype, why="as the unrotated keys")
        checks.expect_device(op, self.pool, **{"what turn returns": keys})
        _constant(op, "what turn returns", keys)
        pages = self._reserve(1, frame.num_tokens)
        try:
            after = upload(self._book.rows_of(pages, frame.num_tokens), self.device)
            for layer in range(self.num_layers):
                self._store_half(layer, 0, after, keys[None, :, layer])
            old, new = (upload(torch.tensor(some), self.device) for some in (frame.pages, pages[0]))
            for pool in (self._bytes(), self.scales):
                if pool is not None:
                    values = pool[:, 1]
                    values.index_copy_(1, new, values.index_select(1, old))
        except Exception:
            self._book.give_back(pages)
            raise
        return replace(frame, pages=pages[0])

    # Multi-level policy

    def compress(
        self,
        seqs: Sequence[int],
        coarse: Callable[[int, int], tuple[Tensor, Tensor]],
        *,
        window: int,
        sink: int = 0,
    ) -> None:
        """Replace the frames that left the window by coarser ones, in their places. (FAR's multi-level cache encodes
        the frames of the window again too: that is `evict` and `begin_frame`.)

        ``coarse(seq, index)`` returns the keys and values to keep for the frame of time `index`, each
        ``[layers, M, heads, head_dim]`` with M below the frame's tokens; it may read `frame`. The latest `window` and
        the first `sink` frames stay as they are. A frame that forked sequences share is compressed once and stays
        shared. A frame is compressed once: it counts as coarse from then on.
        """
        checks.expect_count("FrameCache.compress", "window", window)
        checks.expect_count("FrameCache.compress", "sink", sink)
        for seq in seqs:
            self._book.closed(seq, "be compressed")
        done: dict[Frame, Frame] = {}
        for seq in seqs:
            for place in range(sink, self.num_frames(seq) - window):
                frame = self._book.sequence(seq).frames[place]
                if frame.coarse:
                    continue
                if frame not in done:
                    done[frame] = self._store_coarse(seq, frame, coarse)
                frames = self._book.sequence(seq).frames
                self._book.set_frames(seq, [*frames[:place], done[frame], *frames[place + 1 :]])

    def _store_coarse(self, seq: int, frame: Frame, coarse: Callable[[int, int], tuple[Tensor, Tensor]]) -> Frame:
        """The pages of the frame that is to stand for `frame`. They belong to nobody yet, and to the pool where this
        fails."""
        changes = self._book.changes, self.num_free_pages
        k, v = coarse(seq, frame.index)
        if (self._book.changes, self.num_free_pages) != changes:
            raise ValueError("the cache was changed by the function that makes its frames coarse; it may only read")
        num_tokens = k.shape[1] if k.ndim == 4 else 0
        expected = (self.num_layers, num_tokens, self.num_kv_heads, self.head_dim)
        if not 0 < num_tokens < frame.num_tokens or k.shape != expected or v.shape != expected:
            wanted = f"[{self.num_layers}, fewer than {frame.num_tokens}, {self.num_kv_heads}, {self.head_dim}]"
            found = f"have shapes {list(k.shape)} and {list(v.shape)}"
            checks.refuse("FrameCache.compress", "coarse k and v", found, f"{wanted}, both alike")
        for name, x in (("coarse k", k), ("coarse v", v)):
            _constant("FrameCache.compress", name, x)
        both = torch.stack([k, v]).to(self.device, self.row_dtypes[0])
        pages = self._reserve(1, num_tokens)
        try:
            rows = upload(self._book.rows_of(pages, num_tokens), self.device)
            for layer in range(self.num_layers):
                self._store(layer, rows, *both[:, None, layer])
        except Exception:
            self._book.give_back(pages)
            raise
        return Frame(frame.index, pages[0], num_tokens, coarse=True)

    # Saving

    def state_dict(self) -> dict[str, Tensor]:
        """All sequences and the pages that they use, as contiguous tensors on the host (for safetensors)."""
        self._book.all_closed("be saved")
        used, state = self._book.state()
        state |= self._unrotated_state(used)
        numbers = torch.tensor(used, dtype=torch.int64, device="cpu").to(self.device)
        # Layer by layer: what is in use may be most of the device's memory.
        pages = torch.stack([layer[:, numbers].cpu() for layer in self._bytes()]).view(self.dtype)
        if self.scales is not None:
            state["scales"] = self.scales[:, :, numbers].cpu()
        return {"pages": pages} | state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the content by that of a saved cache of the same layers, heads, page size and dtype.

        The pool may have another number of pages, as long as the saved ones fit. A state that no cache can have saved
        is refused whole. Views follow when they are refreshed.
        """
        self._book.all_closed("be replaced")
        self._book.collect()
        if self._book.holds:
            raise ValueError(
                f"the cache cannot be replaced: {self._book.holds} pinned views or views with a backward that has yet "
                "to run hold its pages"
            )
        if (pages := state.get("pages")) is None:
            checks.refuse("saved cache", "pages", "are missing", "a tensor of 6 dimensions")
        shape = self.num_layers, 2, "pages", self.page_size, self.num_kv_heads, self.head_dim
        checks.expect_shape("saved cache", "pages", pages, *shape)
        checks.expect_dtype("saved cache", "pages", pages, self.dtype, why="as this cache")
        if self.scales is not None:
            scales: Any = state.get("scales")
            checks.expect_shape("saved cache", "scales", scales, self.num_layers, 2, pages.shape[2], self.num_kv_heads)
            checks.expect_dtype("saved cache", "scales", scales, torch.float32)
        if pages.shape[2] > self.num_pages:
            raise ValueError(f"the saved cache has {pages.shape[2]} pages, this one only {self.num_pages}")
        book = self._book.restored(state, pages.shape[2], self._saved_unrotated(state))
        for layer, saved in zip(self._bytes(), pages.view(self._bytes().dtype), strict=True):
            layer[:, : pages.shape[2]] = saved.to(self.device)
        if self.scales is not None:
            self.scales[:, :, : pages.shape[2]] = state["scales"].to(self.device)
        self._book.become(book)

    def _unrotated_state(self, used: list[int]) -> dict[str, Tensor]:
        """Of every rotatable frame its first page, numbered as saved, and the keys before RoPE, frame after frame."""
        frames = {
            used.index(frame.pages[0]): frame.unrotated
            for seq in self._book.sequences
            for frame in self._book.frames(seq)
            if frame.unrotated is not None
        }
        if not frames:
            return {}
        keys = torch.cat([keys.cpu() for keys in frames.values()])
        lengths = [len(keys) for keys in frames.values()]
        return {
            "unrotated": keys,
            "unrotated_frames": torch.tensor([list(frames), lengths], device="cpu").T.contiguous(),
        }

    def _saved_unrotated(self, state: dict[str, Tensor]) -> dict[int, Tensor]:
        """Keys before RoPE by the first page of their frame, from a saved state; empty where it has none."""
        if "unrotated_frames" not in state:
            return {}
        table, keys = state["unrotated_frames"], state.get("unrotated", torch.empty(0))
        checks.expect_shape("saved cache", "unrotated_frames", table, "n", 2)
        checks.expect_dtype("saved cache", "unrotated_frames", table, torch.int64)
        pages, lengths = table.T.tolist()
        if min(lengths, default=0) < 0:
            checks.refuse("saved cache", "unrotated_frames", f"has a frame of {min(lengths)} tokens", "1 or more")
        shape = sum(lengths), self.num_layers, self.num_kv_heads, self.head_dim
        checks.expect_shape("saved cache", "unrotated", keys, *shape)
        expected = self.dtype if self.scales is None else torch.float32
        checks.expect_dtype("saved cache", "unrotated", keys, expected, why="as this cache")
        return dict(zip(pages, keys.to(self.device).split(lengths), strict=True))

    # Bookkeeping

    def _own(self, slot: FrameSlot) -> None:
        if slot.book is not self._book:
            raise ValueError(f"the slot of sequences {list(slot.seqs)} belongs to another cache")

    def _opened(self, slot: FrameSlot) -> None:
        self._own(slot)
        if not slot.open:
            raise ValueError(f"the frame of sequences {list(slot.seqs)} was already committed or cancelled")

    def _frame(self, seq: int, index: int) -> Frame:
        for frame in self._book.sequence(seq).frames:
            if frame.index == index:
                return frame
        raise ValueError(f"frame {index} of sequence {seq} is not resident, only {self.frame_indices(seq)}")

    def _reserve(self, num_frames: int, num_tokens: int) -> list[tuple[int, ...]]:
        need = num_frames * self._book.pages_of(num_tokens)
        if need > self.num_free_pages:
            page_bytes = self.pool.nbytes // self.num_pages
            held = self._book.held_alone()
            waiting = f"; {held} are held by pinned views or by a backward that has yet to run" if held else ""
            raise ValueError(
                f"the cache is full: {num_frames} frames of {num_tokens} tokens need {need} pages "
                f"({in_words(need * page_bytes)}), {self.num_free_pages} of {self.num_pages} are free "
                f"({in_words(self.num_free_pages * page_bytes)} of a budget of {in_words(self.pool.nbytes)}){waiting}"
            )
        return self._book.reserve(num_frames, num_tokens)


def _constant(op: str, name: str, x: Tensor) -> None:
    """Pages hold numbers: a gradient that somebody waits for would be lost."""
    if x.requires_grad and torch.is_grad_enabled():
        expected = f"{name}.detach(), or a call under torch.no_grad()"
        checks.refuse(op, name, "requires a gradient, which pages do not keep", expected)
