"""The fused operators on a GPU: the same budgets as under emulation, at the shapes that matter, and what only a device
shows."""

import pytest
import torch

from mimo_kernels import (
    AxialRoPE,
    FrameRows,
    gated_residual_modulate,
    gather_tokens,
    modulate,
    qk_norm_rope,
    sample_tube_mask,
    scatter_tokens,
)
from mimo_kernels.core.device_copies import kept
from mimo_kernels.ops.gelu import bias_gelu
from mimo_kernels.ops.losses import weighted_squared_error
from mimo_kernels.ops.rope import qk_norm_rope_cache
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.mimo_kernels

FRAME_LISTS = {
    "odd": ([3, 1, 0, 5, 19, 1, 2, 4], [-1, 0, 3, 2, 4, -1, 2, -1]),
    "short-frames": ([40] * 16 + [64] * 16, [-1] * 16 + list(range(16))),
    "long-frames": ([1560] * 6, [-1] * 3 + list(range(3))),
}


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def outputs_and_gradients(function, tensors: dict, kind=None) -> dict[str, torch.Tensor]:
    inputs = {name: t.to(kind or t.dtype).detach().requires_grad_() for name, t in tensors.items()}
    with poisoned_memory():
        outputs = function(**inputs)
        grads = [random(*out.shape, dtype=next(iter(tensors.values())).dtype, seed=5).to(out.dtype) for out in outputs]
        gradients = torch.autograd.grad(outputs, list(inputs.values()), grads)
    return {str(i): out for i, out in enumerate(outputs)} | {f"d{n}": g for n, g in zip(inputs, gradients)}


def check(function, tensors: dict) -> None:
    """function(backend, **tensors) -> outputs"""
    actual = outputs_and_gradients(lambda **t: function("cuda", **t), {n: between_nans(t) for n, t in tensors.items()})
    plain = outputs_and_gradients(lambda **t: function("reference", **t), tensors)
    exact = outputs_and_gradients(lambda **t: function("reference", **t), tensors, torch.float64)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], name=name)


def modulation_inputs(rows: FrameRows, dim: int, dtype, parameters=None) -> dict[str, torch.Tensor]:
    groups, parameters = rows.num_groups + 1, parameters or dtype
    tensors = {"x": random(rows.num_rows, dim, dtype=dtype, seed=1), "branch": random(rows.num_rows, dim, dtype=dtype)}
    for i, name in enumerate(["gate", "scale", "shift"]):
        tensors[name] = random(groups, dim, dtype=parameters, seed=10 + i)
    return tensors | {n: random(dim, dtype=parameters, seed=20 + i) for i, n in enumerate(["weight", "bias"])}


