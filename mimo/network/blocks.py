"""The parts that the network and its decoder are made of: attention, MLP, norms, and the block of the three.

Letters: R packed rows, G rows of modulation (one per future frame), D width, h heads, d head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimo.config import MiMoConfig
from mimo.network.cross import CrossAttention, Told
from mimo.network.fp8 import Projection
from mimo.network.packed import Part, Sizes, Tracks
from mimo_kernels import (
    AxialRoPE,
    FrameMask,
    FrameRows,
    bias_gelu,
    frame_attention,
    gated_residual_modulate,
    gather_tokens,
    modulate,
    qk_norm_rope,
)
from mimo_kernels.ops.rope import qk_norm_rope_cache

Pages = tuple[Tensor, Tensor, Tensor]  # keys and values [slots, h, d] of a layer, and the slot of every row, int64 [R]


def sinusoid(t: Tensor, width: int = 256) -> Tensor:
    """Sinusoidal embedding of t in 0..1000 (Vaswani et al. 2017): [G] -> fp32 [G, width]."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def is_temporal(layer: int) -> bool:
    """Of the blocks of a network whose attention is factorized: spatial, temporal, spatial, ..."""
    return layer % 2 == 1


def attend_tracks(
    q: Tensor, k: Tensor, v: Tensor, mask: FrameMask, tracks: Tracks, backend: str, *, last: bool = False
) -> Tensor:
    """Temporal attention of packed frames, [R, h, d] each: rows are taken track by track, so that one call serves all
    places. mask: of the tracks. last: only rows that are predicted ask, and come out, [n, h, d]."""

    def taken(x: Tensor, index: Tensor) -> Tensor:
        return gather_tokens(x.flatten(1), index, backend=backend).unflatten(1, x.shape[1:])

    q = taken(q, tracks.last_to_tracks if last else tracks.to_tracks)
    k, v = (taken(x, tracks.to_tracks) for x in (k, v))
    out = frame_attention(q, k, v, mask, backend=backend)
    return taken(out, tracks.last_to_frames if last else tracks.to_frames)


def by_size(x: Tensor, sizes: Sizes | None, fine: nn.Module, coarse: nn.Module | None, backend: str) -> Tensor:
    """x [R, D] -> [R, D'], the coarse rows through a layer of their own. sizes=None: all rows are fine."""
    if sizes is None:
        return fine(x)
    assert coarse is not None, "this network has no coarse frames"  # MiMo has refused them by name
    few, many = sizes.split(x)
    return sizes.join(coarse(few), None if many is None else fine(many), backend)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised (unless config.qk_norm is False), rotated queries and keys.

    Args:
        coarse: coarse rows occur, with projections of their own; "keys": only to queries, keys and values, as nobody
            reads what they collect.
    """

    def __init__(self, config: MiMoConfig, backend: str, coarse: Literal["keys"] | bool = False) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, backend
        self.qkv = Projection(config.dim, 3 * config.dim)
        self.qkv_coarse = Projection(config.dim, 3 * config.dim) if coarse else None
        self.proj_coarse = Projection(config.dim, config.dim) if coarse is True else None
        self.q_norm = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.proj = Projection(config.dim, config.dim)

    def forward(
        self,
        y: Tensor,
        coords: Tensor,
        rope: AxialRoPE | None,
        attend: Callable,
        pages: Pages | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor:
        """y [R, D] -> what the rows collected, before the output projection, [R, D] or those that `attend` tells of.
        Keys and values also go to `pages`."""
        qkv = by_size(y, sizes, self.qkv, self.qkv_coarse, self.backend)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # [R, 3, h, d]
        given = qkv, self.q_norm, self.k_norm, None if rope is None else coords, rope
        v = qkv[:, 2]
        if pages is not None:
            q, k = qk_norm_rope_cache(*given, *pages, backend=self.backend)
        elif qkv.requires_grad:  # a v of its own costs a copy, the backward of the view several
            q, k, v = qk_norm_rope(*given, return_v=True, backend=self.backend)
        else:
            q, k = qk_norm_rope(*given, backend=self.backend)
        return attend(q, k, v).flatten(-2)


class MLP(nn.Module):
    """down(gelu(up(y))); the first bias is added inside the activation, which keeps nothing but the product."""

    def __init__(self, config: MiMoConfig, backend: str) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.backend = backend
        self.up = Projection(config.dim, hidden)
        self.down = Projection(hidden, config.dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.down(bias_gelu(self.up.product(y), self.up.bias, backend=self.backend))


class Modulation(NamedTuple):
    """What c says about a norm and the branch behind it, [G, D] each; a final norm has no branch and no gate."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


