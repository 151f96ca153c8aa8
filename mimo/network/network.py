"""The MiMo network: a diffusion transformer over packed frames.

A training sequence is a frame list (mimo.network.frames); the network knows kinds of frames and no system. Clean frames
go through norms of their own (or, with separate_ln off, through AdaLN at tau = 0), noisy ones through AdaLN at their
own timestep, masked ones through the norms of clean ones; all share all other weights. Sampling runs one frame per
sequence at a time over the same blocks, and sees what training saw. Blocks are told how to attend (`attend(layer, q, k,
v) -> out`): over the whole packed sequence when training, over a cache when sampling.

Letters: B clips, T frames, F frames of all clips, N tokens per frame, C channels of a token, D width, h heads, d head
dimension, R packed rows, G rows of modulation (one per frame that is not clean), S sequences being sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.network.blocks import (
    Block,
    LearnedPlaces,
    Modulation,
    Norm,
    Pages,
    Pending,
    added_positions,
    attend_tracks,
    sinusoid,
)
from mimo.network.checks import Tap, check_batch, check_frames, check_recent, check_taps
from mimo.network.cross import Text, Told, across_mask, attend_across, lengths_of, text_on
from mimo.network.frames import Asked, FrameBatch, FrameList, Kind, frame_rows, is_predicted
from mimo.network.heads import Decoder, Projection
from mimo.network.packed import Decoding, Packed, Sizes, frame_coordinates, patches
from mimo.network.recent import Recent
from mimo.network.token_diffusion import TokenDiffusion
from mimo.pretrained import Pretrained
from mimo_kernels import AxialRoPE, FrameMask, FrameRows, frame_attention, gather_tokens

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
TRAINING_ONLY = ("decoder", "projection")  # parts that sampling has no use for


class MiMoOutput(NamedTuple):
    """velocity: of the frames that are neither clean nor coarse, [B, T, N, C], or [rows, C] where clips differ; None
    without such frames. Of a token head, eps of what it was asked, [K, n, C].
    reconstruction: per offset the prediction of frames o..T-1 from clean frames up to 0..T-1-o, [B, T-o, N, C], or
        [rows, C]; empty when nothing is masked.
    features: per tap the hidden state behind that layer, [rows, D], in packed order."""

    velocity: Tensor | None
    reconstruction: dict[int, Tensor]
    features: dict[Tap, Tensor]


def build_rope(config: MiMoConfig) -> AxialRoPE | None:
    if config.positions != "rope":
        return None
    return AxialRoPE(config.head_dim, theta=config.rope_theta, split=config.rope_split)


class MiMo(nn.Module, Pretrained):
    """The diffusion transformer, with the decoder and the projection that training adds.

    Args:
        config: see MiMoConfig.
        backend: "auto" uses the fastest kernels that can serve, "reference" plain PyTorch.
    """

    def __init__(self, config: MiMoConfig, backend: str = "auto") -> None:
        super().__init__()
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend={backend!r}: expected 'auto' or 'reference'")
        self.config, self.backend = config, backend
        dim, depth = config.dim, config.depth
        self.embed = nn.Linear(config.token_channels, dim)
        patch = config.coarse_stride**2 * config.token_channels
        self.embed_coarse = nn.Linear(patch, dim) if config.coarse_stride else None
        predicts_tokens = config.token_depth > 0  # and nothing is modulated
        self.time = None if predicts_tokens else nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim)) if predicts_tokens else None
        self.classes = nn.Embedding(config.num_classes + 1, dim) if config.num_classes else None
        self.actions = nn.Embedding(config.num_actions + 1, dim) if config.num_actions else None
        self.intervals = nn.Embedding(config.max_interval, dim) if config.max_interval else None
        self.noise = nn.Embedding(config.noise_levels, dim) if config.noise_levels else None
        self.places = LearnedPlaces(config) if config.learned_places else None
        self.null_text = nn.Parameter(0.02 * torch.randn(config.text_dim)) if config.text_dim else None
        self.text_norm = nn.LayerNorm(config.text_dim, eps=1e-6) if config.text_dim else None
        self.recent = Recent(config) if config.recent_frames else None
        self.rope = build_rope(config)
        self.positions = added_positions(config)
        decodes = config.mask_weight > 0
        read = {config.decoder_layer} if decodes else set()  # the layers behind which clean rows are read
        if config.repa_weight > 0 and config.repa_frames != "future":
            read.add(config.repa_layer)
        self.blocks = nn.ModuleList(
            Block(
                config,
                backend,
                modulated=not predicts_tokens,
                affine1=config.separate_ln,
                # The last block's history rows end at their keys and values, unless somebody reads them there.
                affine2=predicts_tokens or (config.separate_ln and (i + 1 < depth or depth in read)),
                cross=config.cross_attention,
                coarse=config.coarse_stride > 0 and ("keys" if i + 1 == depth else True),
            )
            for i in range(depth)
        )
        self.norm = Norm(dim, backend, modulated=not predicts_tokens, affine=predicts_tokens, gated=False)
        self.head = TokenDiffusion(config, backend) if predicts_tokens else nn.Linear(dim, config.token_channels)
        self.decoder = Decoder(config, backend) if decodes else None
        self.projection = Projection(config) if config.repa_weight > 0 else None  # of taps; see mimo.recipes.repa
        self._initialise()

    def _initialise(self) -> None:
        """DiT's: Xavier for linear layers; modulation and head zero, so that every future row starts as the
        identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        zero = [m.modulation for m in self.modules() if isinstance(m, Norm) and m.modulation]
        if self.time is not None:
            for layer in (self.time[0], self.time[2]):
                nn.init.normal_(layer.weight, std=0.02)
        if isinstance(self.head, TokenDiffusion):
            self.head.initialise()
        else:
            zero.append(self.head)
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def reshape(self, config: MiMoConfig) -> None:
        """From here on the same weights for clips of another shape: config.frames, height and width. ValueError where a
        weight belongs to a place or a time."""
        fixed = "positions" if config.positions == "learned" else "learned_places" if config.learned_places else None
        if fixed and config.latent_shape != self.config.latent_shape:
            found = "{} x {} x {}".format(*config.latent_shape)
            raise ValueError(
                f"{fixed}={getattr(config, fixed)!r}: expected no other shape of clips, {found} is asked for"
            )
        self.config = config
        if self.decoder is not None:
            self.decoder.config = config

    def forward(self, batch: FrameBatch, *, reconstruct: bool = True, taps: Sequence[Tap] = ()) -> MiMoOutput:
        """Velocity of every frame that is not clean, the reconstruction of masked clean frames, and features.

        Args:
            batch: see FrameBatch and its makers, `clean_and_noisy` and `noisy_alone`.
            reconstruct: False leaves the decoder out.
            taps: what `features` is asked for: (layer, "clean" or "noisy"), layers 1..depth. Of clean frames alone the
                network runs as far as somebody reads.
        """
        config = self.config
        check_batch(config, batch)
        factorized = config.attention == "factorized"
        packed = batch.frames.packed(separate_ln=config.separate_ln, device=batch.latents.device, factorized=factorized)
        decodings = {}
        if reconstruct and self.decoder is not None and packed.clean is not None and batch.tokens is not None:
            found = {
                offset: batch.frames.decoding(offset, config.tokens, batch.latents.device)
                for offset in config.mask_offsets
            }
            decodings = {offset: decoding for offset, decoding in found.items() if decoding is not None}
        last_reads = self.blocks[-1].norm2.weight is not None or not config.separate_ln
        check_taps(config, packed, taps, bool(decodings), last_reads=last_reads)
        given = batch.latents, batch.timestep, batch.tokens, batch.labels, batch.actions, batch.intervals
        across = text = None
        if self.config.cross_attention:
            across, text = self._across(batch), text_on(batch.text, config, batch.latents.device)
        given = *given, batch.noise, batch.masked, batch.asked
        return self.compute(packed, decodings, tuple(taps), *given, across, text, batch.recent)

    def compute(
        self,
        packed: Packed,
        decodings: dict[int, Decoding],
        taps: tuple[Tap, ...],
        latents: Tensor,
        timestep: Tensor | None,
        tokens: Tensor | None,
        labels: Tensor | None,
        actions: Tensor | None,
        intervals: Tensor | None,
        noise: Tensor | None = None,
        masked: Tensor | None = None,
        asked: Asked | None = None,
        across: tuple[FrameMask, FrameMask] | None = None,
        text: tuple[Tensor, Tensor] | None = None,
        recent: Tensor | None = None,
    ) -> MiMoOutput:
        """`forward` from what the host makes of a frame list: device work alone, so that torch.compile(fullgraph=True)
        takes it whole."""
        config, clean, predicted = self.config, packed.clean, packed.predicted
        coords = packed.coordinates(tokens, config.grid[1])
        learned = None
        if self.places is not None or self.noise is not None:
            token = packed.token if tokens is None else tokens
            learned = self._learned(packed.masked[packed.frame], token, None if noise is None else noise[packed.frame])
        x = self._rows(latents, tokens, packed)
        if self.recent is not None and predicted is not None:
            x = predicted.add_rows(x, self.recent(recent).flatten(0, 1))
        x = self._embed(x, coords, intervals, packed.clips, packed.clip, masked, learned)
        if clean is not None and (self.actions is not None or actions is not None):
            told = None if actions is None else actions[clean.clip, clean.time]
            x = clean.add(x, self._action(told, clean.time.shape, x.device).to(x.dtype))
        c = x.new_empty(0, config.dim)
        if timestep is not None:
            clip, time = packed.told_clip, packed.told_time
            told = None if labels is None else labels[clip]
            c = self._condition(timestep, told, None if actions is None else actions[clip, time])
        if clean is not None and not config.separate_ln:
            c = torch.cat([c, self._time(torch.zeros(1, device=x.device))])
        read = (config.decoder_layer, "clean")
        told = None
        if across is not None:
            sequences = self._sequences(labels, text, packed.clips, x.device)
            told = [Told(attend_across(mask, self.backend), sequences) for mask in across]
        taken = {*taps, read} if decodings else {*taps}
        y, features = self._training_trunk(x, F.silu(c), packed, coords, taken, told)
        velocity = None
        if y is not None and isinstance(self.head, TokenDiffusion):
            velocity = None if asked is None else self._ask(asked, y)
        elif y is not None:
            velocity = self.head(y)
            velocity = velocity if predicted.alike is None else velocity.unflatten(0, predicted.alike)
        reconstruction = {}
        if decodings:
            kept = clean.rows(tokens[:, None])
            for offset, decoding in decodings.items():
                reconstruction[offset] = self.decoder(features[read], kept, offset, decoding, self.rope)
        return MiMoOutput(velocity, reconstruction, {tap: features[tap] for tap in taps})

    def _ask(self, asked: Asked, y: Tensor) -> Tensor:
        """eps [K, n, C] of what the token head is asked, from the rows y of the frames that are not clean."""
        told = y[asked.rows]
        if self.places is not None:
            told = told + self.places.told(asked.rows % self.config.tokens).to(told.dtype)
        return self.head(asked.noisy, asked.timestep, told)

    def _training_trunk(
        self,
        x: Tensor,
        c: Tensor,
        packed: Packed,
        coords: Tensor,
        taps: set[Tap],
        told: Sequence[Told] | None = None,
    ) -> tuple[Tensor | None, dict[Tap, Tensor]]:
        """x [R, D], c [G, D] -> what the head is given of the frames that it predicts, [n, D] (None without such),
        and the features of taps. told: what all rows attend to across, and what those of them that are not clean do."""
        depth, predicted = self.config.depth, packed.predicted
        context = packed.clean is not None or packed.sizes is not None
        needed = depth if predicted is not None else max(layer for layer, _ in taps)
        rows, pending, features = packed.rows, None, {}
        for layer, block in enumerate(self.blocks[:needed], start=1):
            # Behind the last block nobody needs the rows of context, unless somebody reads them: their keys and values
            # were all.
            ends = layer == depth and context and predicted is not None and (layer, "clean") not in taps
            attend = partial(self._attend_last if ends else self._attend, packed, layer - 1)
            out = predicted if ends else None
            across = told and told[out is not None]
            x, pending = block(x, pending, c, rows, coords, self.rope, attend, out=out, told=across, sizes=packed.sizes)
            for tap in taps & {(layer, "clean"), (layer, "noisy")}:
                whole = out is not None  # only the noisy rows are left, in their order
                features[tap] = self._settled(x, pending, packed, tap[1], whole)
            if layer == depth and predicted is not None and context:
                if not ends:
                    x, pending = predicted.rows(x), Pending(predicted.rows(pending.branch), pending.gate)
                rows = predicted.frame_rows
        if predicted is None:
            return None, features
        _, y = self.norm(x, pending, self.norm.condition(c), rows)
        return y, features

    def _settled(self, x: Tensor, pending: Pending, packed: Packed, kind: str, whole: bool) -> Tensor:
        """The hidden state behind a block, its MLP added: the rows of a kind, [n, D]. whole: x has no others."""
        part = packed.clean if kind == "clean" else packed.predicted
        select = part.split if whole else part.select
        x, branch = select(x), select(pending.branch)
        if kind == "clean" or self.time is None:
            out = x + branch if self.config.separate_ln else x + pending.gate[-1] * branch
            return out.flatten(0, -2)
        gate = part.per_frame(pending.gate[: len(part.time)] if packed.group is None else pending.gate[packed.group])
        return (part.by_frame(x) + gate * part.by_frame(branch)).flatten(0, -2)

    def _attend(self, packed: Packed, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a training sequence."""
        tracks = packed.tracks
        if tracks is None:
            return frame_attention(q, k, v, packed.mask, backend=self.backend)
        if _is_temporal(layer):
            return attend_tracks(q, k, v, packed.mask, tracks, self.backend)
        return frame_attention(q, k, v, tracks.frames, backend=self.backend)

    def _attend_last(self, packed: Packed, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same of the predicted rows alone: [R, h, d] each -> [n, h, d]."""
        tracks = packed.tracks

        def last(x: Tensor) -> Tensor:
            return packed.predicted.rows(x.flatten(1)).unflatten(1, x.shape[1:])

        if tracks is None:
            return frame_attention(last(q), k, v, packed.last_mask, backend=self.backend)
        if _is_temporal(layer):
            return attend_tracks(q, k, v, packed.last_mask, tracks, self.backend, last=True)
        return last(self._attend(packed, layer, q, k, v))

    def _attend_frame(self, attend: Attend, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one frame per sequence, [S * N, h, d]: what sees no other frame needs no history."""
        if self.config.attention == "joint":
            return attend(layer, q, k, v)
        if _is_temporal(layer):
            return attend(layer // 2, q, k, v)
        mask = _whole_frame(self.config.tokens)
        each = (x.unflatten(0, (-1, self.config.tokens)) for x in (q, k, v))
        return frame_attention(*each, mask, backend=self.backend).flatten(0, 1)

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
        return pages(layer // 2) if _is_temporal(layer) else None

    def _rows(self, latents: Tensor, tokens: Tensor | None, packed: Packed) -> Tensor:
        """Latents [F, N, C] -> embedded rows [R, D], before anything is added."""
        x, config, sizes = latents.flatten(0, 1), self.config, packed.sizes
        if sizes is None:
            if tokens is not None:
                x = gather_tokens(x, packed.frame * config.tokens + tokens, backend=self.backend)
            return self.embed(x)
        assert self.embed_coarse is not None  # `_check` has refused coarse frames of a network without
        coarse = patches(latents[sizes.frames], config.grid[1], config.coarse_stride)
        places = packed.frame * config.tokens + (packed.token if tokens is None else tokens)
        _, fine = sizes.split(places[:, None])
        if fine is not None:
            fine = self.embed(gather_tokens(x, fine.flatten(), backend=self.backend))
        return sizes.join(self.embed_coarse(coarse.flatten(0, 1)), fine, self.backend)

    def _embed(
        self,
        x: Tensor,
        coords: Tensor,
        intervals: Tensor | None,
        clips: int,
        clip: Tensor | None = None,
        masked: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> Tensor:
        """Embedded rows [R, D], those of `masked` the mask token, with added positions, the intervals [B] of
        clips where in use, and what is `learned` of the rows, [R, D]. An interval is added to all rows of its clip
        (`clip` [R], None: all have as many), as MAGI adds it to the hidden states (Sec. 3)."""
        if masked is not None:
            x = torch.where(masked[:, None], self.mask_token.to(x.dtype), x)
        if self.intervals is not None or intervals is not None:
            interval = self._interval(intervals, clips).to(x.dtype)  # [B, D]
            if clip is None:
                x = (x.unflatten(0, (clips, -1)) + interval[:, None]).flatten(0, 1)
            else:
                x = x + interval[clip]
        if self.positions is not None:
            x = x + self.positions(coords).to(x.dtype)
        return x if learned is None else x + learned.to(x.dtype)

    def _learned(self, masked: Tensor | int, token: Tensor, noise: Tensor | None) -> Tensor | None:
        """What is added to rows beside their positions: where they stand in a masked frame (1) or in another (0), and
        how noisy they are; int64 [R] each -> [R, D]."""
        added = None if self.places is None else self.places(masked, token)
        if self.noise is None:
            return added
        level = self.noise(torch.zeros_like(token) if noise is None else noise)
        return level if added is None else added + level

    def _learned_of_frames(self, sequences: int, kind: Kind, noise: Tensor | None = None) -> Tensor | None:
        """As `_learned`, of one frame per sequence; noise: int64 [S]."""
        token = torch.arange(self.config.tokens, device=self.embed.weight.device).repeat(sequences)
        noise = None if noise is None else noise.repeat_interleave(self.config.tokens)
        return self._learned(int(kind == "masked"), token, noise)

    def _sequences(
        self, labels: Tensor | None, text: tuple[Tensor, Tensor] | None, clips: int, device: torch.device
    ) -> Tensor:
        """What clips are told, as embeddings [K, E]: a token of the class each, or padded texts."""
        if not self.config.text_dim:
            null = torch.full((clips,), self.config.num_classes, device=device)
            return self.classes(null if labels is None else labels)
        if text is None:
            return self.null_text.expand(clips, -1)
        features, nothing = text
        features = self.text_norm(features.to(self.text_norm.weight.dtype))
        first = torch.arange(features.shape[1], device=device) == 0
        null, null_text = (nothing[:, None] & first)[..., None], self.null_text.to(features.dtype)
        return torch.where(null, null_text, features).flatten(0, 1)

    def _across(self, batch: FrameBatch) -> tuple[FrameMask, FrameMask]:
        """Which rows are told what: all rows, and those of frames that are not clean."""
        clips = batch.frames.clips
        every = ([sum(f.tokens for f in clip if not last or is_predicted(f)) for clip in clips] for last in (0, 1))
        all_rows, predicted = (across_mask(rows, *lengths_of(batch.text, len(clips))) for rows in every)
        return all_rows, predicted

    def _time(self, timestep: Tensor) -> Tensor:
        return self.time(sinusoid(timestep).to(self.time[0].weight.dtype))

    def _condition(self, timestep: Tensor, labels: Tensor | None, actions: Tensor | None) -> Tensor:
        """c of frames: [G] each -> [G, D]."""
        c = self._time(timestep)
        if labels is not None and self.classes is None:
            raise ValueError("labels are given: expected None, as the network has no classes (num_classes=0)")
        if self.classes is not None:
            null = torch.full_like(timestep, self.config.num_classes, dtype=torch.int64)
            c = c + self.classes(null if labels is None else labels)
        if self.actions is not None or actions is not None:
            c = c + self._action(actions, timestep.shape, timestep.device)
        return c

    def _action(self, actions: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if self.actions is None:
            raise ValueError("actions are given: expected None, as the network has no actions (num_actions=0)")
        if actions is None:
            actions = torch.full(shape, self.config.num_actions, device=device)
        return self.actions(actions)

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

    def _interval(self, intervals: Tensor | None, clips: int) -> Tensor:
        if self.intervals is None:
            raise ValueError("intervals are given: expected None, as the network knows no intervals (max_interval=0)")
        if intervals is None or intervals.shape != (clips,):
            raise ValueError(f"intervals: expected [{clips}] of them, each in 1..{self.config.max_interval}")
        return self.intervals(intervals - 1)


def _is_temporal(layer: int) -> bool:
    """Of the blocks of a network whose attention is factorized: spatial, temporal, spatial, ..."""
    return layer % 2 == 1


@lru_cache(maxsize=64)
def _whole_frame(tokens: int) -> FrameMask:
    return FrameMask.bidirectional([[tokens]])
