"""FrameCache against a plain model of it, with everything that is refused mixed in: old views, slots of before, failing
compressions, damaged states."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from ..kernels.test_cache import PAGE, Machine, content, frame, make
from .registry import batch, fuzzer

EDGES = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 7, 100, 2**31, 2**63 - 1])


class Steps:
    """How many operations the machines of a batch have done."""

    count = 0


class HostileMachine(Machine):
    def __init__(self):
        super().__init__()
        self.shown = []  # [cache, view, its sequences, the times that it shows, the frames of each at its refresh]
        self.pinned = []  # (cache, view, the frames that it shows for good)

    def frames_of(self, seqs):
        return [None if seq not in self.frames else [id(f[3]) for f in self.frames[seq]] for seq in seqs]

    def pages(self) -> int:
        """With those that a pinned view holds and no sequence has any more."""
        frames = {id(f[3]): f[1].shape[1] for frames in self.frames.values() for f in frames}
        frames |= {id(f[3]): f[1].shape[1] for cache, _, held in self.pinned if cache is self.cache for f in held}
        return sum(-(-tokens // PAGE) for tokens in frames.values())

    def check_invariants(self, *arguments, **options):
        Steps.count += 1
        return super().check_invariants(*arguments, **options)

    @rule(data=st.data(), chosen=st.booleans())
    def make_view(self, data, chosen):
        if self.frames and len(self.shown) < 6:
            seqs = data.draw(st.lists(st.sampled_from([None, *self.frames]), max_size=3))
            times = None
            if chosen:
                times = [self.some_times(data, seq) for seq in seqs]
            view = self.cache.view(seqs, times, max_pages=self.cache.num_pages)
            self.shown.append([self.cache, view, seqs, times, self.seen_of(seqs, times)])

    def some_times(self, data, seq):
        times = [] if seq is None else [f[0] for f in self.frames[seq]]
        return data.draw(st.none() | st.lists(st.sampled_from(times), unique=True) if times else st.none())

    def seen_of(self, seqs, times):
        """The frames that a view shows, per sequence; None where they cannot be shown any more."""
        now = self.frames_of(seqs)
        for place, seq in enumerate(seqs):
            if times is not None and times[place] is not None and seq in self.frames:
                seen = [id(f[3]) for f in self.frames[seq] if f[0] in times[place]]
                now[place] = seen if len(seen) == len(times[place]) else None
        return now

    @rule()
    def look_at_views(self):
        for cache, view, seqs, times, frames in self.shown:
            current = cache is self.cache and all(
                seq is None or now == then for seq, now, then in zip(seqs, self.seen_of(seqs, times), frames)
            )
            if current:
                self.cache.check_view(view)
            else:
                with pytest.raises(ValueError, match="older than the cache|belongs to another cache"):
                    self.cache.check_view(view)

    @rule()
    def refresh_views(self):
        self.shown = [entry for entry in self.shown if entry[0] is self.cache]
        for entry in self.shown:
            _, view, seqs, times, _ = entry
            seen = self.seen_of(seqs, times)
            if all(seq is None or now is not None for seq, now in zip(seqs, seen)):
                self.cache.check_view(view.refresh())
                entry[4] = seen
            else:
                with pytest.raises(ValueError, match="it was freed|is not resident"):
                    view.refresh()

    @rule(data=st.data())
    def pin_a_view(self, data):
        if self.frames and len(self.pinned) < 3:
            seqs = data.draw(st.lists(st.sampled_from([None, *self.frames]), max_size=2))
            view = self.cache.view(seqs, pinned=True)
            held = [f for seq in seqs if seq is not None for f in self.frames[seq]]
            self.pinned.append((self.cache, view, held))

    @rule()
    def look_at_pinned_views_and_let_one_go(self):
        for cache, view, held in self.pinned:
            cache.check_view(view)
            seen = cache.pool.flatten(2, 3)[:, :, view.rows()]
            empty = torch.empty(*seen.shape[:1], 0, *seen.shape[3:])
            assert all(torch.equal(seen[:, i], torch.cat([empty, *(f[i + 1] for f in held)], 1)) for i in (0, 1))
        del self.pinned[:1]

    @rule(tokens=st.integers(1, 9), again=st.booleans())
    def reuse_a_slot(self, tokens, again):
        free = [seq for seq in self.frames if not self.open(seq)]
        if not free or not self.fits(2 * -(-tokens // PAGE)):
            return
        first = self.cache.begin_frame(free[:1], tokens)
        self.cache.cancel(first)
        second = self.cache.begin_frame(free[:1], tokens, reuse=first)
        before = second.rows.tolist()
        for wrong in (first, second) if again else (first,):
            with pytest.raises(ValueError, match="cannot reuse a slot|has an open frame"):
                self.cache.begin_frame(free[1:2] or free[:1], tokens, reuse=wrong)
        stranger = make()
        foreign = stranger.begin_frame([stranger.new_sequence()], tokens)
        for use in (self.cache.commit, self.cache.cancel):
            with pytest.raises(ValueError, match="belongs to another cache"):
                use(foreign)
        assert second.rows.tolist() == before
        self.cache.cancel(second)

    @rule(data=st.data(), window=st.integers(0, 2), fails=st.sampled_from(["never", "raises", "shape", "grad", "meta"]))
    def compress(self, data, window, fails):
        seqs = [seq for seq in self.frames if not self.open(seq)]
        if not seqs:
            return
        seq = data.draw(st.sampled_from(seqs))
        old = self.frames[seq][: max(0, len(self.frames[seq]) - window)]
        held = self.cache._book.sequence(seq).frames
        old = [f for f, kept in zip(old, held) if not kept.coarse]
        if any(f[1].shape[1] < 2 for f in old):
            return

        def coarse(seq, index):
            k, v = (x[:, :1].clone() for x in self.cache.frame(seq, index))
            if fails == "raises":
                raise RuntimeError("not today")
            if fails == "meta":
                return k.to("meta"), v.to("meta")
            return (k.requires_grad_() if fails == "grad" else k), (v[:, :0] if fails == "shape" else v)

        if fails != "never" and old:
            with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
                self.cache.compress([seq], coarse, window=window)
        elif not old:
            self.cache.compress([seq], coarse, window=window)
        elif self.fits(len(old)):
            self.cache.compress([seq], coarse, window=window)
            gone = {id(f) for f in old}
            self.frames[seq] = [
                (f[0], f[1][:, :1], f[2][:, :1], object()) if id(f) in gone else f for f in self.frames[seq]
            ]

    @rule(data=st.data(), key=st.sampled_from(["sequences", "frames", "frame_pages", "next_id", "pages"]))
    @precondition(lambda self: self.slot is None)
    def load_a_damaged_state(self, data, key):
        """Into another cache: refused, and nothing changes; or taken, and then it is whole."""
        state = self.cache.state_dict()
        kind = data.draw(st.sampled_from(["missing", "cell", "cut", "twice", "type"]))
        value = state.pop(key)
        if kind == "cell" and value.numel() and key != "pages":
            value = value.clone()
            value.view(-1)[data.draw(st.integers(0, value.numel() - 1))] = data.draw(EDGES)
        elif kind == "cut":
            value = value[: len(value) // 2]
        elif kind == "twice":
            value = torch.cat([value, value])
        elif kind == "type":
            value = value.to(torch.int32 if value.is_floating_point() else torch.float64)
        if kind != "missing":
            state[key] = value
        target = make()
        kept = target.new_sequence()
        target.append([kept], *frame(3.0, 5))
        before = content(target, kept)
        try:
            target.load_state_dict(state)
        except ValueError as error:
            assert "\n" not in str(error)
            assert (
                all(map(torch.equal, content(target, kept), before)) and target.num_free_pages == target.num_pages - 2
            )
            return
        again = target.state_dict()
        assert all(torch.equal(again[name], state[name]) for name in state if name != "pages")
        assert target.new_sequence() == int(state["next_id"])


@fuzzer("cache", ci_seeds=1)
def random_operations(seed: int) -> int:
    Steps.count = 0
    machine = hypothesis.seed(seed)(type("CacheMachine", (HostileMachine,), {}))
    run_state_machine_as_test(machine, settings=batch(25, stateful_step_count=40))
    return Steps.count
