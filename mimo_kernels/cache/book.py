"""Who owns which page: the host's account of a FrameCache. No tensor of keys or values, nothing on a device."""

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mimo_kernels.core import checks

_NO_PAGES = torch.zeros(3, 0, dtype=torch.int32, device="cpu")


@dataclass(frozen=True)
class Frame:
    index: int  # frames appended to its sequence before it: the absolute time of the frame
    pages: tuple[int, ...]
    num_tokens: int
    coarse: bool = False
    # Keys before their rotation, [num_tokens, layers, heads, head_dim], of a frame that can be rotated again.
    unrotated: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass
class Sequence:
    frames: list[Frame]
    table: Tensor  # int32 [3, pages], host: page numbers, rows in use, place of the frame; replaced, never written to
    appended: int  # frames ever appended
    changed: int  # the book's count of changes when the frames changed last
    open: bool = False  # a frame is reserved and not yet committed


class Hold:
    """One more owner of the pages of some frames, as long as somebody refers to it: a view that shows them for good, or
    a backward that has yet to run."""

    def __init__(self, book: "Book", frames: list[Frame]):
        book.collect()
        book.acquire(frames)
        book.holds += 1
        self._book, self._frames = book, frames

    def __del__(self) -> None:
        # At any moment and in any thread: an append alone, which nothing can interrupt. The book collects them itself.
        self._book.returned.append(self._frames)