class Pending(NamedTuple):
    """What a block leaves for the norm behind it to add: branch [R, D] and its gate [G, D]."""

    branch: Tensor
    gate: Tensor


class Norm(nn.Module):
    """LayerNorm of packed rows, in front of a branch (attention, MLP, head).

        future row of frame g:  y = LN(x) (1 + scale[g]) + shift[g],  the branch comes back times gate[g]  (AdaLN-zero)
        history row:            y = LN(x) weight + bias,              the branch comes back as it is

    Args:
        modulated: future rows occur; c gives shift, scale and gate.
        affine: history rows occur, with a weight and bias of their own.
        gated: a branch follows.
    """

    def __init__(self, dim: int, backend: str, *, modulated: bool, affine: bool, gated: bool = True) -> None:
        super().__init__()
        self.backend = backend
        self.modulation = nn.Linear(dim, (3 if gated else 2) * dim) if modulated else None
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def condition(self, c: Tensor) -> Modulation:
        """c [G, D] -> Modulation."""
        if self.modulation is None:
            return Modulation(c, c, c)  # G = 0: nothing is modulated
        return Modulation(*self.modulation(c).unflatten(-1, (-1, c.shape[-1])).unbind(1))

    def forward(self, x: Tensor, pending: Pending | None, m: Modulation, rows: FrameRows) -> tuple[Tensor, Tensor]:
        """x' = x + gate branch (x itself if nothing is pending) and y = norm(x'), in one pass."""
        options = {"weight": self.weight, "bias": self.bias, "backend": self.backend}
        if pending is None:
            return x, modulate(x, m.scale, m.shift, rows, **options)
        return gated_residual_modulate(x, pending.branch, pending.gate, m.scale, m.shift, rows, **options)


