"""Tile sizes of the attention kernels per architecture, and the schedules that follow from them and a mask."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mimo_kernels.attention.triton.tiles import split_head_dim
from mimo_kernels.core.device_copies import DeviceCopies, OfTables
from mimo_kernels.core.host import planner

# Clips that run side by side hold about so many rows, counted once per head, as many as are computed at the same time:
# their keys and values stay in the cache. Clips that differ share one schedule, which is ordered in bands of so many
# rows; of clips that are alike so many repeat it side by side.
BAND_ROWS = 32768


@dataclass(frozen=True)
class Config:
    """tile: rows (dK/dV: keys) of a program; block: keys (dK/dV: rows) of one step; cost: time per query-key pair
    relative to the other choices; ahead: the forward multiplies one block ahead of its softmax; masked_stages: of the
    masked blocks of dK/dV, whose loop holds more values than that of the bare ones."""

    tile: int
    block: int
    num_warps: int
    num_stages: int
    cost: float = 1.0
    ahead: bool = False
    masked_stages: int = 1


# Pass -> up to this many channels (the padded head dimension) -> the choices for a mask: the one whose schedule
# computes the fewest pairs, weighed by their cost, is taken. What the compiler makes of the entries is checked in
# tests/aot; the costs are estimates, not yet measured.
SM80 = {
    "forward": {128: (Config(128, 64, 8, 2),), 192: (Config(64, 16, 8, 2),), 256: (Config(64, 32, 8, 2),)},
    "dq": {
        80: (Config(128, 64, 8, 2),),
        96: (Config(64, 64, 8, 2),),
        112: (Config(64, 32, 8, 2),),
        128: (Config(64, 64, 8, 2),),
        192: (Config(32, 32, 8, 1),),
        256: (Config(64, 32, 8, 1),),
    },
    "dkv": {
        80: (Config(128, 32, 8, 2),),
        96: (Config(64, 16, 8, 2),),
        112: (Config(64, 16, 4, 2),),
        128: (Config(64, 32, 8, 2),),
        256: (Config(32, 32, 8, 1),),
    },
}
# 99 KiB of shared memory instead of 163.
SM86 = {**SM80, "dq": {**SM80["dq"], 256: (Config(32, 32, 8, 1),)}}
# Programs of 4 warps leave room for a second one on the multiprocessor: one computes its softmax while the other
# multiplies. Where only one fits, it works a block ahead. Three stages because the loads of the next but one block are
# issued behind the current one's matrix products. Keys and values come from the L2 cache for every program anew: tiles
# of 64 rows ask more of it than it gives, which is what they cost.
SM90 = {
    "forward": {
        80: (Config(128, 64, 4, 3), Config(64, 64, 4, 3, 1.45)),
        112: (Config(128, 64, 8, 3),),  # in parts: the products of two blocks would wait for each other
        128: (Config(128, 64, 8, 3, ahead=True),),
        192: (Config(128, 64, 8, 2),),
        256: (Config(128, 32, 8, 2),),
    },
    "dq": {
        96: (Config(128, 64, 8, 3), Config(64, 64, 4, 3, 1.45)),
        128: (Config(128, 64, 8, 3),),
        256: (Config(128, 32, 8, 2),),
    },
    # Two sums of 64 keys x 256 channels do not fit in registers beside the rest: the last entry does without wgmma,
    # which wants 64 keys.
    "dkv": {
        80: (Config(128, 64, 8, 3, masked_stages=2),),
        128: (Config(128, 32, 8, 3, masked_stages=2),),
        192: (Config(64, 16, 8, 2, masked_stages=2),),
        256: (Config(32, 32, 8, 1),),
    },
}
SM100 = {
    "forward": {
        80: (Config(128, 64, 8, 3),),
        128: (Config(128, 64, 8, 2),),
        192: (Config(128, 32, 8, 2),),
        256: (Config(64, 32, 8, 2),),
    },
    "dq": {
        64: (Config(64, 64, 8, 2),),
        96: (Config(128, 64, 8, 2),),
        128: (Config(64, 64, 8, 2),),
        256: (Config(32, 32, 8, 1),),
    },
    "dkv": {
        64: (Config(128, 64, 8, 2),),
        80: (Config(128, 32, 8, 2),),
        128: (Config(64, 64, 8, 2),),
        256: (Config(64, 32, 8, 2),),
    },
}
HALF = {80: SM80, 86: SM86, 90: SM90, 100: SM100, 120: SM86}
PASSES = ("forward", "dq", "dkv")
SINGLE = {name: {64: (Config(32, 32, 4, 1),), 256: (Config(16, 16, 4, 1),)} for name in PASSES}
SINGLE["dq"] = {64: (Config(32, 32, 4, 1),), 80: (Config(32, 16, 4, 1),), 256: (Config(16, 16, 4, 1),)}
INTERPRETED = {name: {256: (Config(32, 32, 1, 1, ahead=True), Config(16, 16, 1, 1, 1.2))} for name in PASSES}


@functools.cache
def configs(name: str, arch: int, dtype: torch.dtype, head_dim: int) -> tuple[Config, ...]:
    """The choices for a pass ("forward", "dq", "dkv") on an architecture (90 for sm_90; 0 for the interpreter)."""
    if arch == 0:
        table = INTERPRETED
    elif dtype == torch.float32:
        table = SINGLE
    else:
        table = HALF[max(known for known in HALF if known <= arch)]
    channels = sum(split_head_dim(head_dim))
    return next(choices for limit, choices in table[name].items() if channels <= limit)


@functools.cache
def architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Plan(NamedTuple):
    """A schedule on the device, and what a launch has to say about it.

    data: int32, tiles and segments as csrc/plan.cpp writes them, for one of `repeats` clips that are alike.
    executed_pairs: query-key pairs the matrix units compute per head, all clips together, tile padding included.
    """

    config: Config
    data: Tensor
    num_tiles: int
    repeats: int
    band: int
    executed_pairs: int


_plans = OfTables()


def plan_for(
    name: str,
    frames: Tensor,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    num_keys: int | None = None,
) -> Plan:
    """The plan of a pass for `repeats` clips with this table of groups (FrameMask.pattern) and `num_keys` keys in all;
    None: as many as rows. Made and uploaded once per table, device and tile size: it is kept with the table, so that
    all layers and the backward share it, and goes away with it. How it gets to the device, see
    core/device_copies.py."""
    plans = _plans[frames]
    key = (name, repeats, device, dtype, heads, head_dim, num_keys)
    made = plans.get(key)
    if made is None:
        choices = configs(name, architecture(device), dtype, head_dim)
        made = plans[key] = make_plan(plans, name, frames, repeats, device, heads, choices, num_keys)
    plan, cells = made
    cells.on(device)  # orders this stream behind the upload
    return plan


def make_plan(
    plans: dict,
    name: str,
    frames: Tensor,
    repeats: int,
    device: torch.device,
    heads: int,
    choices: tuple[Config, ...],
    num_keys: int | None = None,
) -> tuple[Plan, DeviceCopies]:
    """The choice that computes the fewest pairs, weighed by their cost. Schedules are kept in `plans` too: passes with
    the same tiles share them."""
    kind = "plan_keys" if name == "dkv" else "plan_rows"
    band_rows, scheduled = max(1, BAND_ROWS // heads), []
    clip_keys = -1 if num_keys is None else num_keys // repeats
    for config in choices:
        key = (kind, config.tile, config.block, band_rows, num_keys)
        if key not in plans:
            cells, *facts = getattr(planner(), kind)(frames.numpy(), config.tile, config.block, band_rows, clip_keys)
            with torch.inference_mode(False):
                cells = DeviceCopies("the schedules of this mask", torch.frombuffer(cells, dtype=torch.int32))
            plans[key] = cells, *facts
        scheduled.append((config, plans[key]))
    config, (cells, num_tiles, executed, rows) = min(scheduled, key=lambda choice: choice[0].cost * choice[1][2])
    band = max(1, min(repeats, band_rows // max(1, rows)))
    return Plan(config, *cells.on(device), num_tiles, repeats, band, executed * repeats), cells