class Book:
    """Sequences of frames, the pages of every frame, how many frames a page belongs to, and the free pages.

    `changes` counts: what was read at one count and has another now may be out of date (see CacheView.check_current).
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.references = [0] * num_pages
        self.free = list(range(num_pages - 1, -1, -1))  # a stack: low numbers first, then the latest freed
        self.sequences: dict[int, Sequence] = {}
        self.next_id = 0
        self.changes = 0
        self.holds = 0  # owners beside the sequences
        self.returned: deque[list[Frame]] = deque()  # what holds have given up and nobody has collected yet

    def sequence(self, seq: int) -> Sequence:
        if seq not in self.sequences:
            known = "it was freed" if isinstance(seq, int) and 0 <= seq < self.next_id else "it was never made"
            raise ValueError(f"no sequence {seq} in the cache: {known}")
        return self.sequences[seq]

    def closed(self, seq: int, action: str) -> Sequence:
        sequence = self.sequence(seq)
        if sequence.open:
            raise ValueError(f"sequence {seq} has an open frame and cannot {action}: commit or cancel it first")
        return sequence

    def all_closed(self, action: str) -> None:
        for seq in self.sequences:
            self.closed(seq, action)

    def frames(self, seq: int | None) -> list[Frame]:
        return [] if seq is None else list(self.sequence(seq).frames)

    def table(self, seq: int | None) -> Tensor:
        return _NO_PAGES if seq is None else self.sequence(seq).table

    def changed(self, seq: int | None) -> int | None:
        """The count of changes at which the sequence changed last; None where there is no sequence."""
        sequence = None if seq is None else self.sequences.get(seq)
        return None if sequence is None else sequence.changed

    def add(self, frames: SequenceOf[Frame] = (), appended: int = 0) -> int:
        """A new sequence with these frames, whose pages it shares with those who have them."""
        self.acquire(frames)
        self.changes += 1
        self.sequences[self.next_id] = Sequence(list(frames), self.table_of(frames), appended, self.changes)
        self.next_id += 1
        return self.next_id - 1

    def remove(self, seq: int) -> None:
        self.changes += 1
        self.release(self.sequences.pop(seq).frames)

    def append(self, seq: int, frame: Frame) -> None:
        sequence = self.sequences[seq]
        self.acquire([frame])
        sequence.table = torch.cat([sequence.table, self.table_of([frame], len(sequence.frames))], 1)
        sequence.frames.append(frame)
        sequence.appended += 1
        self.changes += 1
        sequence.changed = self.changes

    def set_frames(self, seq: int, frames: list[Frame]) -> None:
        """Other frames for a sequence: pages that nobody has any more are free."""
        sequence = self.sequences[seq]
        self.acquire(frames)
        before, sequence.frames, sequence.table = sequence.frames, frames, self.table_of(frames)
        self.release(before)
        self.changes += 1
        sequence.changed = self.changes

    def pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def reserve(self, num_frames: int, num_tokens: int) -> list[tuple[int, ...]]:
        """Free pages for some frames; the caller has looked that there are as many."""
        return [tuple(self.free.pop() for _ in range(self.pages_of(num_tokens))) for _ in range(num_frames)]

    def give_back(self, pages: list[tuple[int, ...]]) -> None:
        """What was reserved and never became a frame."""
        for some in pages:
            self.free.extend(reversed(some))

    def collect(self) -> None:
        """Pages whose holds are gone are free where nobody else has them. To be called before free pages are looked
        at."""
        while self.returned:
            self.release(self.returned.popleft())
            self.holds -= 1

    def held_alone(self) -> int:
        """Pages that belong to no sequence any more and are not free yet, because of a hold."""
        self.collect()
        owned = {page for sequence in self.sequences.values() for frame in sequence.frames for page in frame.pages}
        return sum(count > 0 and page not in owned for page, count in enumerate(self.references))

    def acquire(self, frames: SequenceOf[Frame]) -> None:
        for frame in frames:
            for page in frame.pages:
                self.references[page] += 1

    def release(self, frames: SequenceOf[Frame]) -> None:
        for frame in frames:
            for page in reversed(frame.pages):
                self.references[page] -= 1
                if not self.references[page]:
                    self.free.append(page)

    def table_of(self, frames: SequenceOf[Frame], first: int = 0) -> Tensor:
        """As `Sequence.table`, for frames of which the first is number `first` of its sequence."""
        pages: list[int] = []
        used: list[int] = []
        places: list[int] = []
        for place, frame in enumerate(frames, first):
            pages.extend(frame.pages)
            used.extend([self.page_size] * (len(frame.pages) - 1))
            used.append(frame.num_tokens - self.page_size * (len(frame.pages) - 1))
            places.extend([place] * len(frame.pages))
        return torch.tensor([pages, used, places], dtype=torch.int32, device="cpu")

    def rows_of(self, pages: list[tuple[int, ...]], num_tokens: int) -> Tensor:
        """Rows of the pool for the tokens of some frames: int64 [frames * num_tokens], on the host."""
        first = torch.tensor(pages, dtype=torch.int64, device="cpu")[:, :, None] * self.page_size
        return (first + torch.arange(self.page_size, device="cpu")).flatten(1)[:, :num_tokens].flatten()

    # Saving

    def state(self) -> tuple[list[int], dict[str, Tensor]]:
        """The pages in use, ascending, and everything but their content as int64 tensors, pages numbered as in that
        list."""
        used = sorted(
            {page for sequence in self.sequences.values() for frame in sequence.frames for page in frame.pages}
        )
        saved_as = {page: number for number, page in enumerate(used)}
        frames: list[tuple[int, int, int, bool]] = []
        pages: list[int] = []
        for seq, sequence in self.sequences.items():
            for frame in sequence.frames:
                frames.append((seq, frame.index, frame.num_tokens, frame.coarse))
                pages.extend(saved_as[page] for page in frame.pages)
        sequences = [(seq, sequence.appended) for seq, sequence in self.sequences.items()]

        def tensor(values: list, *shape: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device="cpu").view(*shape)

        return used, {
            "sequences": tensor(sequences, -1, 2),
            "frames": tensor(frames, -1, 4),
            "frame_pages": tensor(pages, -1),
            "next_id": tensor([self.next_id], 1),
        }

    def become(self, other: "Book") -> None:
        """Takes over the content of a book of the same size."""
        vars(self).update(vars(other))

    def restored(self, state: dict[str, Tensor], saved_pages: int, unrotated: dict[int, Tensor]) -> "Book":
        """A book of this size with a saved state and the unrotated keys of some frames, by first page; ValueError,
        before anything is made, for what no cache can have saved. It counts on from this one's changes: no view of
        before is taken for current."""
        sequences, frames, numbers, (next_id,) = (
            _numbers(state, key, *shape)
            for key, *shape in (("sequences", 2), ("frames", 4), ("frame_pages",), ("next_id",))
        )
        book = Book(self.num_pages, self.page_size)
        book.next_id, book.changes = next_id, self.changes + 1
        checks.expect_count("saved cache", "next_id", next_id)
        for seq, appended in sequences:
            if not 0 <= seq < next_id or seq in book.sequences or appended < 0:
                raise ValueError(
                    f"saved cache: sequence {seq} with {appended} frames appended is there twice or is none of the "
                    f"{next_id} made so far"
                )
            book.sequences[seq] = Sequence([], _NO_PAGES, appended, book.changes)
        owners: dict[int, Frame] = {}
        left = iter(numbers)
        for seq, index, num_tokens, coarse in frames:
            what = f"saved cache: frame {index} of sequence {seq}, {num_tokens} tokens"
            if seq not in book.sequences:
                raise ValueError(f"{what}: there is no such sequence")
            sequence = book.sequences[seq]
            latest = sequence.frames[-1].index if sequence.frames else -1
            if not latest < index < sequence.appended or coarse not in (0, 1):
                raise ValueError(f"{what}: expected times that ascend below {sequence.appended}, and coarse 0 or 1")
            if num_tokens < 1 or book.pages_of(num_tokens) > saved_pages:
                raise ValueError(f"{what}: expected 1 to {saved_pages * self.page_size} tokens")
            pages = tuple(next(left, -1) for _ in range(book.pages_of(num_tokens)))
            keys = unrotated.get(pages[0])
            if keys is not None and len(keys) != num_tokens:
                raise ValueError(f"{what}: {len(keys)} rows of unrotated keys, expected {num_tokens}")
            frame = Frame(index, pages, num_tokens, bool(coarse), keys)
            others = {owners.setdefault(page, frame) for page in pages}
            if len(set(pages)) < len(pages) or not all(0 <= page < saved_pages for page in pages) or others != {frame}:
                raise ValueError(
                    f"{what}: its pages {list(pages)} are not {len(pages)} of the {saved_pages} saved ones, "
                    "or belong to another frame too"
                )
            sequence.frames.append(frame)
        if next(left, None) is not None or len(owners) != saved_pages:
            raise ValueError(
                f"saved cache: {len(owners)} of {saved_pages} pages belong to frames, expected all of them"
            )
        if lost := unrotated.keys() - {frame.pages[0] for frame in owners.values()}:
            raise ValueError(f"saved cache: unrotated keys for page {min(lost)}, with which no frame begins")
        for sequence in book.sequences.values():
            book.acquire(sequence.frames)
            sequence.table = book.table_of(sequence.frames)
        book.free = [page for page in reversed(range(self.num_pages)) if not book.references[page]]
        return book


def _numbers(state: dict[str, Tensor], key: str, *columns: int) -> list:
    """A saved int64 tensor [n, *columns] as a list."""
    saved = state.get(key)
    if not isinstance(saved, Tensor) or saved.dtype != torch.int64 or saved.shape[1:] != columns or saved.ndim < 1:
        found = f"{saved.dtype} {list(saved.shape)}" if isinstance(saved, Tensor) else type(saved).__name__
        checks.refuse("saved cache", key, f"is {found}", f"int64 [{', '.join(map(str, ('n', *columns)))}]")
    if key == "next_id":
        checks.expect_shape("saved cache", key, saved, 1)
    return saved.tolist()
