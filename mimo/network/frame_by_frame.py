"""The network as sampling runs it: one frame per sequence at a time, over a history that the caller keeps.

Letters as in mimo.network.network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.network.blocks import Modulation, Pages, is_temporal
from mimo.network.checks import check_frames, check_recent
from mimo.network.cross import Text, Told, across_mask, attend_across, lengths_of, text_on
from mimo.network.frames import FrameList, Kind, frame_rows
from mimo.network.packed import Sizes, frame_coordinates
from mimo_kernels import FrameMask, FrameRows, frame_attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class FrameByFrame(nn.Module):
    """What MiMo offers to samplers. Its parts are made in mimo.network.network."""

    config: MiMoConfig
    backend: str

    def rows_of_frames(self, sequences: int, *, clean: bool = False) -> FrameRows:
        """The rows of `future_frame` and of a `history_frame` with a timestep or, `clean`, of one without. A captured
        graph points to their tables: keep them beside it."""
        modulated: bool | None = self.time is not None
        if clean:
            modulated = False if self.config.separate_ln else None
        return frame_rows(sequences, self.config.tokens, modulated=modulated)

    def history_frame(
        self,
        x: Tensor,
        position: float | Tensor,
        attend: Attend,
        *,
        timestep: float | None = None,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
        text: Text | None = None,
        kind: Kind = "clean",
        noise: Tensor | None = None,
        place: Callable[[int], Pages] | None = None,
    ) -> None:
        """Runs one finished frame per sequence, so that `attend` can keep the keys and values of every layer.

        Args:
            x: [S, N, C].
            position: frame number, one for all or int [S]. A tensor is not looked at: before it holds 1024 or more on a
                GPU, call `rope.tables_on(device, largest)`. With positions="sincos" also a time between two frames,
                float or fp32 [S].
            attend: called with the number of a layer that sees other frames, 0 .. config.cached_depth - 1, and its q,
                k, v [S * N, h, d]; returns the attention output [S * N, h, d].
            timestep: the frame goes through AdaLN at this timestep, told labels and actions. None: as a clean frame of
                training, told its action alone. A recipe's `history_policy` says which.
            labels, actions, intervals: int64 [S]; text: of S texts.
            kind: as what it was seen in training: "clean", or "masked" (no token of it is).
            noise: int64 [S], its level of noise, for a network with noise_levels; None: 0.
            place: of such a layer: where its keys and values are written as they are made, before `attend` is called.
        """
        sequences = len(x)
        coords = self._coords(position, sequences, x.device)
        learned = self._learned_of_frames(sequences, kind, noise)
        x = self._embed(self.embed(x.flatten(0, 1)), coords, intervals, sequences, learned=learned)
        if timestep is not None:
            c = self._condition(torch.full((sequences,), timestep, device=x.device), labels, actions)
        else:
            if self.actions is not None or actions is not None:
                action = self._action(actions, (sequences,), x.device).to(x.dtype)
                x.unflatten(0, (sequences, -1)).add_(action[:, None])
            c = x.new_empty(0, self.config.dim)
            if not self.config.separate_ln:
                c = self._time(torch.zeros(1, device=x.device))
        rows = self.rows_of_frames(sequences, clean=timestep is None)
        told = self.told(sequences, labels=labels, text=text)
        self._frame_trunk(x, rows, coords, attend, c=F.silu(c), pages=place, predicts=False, across=told)

    def told(self, sequences: int, *, labels: Tensor | None = None, text: Text | None = None) -> list[Told] | None:
        """What the rows of one frame per sequence attend to across in every block, its keys and values made; None in a
        network without cross-attention. labels: int64 [S]; text: of S texts; None is the null token."""
        if not self.config.cross_attention:
            return None
        device = self.embed.weight.device
        embedded = self._sequences(labels, text_on(text, self.config, device), sequences, device)
        mask = across_mask([self.config.tokens] * sequences, *lengths_of(text, sequences))
        attend = attend_across(mask, self.backend)
        return [Told(attend, keys_values=block.cross.keys_values(embedded)) for block in self.blocks]

    def history_frames(
        self,
        frames: FrameList,
        x: Tensor,
        timestep: Tensor,
        attend: Attend,
        *,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
        place: Callable[[int], Pages] | None = None,
    ) -> None:
        """`history_frame` for several frames of each sequence, noisy and coarse ones.

        Args:
            frames: a clip per sequence, at the times that the frames have.
            x: [F, N, C], whole frames in the order of the list.
            timestep, labels, actions: [F]. intervals: int64 [S].
            attend, place: as in `history_frame`, of the packed rows of the list.
        """
        packed = frames.packed(separate_ln=self.config.separate_ln, device=x.device)
        if self.rope is not None:
            self.rope.tables_on(x.device, max(frame.time for frame in frames.frames))
        coords = packed.coordinates(None, self.config.grid[1])
        c = F.silu(self._condition(timestep, labels, actions))
        x = self._embed(self._rows(x, None, packed), coords, intervals, packed.clips, packed.clip)
        options = {"pages": place, "predicts": False, "sizes": packed.sizes}
        self._frame_trunk(x, packed.rows, coords, attend, c=c, **options)

    def modulations(self, timestep: Tensor, *, labels: Tensor | None = None, actions: Tensor | None = None) -> Tensor:
        """What the norms of `future_frame` are told, [M, G, D]: the shift, scale and gate of each, in the order of use.

        It depends on no token. So a sampler can make it for all steps of a frame at once, and each norm's matrix (a
        third of the network's weights) is read once instead of in every step.

        Args:
            timestep, labels, actions: [G] each, as in `future_frame`.
        """
        c = F.silu(self._condition(timestep, labels, actions))
        norms = *(norm for block in self.blocks for norm in (block.norm1, block.norm2)), self.norm
        return torch.cat([norm.modulation(c).unflatten(-1, (-1, self.config.dim)).transpose(0, 1) for norm in norms])

    def future_frame(
        self,
        x: Tensor,
        timestep: Tensor | None,
        position: float | Tensor,
        attend: Attend,
        *,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
        modulations: Tensor | None = None,
        recent: Tensor | None = None,
    ) -> Tensor:
        """Velocity of one noisy frame per sequence, [S, N, C] -> [S, N, C].

        Args:
            x: [S, N, C].
            timestep: [S] in 0..1000.
            position, attend: as in `history_frame`; q attends to the kept frames and to its own k, v.
            labels, actions, intervals: int64 [S]; no label or action is the null one.
            modulations: [M, S, D], instead of the timestep, labels and actions that they were made of.
            recent: [S, N, recent_frames C], the frames right before, the latest first, for a network that is told them.
        """
        sequences, tokens, _ = x.shape
        check_recent(self.config, recent, sequences)
        coords = self._coords(position, sequences, x.device)
        x = self.embed(x.flatten(0, 1))
        if self.recent is not None:
            x = x + self.recent(recent).flatten(0, 1)
        x = self._embed(x, coords, intervals, sequences)
        c = F.silu(self._condition(timestep, labels, actions)) if modulations is None else None
        rows = self.rows_of_frames(sequences)
        y = self._frame_trunk(x, rows, coords, attend, c=c, modulations=modulations)
        return self.head(y).view(sequences, tokens, -1)

    def masked_frame(
        self,
        x: Tensor,
        masked: Tensor,
        position: float | Tensor,
        attend: Attend,
        *,
        intervals: Tensor | None = None,
        told: Sequence[Told] | None = None,
    ) -> Tensor:
        """What the token head is given of every token of one masked frame per sequence, [S, N, D].

        Args:
            x: [S, N, C]; what lies at masked places is not looked at.
            masked: bool [S, N].
            position, attend, intervals: as in `future_frame`.
            told: as `told` makes it; None is the null token.
        """
        sequences, tokens, _ = x.shape
        coords = self._coords(position, sequences, x.device)
        learned = self._learned_of_frames(sequences, "masked")
        x = self._embed(
            self.embed(x.flatten(0, 1)), coords, intervals, sequences, masked=masked.flatten(), learned=learned
        )
        rows = self.rows_of_frames(sequences)
        across = told or self.told(sequences)
        y = self._frame_trunk(x, rows, coords, attend, c=x.new_empty(0, self.config.dim), across=across)
        y = y.view(sequences, tokens, -1)
        return y if self.places is None else y + self.places.head.to(y.dtype)

    def _frame_trunk(
        self,
        x: Tensor,
        rows: FrameRows,
        coords: Tensor,
        attend: Attend,
        *,
        c: Tensor | None,
        modulations: Tensor | None = None,
        pages: Callable[[int], Pages] | None = None,
        predicts: bool = True,
        across: Sequence[Told] | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor | None:
        """x [S * N, D], one frame per sequence -> what the head is given, [S * N, D]. Unless it `predicts`, the keys
        and values of the last block are the end."""
        told: list[Any] = [None] * self.config.depth
        last = None
        if modulations is not None:
            m = [Modulation(*three) for three in modulations[:-2].unflatten(0, (-1, 3))]
            told, last = list(zip(m[::2], m[1::2], strict=True)), Modulation(*modulations[-2:])
        pending = None
        for i, block in enumerate(self.blocks):
            keys_only = not predicts and i + 1 == self.config.depth
            written = self._pages_of(i, pages)
            given = x, pending, c, rows, coords, self.rope, partial(self._attend_frame, attend, i)
            options = {"modulations": told[i], "keys_only": keys_only, "pages": written, "sizes": sizes}
            x, pending = block(*given, **options, told=across and across[i])
        if not predicts:
            return None
        return self.norm(x, pending, last or self.norm.condition(c), rows)[1]

    def _pages_of(self, layer: int, pages: Callable[[int], Pages] | None) -> Pages | None:
        if pages is None or self.config.attention == "joint":
            return None if pages is None else pages(layer)
        return pages(layer // 2) if is_temporal(layer) else None

    def _attend_frame(self, attend: Attend, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one frame per sequence, [S * N, h, d]: what sees no other frame needs no history."""
        if self.config.attention == "joint":
            return attend(layer, q, k, v)
        if is_temporal(layer):
            return attend(layer // 2, q, k, v)
        mask = _whole_frame(self.config.tokens)
        each = (x.unflatten(0, (-1, self.config.tokens)) for x in (q, k, v))
        return frame_attention(*each, mask, backend=self.backend).flatten(0, 1)

    def _learned_of_frames(self, sequences: int, kind: Kind, noise: Tensor | None = None) -> Tensor | None:
        """As `_learned`, of one frame per sequence; noise: int64 [S]."""
        token = torch.arange(self.config.tokens, device=self.embed.weight.device).repeat(sequences)
        noise = None if noise is None else noise.repeat_interleave(self.config.tokens)
        return self._learned(int(kind == "masked"), token, noise)

    def _coords(self, position: float | Tensor, sequences: int, device: torch.device) -> Tensor:
        """Coordinates of the tokens of one frame per sequence, int32 [S * N, 3]."""
        if isinstance(position, Tensor):
            time = position
        else:
            if isinstance(position, int):
                check_frames(self.config, position + 1)
                if self.rope is not None:
                    self.rope.tables_on(device, position)
            time = torch.full((sequences,), position, device=device)
        return frame_coordinates(time, self.config.tokens, self.config.grid[1])


@lru_cache(maxsize=64)
def _whole_frame(tokens: int) -> FrameMask:
    return FrameMask.bidirectional([[tokens]])
