"""The multi-level cache of networks with coarse frames (FAR, Sec. 4.4 and Fig. 8).

What the frame of time t sees, n = config.fine_frames:

    time    0      1     ...    t-n  |  t-n+1  ...  t-1  |  t
            coarse coarse ...  coarse|  fine   ...  fine |  the frame being made

When frame t is done, frame t-n+1 leaves the fine ones. It is encoded as a coarse frame, behind the coarse frames that
are in the cache already. They saw no fine frame and stay as they are. The fine frames did see it as a fine one, so all
of them are encoded again, frame t with them. Both is one pass through the network, block causal, of the coarse tokens
and (n - 1) N fine ones per sequence, which sees the cached coarse frames. Keys and values of the fine frames are thus
those of a forward pass over the whole list, at a cost that does not grow with the video but for what attention reads.

Letters: B clips, K trajectories per clip, S = B * K sequences, N tokens per frame, C latent channels, H histories,
F frames of a pass, R rows of a pass.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.errors import InputError
from mimo.network.frames import Frame, FrameList
from mimo.network.network import MiMo
from mimo.sampling.guidance import Conditions, RunKey
from mimo.sampling.history import CachedHistory, CachePolicy, RecomputedHistory
from mimo_kernels import FrameMask, frame_attention
from mimo_kernels.cache.view import upload


def levels(count: int, config: MiMoConfig) -> list[Frame]:
    """The `count` frames that the next one sees."""
    coarse = max(0, count - (config.fine_frames - 1))
    distant = [Frame(t, "coarse", config.coarse_tokens, config.coarse_stride) for t in range(coarse)]
    return distant + [Frame(t, "noisy", config.tokens) for t in range(coarse, count)]


def told_of(
    conditions: Conditions, rows: Sequence[int], lists: Sequence[Sequence[Frame]], histories: int
) -> dict[str, Any]:
    """What `MiMo.history_frames` tells the frames of some lists, in every history.

    rows: per list, the sequence whose conditions it is told.
    """
    device, history = conditions.position.device, conditions.history
    every = [frame for frames in lists for frame in frames]
    sequence = torch.tensor([row for row, frames in zip(rows, lists, strict=True) for _ in frames])
    time = torch.tensor([frame.time for frame in every])
    found = conditions.of_histories(upload(sequence, device), upload(time, device))
    del found["kind"]  # the lists say it
    timestep = [history.coarse_timestep if frame.kind == "coarse" else history.timestep for frame in every]
    found["timestep"] = upload(torch.tensor(timestep * histories, dtype=torch.float32), device)
    if conditions.intervals is not None:  # one per sequence
        found["intervals"] = conditions.intervals[upload(torch.tensor(rows), device)].repeat(histories)
    return found


class MultiLevelHistory(CachedHistory):
    """Coarse frames and, behind them, the fine ones in a FrameCache; their latents are kept for the next pass.

    A pass depends on how far each sequence is, so it is not captured as a CUDA graph; the denoising steps are.
    """

    captures_record = False

    def __init__(self, model: MiMo, policy: CachePolicy, key: RunKey, conditions: Conditions, page_size: int):
        super().__init__(model, policy, key, conditions, page_size)
        self.kept_frames = model.config.fine_frames - 1
        self.recent = self._no_frames(self.size)  # [S, n - 1, N, C], the latest frames; zeros where there are fewer
        self.counts: list[int] = []  # frames that each of the S sequences has

    def begin(self, clips: list[Tensor]) -> None:
        histories, trajectories = self.key.histories, self.key.trajectories
        self.seqs = [self.cache.new_sequence() for _ in range(histories * len(clips))]  # all of them, should this fail
        firsts, config = list(self.seqs), self.model.config
        given = [clip.to(self.device, torch.float32) for clip in clips]
        lists = [levels(len(clip), config) for clip in clips]
        self._encode(firsts, [b * trajectories for b in range(len(clips))], lists, torch.cat(given))
        recent = self._no_frames(len(clips))
        for frames, clip in zip(recent, given, strict=True):
            latest = clip[max(0, len(clip) - self.kept_frames) :]
            frames[self.kept_frames - len(latest) :] = latest
        self.recent = recent.repeat_interleave(trajectories, 0)
        self.counts = [len(clip) for clip in clips for _ in range(trajectories)]
        self.seqs = []
        for first in firsts:
            self.seqs += [first, *(self.cache.fork(first) for _ in range(trajectories - 1))]
        self._refresh()

    def reserve(self) -> None:
        return  # `record` does, when the frames that it encodes again have given their pages back

    def record(self, x: Tensor) -> None:
        latents = torch.cat([self.recent, x[:, None]], 1)  # [S, n, N, C]
        lists = []
        for s, count in enumerate(self.counts):
            coarse = count - self.kept_frames  # the time of the frame that leaves
            if coarse < 0:
                lists.append(levels(count + 1, self.model.config)[-1:])
                continue
            lists.append(levels(count + 1, self.model.config)[coarse:])
            for seq in self.seqs[s :: self.size]:
                self.cache.evict(seq, window=0, sink=coarse)
        packed = torch.cat([frames[len(frames) - len(new) :] for frames, new in zip(latents, lists, strict=True)])
        self._encode(self.seqs, list(range(self.size)), lists, packed)
        self.recent = latents[:, 1:]
        self.counts = [count + 1 for count in self.counts]

    def commit(self) -> None:
        self._refresh()

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"recent": self.recent.cpu(), "counts": torch.tensor(self.counts)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        found, expected = list(state["recent"].shape), list(self.recent.shape)
        if found != expected or len(state["counts"]) != self.size:
            raise InputError(f"the saved run keeps frames {found}, expected {expected}")
        super().load_state_dict(state)
        self.recent, self.counts = state["recent"].to(self.device), state["counts"].tolist()

    def _no_frames(self, sequences: int) -> Tensor:
        c = self.model.config
        return torch.zeros(sequences, self.kept_frames, c.tokens, c.token_channels, device=self.device)

    def _encode(self, seqs: list[int], rows: list[int], lists: Sequence[list[Frame]], x: Tensor) -> None:
        """Keys and values of frames, into pages behind what their sequences have, all of which they see.

        Args:
            seqs: H times as many sequences of the cache as there are lists, those of history 0 first.
            rows: per list, the sequence whose conditions it is told.
            lists: the frames of a sequence. x: their latents, list after list, [F, N, C].
        """
        if not len(x):
            return
        histories, cache = self.key.histories, self.cache
        every = [*lists] * histories
        before = [cache.num_tokens(seq) for seq in seqs]
        for number in range(max(map(len, lists))):
            for size in sorted({frames[number].tokens for frames in lists if len(frames) > number}):
                fits = [len(frames) > number and frames[number].tokens == size for frames in every]
                cache.commit(cache.begin_frame([seq for seq, fit in zip(seqs, fits, strict=True) if fit], size))
        # Keys and values go to their pages as they are made; then a pass reads all that its sequences have in pages.
        pages = cache.view(seqs).rows()
        lens = [[cached, *(frame.tokens for frame in frames)] for cached, frames in zip(before, every, strict=True)]
        own = upload(_behind(lens), self.device)
        mask, places = FrameMask.block_causal(lens, queries=slice(1, None)), pages[own]  # what is cached asks nothing

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.pool[layer].flatten(1, 2)[:, pages]
            return frame_attention(q, keys, values, mask, backend=self.model.backend)

        self.model.history_frames(
            FrameList(tuple(map(tuple, every)), "block_causal"),
            x.to(self.dtype).repeat(histories, 1, 1),
            attend=attend,
            place=lambda layer: (*cache.pool[layer].flatten(1, 2), places),
            **told_of(self.conditions, rows, lists, histories),
        )


def _behind(lens: list[list[int]]) -> Tensor:
    """int64 [R], the rows of all but the first of each clip's lengths, clips one after the other."""
    firsts = accumulate(map(sum, lens), initial=0)
    spans = [torch.arange(first + clip[0], first + sum(clip)) for first, clip in zip(firsts, lens, strict=False)]
    return torch.cat(spans)


class RecomputedMultiLevelHistory(RecomputedHistory):
    """Latents, put through the network anew in every step, coarse and fine ones as one list: for comparison."""

    def _run(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Keys and values of all that is seen, per layer and sequence of all histories: ``[rows, h, d]``."""
        histories = self.key.histories
        packed = [x for frames in self.frames for x in frames]
        if not packed:
            return [[]] * self.model.config.cached_depth
        lists = [tuple(levels(len(frames), self.model.config)) for frames in self.frames]
        listed, layers = FrameList(tuple(lists * histories), "block_causal"), []
        rows = [sum(frame.tokens for frame in frames) for frames in listed.clips]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layers.append(list(zip(k.split(rows), v.split(rows), strict=True)))
            return frame_attention(q, k, v, listed.mask, backend=self.model.backend)

        x = torch.stack(packed).to(self.dtype).repeat(histories, 1, 1)
        told = told_of(self.conditions, range(self.size), lists, histories)
        self.model.history_frames(listed, x, attend=attend, **told)
        return layers

    def _behind(self, past: Sequence[Tensor], own: Sequence[Tensor], s: int) -> list[Tensor]:
        return [torch.cat([x[None], new], 1) for x, new in zip(past, own, strict=True)]
