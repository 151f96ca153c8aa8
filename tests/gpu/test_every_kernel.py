"""Every kernel once, small, forward and backward: the first thing to run on a new GPU, and what `benchmarks/report.py
--sanitize` runs under compute-sanitizer. Whether results are right is for the other files; here they have to be finite
and to need no more than the memory they own."""

import importlib

import pytest
import torch

from mimo_kernels import (
    AxialRoPE,
    FrameCache,
    FrameRows,
    gated_residual_modulate,
    gather_tokens,
    modulate,
    paged_frame_attention,
    qk_norm_rope,
    scatter_tokens,
)
from mimo_kernels.attention import FrameMask, frame_attention
from mimo_kernels.attention.paged import _triton_op
from mimo_kernels.core.operators import OPERATORS
from mimo_kernels.core.register import SAMPLES
from mimo_kernels.ops.gelu import bias_gelu
from mimo_kernels.ops.guidance import guided_step
from mimo_kernels.ops.losses import weighted_squared_error

for family in {operator.family for operator in OPERATORS}:
    importlib.import_module(f"mimo_kernels.{family}")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, dtype=torch.float32, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_(grad)


def finish(outputs: tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> None:
    gradients = torch.autograd.grad(sum(out.float().sum() for out in outputs), inputs)
    torch.cuda.synchronize()
    assert all(t.isfinite().all() for t in (*outputs, *gradients))


@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frame_attention(dtype, head_dim):
    # Bare and masked blocks, tiles that end early, three key intervals, a dropped frame; rows and keys that end inside
    # a tile.
    mask = FrameMask.teacher_forcing(
        [[130, 40, 70], [64, 1, 9]],
        [[200, 65, 7], [64, 0, 3]],
        drop_history=[[False, True, False]] * 2,
        window=2,
        sink=1,
    )
    inputs = [draw(mask.num_tokens, 2, head_dim, dtype=dtype) for _ in range(3)]
    finish(frame_attention(*inputs, mask, backend="triton", return_lse=True), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_paged_frame_attention_and_guided_step(dtype):
    cache = FrameCache(1, 2, 72, num_pages=12, page_size=16, dtype=dtype, device="cuda")
    seq = cache.new_sequence()
    q, k, v = (draw(1, 40, 2, 72, dtype=dtype, grad=False) for _ in range(3))
    for _ in range(2):
        cache.append([seq], k[None], v[None])
    view = cache.view([seq])
    out = paged_frame_attention(q, k, v, cache, layer=0, view=view, backend="triton")
    tables = view.tables, None, torch.zeros(1, 2, device="cuda"), None
    split, *_ = _triton_op(q, k, v, *cache.keys_and_values(0), *tables, 0.1, splits=3)
    inputs = [draw(1, 40, heads, 72, dtype=dtype) for heads in (4, 2, 2)]
    more = {"self_mask": FrameMask.block_causal([[15, 25]]), "backend": "triton", "return_lse": True}
    finish(paged_frame_attention(*inputs, cache, layer=0, view=view, **more), inputs)
    one, *_ = (x[:, :1].detach() for x in inputs)  # few tiles: the gradient is split
    finish(paged_frame_attention(one.requires_grad_(), k[:, :1], v[:, :1], cache, layer=0, view=view), [one])
    x, velocities = draw(5, 7, grad=False), draw(3, 5, 7, dtype=dtype, grad=False)
    weights, coefficients = draw(3, grad=False), draw(4, 2, grad=False)
    guided_step(x, velocities, weights, coefficients, torch.tensor([3], device="cuda"), backend="triton")
    torch.cuda.synchronize()
    assert all(t.isfinite().all() for t in (out, split, x))


@pytest.mark.parametrize("dim", [72, 1152, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulate(dtype, dim):
    rows = FrameRows([3, 1, 0, 5, 19, 1], [-1, 0, 3, 2, 4, -1])
    x, branch, weight, bias = (draw(*shape, dtype=dtype) for shape in ((rows.num_rows, dim),) * 2 + ((dim,),) * 2)
    gate, scale, shift = (draw(5, dim, dtype=dtype) for _ in range(3))
    inputs = [x, branch, gate, scale, shift, weight, bias]
    finish(
        gated_residual_modulate(x, branch, gate, scale, shift, rows, weight=weight, bias=bias, backend="cuda"), inputs
    )
    inputs = [x, scale, shift, weight, bias]
    finish((modulate(x, scale, shift, rows, weight=weight, bias=bias, backend="cuda"),), inputs)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (5, 72), (3, 136), (2, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope(dtype, heads, head_dim):
    qkv, q_weight, k_weight = draw(37, 3, heads, head_dim, dtype=dtype), draw(head_dim), draw(head_dim)
    coords = torch.randint(0, 9, (37, 3), device="cuda", dtype=torch.int32)
    outputs = qk_norm_rope(qkv, q_weight, k_weight, coords, AxialRoPE(head_dim), return_v=True, backend="cuda")
    finish(outputs, [qkv, q_weight, k_weight])


@pytest.mark.parametrize("norm", ["row", "head", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_of_other_networks(dtype, norm):
    for interleaved, (heads, kv_heads, head_dim) in ((True, (12, 12, 128)), (False, (5, 2, 72)), (False, (1, 1, 8))):
        columns = {"row": (heads * head_dim, kv_heads * head_dim), "head": (head_dim, head_dim), "none": ()}[norm]
        weights = [draw(size, dtype=dtype) for size in columns]
        q, k = draw(37, heads, head_dim, dtype=dtype), draw(37, kv_heads, head_dim, dtype=dtype)
        table = draw(37, head_dim // 2, 2)
        options = {"interleaved": interleaved, "backend": "cuda"}
        finish(qk_norm_rope((q, k), *(weights or (None, None)), None, table, **options), [q, k, table, *weights])


@pytest.mark.parametrize("dim", [3, 72])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_and_loss(dtype, dim):
    x, fill = draw(50, dim, dtype=dtype), draw(dim, dtype=dtype)
    index = torch.randperm(50, device="cuda")[:31]
    kept = gather_tokens(x, index, backend="cuda")
    back = scatter_tokens(kept, index, 50, fill, backend="cuda")
    target, weight = draw(50, dim, dtype=dtype, grad=False), draw(50, grad=False)
    finish((kept, back, weighted_squared_error(back, target, weight, backend="cuda")), [x, fill])


@pytest.mark.parametrize("dim", [8, 264, 2056])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gelu(dtype, dim):
    x, bias = draw(71, dim, dtype=dtype), draw(dim)
    finish((bias_gelu(x, bias, backend="cuda"),), [x, bias])


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_of_every_operator(name):
    """What a new operator gets without a line here."""
    on_host = SAMPLES[name](37)
    operator = getattr(torch.ops.mimo_kernels, name).default
    # The table of an attention mask lies on the host.
    stays = {i for i, argument in enumerate(operator._schema.arguments) if argument.name == "frames"}
    args = [arg.cuda() if isinstance(arg, torch.Tensor) and i not in stays else arg for i, arg in enumerate(on_host)]
    results = operator(*args)
    torch.cuda.synchronize()
    results = results if isinstance(results, tuple) else () if results is None else (results,)
    written = [arg for arg, it in zip(args, operator._schema.arguments) if it.alias_info is not None]
    assert all(t.isfinite().all() for t in (*results, *written))
