"""AxialRoPE: the frequencies of rotary embedding over (t, y, x), and their tables. Data that operators take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mimo_kernels.core import checks, torch_private
from mimo_kernels.core.device_copies import DeviceCopies

MAX_POSITIONS = 1 << 20  # 300 MB of table for heads of 72


class Table(NamedTuple):
    """Cosine and sine of every position and channel pair: [positions, head_dim / 2, 2], and per axis [positions,
    channels]."""

    whole: Tensor
    axes: list[Tensor]


class AxialRoPE:
    """Rotary embedding of integer (t, y, x) positions, a share of the channels for each axis.

    Pair i of an axis with c channels turns by position * theta ** (-2i / c). Pairs are neighbouring channels, (2i, 2i +
    1) of the axis; or, where an operator is told `interleaved=False`, channel p of the head's first half with channel p
    of its second, pairs counted through the axes: t's first.

    Args:
        head_dim: channels of a head, even.
        theta: base of the frequencies.
        split: channels for t, y and x, each even; their sum is head_dim. Default: a third each, rounded down to
            even. Of the channel pairs that are left, one goes to t, two go to y and x, so that space is even:
            72 -> 24, 24, 24, 128 -> 44, 42, 42 (as in Wan and DFoT), 64 -> 20, 22, 22.

    Raises ValueError for an odd head_dim or a split that does not fit.
    Source: Su et al., arXiv 2104.09864, Sec. 3.2, applied to each axis.
    """

    def __init__(self, head_dim: int, *, theta: float = 100.0, split: Sequence[int] | None = None):
        checks.expect_count("AxialRoPE", "head_dim", head_dim, low=2)
        if head_dim % 2:
            checks.refuse("AxialRoPE", "head_dim", f"is {head_dim}", "an even number")
        if split is None:
            pairs = head_dim // 2
            space = (pairs + 1) // 3
            split = (2 * (pairs - 2 * space), 2 * space, 2 * space)
        split = tuple(split)
        for channels in split:
            checks.expect_count("AxialRoPE", "a number of split", channels)
        if len(split) != 3 or sum(split) != head_dim or any(channels % 2 for channels in split):
            checks.refuse("AxialRoPE", "split", f"is {split}", f"three even numbers with the sum {head_dim}")
        checks.expect_number("AxialRoPE", "theta", theta, above=0)
        self.head_dim, self.theta, self.split = head_dim, theta, split
        self._positions = 0
        self._copies: DeviceCopies | None = None
        self.table("cpu")

    def frequencies(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
        """Radians per position of every channel pair: [head_dim / 2]"""
        steps = [torch.arange(0, c, 2, dtype=torch.float64, device=device) / c for c in self.split if c]
        return (self.theta ** -torch.cat(steps)).to(dtype)

    def axes(self, device: torch.device | str = "cpu") -> Tensor:
        """The axis that turns every channel pair, 0, 1 or 2: int64 [head_dim / 2]"""
        pairs = [torch.full((c // 2,), axis, dtype=torch.int64, device=device) for axis, c in enumerate(self.split)]
        return torch.cat(pairs)

    def tables_on(self, device: torch.device | str, max_position: int = 1023) -> tuple[Tensor, Tensor]:
        """(cos, sin) of every position and channel pair: float32 [positions, head_dim / 2], at least up to
        `max_position`.

        Made on the host, kept per device; a larger position makes a table of twice the size, once. Call it where
        positions from 1024 on are about to come in on a GPU: the kernel cannot make its table longer, and stops with a
        message. There are at most 1,048,576 positions.
        """
        checks.expect_count("tables_on", "max_position", max_position, high=MAX_POSITIONS - 1)
        table = self.table(torch.device(device), max_position).whole
        return table[..., 0], table[..., 1]

    def table(self, device: torch.device | str, max_position: int = 1023) -> Table:
        """As `tables_on`, in the layouts that operators and their reference read."""
        if self._copies is None or max_position >= self._positions:
            self._positions = 1 << max(10, max_position.bit_length())
            self._copies = self._make_tables(self._positions)
        whole, *axes = self._copies.on(device)
        return Table(whole, axes)

    def _make_tables(self, positions: int) -> DeviceCopies:
        # Outside of inference mode: a table made in it could not serve training later.
        with torch_private.plain_tensors():
            angle = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * self.frequencies()
            whole = torch.stack([angle.cos(), angle.sin()], dim=-1).float()
            parts = whole.split([channels // 2 for channels in self.split], dim=1)
            axes = (part.flatten(1).contiguous() for part in parts)
            return DeviceCopies(f"AxialRoPE: the tables up to position {positions - 1} (see tables_on)", whole, *axes)
