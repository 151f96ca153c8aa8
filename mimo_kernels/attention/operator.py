"""The signature, the gradient and the shapes that every backend of frame_attention shares as an operator of torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from mimo_kernels.attention.mask import FrameMask
from mimo_kernels.core.register import register

MASK = "Tensor frames, SymInt repeats, float scale"


def register_attention(
    name: str, forward: Callable, backward: Callable, *, dtype: torch.dtype = torch.float32, head_dim: int = 8
) -> Callable:
    """Registers `mimo_kernels::{name}` and `mimo_kernels::{name}_backward` and returns the first.

    forward(q, k, v, frames, repeats, scale) -> (out, lse);  q, out [B, L, h, d], k, v [B, M, h_kv, d], h_kv a divisor
    of h, lse fp32 [B, h, L];
    backward(dout, dlse or None, q, k, v, out, lse, frames, repeats, scale) -> (dq, dk, dv).
    frames is a mask's host table of one clip, which `repeats` clips share. dtype, head_dim: of tensors that it serves.
    """

    def sample(tokens: int) -> tuple:
        q, k, v = torch.randn(3, 1, tokens, 2, head_dim, dtype=dtype).unbind()
        return q, k, v, FrameMask.block_causal([[tokens]]).pattern, 1, 0.35

    def sample_backward(tokens: int) -> tuple:
        q, k, v, *mask = sample(tokens)
        scores = mask[-1] * torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float())
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(dtype)
        return torch.randn_like(q), None, q, k, v, out, scores.logsumexp(-1), *mask

    def fake(q, k, v, frames, repeats, scale):
        batch, tokens, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)

    def fake_backward(dout, dlse, q, k, v, out, lse, frames, repeats, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    run_backward = register(
        f"{name}_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {MASK})"
        " -> (Tensor, Tensor, Tensor)",
        backward,
        fake=fake_backward,
        sample=sample_backward,
    )

    def save(ctx, inputs, output):
        q, k, v, frames, ctx.repeats, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output, frames)
        ctx.set_materialize_grads(False)

    def gradients(ctx, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, out, lse, frames = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        return *run_backward(dout, dlse, q, k, v, out, lse, frames, ctx.repeats, ctx.scale), None, None, None

    return register(
        f"{name}(Tensor q, Tensor k, Tensor v, {MASK}) -> (Tensor, Tensor)",
        forward,
        fake=fake,
        sample=sample,
        gradients=gradients,
        save=save,
    )
