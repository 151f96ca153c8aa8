"""frame_attention on Hopper by hand-written kernels (csrc/attention_sm90.cuh), as operators of torch.library.

`mimo_kernels::frame_attention_cuda` and its `_backward`. No GPU has confirmed these kernels yet; they are proven under
emulation (tests/kernels/test_sm90_attention.py), so they serve whoever asks for backend="cuda", and "auto" never takes
them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mimo_kernels.attention.mask import INTERVALS, KEYS
from mimo_kernels.attention.operator import register_attention
from mimo_kernels.core import backends
from mimo_kernels.core.backends import extension
from mimo_kernels.core.device_copies import DeviceCopies, OfTables
from mimo_kernels.core.launch import DTYPES, kernels, place, pointer

HEAD_DIMS = (64, 72, 80, 128)
HALF = (torch.float16, torch.bfloat16)
# Rows of the other side per step. Longer blocks cost fewer barriers and maxima, shorter ones fewer pairs that no row
# sees: the longer one is taken where it computes at most so many times the pairs.
FORWARD_BLOCKS = (128, 64)
LONGER_IS_CHEAPER_BY = 1.04
BACKWARD_BLOCK = 64
BAND_ROWS = 16384  # clips that run side by side hold about so many rows, counted once per head


def device_refusals(device: torch.device) -> list[str]:
    """Why the kernels cannot run on this device."""
    reasons = list(backends.cuda_refusals(device))
    if device.type == "cuda" and not reasons:
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            reasons.append(f"the GPU is sm_{capability[0]}{capability[1]}, the kernels are for sm_90 alone")
        if "sm_90a" not in backends.cuda_archs():
            reasons.append(f"compiled are {', '.join(backends.cuda_archs())}, the kernels need sm_90a")
    return reasons


def input_refusals(dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why the kernels cannot serve tensors like these on any device."""
    reasons = []
    if dtype not in HALF:
        reasons.append(f"q, k and v are {dtype}, expected float16 or bfloat16")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim is {head_dim}, expected one of {', '.join(map(str, HEAD_DIMS))}")
    return reasons


def mask_refusals(mask) -> list[str]:
    """Why the kernels cannot serve a mask."""
    reasons = []
    if mask.clip_lens != mask.key_lens:
        found = f"{mask.num_queries} queries and {mask.num_keys} keys"
        reasons.append(f"the mask has {found}, expected as many of both in each clip")
    intervals = (mask.frames.shape[1] - KEYS) // 2
    if intervals > INTERVALS:
        reasons.append(f"a row of the mask sees {intervals} intervals of keys, expected at most {INTERVALS}")
    return reasons


def attention(q: Tensor, k: Tensor, v: Tensor, mask, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, L, h, d], k, v [B, L, h_kv, d] -> out [B, L, h, d], lse fp32 [B, h, L]; both differentiable.

    B is 1 unless the mask has one clip. ValueError for a first use of the mask inside a CUDA graph capture.
    """
    if scale <= 0:  # the kernels take the maximum before they scale
        q, scale = q * scale, 1.0
    return _operator(q, k, v, mask.pattern_for(q), mask.repeats, scale)


class Plan(NamedTuple):
    """A schedule on the device, for one of the clips that are alike.

    data: int32, as csrc/attention_sm90.h describes it. pairs: query-key pairs the products compute per head and clip.
    rows: of a clip.
    """

    data: Tensor
    tiles: int
    block: int
    pairs: int
    rows: int


_plans = OfTables()


def plan_for(frames: Tensor, *, block: int, keys: bool, heads: int, device: torch.device) -> Plan:
    """The schedule over tiles of rows, or with `keys` of keys. Made and uploaded once per table, and kept with it."""
    plans = _plans[frames]
    band_rows = max(1, BAND_ROWS // heads)
    if (block, keys, band_rows) not in plans:
        cells, *facts = extension().plan_sm90(frames.numpy(), block=block, band_rows=band_rows, keys=keys)
        with torch.inference_mode(False):
            cells = DeviceCopies("the schedules of this mask", torch.frombuffer(cells, dtype=torch.int32))
        plans[block, keys, band_rows] = cells, *facts
    cells, tiles, pairs, rows = plans[block, keys, band_rows]
    (data,) = cells.on(device)
    return Plan(data, tiles, block, pairs, rows)


def forward_plan(frames: Tensor, heads: int, device: torch.device) -> Plan:
    """The schedule of the forward, with the block length that suits the mask."""
    long, short = (plan_for(frames, block=block, keys=False, heads=heads, device=device) for block in FORWARD_BLOCKS)
    return long if long.pairs <= LONGER_IS_CHEAPER_BY * short.pairs else short


def _forward(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, repeats: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel():
        q, k, v = (_addressable(x) for x in (q, k, v))
        plan = forward_plan(frames, heads, q.device)
        kernels().attention_sm90_forward(
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            plan=plan.data.data_ptr(),
            tiles=plan.tiles,
            block=plan.block,
            **_described(q=q, k=k, v=v),
            **_problem(q, k, frames, plan, repeats, scale),
        )
    return out, lse


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    frames: Tensor,
    repeats: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if dq.numel():
        dout, q, k, v = (_addressable(x) for x in (dout, q, k, v))
        out, lse = out.contiguous(), lse.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        rows, keys = (
            plan_for(frames, block=BACKWARD_BLOCK, keys=keys, heads=heads, device=q.device) for keys in (False, True)
        )
        padded = -(-rows.rows // 4) * 4
        statistics = torch.empty((batch, heads, 2, repeats, padded), dtype=torch.float32, device=q.device)
        kernels().attention_sm90_backward(
            dq=dq.data_ptr(),
            dk=dk.data_ptr(),
            dv=dv.data_ptr(),
            rows=statistics.data_ptr(),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            dlse=pointer(dlse),
            row_plan=rows.data.data_ptr(),
            key_plan=keys.data.data_ptr(),
            row_tiles=rows.tiles,
            key_tiles=keys.tiles,
            **_described(dout=dout, q=q, k=k, v=v),
            **_problem(q, k, frames, rows, repeats, scale),
        )
    return dq, dk, dv


def _described(**tensors: Tensor) -> dict[str, int]:
    """Address and strides of tensors [B, L, h, d], by the names of the launchers' parameters."""
    described = {}
    for name, x in tensors.items():
        described[name] = x.data_ptr()
        described[f"{name}_batch"], described[f"{name}_row"], described[f"{name}_head"], _ = x.stride()
    return described


def _problem(q: Tensor, k: Tensor, frames: Tensor, plan: Plan, repeats: int, scale: float) -> dict:
    batch, _, heads, head_dim = q.shape
    return {
        "groups": len(frames),
        "band": max(1, min(batch * repeats, BAND_ROWS // (heads * plan.rows))),
        "batch": batch,
        "repeats": repeats,
        "length": plan.rows,
        "heads": heads,
        "kv_heads": k.shape[2],
        "head_dim": head_dim,
        "scale": scale,
        "dtype": DTYPES[q.dtype],
        **place(q),
    }


def _addressable(x: Tensor) -> Tensor:
    """The tensor itself when a tensor map can tell of it: 16-byte steps, channels side by side; else a copy."""
    steps = x.stride()[:3]
    if x.stride(-1) == 1 and not any(step % 8 or step <= 0 for step in steps) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


_operator = register_attention("frame_attention_cuda", _forward, _backward, dtype=torch.float16, head_dim=64)
