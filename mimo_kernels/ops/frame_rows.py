"""Which modulation row each packed row of a batch uses."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_kernels.core import torch_private
from mimo_kernels.core.device_copies import DeviceCopies


class FrameRows:
    """Which modulation row each packed row uses: frame i has `lens[i]` rows of group `groups[i]`.

    A group is a row of scale, shift and gate, or -1 for history, which uses the learned weight and bias. Several
    frames may share a group; a frame of no rows is legal; frames need not be sorted.

        lens   = [2, 2, 3, 3]        rows   0 0 | 1 1 | 2 2 2 | 3 3 3       frame
        groups = [-1, -1, 0, 1]            -1 -1 -1 -1  0 0 0   1 1 1       group

    Built on the host once per batch; uploaded once per device without waiting for it (core/device_copies.py).

    Args:
        lens, groups: one int per frame, as sequences or 1-d CPU tensors.
    Raises ValueError for what is not a list of whole numbers, a negative length, a group below -1, or unequal numbers
    of them. Building them breaks a graph of torch.compile; pass them in.
    """

    @torch.compiler.disable
    def __init__(self, lens: Sequence[int] | Tensor, groups: Sequence[int] | Tensor):
        with torch_private.plain_tensors():
            self._build(lens, groups)

    def _build(self, lens: Sequence[int] | Tensor, groups: Sequence[int] | Tensor) -> None:
        lens, groups = _integers("lens", lens), _integers("groups", groups)
        if lens.numel() != groups.numel():
            raise ValueError(f"FrameRows: {lens.numel()} lens and {groups.numel()} groups, expected as many")
        if lens.numel() and int(lens.min()) < 0:
            raise ValueError(f"FrameRows: a frame has {int(lens.min())} rows, expected 0 or more")
        if groups.numel() and int(groups.min()) < -1:
            raise ValueError(
                f"FrameRows: a frame has group {int(groups.min())}, expected -1 (history) or a modulation row"
            )
        self.num_frames = lens.numel()
        self.num_rows = int(lens.sum())
        self.num_groups = int(groups.max()) + 1 if groups.numel() else 0
        self.has_history = bool((groups[lens > 0] < 0).any())
        if max(self.num_rows, self.num_groups) >= 1 << 31:
            raise ValueError(f"FrameRows: {self.num_rows} rows of {self.num_groups} groups, expected fewer than 2^31")
        offsets = F.pad(lens.cumsum(0), (1, 0))
        row = groups.repeat_interleave(lens)
        host = (row, offsets, groups, *_chunks(row, self.num_groups))
        self._copies = DeviceCopies("FrameRows: these rows", *(tensor.to(torch.int32) for tensor in host))

    def row_on(self, device: torch.device | str) -> Tensor:
        """int32 [num_rows]: group of every row."""
        return self._copies.on(device)[0]

    def offsets_on(self, device: torch.device | str) -> Tensor:
        """int32 [frames + 1]: first row of every frame, and the end."""
        return self._copies.on(device)[1]

    def group_on(self, device: torch.device | str) -> Tensor:
        """int32 [frames]: group of every frame."""
        return self._copies.on(device)[2]

    def chunks_on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The backward's work list: int32 [chunks, 3] of (first row, end row, group), ascending in the group, and int32
        [groups + 2]:
        where the chunks of history and of every group begin."""
        chunks, begins = self._copies.on(device)[3:5]
        return chunks, begins


def _integers(name: str, values: Sequence[int] | Tensor) -> Tensor:
    if isinstance(values, Tensor) and torch_private.is_fake(values):
        raise ValueError(f"FrameRows: {name} is a tensor without values (fake or meta), expected whole numbers")
    values = torch.as_tensor(values, device="cpu")
    if values.ndim != 1 or (values.is_floating_point() and values.numel()):  # an empty list is of float32
        raise ValueError(
            f"FrameRows: {name} is {values.dtype} {list(values.shape)}, expected one whole number per frame"
        )
    return values.to(torch.int64)


def _chunks(row: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Runs of rows of one group cut into nearly equal pieces, small enough to fill a GPU and large enough that their
    sums are few."""
    longest = 64 if row.numel() >= 1 << 15 else 32 if row.numel() >= 1 << 14 else 16
    groups, lens = torch.unique_consecutive(row, return_counts=True)
    offsets = F.pad(lens.cumsum(0), (1, 0))
    pieces = (lens + longest - 1) // longest
    run = torch.arange(lens.numel(), device="cpu").repeat_interleave(pieces)
    piece = torch.arange(run.numel(), device="cpu") - F.pad(pieces.cumsum(0), (1, 0))[run]
    begin = offsets[run] + lens[run] * piece // pieces[run]
    end = offsets[run] + lens[run] * (piece + 1) // pieces[run]
    group = groups[run]
    order = group.argsort(stable=True)
    chunks = torch.stack([begin, end, group], dim=1)[order]
    first = F.pad(torch.bincount(group + 1, minlength=num_groups + 1).cumsum(0), (1, 0))
    return chunks, first