@pytest.mark.parametrize("frames", FRAME_LISTS)
@pytest.mark.parametrize("dim", [8, 72, 768, 1024, 1152, 1536, 2048, 2056, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulate(dim, dtype, frames):
    rows = FrameRows(*FRAME_LISTS[frames])
    tensors = modulation_inputs(rows, dim, dtype)
    check(lambda backend, **t: gated_residual_modulate(**t, rows=rows, backend=backend), tensors)
    tensors = {name: t for name, t in tensors.items() if name not in ("branch", "gate")}
    check(lambda backend, **t: (modulate(**t, rows=rows, backend=backend),), tensors)


def test_modulate_with_float_parameters():
    rows = FrameRows(*FRAME_LISTS["odd"])
    tensors = modulation_inputs(rows, 1152, torch.bfloat16, torch.float32)
    check(lambda backend, **t: gated_residual_modulate(**t, rows=rows, backend=backend), tensors)


@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (12, 64), (16, 72), (12, 128), (3, 136), (2, 256)])
@pytest.mark.parametrize("rows", [1, 301, 20000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope(heads, dim, rows, dtype):
    rope = AxialRoPE(dim)
    coords = torch.randint(0, 300, (rows, 3), device="cuda", dtype=torch.int32)
    tensors = {
        "qkv": random(rows, 3, heads, dim, dtype=dtype),
        "q_weight": random(dim, dtype=dtype, seed=1),
        "k_weight": random(dim, dtype=dtype, seed=2),
    }
    check(lambda backend, **t: qk_norm_rope(**t, coords=coords, rope=rope, return_v=True, backend=backend), tensors)
    cache, slots = (
        torch.zeros(2, 2 * rows, heads, dim, device="cuda", dtype=dtype),
        torch.randperm(2 * rows, device="cuda")[:rows],
    )
    q, k = qk_norm_rope_cache(**tensors, coords=coords, rope=rope, k_cache=cache[0], v_cache=cache[1], cache_rows=slots)
    expected = qk_norm_rope(**tensors, coords=coords, rope=rope)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    assert torch.equal(cache[0, slots], k) and torch.equal(cache[1, slots], tensors["qkv"][:, 2])


@pytest.mark.parametrize("dim", [1, 20, 1152, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_scatter(dim, dtype):
    rows, kept = 5001, 3210
    index = torch.randperm(rows, device="cuda")[:kept]
    tensors = {"x": random(rows, dim, dtype=dtype), "fill": random(dim, dtype=dtype, seed=1)}

    def drop_and_restore(backend, x, fill):
        y = gather_tokens(x, index, backend=backend)
        return y, scatter_tokens(y, index, rows, fill, backend=backend)

    check(drop_and_restore, tensors)


@pytest.mark.parametrize("dim", [8, 264, 4608])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gelu(dim, dtype):
    tensors = {"x": random(3001, dim, dtype=dtype), "bias": random(dim, dtype=dtype, seed=1)}
    check(lambda backend, **t: (bias_gelu(**t, backend=backend),), tensors)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_squared_error(channels, dtype):
    target, weight = random(4, 5, 257, channels, dtype=dtype), random(4, 5, seed=2).abs() / 1e4
    check(
        lambda backend, x: (weighted_squared_error(x, target.to(x.dtype), weight, backend=backend),),
        {"x": random(4, 5, 257, channels, dtype=dtype, seed=1)},
    )


def everything(compiled: bool = False):
    """One pass through every operator, forward and backward: a function that returns all results."""
    rows = FrameRows([160] * 5 + [256] * 5, [-1] * 5 + list(range(5)))
    t = {name: value.requires_grad_() for name, value in modulation_inputs(rows, 1152, torch.bfloat16).items()}
    weight = random(72).bfloat16().requires_grad_()
    coords = torch.arange(rows.num_rows * 3, device="cuda", dtype=torch.int32).view(-1, 3) % 300
    token_weight = random(rows.num_rows, seed=3).abs()
    index, rope = torch.arange(0, rows.num_rows, 2, device="cuda"), AxialRoPE(72)

    def forward():
        x, y = gated_residual_modulate(**t, rows=rows, backend="cuda")
        z = modulate(x + y, t["scale"], t["shift"], rows, weight=t["weight"], bias=t["bias"], backend="cuda")
        qkv = torch.cat([x, y, z], dim=1).unflatten(1, (3, 16, 72))
        out = sum(qk_norm_rope(qkv, weight, weight, coords, rope, return_v=True, backend="cuda")).flatten(1)
        kept = bias_gelu(gather_tokens(out, index, backend="cuda"), backend="cuda")
        back = scatter_tokens(kept, index, rows.num_rows, t["bias"], backend="cuda")
        return back, weighted_squared_error(back, z.detach(), token_weight, backend="cuda")

    run = torch.compile(forward, fullgraph=True) if compiled else forward

    def step():
        back, loss = run()
        gradients = torch.autograd.grad(loss, [*t.values(), weight])
        # Detached: a graph that lives on ties the next step's gradients to the stream of this one.
        return back.detach(), loss.detach(), *gradients

    return step


def test_the_same_bits_in_twenty_runs():
    step = everything()
    first = step()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(step(), first))


def test_in_a_cuda_graph_and_on_another_stream():
    step = everything()
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        streamed = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for results in (streamed, captured):
        assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_a_graph_outlives_the_rows_that_it_reads():
    x, scale = random(640, 64), random(4, 64)
    rows = FrameRows([160] * 4, [0, 1, 2, 3])
    expected = modulate(x, scale, scale, rows)
    graph = torch.cuda.CUDAGraph()
    with kept() as copies, torch.cuda.graph(graph):
        y = modulate(x, scale, scale, rows)
    assert copies
    del rows
    for _ in range(50):  # who asks for memory of that size gets other memory
        torch.full((640,), 1 << 30, dtype=torch.int32, device="cuda")
    graph.replay()
    assert torch.equal(y, expected)


def test_a_second_stream_waits_for_the_upload():
    x, scale = random(1 << 16, 64), random(4, 64)
    stream = torch.cuda.Stream()
    for _ in range(10):
        rows = FrameRows([1 << 14] * 4, [0, 1, 2, 3])
        torch.cuda._sleep(50_000_000)  # the upload stands behind it
        expected = modulate(x, scale, scale, rows)
        with torch.cuda.stream(stream):
            y = modulate(x, scale, scale, rows)
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


def test_rows_are_not_uploaded_inside_a_capture():
    rows, x = FrameRows([5], [0]), random(5, 8)
    modulate(x, x[:1], x[:1], FrameRows([5], [0]))
    with pytest.raises(ValueError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        modulate(x, x[:1], x[:1], rows)


def test_rotation_tables_are_not_made_inside_a_capture():
    qkv, weight = random(4, 3, 2, 16), torch.ones(16, device="cuda")
    coords = torch.zeros(4, 3, dtype=torch.int32, device="cuda")
    qk_norm_rope(qkv, weight, weight, coords, AxialRoPE(16))
    with pytest.raises(ValueError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        qk_norm_rope(qkv, weight, weight, coords, AxialRoPE(16))


def test_compiled_by_inductor():
    for a, b in zip(everything(compiled=True)(), everything()()):
        assert (a - b).float().norm() <= 0.03 * b.float().norm()  # the additions in between are rounded differently


def test_operators_are_well_formed_on_the_device():
    rows = FrameRows([3, 4], [-1, 0])
    t = {name: value.requires_grad_() for name, value in modulation_inputs(rows, 16, torch.float32).items()}
    table = (rows.row_on("cuda"), *rows.chunks_on("cuda"))
    torch.library.opcheck(OPS.gated_residual_modulate.default, (*t.values(), *table, 1e-6))
    index = torch.tensor([5, 0], device="cuda")
    torch.library.opcheck(OPS.gather_rows.default, (t["x"], index))
    torch.library.opcheck(OPS.scatter_rows.default, (t["x"][:2], index, 9, t["bias"]))
    weight = t["bias"].detach().requires_grad_()
    arguments = (random(7, 3, 2, 16).requires_grad_(), None, weight, weight, None, None, (0, 0, 0), 1e-6, True, True)
    torch.library.opcheck(OPS.qk_norm_rope.default, arguments)


def test_tensors_of_more_than_two_to_the_31_elements():
    rows, dim = (1 << 31) // 2048 + 3, 2048
    if torch.cuda.mem_get_info()[0] < 12 * rows * dim:
        pytest.skip("needs about 24 GiB of device memory")
    x = torch.empty(rows, dim, dtype=torch.bfloat16, device="cuda").normal_()
    frames = FrameRows([rows], [0])
    scale, shift = random(1, dim, dtype=torch.bfloat16), random(1, dim, dtype=torch.bfloat16, seed=1)
    y = modulate(x, scale, shift, frames, backend="cuda")
    last = modulate(x[-3:].clone(), scale, shift, FrameRows([3], [0]), backend="cuda")
    assert torch.equal(y[-3:], last)
    kept = gather_tokens(x, torch.tensor([rows - 1, 0], device="cuda"), backend="cuda")
    assert torch.equal(kept, torch.stack([x[-1], x[0]]))


def test_the_host_never_waits():
    """Everything a training step does with the operators, uploads of frame tables included, without a
    synchronisation."""
    step = everything()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        FrameRows([160] * 5, [-1] * 5).row_on("cuda")
        sample_tube_mask(4, 256, 100, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_input():
    x, index = random(5, 8), torch.tensor([0])
    with pytest.raises(ValueError, match="index is on cpu, expected cuda:0"):
        gather_tokens(x, index)
    with pytest.raises(ValueError, match="x is torch.float64"):
        gather_tokens(x.double(), index.cuda(), backend="cuda")
