"""The MiMo network: a diffusion transformer over packed frames.

A training sequence is a frame list (mimo.network.frames); the network knows kinds of frames and no system. Clean frames
go through norms of their own (or, with separate_ln off, through AdaLN at tau = 0), noisy ones through AdaLN at their
own timestep, masked ones through the norms of clean ones; all share all other weights. Sampling runs one frame per
sequence at a time over the same blocks, and sees what training saw. Blocks are told how to attend (`attend(layer, q, k,
v) -> out`): over the whole packed sequence when training, in this file; over a cache when sampling, in
mimo.network.frame_by_frame.

Letters: B clips, T frames, F frames of all clips, N tokens per frame, C channels of a token, D width, h heads, d head
dimension, R packed rows, G rows of modulation (one per frame that is not clean), S sequences being sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.network.blocks import (
    Block,
    LearnedPlaces,
    Norm,
    Pending,
    added_positions,
    attend_tracks,
    is_temporal,
    sinusoid,
)
from mimo.network.checks import Tap, check_batch, check_taps
from mimo.network.cross import Told, across_mask, attend_across, lengths_of, text_on
from mimo.network.frame_by_frame import FrameByFrame
from mimo.network.frames import Asked, FrameBatch, is_predicted
from mimo.network.heads import Decoder, Projection
from mimo.network.packed import Decoding, Packed, patches
from mimo.network.recent import Recent
from mimo.network.token_diffusion import TokenDiffusion
from mimo.pretrained import Pretrained
from mimo_kernels import AxialRoPE, FrameMask, frame_attention, gather_tokens

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


class MiMo(FrameByFrame, Pretrained):
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
        if is_temporal(layer):
            return attend_tracks(q, k, v, packed.mask, tracks, self.backend)
        return frame_attention(q, k, v, tracks.frames, backend=self.backend)

    def _attend_last(self, packed: Packed, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same of the predicted rows alone: [R, h, d] each -> [n, h, d]."""
        tracks = packed.tracks

        def last(x: Tensor) -> Tensor:
            return packed.predicted.rows(x.flatten(1)).unflatten(1, x.shape[1:])

        if tracks is None:
            return frame_attention(last(q), k, v, packed.last_mask, backend=self.backend)
        if is_temporal(layer):
            return attend_tracks(q, k, v, packed.last_mask, tracks, self.backend, last=True)
        return last(self._attend(packed, layer, q, k, v))

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

    def _interval(self, intervals: Tensor | None, clips: int) -> Tensor:
        if self.intervals is None:
            raise ValueError("intervals are given: expected None, as the network knows no intervals (max_interval=0)")
        if intervals is None or intervals.shape != (clips,):
            raise ValueError(f"intervals: expected [{clips}] of them, each in 1..{self.config.max_interval}")
        return self.intervals(intervals - 1)
