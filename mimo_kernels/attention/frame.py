"""Attention under a FrameMask: out = softmax(scale * q k^T over the keys each row sees) v, and which backend computes
it."""

import functools
import math

import torch
from torch import Tensor

from mimo_kernels.attention import reference, sm90
from mimo_kernels.attention.mask import FrameMask
from mimo_kernels.core import backends, checks

__all__ = ["FrameMask", "describe_backends", "frame_attention"]

MAX_HEAD_DIM = 256


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FrameMask,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed clips, every row seeing the frames its mask allows (MiMo, Sec. 3.3; the mask's drawing:
    `print(mask)`).

        out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax over the keys j that row i sees of scale * q[i] . k[j]
        lse[i] = log sum_j exp(scale * q[i] . k[j])

    Args:
        q: [queries, heads, head_dim], or [batch, queries, heads, head_dim] with a mask of one clip that every batch
            entry shares. fp32, fp16 or bf16; head_dim any multiple of 8 up to 256. Strides are free.
        k, v: [keys, kv_heads, head_dim], or with the batch of q, where kv_heads divides heads. Query head i takes
            key head i // (heads / kv_heads): grouped-query attention, with kv_heads = 1 multi-query attention. Nothing
            is expanded; dk and dv are sums over the query heads that share them.
        mask: a FrameMask of so many queries and keys; lengths, clips and masks may change from call to call without
            recompiling.
        scale: factor on the scores; None: head_dim ** -0.5.
        backend: "auto" takes the fastest that serves (Triton on a GPU, else the reference); "triton", "cuda" (Hopper
            alone, head_dim 64, 72, 80 or 128, fp16 or bf16, as many keys as queries, at most three intervals of keys
            per row) and "reference" insist on one.
        return_lse: also return lse, fp32 [heads, queries] or [batch, heads, queries], in natural log.

    Returns:
        out, shaped and typed as q; with return_lse (out, lse). A row that sees no key gives 0, and lse -inf. Both are
        differentiable in q, k and v; the gradients are deterministic, and the backward keeps q, k, v, out and lse
        alone.

    Example, a batch of clips of the same lengths: one mask of one clip, tensors [batch, tokens, heads, head_dim].

        mask = FrameMask.block_causal([[256] * 16])
        out = frame_attention(q, k, v, mask)  # q [8, 4096, 16, 72]

    Clips of different lengths are packed one after another, [tokens, heads, head_dim], under a mask that tells the
    lengths of each.

    Raises:
        ValueError: tensors that do not fit each other or the mask, naming both sides; a backend that cannot serve, with
        every reason.
    """
    _check(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else finite("frame_attention", scale)
    backend = _serving_backend(backend, q.device, q.dtype, q.shape[-1])
    if backend == "cuda" and (reasons := sm90.mask_refusals(mask)):
        backends.choose("frame_attention", backend, {backend: reasons})
    batched = q.dim() == 4
    if not batched:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    out, lse = _attention(backend)(q, k, v, mask, scale)
    if not batched:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


def describe_backends(device: torch.device | str) -> dict[str, list[str]]:
    """Backend -> every reason why it cannot serve bf16 tensors with 64 channels on this device; empty: it can."""
    device = torch.device(device)
    return {name: _refusals(name, device, torch.bfloat16, 64) for name in _preference(device)}


def finite(op: str, scale: float) -> float:
    """The factor on the scores; ValueError for what is no finite number."""
    try:
        number = float(scale)
    except (TypeError, ValueError):
        number = math.nan
    if not -math.inf < number < math.inf:
        checks.refuse(op, "scale", f"is {scale!r}", "a finite number")
    return number


def _check(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask) -> None:
    op = "frame_attention"
    if not isinstance(mask, FrameMask):
        checks.refuse(op, "mask", f"is a {type(mask).__name__}", "a FrameMask")
    checks.expect_tensor(op, "q", q)
    checks.expect_kind(op, "q", q, k=k, v=v)
    if not torch.compiler.is_compiling():
        mask.check_unchanged()
    checks.expect_dtype(op, "q", q, *checks.FLOATS)
    if q.dim() not in (3, 4):
        layouts = "[tokens, heads, head_dim] or [batch, tokens, heads, head_dim]"
        checks.refuse(op, "q", f"has shape {list(q.shape)}", layouts)
    head_dim = q.shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        checks.refuse(op, "head_dim", f"is {head_dim}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM}")
    if q.shape[-3] != mask.num_queries:
        expected = f"{mask.num_queries} as the mask has, or a mask made for this sequence{_hint(q, mask)}"
        checks.refuse(op, "q", f"has {q.shape[-3]} tokens", expected)
    if q.dim() == 4 and mask.num_clips != 1:
        found = f"is a batch of {q.shape[0]} sequences and the mask has {mask.num_clips} clips"
        expected = "a mask of one clip for batched input, or all clips packed into [tokens, heads, head_dim]"
        checks.refuse(op, "q", found, expected)
    heads, kv_heads = q.shape[-2], k.shape[-2] if k.dim() == q.dim() else 0
    checks.expect_shape(op, "k", k, *q.shape[:-3], mask.num_keys, "kv_heads", head_dim)
    checks.expect_like(op, "k", k, v=v)
    if heads != kv_heads and (not heads or not kv_heads or heads % kv_heads):
        checks.refuse(op, "k", f"has {kv_heads} heads", f"a number that divides the {heads} heads of q")


def _hint(q: Tensor, mask: FrameMask) -> str:
    if q.shape[-2] != mask.num_queries:
        return ""
    axes = "batch, heads, tokens, head_dim" if q.dim() == 4 else "heads, tokens, head_dim"
    return (
        f" (q looks like the [{axes}] of scaled_dot_product_attention; here tokens come before heads: "
        f"q.transpose({q.dim() - 3}, {q.dim() - 2}))"
    )


def _preference(device: torch.device) -> tuple[str, ...]:
    return ("triton", "cuda", "reference") if device.type == "cuda" else ("reference", "triton", "cuda")


@torch.compiler.assume_constant_result
def _serving_backend(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return _choose(requested, device, dtype, head_dim)


@functools.cache
def _choose(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Depends on nothing that changes from step to step: a look-up in eager mode, a constant under torch.compile."""
    refusals = {}
    for name in _preference(device):
        # Only the reasons that can matter: asking Triton loads it.
        refusals[name] = _refusals(name, device, dtype, head_dim) if requested in ("auto", name) else []
        if requested == "auto" and name == "cuda":
            refusals[name].insert(0, "no results of a GPU confirm it yet, so it serves by name alone")
        if requested == "auto" and not refusals[name]:
            break
    return backends.choose("frame_attention", requested, refusals)


def _refusals(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    if backend == "reference":
        return reference.refusals(device)
    if backend == "cuda":
        return [*sm90.input_refusals(dtype, head_dim), *sm90.device_refusals(device)]
    if reasons := backends.triton_refusals(device):
        return reasons
    try:
        from mimo_kernels.attention.triton import operator as triton_op
    except ImportError as error:
        return [f"the Triton kernels do not load ({error})"]
    typical = torch.empty(1, 1, 1, 64, dtype=dtype, device=device)
    return triton_op.refusals(typical, typical, typical, FrameMask.block_causal([[1]]))


def _attention(backend: str):
    if backend == "reference":
        return reference.attention
    if backend == "cuda":
        return sm90.attention
    from mimo_kernels.attention.triton import operator as triton_op

    return triton_op.attention
