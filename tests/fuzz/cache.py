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
        self.shown = []  # (view, its sequences, the frames of each when it was refreshed)

    def frames_of(self, seqs):
        return [None if seq not in self.frames else [id(f[3]) for f in self.frames[seq]] for seq in seqs]

    def check_invariants(self, *arguments, **options):
        Steps.count += 1
        return super().check_invariants(*arguments, **options)

    @rule(data=st.data())
    def make_view(self, data):
        if self.frames and len(self.shown) < 6:
            seqs = data.draw(st.lists(st.sampled_from([None, *self.frames]), max_size=3))
            view = self.cache.view(seqs, max_pages=self.cache.num_pages)
            self.shown.append([self.cache, view, seqs, self.frames_of(seqs)])

    @rule()
    def look_at_views(self):
        for cache, view, seqs, frames in self.shown:
            current = cache is self.cache and all(
                seq is None or now == then for seq, now, then in zip(seqs, self.frames_of(seqs), frames)
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
            _, view, seqs, _ = entry
            if all(seq is None or seq in self.frames for seq in seqs):
                self.cache.check_view(view.refresh())
                entry[3] = self.frames_of(seqs)
            else:
                with pytest.raises(ValueError, match="it was freed"):
                    view.refresh()

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