class Block(nn.Module):
    """A transformer block: norm1, attention, norm2, MLP; between the two, with `cross`, a norm and cross-attention.

    The end of one block and the norm of the next are one fused operation. So a block leaves the product of its MLP
    pending, and begins by adding what the block before it left: whoever shards, recomputes or compiles the network
    block by block has all that a block needs in one call.
    """

    def __init__(
        self,
        config: MiMoConfig,
        backend: str,
        *,
        modulated: bool,
        affine1: bool,
        affine2: bool,
        coarse: Literal["keys"] | bool = False,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.norm1 = Norm(config.dim, backend, modulated=modulated, affine=affine1)
        self.attention = Attention(config, backend, coarse)
        self.norm_cross = Norm(config.dim, backend, modulated=modulated, affine=affine2) if cross else None
        self.cross = CrossAttention(config) if cross else None
        self.norm2 = Norm(config.dim, backend, modulated=modulated, affine=affine2)
        self.mlp = MLP(config, backend)
        self.recompute = False  # activation checkpointing

    def forward(self, *given, **options) -> tuple[Tensor, Pending | None]:
        """`compute`, keeping for the backward what it needs or, with `recompute`, no more than what comes in."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, *given, **options, use_reentrant=False, preserve_rng_state=False)
        return self.compute(*given, **options)

    def compute(
        self,
        x: Tensor,
        pending: Pending | None,
        c: Tensor | None,
        rows: FrameRows,
        coords: Tensor,
        rope: AxialRoPE | None,
        attend: Callable,
        *,
        modulations: tuple[Modulation, Modulation] | None = None,
        out: Part | None = None,
        keys_only: bool = False,
        pages: Pages | None = None,
        told: Told | None = None,
        sizes: Sizes | None = None,
    ) -> tuple[Tensor, Pending | None]:
        """x [R, D] -> x' before the MLP is added, [R, D] or the rows of `out`, and what is pending.

        Args:
            x, pending: rows in, and what the block before left for them.
            c: silu of the conditioning, [G, D], from which norm1 and norm2 are modulated.
            rows: the modulation row of every row.
            coords: int32 [R, 3].
            attend: q, k, v [R, h, d] -> [R, h, d], or what the rows of `out` collect.
            modulations: of norm1 and norm2, instead of c.
            out: rows out, which alone ask; None is all of them.
            keys_only: no rows out: their keys and values are all that is wanted.
            pages: where keys and values are also written.
            told: what the rows (those of `out`) attend to across, of a block that does.
            sizes: which rows are coarse; those of `out` are not.
        """
        m1, m2 = modulations or (self.norm1.condition(c), self.norm2.condition(c))
        x, y = self.norm1(x, pending, m1, rows)
        collected = self.attention(y, coords, rope, attend, pages, sizes)
        if keys_only:
            return x, None
        if out is not None:
            x, rows, sizes = out.rows(x), out.frame_rows, None
        branch = by_size(collected, sizes, self.attention.proj, self.attention.proj_coarse, self.backend)
        pending = Pending(branch, m1.gate)
        if self.cross is not None:
            across = self.norm_cross.condition(c)
            x, y = self.norm_cross(x, pending, across, rows)
            pending = Pending(self.cross(y, told), across.gate)
        x, y = self.norm2(x, pending, m2, rows)
        return x, Pending(self.mlp(y), m2.gate)


class LearnedPositions(nn.Module):
    """Added positions: a learned vector per frame plus one per place in the frame."""

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__()
        self.width = config.grid[1]
        self.time = nn.Parameter(0.02 * torch.randn(config.frames, config.dim))
        self.space = nn.Parameter(0.02 * torch.randn(config.tokens, config.dim))

    def forward(self, coords: Tensor) -> Tensor:
        """coords int32 [R, 3] -> [R, D]."""
        return self.time[coords[:, 0]] + self.space[coords[:, 1] * self.width + coords[:, 2]]


class FixedPositions(nn.Module):
    """Added positions that nothing learns, those of DiT: sines and cosines of y and x, half of the channels each, plus
    those of t over all channels (the time that DiT, a network for images, lacks; as Latte adds it).

        e(p, W)  = [sin(p w_i), cos(p w_i)],  w_i = 10000 ** (-2i / W),  i = 0 .. W/2 - 1
        position = [e(x, D/2), e(y, D/2)] + e(t, D)

    Between two times lies what is linear between them, (1 - s) e(n, D) + s e(n + 1, D) at n + s: longer videos than
    those of training are squeezed into its times.

    Source: Peebles and Xie 2023; Ma et al. 2024 (Latte); Zhou et al. 2025 (MAGI), App. A.4.
    """

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__()
        self.dim = config.dim

    def forward(self, coords: Tensor) -> Tensor:
        """coords [R, 3], int32, or fp32 with times between two frames -> fp32 [R, D]."""
        t, y, x = coords.unbind(1)
        place = torch.cat([self._waves(x, self.dim // 2), self._waves(y, self.dim // 2)], 1)
        if not coords.is_floating_point():
            return place + self._waves(t, self.dim)
        before = t.floor()
        return place + torch.lerp(
            self._waves(before, self.dim), self._waves(before + 1, self.dim), (t - before)[:, None]
        )

    @staticmethod
    def _waves(position: Tensor, width: int) -> Tensor:
        """[R] -> fp32 [R, width]"""
        half = width // 2
        frequency = torch.exp(torch.arange(half, device=position.device) * (-math.log(10_000) / half))
        angle = position[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class LearnedPlaces(nn.Module):
    """A learned vector per place: of clean frames, of masked ones, and for what the token head is told of a token."""

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__()
        self.frames = nn.Parameter(0.02 * torch.randn(2, config.tokens, config.dim))
        self.head = nn.Parameter(0.02 * torch.randn(config.tokens, config.dim))

    def forward(self, masked: Tensor | int, token: Tensor) -> Tensor:
        """token int64 [R] of frames that are masked ones (1) or not (0) -> [R, D]."""
        return F.embedding(masked * self.head.shape[0] + token, self.frames.flatten(0, 1))

    def told(self, token: Tensor) -> Tensor:
        """int64 [n] -> what is added to what the token head is told, [n, D]."""
        return F.embedding(token, self.head)


def added_positions(config: MiMoConfig) -> nn.Module | None:
    """What config.positions adds to the tokens; None for RoPE, which turns queries and keys instead."""
    return {"rope": lambda _: None, "sincos": FixedPositions, "learned": LearnedPositions}[config.positions](config)
