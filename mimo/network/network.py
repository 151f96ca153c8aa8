"""The MiMo network: a diffusion transformer over packed tokens, and the decoder of masked history modelling.

Training feeds every clip twice, packed as mimo.network.frames says: clean *history*, a part of its tokens dropped, and noisy
*future*. Both copies share all weights. Future frame t attends to history frames < t and to itself, so one forward pass
trains every frame, and sampling sees exactly what training saw. Blocks are told how to attend (`attend(layer, q, k, v)
-> out`): over the whole packed sequence when training, over a cache when sampling.

Letters: B clips, T frames, N tokens per frame, k kept history tokens per frame, C latent channels, D width, h heads,
d head dimension, R packed rows, G rows of modulation (one per future frame), S sequences being sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.config import MiMoConfig
from mimo.network.blocks import Block, Modulation, Norm, Pending, Place, added_positions, sinusoid
from mimo.network.frames import Layout, Plan, coordinates, make_layout, make_masks, make_plan
from mimo_kernels import AxialRoPE, FrameRows, gather_tokens, scatter_tokens
from mimo_kernels.attention import FrameMask, frame_attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class MiMoOutput(NamedTuple):
    """velocity: [B, T, N, C], or None without noisy frames.
    reconstruction: per offset o the prediction of frames o..T-1 from history up to 0..T-1-o, [B, T-o, N, C]; empty when
    nothing is masked."""

    velocity: Tensor | None
    reconstruction: dict[int, Tensor]


class Decoder(nn.Module):
    """Masked history modelling (Eq. 5): from the features of kept history tokens to the tokens of frame t + offset.

    Kept features go back to their places, a learned query fills the holes, an embedding tells the offset, and a
    frame-causal ViT does the rest: bidirectional attention would show it frame t + 1.
    """

    def __init__(self, config: MiMoConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.query = nn.Parameter(0.02 * torch.randn(config.dim))
        self.offset = nn.Parameter(0.02 * torch.randn(len(config.mask_offsets), config.dim))
        self.positions = added_positions(config)
        vit = {"modulated": False, "affine1": True, "affine2": True}
        self.blocks = nn.ModuleList(Block(config, backend, **vit) for _ in range(config.decoder_depth))
        self.norm = Norm(config.dim, backend, modulated=False, affine=True)
        self.head = nn.Linear(config.dim, config.channels)

    def forward(
        self, features: Tensor, keep: Tensor, offset: int, mask: FrameMask, rows: FrameRows, rope: AxialRoPE | None
    ) -> Tensor:
        """features [B, T, k, D] of history frames 0..T-1, keep [B, k] -> frames offset..T-1+offset, [B, T, N, C]."""
        clips, frames, _, dim = features.shape
        tokens, device = self.config.tokens, features.device
        num_rows = clips * frames * tokens
        first = torch.arange(0, num_rows, tokens, device=device).view(clips, frames, 1)  # row of each frame
        index = (first + keep[:, None]).flatten()
        x = scatter_tokens(features.flatten(0, 2), index, num_rows, self.query, backend=self.backend)
        x = x + self.offset[self.config.mask_offsets.index(offset)].to(x.dtype)
        place = torch.arange(num_rows, device=device) % (frames * tokens)
        coords = coordinates(place, self.config.height, self.config.width)
        if self.positions is not None:
            x = x + self.positions(coords).to(x.dtype)
        c, pending = x.new_empty(0, dim), None  # nothing is modulated

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return frame_attention(q, k, v, mask, backend=self.backend)

        for block in self.blocks:
            x, pending = block(x, pending, c, rows, coords, rope, attend)
        _, y = self.norm(x, pending, self.norm.condition(c), rows)
        return self.head(y).view(clips, frames, tokens, -1)


def build_rope(config: MiMoConfig) -> AxialRoPE | None:
    if config.positions != "rope":
        return None
    return AxialRoPE(config.head_dim, theta=config.rope_theta, split=config.rope_split)


class MiMo(nn.Module):
    """The diffusion transformer, with the decoder that training adds.

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
        self.embed = nn.Linear(config.channels, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.classes = nn.Embedding(config.num_classes + 1, dim) if config.num_classes else None
        self.actions = nn.Embedding(config.num_actions + 1, dim) if config.num_actions else None
        self.intervals = nn.Embedding(config.max_interval, dim) if config.max_interval else None
        self.rope = build_rope(config)
        self.positions = added_positions(config)
        decodes = config.mask_weight > 0
        self.blocks = nn.ModuleList(
            Block(
                config,
                backend,
                modulated=True,
                affine1=config.separate_ln,
                # The last block's history rows end at their keys and values, unless the decoder reads them there.
                affine2=config.separate_ln and (i + 1 < depth or (decodes and config.decoder_layer == depth)),
            )
            for i in range(depth)
        )
        self.norm = Norm(dim, backend, modulated=True, affine=False, gated=False)
        self.head = nn.Linear(dim, config.channels)
        self.decoder = Decoder(config, backend) if decodes else None
        self._initialise()

    def _initialise(self) -> None:
        """DiT's: Xavier for linear layers; modulation and head zero, so that every future row starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.head, *(m.modulation for m in self.modules() if isinstance(m, Norm) and m.modulation)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        history: Tensor,
        noisy: Tensor | None,
        timestep: Tensor | None,
        *,
        keep: Tensor | None = None,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
        drop_history: Tensor | None = None,
        reconstruct: bool = True,
    ) -> MiMoOutput:
        """Velocity of every noisy frame given the clean frames before it, and the reconstruction of masked history.

        Args:
            history: clean latents [B, T, N, C].
            noisy: noisy latents [B, T, N, C]; None runs history alone, as far as the decoder needs it.
            timestep: [B, T] in 0..1000 (a schedule's `embedding`); None with `noisy`.
            keep: int64 [B, k], sorted: the history tokens that are not masked, the same in every frame of a clip. None
                keeps all and reconstructs nothing.
            labels: int64 [B]; None or num_classes is the null class.
            actions: int64 [B, T]; None or num_actions is the null action. An action belongs to the frame it leads to.
            intervals: int64 [B] in 1..max_interval, the distance of a clip's frames in its video; there is no null one.
            drop_history: bool [B, T] on the host: that future frame sees itself alone.
            reconstruct: run the decoder, where there is one and tokens are masked.
        """
        self._check(history, noisy, timestep, keep, drop_history)
        clips, frames, tokens, _ = history.shape
        kept = tokens if keep is None else keep.shape[1]
        plan = self.plan(clips, frames, kept, noisy is not None, reconstruct and keep is not None, drop_history)
        if self.rope is not None:
            self.rope.tables_on(history.device, frames - 1)
        return self.run(plan, history, noisy, timestep, keep, labels, actions, intervals)

    def plan(
        self, clips: int, frames: int, kept: int, noised: bool, reconstruct: bool, drop_history: Tensor | None = None
    ) -> Plan:
        """What `run` needs to know about a batch of this shape; see `forward` for the rest."""
        config = self.config
        offsets = config.mask_offsets if reconstruct and self.decoder is not None else ()
        shape = clips, frames, kept, config.tokens if noised else 0
        plan = make_plan(*shape, config.tokens, config.separate_ln, offsets)
        if drop_history is not None and drop_history.any():
            mask, last_mask = make_masks(*shape, drop_history)
            plan = plan._replace(mask=mask, last_mask=last_mask)
        return plan

    def run(
        self,
        plan: Plan,
        history: Tensor,
        noisy: Tensor | None,
        timestep: Tensor | None,
        keep: Tensor | None,
        labels: Tensor | None,
        actions: Tensor | None,
        intervals: Tensor | None = None,
    ) -> MiMoOutput:
        """`forward` from a plan: device work alone, so that torch.compile(fullgraph=True) takes it whole."""
        clips, frames, tokens, _ = history.shape
        x, coords = self._pack(history, noisy, keep)
        x = self._embed(x, coords, plan.layout, actions, intervals)
        c = None
        if noisy is not None:
            per_frame = None if labels is None else labels[:, None].expand(-1, frames).flatten()
            c = self._condition(timestep.flatten(), per_frame, None if actions is None else actions.flatten())
        decode = len(plan.decoder) > 0
        history_ends = noisy is not None and not (decode and self.config.decoder_layer == self.config.depth)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = plan.last_mask if history_ends and layer + 1 == self.config.depth else plan.mask
            return frame_attention(q, k, v, mask, backend=self.backend)

        velocity, features = self._trunk(x, c, plan.layout, coords, attend, decode=decode)
        if velocity is not None:
            velocity = velocity.unflatten(0, (clips, frames, tokens))
        reconstruction = {}
        for offset, (mask, rows) in plan.decoder.items():
            seen = features.unflatten(1, (frames, -1))[:, : frames - offset]
            reconstruction[offset] = self.decoder(seen, keep, offset, mask, rows, self.rope)
        return MiMoOutput(velocity, reconstruction)

    @property
    def history_conditions(self) -> frozenset[str]:
        """The conditions, of "labels" and "actions", that change the keys and values of a history frame. A guidance branch
        that is not told one of them sees another history than those that are."""
        return frozenset({"actions"} if self.config.num_actions else ())

    def history_frame(
        self,
        x: Tensor,
        position: int | Tensor,
        attend: Attend,
        *,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
        place: Callable[[int], Place] | None = None,
    ) -> None:
        """Runs one clean frame per sequence, so that `attend` can keep the keys and values of every layer.

        Args:
            x: [S, N, C].
            position: frame number, one for all or int [S]. A tensor is not looked at: before it holds 1024 or more on a GPU,
                call `rope.tables_on(device, largest)`.
            attend: called once per layer with q, k, v [S * N, h, d]; returns the attention output [S * N, h, d].
            labels, actions, intervals: int64 [S]. What is not in `history_conditions` changes nothing.
            place: of a layer: where its keys and values are written as they are made, before `attend` is called.
        """
        sequences, tokens, _ = x.shape
        layout = make_layout(sequences, 1, tokens, 0, self.config.separate_ln)
        coords = self._coords(position, sequences, x.device)
        x = self._embed(x.flatten(0, 1), coords, layout, None if actions is None else actions[:, None], intervals)
        self._trunk(x, None, layout, coords, attend, decode=False, place=place)

    def modulations(self, timestep: Tensor, *, labels: Tensor | None = None, actions: Tensor | None = None) -> Tensor:
        """What the norms of `future_frame` are told, [M, G, D]: the shift, scale and gate of each, in the order of use.

        It depends on no token. So a sampler can make it for all steps of a frame at once, and each norm's matrix (a third of
        the network's weights) is read once instead of in every step.

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
        position: int | Tensor,
        attend: Attend,
        *,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
        intervals: Tensor | None = None,
        modulations: Tensor | None = None,
    ) -> Tensor:
        """Velocity of one noisy frame per sequence, [S, N, C] -> [S, N, C].

        Args:
            x: [S, N, C].
            timestep: [S] in 0..1000.
            position, attend: as in `history_frame`; q attends to the kept frames and to its own k, v.
            labels, actions, intervals: int64 [S]; no label or action is the null one.
            modulations: [M, S, D], instead of the timestep, labels and actions that they were made of.
        """
        sequences, tokens, _ = x.shape
        layout = make_layout(sequences, 1, 0, tokens, self.config.separate_ln)
        coords = self._coords(position, sequences, x.device)
        x = self._embed(x.flatten(0, 1), coords, layout, None, intervals)
        c = self._condition(timestep, labels, actions) if modulations is None else None
        v, _ = self._trunk(x, c, layout, coords, attend, decode=False, modulations=modulations)
        return v.view(sequences, tokens, -1)

    def parameter_report(self) -> str:
        """A table of parameter counts by part; the decoder is needed in training only."""
        parts = {
            "embedding": [self.embed, self.positions],
            "conditioning": [self.time, self.classes, self.actions, self.intervals],
            "attention": [block.attention for block in self.blocks],
            "MLP": [block.mlp for block in self.blocks],
            "norms and modulation": [norm for block in self.blocks for norm in (block.norm1, block.norm2)],
            "head": [self.norm, self.head],
            "decoder": [self.decoder],
        }
        counts = {
            name: sum(p.numel() for m in modules if m is not None for p in m.parameters())
            for name, modules in parts.items()
        }
        total = sum(counts.values())
        counts |= {"total": total, "total when sampling": total - counts["decoder"]}
        return "\n".join(f"{name:<22}{count:>15,}" for name, count in counts.items())

    def _trunk(
        self,
        x: Tensor,
        c: Tensor | None,
        layout: Layout,
        coords: Tensor,
        attend: Attend,
        *,
        decode: bool,
        place: Callable[[int], Place] | None = None,
        modulations: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """x [R, D], c [G, D] (None without future, or with `modulations`) -> velocity rows [future rows, C] (None without
        future), history features after layer l [B, T * k, D] (None unless `decode`)."""
        config, rows, features, pending = self.config, layout.rows, None, None
        has_future = layout.future_rows is not None
        if modulations is None:
            c = x.new_empty(0, config.dim) if c is None else c
            if not config.separate_ln and layout.history_len > 0:
                c = torch.cat([c, self._time(torch.zeros(1, device=x.device))])
            c = F.silu(c)
            told = [c] * config.depth
        else:
            m = [Modulation(*three) for three in modulations[:-2].unflatten(0, (-1, 3))]
            told = list(zip(m[::2], m[1::2], strict=True))
        for i, block in enumerate(self.blocks):
            last, read = i + 1 == config.depth, decode and i + 1 == config.decoder_layer
            ends = layout if last and not read else None  # history's keys and values are all that is wanted of it
            stored = None if place is None else place(i)
            x, pending = block(
                x, pending, told[i], rows, coords, self.rope, partial(attend, i), ends=ends, place=stored
            )
            if read:
                gate = 1 if config.separate_ln else pending.gate[-1]
                features = layout.history(x) + gate * layout.history(pending.branch)
            if not has_future and (read or last):
                return None, features
            if last:
                rows = layout.future_rows
                if read:
                    x, pending = layout.future(x), Pending(layout.future(pending.branch), pending.gate)
        last = self.norm.condition(c) if modulations is None else Modulation(*modulations[-2:])
        _, y = self.norm(x, pending, last, rows)
        return self.head(y), features

    def _pack(self, history: Tensor, noisy: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows that are not masked, in packed order: latents [R, C] and coordinates int32 [R, 3]."""
        source = torch.stack([history] if noisy is None else [history, noisy], dim=1)  # [B, copies, T, N, C]
        clips, copies, frames, tokens, _ = source.shape
        size, device = frames * tokens, source.device
        places = torch.arange(copies * size, device=device).expand(clips, -1)  # of a row among the copies of its clip
        x = source.flatten(0, 3)
        if keep is not None:
            kept = torch.arange(0, size, tokens, device=device)[:, None] + keep[:, None]  # [B, T, k]
            places = torch.cat([kept.flatten(1), places[:, size:]], dim=1)
            first = torch.arange(0, len(x), copies * size, device=device)[:, None]  # row of each clip in x
            x = gather_tokens(x, (first + places).flatten(), backend=self.backend)
        return x, coordinates((places % size).flatten(), self.config.height, self.config.width)

    def _embed(self, x: Tensor, coords: Tensor, layout: Layout, actions, intervals) -> Tensor:
        """Latent rows [R, C] -> [R, D], with learned positions, actions [B, T] of history frames, intervals [B] of clips
        where in use. An interval is added to all rows of its clip, as MAGI adds it to the hidden states (its Sec. 3)."""
        x = self.embed(x)
        if self.intervals is not None or intervals is not None:
            interval = self._interval(intervals, layout.clips).to(x.dtype)  # [B, D]
            x = (x.unflatten(0, (layout.clips, -1)) + interval[:, None]).flatten(0, 1)
        if self.positions is not None:
            x = x + self.positions(coords).to(x.dtype)
        if layout.history_len > 0 and (self.actions is not None or actions is not None):
            action = self._action(actions, (layout.clips, layout.frames), x.device).to(x.dtype)  # [B, T, D]
            layout.history(x).unflatten(1, (layout.frames, -1)).add_(action[:, :, None])
        return x

    def _time(self, timestep: Tensor) -> Tensor:
        return self.time(sinusoid(timestep).to(self.time[0].weight.dtype))

    def _condition(self, timestep: Tensor, labels: Tensor | None, actions: Tensor | None) -> Tensor:
        """c of every future frame: [G] each -> [G, D]."""
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

    def _coords(self, position: int | Tensor, sequences: int, device: torch.device) -> Tensor:
        """Coordinates of the tokens of one frame per sequence, int32 [S * N, 3]."""
        place = torch.arange(self.config.tokens, device=device).repeat(sequences, 1)
        if isinstance(position, int):
            self._check_frames(position + 1)
            if self.rope is not None:
                self.rope.tables_on(device, position)
            place += position * self.config.tokens
        else:
            place += position[:, None] * self.config.tokens
        return coordinates(place.flatten(), self.config.height, self.config.width)

    def _check_frames(self, frames: int) -> None:
        if self.config.positions == "learned" and frames > self.config.frames:
            raise ValueError(f"{frames} frames: learned positions end at {self.config.frames}")

    def _check(self, history, noisy, timestep, keep, drop_history) -> None:
        """Refuses shapes that do not fit, by name."""
        config, shape = self.config, history.shape
        if history.dim() != 4 or shape[2:] != (config.tokens, config.channels):
            raise ValueError(f"history is {list(shape)}: expected [B, T, {config.tokens}, {config.channels}]")
        self._check_frames(shape[1])
        if (noisy is None) != (timestep is None):
            raise ValueError("noisy and timestep: expected both or neither")
        if noisy is None and (keep is None or self.decoder is None):
            raise ValueError("noisy=None: expected a keep and a decoder, as there is nothing else to compute")
        expected = {
            "noisy": (noisy, shape),
            "timestep": (timestep, shape[:2]),
            "drop_history": (drop_history, shape[:2]),
        }
        for name, (tensor, wanted) in expected.items():
            if tensor is not None and tensor.shape != wanted:
                raise ValueError(f"{name} is {list(tensor.shape)}: expected {list(wanted)}, to match history")
        if keep is not None and (keep.dim() != 2 or len(keep) != shape[0] or not 1 <= keep.shape[1] <= config.tokens):
            raise ValueError(f"keep is {list(keep.shape)}: expected [{shape[0]}, k] with 1 <= k <= {config.tokens}")
        if drop_history is not None and drop_history.device.type != "cpu":
            raise ValueError(f"drop_history is on {drop_history.device}: expected cpu, where the mask is built")
