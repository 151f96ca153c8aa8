"""Frame-level K/V cache in pages.

One pool of pages per layer holds the keys and values of every cached frame of every sequence; the same page numbers
are used in all layers. A frame takes ``ceil(tokens / page_size)`` pages, is written once and never moves:

    sequence 0   [ frame 0: pages 4 7 ][ frame 1: pages 2 9 ]          page table, oldest frame first
    sequence 1   [ frame 0: pages 4 7 ][ frame 1: pages 5 3 ]          forked after frame 0: pages 4 and 7 have two owners

so sharing needs no copy, and dropping a frame is dropping a reference. All bookkeeping is on the host; the device sees
a page table per sequence (``CacheView``), uploaded once per frame into buffers whose addresses never change, and the
rows that a new frame is written to (``FrameSlot``). Nothing is ever read back from the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mimo_kernels.cache.view import CacheView, ViewHead, upload

__all__ = ["CacheView", "FrameCache", "FrameSlot", "ViewHead"]

_NO_PAGES = torch.zeros(2, 0, dtype=torch.int32)


@dataclass(frozen=True)
class _Frame:
    index: int  # frames appended to its sequence before it: the absolute time of the frame
    pages: tuple[int, ...]
    num_tokens: int
    coarse: bool = False


@dataclass
class _Sequence:
    frames: list[_Frame]
    table: Tensor  # int32 [2, pages], host: page numbers and rows in use per page; replaced, never written to
    appended: int  # frames ever appended
    open: bool = False  # a frame is reserved and not yet committed


@dataclass(eq=False)
class FrameSlot:
    """Pages reserved for one more frame in each of some sequences, until `FrameCache.commit` or `FrameCache.cancel`.

    ``rows`` (int64 ``[sequences * num_tokens]``, on the device) are the pool rows of the frame's tokens.
    """

    seqs: tuple[int, ...]
    num_tokens: int
    rows: Tensor
    pages: list[tuple[int, ...]] = field(default_factory=list)
    open: bool = True


class FrameCache:
    """Keys and values of finished frames, in pages shared between sequences.

    Keys are stored as attention uses them: after QK-norm and RoPE at absolute positions.

    Args:
        num_layers, num_heads, head_dim: of the network.
        num_pages: pages in the pool; `pages_for` counts what a run needs.
        page_size: tokens per page. Best equal to the tokens of a frame, or a divisor of them, up to 64 or 128.
        dtype: float32, float16 or bfloat16. device: where the pool lives.
        budget: bytes that the pool may take; default: on a GPU what is free there, elsewhere no limit.

    Raises ValueError when the pool does not fit into the budget. All methods raise ValueError for a sequence that is
    not there (never made, or freed), and leave the cache as it was whenever they raise; `compress` may have compressed
    some frames by then.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        *,
        num_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        budget: int | None = None,
    ):
        self.num_layers, self.num_heads, self.head_dim = num_layers, num_heads, head_dim
        self.num_pages, self.page_size = num_pages, page_size
        self.dtype, self.device = dtype, torch.device(device)
        need = self.bytes(num_layers, num_heads, head_dim, num_pages=num_pages, page_size=page_size, dtype=dtype)
        if budget is None and self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            budget = torch.cuda.mem_get_info(self.device)[0] + unused
        if budget is not None and need > budget:
            raise ValueError(f"the cache needs {_size(need)} for {num_pages} pages, the budget is {_size(budget)}")
        # Zeroed, so that what `state_dict` saves of a partly used page is the same every time.
        shape = (num_layers, 2, num_pages, page_size, num_heads, head_dim)
        self.pool = torch.zeros(shape, dtype=dtype, device=self.device)
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low numbers first, then the latest freed
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0

    @staticmethod
    def bytes(
        num_layers: int,
        num_heads: int,
        head_dim: int,
        *,
        num_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes of the pool: ``2 * layers * pages * page_size * heads * head_dim * itemsize``.

        The reference backend of `paged_frame_attention` takes more beside it (see `CacheView.joined`), the kernels do not.
        """
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "head_dim": head_dim, "page_size": page_size}
        sizes["num_pages"] = num_pages
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        return 2 * num_layers * num_pages * page_size * num_heads * head_dim * dtype.itemsize

    @staticmethod
    def pages_for(num_frames: int, tokens_per_frame: int, *, sequences: int = 1, page_size: int = 64) -> int:
        """Pages of `sequences` sequences of `num_frames` frames each that share nothing."""
        return sequences * num_frames * -(-tokens_per_frame // page_size)

    # Sequences

    def new_sequence(self) -> int:
        """An empty sequence; its number is never used again."""
        return self._add(_Sequence([], _NO_PAGES, 0))

    def fork(self, seq: int) -> int:
        """A new sequence with the same committed frames, in the same pages."""
        source = self._sequence(seq)
        self._acquire(source.frames)
        return self._add(_Sequence(list(source.frames), source.table, source.appended))

    def free(self, seq: int) -> None:
        """Forget a sequence; pages that nobody else uses return to the pool."""
        self._closed(seq, "be freed")
        self._release(self._sequences.pop(seq).frames)

    def evict(self, seq: int, *, window: int, sink: int = 0) -> int:
        """Keep the first `sink` and the latest `window` of the resident frames, drop the rest; returns how many.

        Frames are counted as they stand in the sequence now; nothing is copied or moved.
        """
        if window < 0 or sink < 0:
            raise ValueError(f"window and sink must not be negative, got {window} and {sink}")
        sequence = self._sequence(seq)
        frames = sequence.frames
        first, last = sink, max(sink, len(frames) - window)
        dropped = frames[first:last]
        if dropped:
            self._set_frames(sequence, frames[:first] + frames[last:])
            self._release(dropped)
        return len(dropped)

    def num_frames(self, seq: int) -> int:
        """Frames that are resident now."""
        return len(self._sequence(seq).frames)

    def num_tokens(self, seq: int) -> int:
        """Tokens that are resident now."""
        return sum(frame.num_tokens for frame in self._sequence(seq).frames)

    def position(self, seq: int) -> int:
        """Frames ever appended: the time of the next one."""
        return self._sequence(seq).appended

    def frame_indices(self, seq: int) -> list[int]:
        """The times of the resident frames, ascending."""
        return [frame.index for frame in self._sequence(seq).frames]

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    # Writing

    def begin_frame(self, seqs: Sequence[int], num_tokens: int, *, reuse: FrameSlot | None = None) -> FrameSlot:
        """Reserve pages for one more frame of `num_tokens` tokens in each of `seqs`: in all of them or in none.

        `reuse`: a slot of the same size that is no longer open; its ``rows`` keep their address, so that a captured
        CUDA graph writes the new frame.
        """
        seqs = tuple(seqs)
        if not seqs or num_tokens < 1:
            raise ValueError(f"a frame needs a sequence and a token, got {len(seqs)} sequences, {num_tokens} tokens")
        if len(set(seqs)) != len(seqs):
            raise ValueError(f"each sequence can have one open frame, got sequences {list(seqs)}")
        for seq in seqs:
            self._closed(seq, "begin another")
        if reuse is not None and (reuse.open or reuse.rows.numel() != len(seqs) * num_tokens):
            raise ValueError(
                f"cannot reuse a slot of {len(reuse.seqs)} x {reuse.num_tokens} tokens, open: {reuse.open}, "
                f"for {len(seqs)} x {num_tokens} tokens"
            )
        pages = self._reserve(len(seqs), num_tokens)
        for seq in seqs:
            self._sequences[seq].open = True
        rows = upload(self._rows_of(pages, num_tokens), self.device, None if reuse is None else reuse.rows)
        return FrameSlot(seqs, num_tokens, rows, pages)

    def write(self, slot: FrameSlot, layer: int, k: Tensor, v: Tensor) -> None:
        """Store one layer's keys and values of the frame: k, v ``[sequences, num_tokens, heads, head_dim]``."""
        expected = (len(slot.seqs), slot.num_tokens, self.num_heads, self.head_dim)
        for name, x in (("k", k), ("v", v)):
            if x.shape != expected or x.dtype != self.dtype or x.device.type != self.device.type:
                raise ValueError(
                    f"{name} must be {list(expected)} {self.dtype} on {self.device}, "
                    f"got {list(x.shape)} {x.dtype} on {x.device}"
                )
        keys, values, rows = self.place(slot, layer)
        keys.index_copy_(0, rows, k.flatten(0, 1))
        values.index_copy_(0, rows, v.flatten(0, 1))

    def place(self, slot: FrameSlot, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where `write` puts one layer's keys and values, for a kernel that makes them there (`qk_norm_rope_cache`):
        the layer's keys and its values, each a view ``[num_pages * page_size, heads, head_dim]``, and the row in them
        of every token, int64 ``[sequences * num_tokens]``. Rows that are not named belong to others.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in 0..{self.num_layers - 1}, got {layer}")
        self._opened(slot)
        keys, values = self.pool[layer].flatten(1, 2)
        return keys, values, slot.rows

    def commit(self, slot: FrameSlot) -> None:
        """Make the frame visible to views that are refreshed from now on."""
        self._opened(slot)
        for seq, pages in zip(slot.seqs, slot.pages, strict=True):
            sequence = self._sequences[seq]
            frame = _Frame(sequence.appended, pages, slot.num_tokens)
            self._acquire([frame])
            sequence.frames.append(frame)
            sequence.table = torch.cat([sequence.table, self._table_of([frame])], 1)
            sequence.appended += 1
            sequence.open = False
        slot.open = False

    def cancel(self, slot: FrameSlot) -> None:
        """Give the reserved pages back; the sequences are as before `begin_frame`."""
        self._opened(slot)
        for seq, pages in zip(slot.seqs, slot.pages, strict=True):
            self._sequences[seq].open = False
            self._free.extend(reversed(pages))
        slot.open = False

    def append(self, seqs: Sequence[int], k_layers: Sequence[Tensor], v_layers: Sequence[Tensor]) -> None:
        """`begin_frame`, `write` every layer and `commit`. k_layers, v_layers: per layer [S, N, heads, head_dim]."""
        if len(k_layers) != self.num_layers or len(v_layers) != self.num_layers:
            raise ValueError(f"expected {self.num_layers} layers, got {len(k_layers)} of k and {len(v_layers)} of v")
        slot = self.begin_frame(seqs, k_layers[0].shape[1] if k_layers[0].ndim == 4 else 1)
        try:
            for layer, (k, v) in enumerate(zip(k_layers, v_layers, strict=True)):
                self.write(slot, layer, k, v)
        except Exception:
            self.cancel(slot)
            raise
        self.commit(slot)

    # Reading

    def view(self, seqs: Sequence[int | None], *, max_pages: int | None = None) -> CacheView:
        """Device page tables of `seqs`; ``None`` is a sequence without history, repeats are allowed.

        `max_pages`: pages per sequence that the view can ever show; default what the longest sequence has now.
        """
        seqs = tuple(seqs)
        if max_pages is None:
            max_pages = max((self._table(seq).shape[1] for seq in seqs), default=0)
        return CacheView(self, seqs, max_pages).refresh()

    def frame(self, seq: int, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the resident frame of time `index`: copies, each ``[layers, tokens, heads, head_dim]``."""
        frame = self._frame(seq, index)
        pages = upload(torch.tensor(frame.pages), self.device)
        k, v = self.pool[:, :, pages].flatten(2, 3)[:, :, : frame.num_tokens].unbind(1)
        return k, v

    # Multi-level policy

    def compress(
        self,
        seqs: Sequence[int],
        coarse: Callable[[int, int], tuple[Tensor, Tensor]],
        *,
        window: int,
        sink: int = 0,
    ) -> None:
        """Replace the frames that left the window by coarser ones (FAR, Sec. 4.4: multi-level K/V cache).

        ``coarse(seq, index)`` returns the keys and values to keep for the frame of time `index`, each
        ``[layers, M, heads, head_dim]`` with M below the frame's tokens; it may read `frame`. The latest `window` and
        the first `sink` frames stay as they are. A frame that forked sequences share is compressed once and stays
        shared. A frame is compressed once: it counts as coarse from then on.
        """
        for seq in seqs:
            self._closed(seq, "be compressed")
        done: dict[_Frame, _Frame] = {}
        for seq in seqs:
            sequence = self._sequence(seq)
            for place in range(sink, len(sequence.frames) - window):
                frame = sequence.frames[place]
                if not frame.coarse:
                    if frame not in done:
                        done[frame] = self._store_coarse(frame, *coarse(seq, frame.index))
                    self._acquire([done[frame]])
                    self._set_frames(sequence, [*sequence.frames[:place], done[frame], *sequence.frames[place + 1 :]])
                    self._release([frame])

    def _store_coarse(self, frame: _Frame, k: Tensor, v: Tensor) -> _Frame:
        num_tokens = k.shape[1] if k.ndim == 4 else 0
        expected = (self.num_layers, num_tokens, self.num_heads, self.head_dim)
        if not 0 < num_tokens < frame.num_tokens or k.shape != expected or v.shape != expected:
            raise ValueError(
                f"coarse k and v must be [{self.num_layers}, fewer than {frame.num_tokens}, {self.num_heads}, "
                f"{self.head_dim}], got {list(k.shape)} and {list(v.shape)}"
            )
        pages = self._reserve(1, num_tokens)
        rows = upload(self._rows_of(pages, num_tokens), self.device)
        self.pool.flatten(2, 3).index_copy_(2, rows, torch.stack([k, v], 1).to(self.pool))
        return _Frame(frame.index, pages[0], num_tokens, coarse=True)

    # Saving

    def state_dict(self) -> dict[str, Tensor]:
        """All sequences and the pages that they use, as contiguous tensors on the host (for safetensors)."""
        self._all_closed("be saved")
        used = [page for page, count in enumerate(self._references) if count]
        saved_as = {page: number for number, page in enumerate(used)}
        frames, pages = [], []
        for seq, sequence in self._sequences.items():
            for frame in sequence.frames:
                frames.append((seq, frame.index, frame.num_tokens, frame.coarse))
                pages.extend(saved_as[page] for page in frame.pages)
        sequences = [(seq, sequence.appended) for seq, sequence in self._sequences.items()]
        numbers = torch.tensor(used, dtype=torch.int64).to(self.device)
        return {
            # Layer by layer: what is in use may be most of the device's memory.
            "pages": torch.stack([layer[:, numbers].cpu() for layer in self.pool]),
            "sequences": torch.tensor(sequences, dtype=torch.int64).view(-1, 2),
            "frames": torch.tensor(frames, dtype=torch.int64).view(-1, 4),
            "frame_pages": torch.tensor(pages, dtype=torch.int64),
            "next_id": torch.tensor([self._next_id]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the content by that of a saved cache of the same layers, heads, page size and dtype.

        The pool may have another number of pages, as long as the saved ones fit.
        """
        self._all_closed("be replaced")
        pages = state["pages"]
        expected = (self.num_layers, 2, pages.shape[2], self.page_size, self.num_heads, self.head_dim)
        if pages.shape != expected or pages.dtype != self.dtype:
            raise ValueError(
                f"saved pages are {list(pages.shape)} {pages.dtype}, this cache needs {list(expected)} {self.dtype}"
            )
        if pages.shape[2] > self.num_pages:
            raise ValueError(f"the saved cache has {pages.shape[2]} pages, this one only {self.num_pages}")
        for layer, saved in zip(self.pool, pages, strict=True):
            layer[:, : pages.shape[2]] = saved.to(self.device)
        self._references = [0] * self.num_pages
        self._sequences = {seq: _Sequence([], _NO_PAGES, appended) for seq, appended in state["sequences"].tolist()}
        self._next_id = int(state["next_id"])
        numbers = iter(state["frame_pages"].tolist())
        for seq, index, num_tokens, coarse in state["frames"].tolist():
            frame_pages = tuple(next(numbers) for _ in range(self._pages_per_frame(num_tokens)))
            self._sequences[seq].frames.append(_Frame(index, frame_pages, num_tokens, bool(coarse)))
        for sequence in self._sequences.values():
            self._acquire(sequence.frames)
            self._set_frames(sequence, sequence.frames)
        self._free = [page for page in reversed(range(self.num_pages)) if not self._references[page]]

    # Bookkeeping

    def _sequence(self, seq: int) -> _Sequence:
        if seq not in self._sequences:
            known = "it was freed" if 0 <= seq < self._next_id else "it was never made"
            raise ValueError(f"no sequence {seq} in the cache: {known}")
        return self._sequences[seq]

    def _closed(self, seq: int, action: str) -> _Sequence:
        sequence = self._sequence(seq)
        if sequence.open:
            raise ValueError(f"sequence {seq} has an open frame and cannot {action}: commit or cancel it first")
        return sequence

    def _all_closed(self, action: str) -> None:
        for seq in self._sequences:
            self._closed(seq, action)

    def _opened(self, slot: FrameSlot) -> None:
        if not slot.open:
            raise ValueError(f"the frame of sequences {list(slot.seqs)} was already committed or cancelled")

    def _frame(self, seq: int, index: int) -> _Frame:
        for frame in self._sequence(seq).frames:
            if frame.index == index:
                return frame
        raise ValueError(f"frame {index} of sequence {seq} is not resident, only {self.frame_indices(seq)}")

    def _add(self, sequence: _Sequence) -> int:
        self._next_id += 1
        self._sequences[self._next_id - 1] = sequence
        return self._next_id - 1

    def _pages_per_frame(self, num_tokens: int) -> int:
        return self.pages_for(1, num_tokens, page_size=self.page_size)

    def _reserve(self, num_frames: int, num_tokens: int) -> list[tuple[int, ...]]:
        per_frame = self._pages_per_frame(num_tokens)
        need = num_frames * per_frame
        if need > len(self._free):
            page_bytes = self.pool.nbytes // self.num_pages
            raise ValueError(
                f"the cache is full: {num_frames} frames of {num_tokens} tokens need {need} pages "
                f"({_size(need * page_bytes)}), {len(self._free)} of {self.num_pages} are free "
                f"({_size(len(self._free) * page_bytes)} of a budget of {_size(self.pool.nbytes)})"
            )
        return [tuple(self._free.pop() for _ in range(per_frame)) for _ in range(num_frames)]

    def _acquire(self, frames: list[_Frame]) -> None:
        for frame in frames:
            for page in frame.pages:
                self._references[page] += 1

    def _release(self, frames: list[_Frame]) -> None:
        for frame in frames:
            for page in reversed(frame.pages):
                self._references[page] -= 1
                if not self._references[page]:
                    self._free.append(page)

    def _rows_of(self, pages: list[tuple[int, ...]], num_tokens: int) -> Tensor:
        first = torch.tensor(pages, dtype=torch.int64)[:, :, None] * self.page_size
        return (first + torch.arange(self.page_size)).flatten(1)[:, :num_tokens].flatten()

    def _table_of(self, frames: list[_Frame]) -> Tensor:
        pages, used = [], []
        for frame in frames:
            pages.extend(frame.pages)
            used.extend([self.page_size] * (len(frame.pages) - 1))
            used.append(frame.num_tokens - self.page_size * (len(frame.pages) - 1))
        return torch.tensor([pages, used], dtype=torch.int32)

    def _set_frames(self, sequence: _Sequence, frames: list[_Frame]) -> None:
        sequence.frames, sequence.table = frames, self._table_of(frames)

    def _table(self, seq: int | None) -> Tensor:
        return _NO_PAGES if seq is None else self._sequence(seq).table

    def _frames(self, seq: int | None) -> list[_Frame]:
        return [] if seq is None else list(self._sequence(seq).frames)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.2f} MiB"
