"""The signature, the gradient and the shapes that every backend of paged_frame_attention shares as an operator of
torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from mimo_kernels.attention.mask import FrameMask
from mimo_kernels.core import page_tables, torch_private
from mimo_kernels.core.register import register

# k_pages, v_pages [pages, page_size, heads, D]; tables, lengths and bias as in triton/paged.py: Pages; mask: the host
# table of a FrameMask over the new rows, or None: all of them see each other. scales, last of all: fp32 [2, pages,
# heads], by which the numbers in pages of keys and of values are multiplied; None: by nothing.
PAGES = "Tensor k_pages, Tensor v_pages, Tensor tables, Tensor? lengths, Tensor? bias, Tensor? mask, float scale"


def sample(tokens: int) -> tuple:
    """Two heads of q for one of the cache; a page, and the beginning of another one."""
    torch.manual_seed(tokens)
    q = torch.randn(1, tokens, 4, 8)
    k_self, v_self = torch.randn(2, 1, tokens, 2, 8).unbind()
    k_pages, v_pages = torch.randn(2, 3, 16, 2, 8).unbind()
    tables = torch.tensor([[2, 2, 0, 16, 5, 0, 1]], dtype=torch.int32)
    bias = torch.tensor([[0.5, -1.0]])
    return q, k_self, v_self, k_pages, v_pages, tables, None, bias, FrameMask.block_causal([[tokens]]).pattern, 0.35


def register_paged(name: str, forward: Callable, backward: Callable) -> Callable:
    """Registers `mimo_kernels::{name}` and `mimo_kernels::{name}_backward` and returns the first.

    forward(q, k_self, v_self, *pages, scale, splits, scales) -> (out, lse);   q, out [S, N, H, D], lse fp32 [S, H, N];
    backward(dout, dlse or None, q, k_self, v_self, out, lse, *pages, scale, scales) -> (dq, dk_self, dv_self).

    The operator takes the number of a view too (core/page_tables.py): its pages then stay until the backward has run.
    It returns a third result, which owns them: a copy of the tables, empty where no number is given.
    """

    def run(q, k_self, v_self, k_pages, v_pages, tables, lengths, bias, mask, scale, view=-1, splits=None, scales=None):
        held = page_tables.held_copy(tables, view)
        pages = k_pages, v_pages, tables, lengths, bias, mask
        return *forward(q, k_self, v_self, *pages, scale, splits, scales), held

    def fake(
        q, k_self, v_self, k_pages, v_pages, tables, lengths, bias, mask, scale, view=-1, splits=None, scales=None
    ):
        num_seqs, tokens, heads, _ = q.shape
        held = tables.new_empty(tables.shape if view >= 0 else (0,))
        return q.new_empty(q.shape), q.new_empty((num_seqs, heads, tokens), dtype=torch.float32), held

    def fake_backward(dout, dlse, q, k_self, v_self, *rest):
        return q.new_empty(q.shape), k_self.new_empty(k_self.shape), v_self.new_empty(v_self.shape)

    def sample_backward(tokens: int) -> tuple:
        args = sample(tokens)
        out, lse, _ = operator(*args)
        return torch.randn_like(out), None, *args[:3], out, lse, *args[3:]

    run_backward = register(
        f"{name}_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k_self, Tensor v_self, Tensor out, Tensor lse,"
        f" {PAGES}, Tensor? scales=None) -> (Tensor, Tensor, Tensor)",
        backward,
        fake=fake_backward,
        sample=sample_backward,
    )

    def save(ctx, inputs, output):
        q, k_self, v_self, k_pages, v_pages, tables, lengths, bias, mask, ctx.scale, view, _, scales = inputs
        out, lse, held = output
        kept = held if view >= 0 else tables
        ctx.save_for_backward(q, k_self, v_self, out, lse, k_pages, v_pages, kept, lengths, bias, mask, scales)
        if torch_private.saved_tensors_are_packed():  # others keep what is saved, in a form that owns no pages
            ctx.pages = getattr(held, "pages", None)
        ctx.set_materialize_grads(False)

    def gradients(ctx, dout: Tensor | None, dlse: Tensor | None, _):
        q, k_self, v_self, out, lse, *pages, scales = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        found = run_backward(dout, dlse, q, k_self, v_self, out, lse, *pages, ctx.scale, scales)
        return *found, *[None] * 10

    operator = register(
        f"{name}(Tensor q, Tensor k_self, Tensor v_self, {PAGES}, SymInt view=-1, SymInt? splits=None,"
        " Tensor? scales=None) -> (Tensor out, Tensor lse, Tensor held)",
        run,
        fake=fake,
        sample=sample,
        gradients=gradients,
        save=save,
    )
    return operator
