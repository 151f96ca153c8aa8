"""How a backend of frame_attention becomes an operator of torch.library that torch.compile and autograd know."""

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("mimo_kernels", "FRAGMENT")
MASK = "Tensor frames, SymInt repeats, float scale"


def register(name: str, forward: Callable, backward: Callable) -> Callable:
    """Defines `mimo_kernels::{name}` and `mimo_kernels::{name}_backward` and returns the first.

    forward(q, k, v, frames, repeats, scale) -> (out, lse);  q, k, v, out [B, L, h, d], lse fp32 [B, h, L];
    backward(dout, dlse or None, q, k, v, out, lse, frames, repeats, scale) -> (dq, dk, dv).
    frames is a mask's host table of one clip, which `repeats` clips share.
    """
    backward_name = f"{name}_backward"
    schemas = {
        name: f"(Tensor q, Tensor k, Tensor v, {MASK}) -> (Tensor, Tensor)",
        backward_name: f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {MASK})"
        " -> (Tensor, Tensor, Tensor)",
    }
    for operator, implementation in ((name, forward), (backward_name, backward)):
        LIBRARY.define(operator + schemas[operator], tags=torch.Tag.pt2_compliant_tag)
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(operator, implementation, device)

    def fake(q, k, v, frames, repeats, scale):
        batch, tokens, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)

    def fake_backward(dout, dlse, q, k, v, out, lse, frames, repeats, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    run, run_backward = (getattr(torch.ops.mimo_kernels, operator).default for operator in (name, backward_name))

    def setup_context(ctx, inputs, output):
        q, k, v, frames, ctx.repeats, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output, frames)
        ctx.set_materialize_grads(False)

    def gradients(ctx, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, out, lse, frames = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        return *run_backward(dout, dlse, q, k, v, out, lse, frames, ctx.repeats, ctx.scale), None, None, None

    torch.library.register_fake(f"mimo_kernels::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"mimo_kernels::{backward_name}", fake_backward, lib=LIBRARY)
    torch.library.register_autograd(f"mimo_kernels::{name}", gradients, setup_context=setup_context, lib=LIBRARY)
    return run
