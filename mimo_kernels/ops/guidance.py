"""Guidance and one sampler step in one pass: the velocities of all branches are combined and the latents updated in
place."""

import contextlib

import torch
from torch import Tensor

from mimo_kernels.core import backends, checks, launch
from mimo_kernels.core.register import refuse_torch_func, register

if backends.triton_available():
    import triton
    import triton.language as tl

    @triton.jit
    def guided_step_kernel(
        p_x,
        p_v,
        p_weights,
        p_coefficients,
        p_index,
        p_noise,
        num_elements,
        G: tl.constexpr,
        NOISE: tl.constexpr,
        BM: tl.constexpr,
    ):
        o_x = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        m_x = o_x < num_elements
        p_row = p_coefficients + (3 if NOISE else 2) * tl.load(p_index)
        b_v = tl.zeros([BM], dtype=tl.float32)
        for g in tl.static_range(G):
            b_v += tl.load(p_weights + g) * tl.load(p_v + g * num_elements + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.load(p_row) * tl.load(p_x + o_x, mask=m_x, other=0.0) + tl.load(p_row + 1) * b_v
        if NOISE:
            b_x += tl.load(p_row + 2) * tl.load(p_noise + o_x, mask=m_x, other=0.0)
        tl.store(p_x + o_x, b_x, mask=m_x)


BLOCK = 1024


def _guided_step(
    x: Tensor, v: Tensor, weights: Tensor, coefficients: Tensor, index: Tensor, noise: Tensor | None = None
) -> None:
    blocks, drawn = triton.cdiv(x.numel(), BLOCK), x if noise is None else noise
    options = {"G": len(weights), "NOISE": noise is not None, "BM": BLOCK, "num_warps": 4, "enable_fp_fusion": True}
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():  # a launch goes to the current device
        guided_step_kernel[(blocks,)](x, v, weights, coefficients, index, drawn, x.numel(), **options)


_triton_op = register(
    "guided_step_triton(Tensor(a!) x, Tensor v, Tensor weights, Tensor coefficients, Tensor index, "
    "Tensor? noise=None) -> ()",
    _guided_step,
    fake=lambda x, v, weights, coefficients, index, noise=None: None,
    sample=lambda rows: (
        torch.randn(rows, 8),
        torch.randn(2, rows, 8),
        torch.randn(2),
        torch.randn(3, 2),
        torch.tensor([1]),
    ),
)


def serving(device: torch.device) -> dict[str, list[str]]:
    """backend -> the reasons why it cannot serve tensors on `device`, in order of preference."""
    triton_ = launch.triton_refusals(device)
    if device.type == "cuda":
        return {"triton": triton_, "reference": []}
    return {"reference": [], "triton": triton_}


describe_backends = serving


def guided_step(
    x: Tensor,
    v: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    index: Tensor,
    *,
    noise: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One step of a sampler that is linear in x and v, under guidance, in place:

        x <- coefficients[i, 0] * x + coefficients[i, 1] * sum_g weights[g] * v[g]  [+ coefficients[i, 2] * noise]
        i = index[0]

    DDIM with eta 0 and Euler are such samplers, and with noise DDPM's ancestral steps; guidance is a weighted sum of
    velocities whose weights add up to 1 (MiMo, Eq. 27). The step number stands on the device, so a captured CUDA graph
    serves every step.

    Args:
        x: fp32 [...], contiguous; updated.
        v: fp32, fp16 or bf16 [G, ...], contiguous: the velocities of G branches, each shaped as x.
        weights: fp32 [G]. coefficients: fp32 [steps, 2], or with noise [steps, 3]. index: int64 [1], below `steps`.
        noise: fp32, shaped as x, contiguous; None for a sampler that draws nothing.
        backend: "auto", "triton" or "reference".

    Returns: x.

    Raises ValueError for shapes or dtypes that do not fit, and for a backend that cannot serve.
    """
    op = "guided_step"
    checks.expect_tensor(op, "x", x)
    checks.expect_shape(op, "weights", weights, "G")
    if not weights.shape[0]:
        checks.refuse(op, "weights", "has shape [0]", "[G], at least one branch")
    checks.expect_shape(op, "v", v, weights.shape[0], *x.shape)
    checks.expect_shape(op, "coefficients", coefficients, "steps", 2 if noise is None else 3)
    checks.expect_shape(op, "index", index, 1)
    checks.expect_dtype(op, "v", v, *checks.FLOATS)
    checks.expect_dtype(op, "index", index, torch.int64)
    fp32 = {"x": x, "weights": weights, "coefficients": coefficients}
    if noise is not None:
        checks.expect_shape(op, "noise", noise, *x.shape)
        fp32["noise"] = noise
    for name, tensor in fp32.items():
        checks.expect_dtype(op, name, tensor, torch.float32)
    for name, tensor in (fp32 | {"v": v}).items():
        checks.expect_contiguous(op, name, tensor)
    checks.expect_indices(op, "index", index, coefficients.shape[0])
    checks.expect_device(op, x, v=v, weights=weights, coefficients=coefficients, index=index, noise=noise)
    if backends.choose("guided_step", backend, serving(x.device)) == "triton":
        refuse_torch_func("guided_step")
        _triton_op(x, v, weights, coefficients, index, noise)
        return x
    return x.copy_(guided_step_ref(x, v, weights, coefficients, index, noise))


def guided_step_ref(
    x: Tensor, v: Tensor, weights: Tensor, coefficients: Tensor, index: Tensor, noise: Tensor | None = None
) -> Tensor:
    """`guided_step` in plain PyTorch, not in place."""
    of_x, of_v, *of_noise = coefficients[index].flatten().unbind()
    guided = (weights.view(-1, *[1] * x.ndim) * v.float()).sum(0)
    stepped = of_x * x + of_v * guided
    return stepped if noise is None else stepped + of_noise[0] * noise
