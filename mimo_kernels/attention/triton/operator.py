"""frame_attention on Triton kernels, as operators of torch.library: `mimo_kernels::frame_attention_triton` and its
`_backward`."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mimo_kernels.attention.operator import register_attention
from mimo_kernels.attention.triton import backward as triton_bwd
from mimo_kernels.attention.triton import forward as triton_fwd
from mimo_kernels.attention.triton.schedule import PASSES, Plan, plan_for
from mimo_kernels.core import backends

MAX_BATCH = 65535  # what the second dimension of a grid holds


def refusals(q: Tensor, k: Tensor, v: Tensor, mask) -> list[str]:
    """Why the Triton kernels cannot serve tensors like these; empty when they can. Shapes and dtypes have passed
    frame_attention's checks."""
    reasons = backends.triton_refusals(q.device)
    if not reasons and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly; use float32 or float16 on the CPU")
    return reasons


def attention(q: Tensor, k: Tensor, v: Tensor, mask, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, L, h, d], k, v [B, M, h_kv, d] -> out [B, L, h, d], lse fp32 [B, h, L]; both differentiable. B is 1 unless
    the mask has one clip."""
    if scale <= 0:  # the kernels take the maximum before they scale
        q, scale = q * scale, 1.0
    return _operator(q, k, v, mask.pattern_for(q), mask.repeats, scale)


def plans(q: Tensor, mask) -> dict[str, Plan]:
    """The plans that attention over q [.., h, d] with this mask uses, by pass: their tile sizes and the pairs they
    compute."""
    given = mask.pattern, mask.repeats, q.device, q.dtype, *q.shape[-2:], mask.num_keys
    return {name: plan_for(name, *given) for name in PASSES}


def _forward(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, repeats: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_dim = q.shape
    if batch > MAX_BATCH:
        parts = [_forward(*part, frames, repeats, scale) for part in _in_parts(q, k, v)]
        return tuple(torch.cat(results) for results in zip(*parts))
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    if out.numel():
        q, k, v = (_addressable(x) for x in (q, k, v))
        with _on_device(q):
            plan = plan_for("forward", frames, repeats, q.device, q.dtype, heads, head_dim, k.shape[1])
            triton_fwd.forward(q, k, v, out, lse, plan, scale)
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
    if len(q) > MAX_BATCH:
        inputs = (dout, torch.zeros_like(lse) if dlse is None else dlse, q, k, v, out, lse)
        parts = [_backward(*part, frames, repeats, scale) for part in _in_parts(*inputs)]
        return tuple(torch.cat(results) for results in zip(*parts))
    if not q.shape[1]:  # nobody asks
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    if out.numel():
        dout, q, k, v = (_addressable(x) for x in (dout, q, k, v))
        dlse = None if dlse is None else dlse.contiguous()
        with _on_device(q):
            row_plan, key_plan = (
                plan_for(name, frames, repeats, q.device, q.dtype, *q.shape[2:], k.shape[1]) for name in ("dq", "dkv")
            )
            triton_bwd.backward(
                dout, dlse, q, k, v, out.contiguous(), lse.contiguous(), *gradients, row_plan, key_plan, scale
            )
    return gradients


def _in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(MAX_BATCH) for x in tensors))


def _addressable(x: Tensor) -> Tensor:
    """The tensor itself when 16-byte loads of its channels are aligned, as in any slice of a projection; else a
    copy."""
    if x.stride(-1) == 1 and not any(stride % 8 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


_operator = register_attention("frame_attention_triton", _forward, _backward)
