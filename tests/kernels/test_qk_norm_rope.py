"""qk_norm_rope: the CUDA kernels, executed by the block emulator, against plain PyTorch; and AxialRoPE."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mimo_kernels import AxialRoPE, qk_norm_rope
from mimo_kernels.ops.rope import GRAD_BLOCKS, apply_rope, qk_norm_rope_cache
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

from .rope_variants import Variant, check_variant, draw_inputs, results

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.mimo_kernels


def sample(rows: int, heads: int, dim: int, dtype=torch.float32, weights=None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, 3, heads, dim, generator=generator).to(dtype)
    q_weight, k_weight = (torch.randn(dim, generator=generator).to(weights or dtype) for _ in range(2))
    coords = torch.randint(0, 300, (rows, 3), generator=generator, dtype=torch.int32)
    return qkv, q_weight, k_weight, coords


def run(qkv, q_weight, k_weight, coords, rope, backend, kind=None, return_v=False):
    """Outputs and gradients, by name."""
    inputs = [t.to(kind or t.dtype).detach().requires_grad_() for t in (qkv, q_weight, k_weight)]
    generator = torch.Generator().manual_seed(1)
    with poisoned_memory():
        outputs = qk_norm_rope(*inputs, coords, rope, return_v=return_v, backend=backend)
        grads = [torch.randn(out.shape, generator=generator).to(qkv.dtype).to(out.dtype) for out in outputs]
        gradients = torch.autograd.grad(outputs, inputs, grads)
    return dict(zip(["q", "k", "v"][: len(outputs)] + ["dqkv", "dq_weight", "dk_weight"], (*outputs, *gradients)))


def check(qkv, q_weight, k_weight, coords, rope, return_v=False) -> None:
    poisoned = [between_nans(t) for t in (qkv, q_weight, k_weight)]
    actual = run(*poisoned, coords, rope, "cuda", return_v=return_v)
    plain = run(qkv, q_weight, k_weight, coords, rope, "reference", return_v=return_v)
    exact = run(qkv, q_weight, k_weight, coords, rope, "reference", torch.float64, return_v=return_v)
    for name in exact:
        assert actual[name].dtype == plain[name].dtype
        assert_within_budget(actual[name], plain[name], exact[name], name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "dim"),
    [(1, 1, 8), (7, 5, 24), (3, 12, 64), (33, 2, 40), (5, 16, 72), (2, 3, 96), (9, 4, 128), (3, 2, 136), (4, 3, 256)],
)
def test_outputs_and_gradients(emulated, rows, heads, dim, dtype):
    check(*sample(rows, heads, dim, dtype), AxialRoPE(dim), return_v=rows % 2 == 0)


@pytest.mark.parametrize("split", [(72, 0, 0), (0, 0, 72), (2, 30, 40), (0, 36, 36), (22, 0, 50)])
def test_channel_splits(emulated, split):
    check(*sample(5, 3, 72), AxialRoPE(72, theta=1000.0, split=split))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_weights_beside_narrow_tokens(emulated, dtype):
    check(*sample(6, 3, 72, dtype, torch.float32), AxialRoPE(72))


@pytest.mark.parametrize("return_v", [False, True])
def test_without_rotation(emulated, return_v):
    qkv, q_weight, k_weight, _ = sample(11, 3, 64)
    check(qkv, q_weight, k_weight, None, None, return_v=return_v)


@pytest.mark.parametrize("return_v", [False, True])
def test_no_rows(emulated, return_v):
    results = run(*sample(0, 3, 16), AxialRoPE(16), "cuda", return_v=return_v)
    assert results["q"].shape == results["k"].shape == (0, 3, 16)
    assert not results["dq_weight"].any() and not results["dk_weight"].any()


def test_more_rows_than_the_device_holds(emulated):
    """Every warp takes several rows, in the forward a whole row each."""
    check(*sample(700, 2, 8), AxialRoPE(8), return_v=True)


def test_strided_and_misaligned_inputs(emulated):
    qkv, q_weight, k_weight, coords = sample(6, 2, 24)
    expected = run(qkv, q_weight, k_weight, coords, AxialRoPE(24), "reference")
    wide = torch.cat([qkv.flatten(1), torch.zeros(6, 5)], dim=1)[:, : qkv[0].numel()].unflatten(1, (3, 2, 24))
    weight = torch.cat([torch.zeros(1), q_weight])[1:]
    actual = run(wide, weight, k_weight, coords.t().contiguous().t(), AxialRoPE(24), "cuda")
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same_bits_whoever_runs_first(emulated):
    inputs, first = sample(40, 3, 72, torch.bfloat16), None
    for seed in range(20):
        emulated.set_order(seed)
        results = run(*inputs, AxialRoPE(72), "cuda")
        first = first or results
        assert all(torch.equal(results[name], first[name]) for name in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_writes_keys_and_values_into_pages(emulated, backend, dtype):
    qkv, q_weight, k_weight, coords = sample(10, 3, 72, dtype)
    rope = AxialRoPE(72)
    pool = torch.full((2, 6, 4, 3, 72), float("nan"), dtype=dtype)  # k and v, 6 pages of 4 slots
    slots = torch.tensor([20, 21, 22, 23, 4, 5, 6, 7, 12, 13])
    q, k = qk_norm_rope_cache(
        qkv, q_weight, k_weight, coords, rope, *(half.flatten(0, 1) for half in pool), slots, backend=backend
    )
    expected = qk_norm_rope(qkv, q_weight, k_weight, coords, rope, backend=backend)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    keys, values = pool.flatten(1, 2)
    assert torch.equal(keys[slots], k) and torch.equal(values[slots], qkv[:, 2])
    keys[slots] = values[slots] = float("nan")
    assert pool.isnan().all()  # nothing else was touched


def test_positions_and_slots_out_of_range_stop_the_kernel(emulated):
    qkv, q_weight, k_weight, coords = sample(3, 1, 8)
    for bad in (-1, 1024):
        coords[1, 2] = bad
        with pytest.raises(RuntimeError, match="a position is negative or beyond the table"):
            qk_norm_rope(qkv, q_weight, k_weight, coords, AxialRoPE(8), backend="cuda")
    rope = AxialRoPE(8)
    rope.tables_on("cpu", 1024)  # makes room
    check(qkv, q_weight, k_weight, coords, rope)
    cache = torch.zeros(2, 4, 1, 8)
    with pytest.raises(RuntimeError, match="cache row out of range"):
        qk_norm_rope_cache(qkv, q_weight, k_weight, coords, rope, *cache, torch.tensor([0, 4, 1]), backend="cuda")


def test_operators_are_well_formed(emulated):
    qkv, q_weight, k_weight, coords = sample(5, 2, 16)
    rope = AxialRoPE(16)
    table = rope.table(torch.device("cpu")).whole
    for t in (qkv, q_weight, k_weight):
        t.requires_grad_()
    for rotation in ((coords, table, rope.split), (None, None, (0, 0, 0))):
        for return_v in (False, True):
            arguments = (qkv, None, q_weight, k_weight, *rotation, 1e-6, True, return_v)
            torch.library.opcheck(OPS.qk_norm_rope.default, arguments)
    qkv, q_weight, k_weight = (t.detach() for t in (qkv, q_weight, k_weight))
    dq, dk, dv = torch.randn(3, 5, 2, 16)
    rest = (q_weight, k_weight, coords, table, rope.split, 1e-6, True)
    torch.library.opcheck(OPS.qk_norm_rope_backward.default, (dq, dk, dv, qkv, None, *rest, False))
    torch.library.opcheck(OPS.qk_norm_rope_backward.default, (dq, dk, None, qkv, None, *rest, False))
    cache, slots = torch.zeros(2, 8, 2, 16), torch.arange(5)
    torch.library.opcheck(OPS.qk_norm_rope_cache.default, (qkv, None, None, *rest, *cache.clone().unbind(), slots))


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_compiles_whole_and_under_checkpointing(emulated, backend):
    rope = AxialRoPE(16)

    def project(x, q_weight, k_weight, coords):
        qkv = x.unflatten(1, (3, 2, 16))
        outputs = qk_norm_rope(qkv, q_weight, k_weight, coords, rope, return_v=True, backend=backend)
        return torch.cat([*outputs, qkv[:, 2]])

    compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
    for rows in (5, 8):
        qkv, *weights, coords = sample(rows, 2, 16)
        inputs = [t.requires_grad_() for t in (qkv.flatten(1), *weights)]
        expected = torch.autograd.grad(project(*inputs, coords).sin().sum(), inputs)
        for variant in (compiled, lambda *a: checkpoint(project, *a, use_reentrant=False)):
            actual = torch.autograd.grad(variant(*inputs, coords).sin().sum(), inputs)
            for a, b in zip(actual, expected):
                torch.testing.assert_close(a, b)


# Every norm with every rotation and both kinds of pairs, in one of the layouts and dtypes each; heads of an odd number
# of lanes, of one lane, and more heads than a warp has in flight.
VARIANTS = [
    Variant(norm="row", rotation="axes", rows=7, heads=12, kv_heads=12, dim=16),  # Wan
    Variant(norm="row", rotation="axes", rows=2, heads=5, kv_heads=2, dim=128, sliced=True, dtype=torch.bfloat16),
    Variant(norm="row", rotation="rows", interleaved=False, heads=4, kv_heads=1, dim=24, return_v=True),
    Variant(norm="row", rotation="rows", heads=9, kv_heads=9, dim=40, dtype=torch.float16, float_weights=True),
    Variant(norm="row", rotation="positions", interleaved=False, packed=True, dim=8, return_v=True),
    Variant(norm="row", rotation="none", packed=True, heads=2, kv_heads=2, dim=72),
    Variant(norm="head", rotation="axes", heads=6, kv_heads=2, dim=64, sliced=True, return_v=True),
    Variant(norm="head", rotation="axes", interleaved=False, packed=True, dim=72, dtype=torch.bfloat16),
    Variant(norm="head", rotation="rows", heads=8, kv_heads=1, dim=8, rows=9),
    Variant(norm="head", rotation="rows", interleaved=False, packed=True, heads=5, kv_heads=5, dim=40, return_v=True),
    Variant(norm="head", rotation="positions", heads=2, kv_heads=1, dim=256, dtype=torch.float16),
    Variant(norm="head", rotation="none", heads=3, kv_heads=2, dim=24, float_weights=True, dtype=torch.bfloat16),
    Variant(norm="none", rotation="axes", packed=True, heads=4, kv_heads=4, dim=72, return_v=True),
    Variant(norm="none", rotation="rows", interleaved=False, heads=4, kv_heads=2, dim=128, dtype=torch.float16),
    Variant(norm="none", rotation="rows", heads=1, kv_heads=1, dim=136, sliced=True),
    Variant(norm="none", rotation="positions", interleaved=False, heads=2, kv_heads=2, dim=8, dtype=torch.bfloat16),
    Variant(norm="row", rotation="rows", rows=0, return_v=True),
]


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: f"{case.norm}-{case.rotation}-{case.dim}")
def test_variants(emulated, case):
    check_variant(case, "cuda")


@pytest.mark.parametrize(("norm", "rows"), [("row", GRAD_BLOCKS + 2), ("head", 270)])
def test_variants_with_more_rows_than_the_device_holds(emulated, norm, rows):
    """Every warp or block takes several rows; where a block has a row, in the backward too."""
    check_variant(Variant(rows=rows, heads=1, kv_heads=1, dim=8, norm=norm, rotation="rows"), "cuda")


@pytest.mark.parametrize("norm", ["row", "head"])
def test_variants_are_the_same_bits_whoever_runs_first(emulated, norm):
    case = Variant(rows=9, heads=5, kv_heads=2, dim=24, norm=norm, rotation="rows", dtype=torch.bfloat16)
    given, first = draw_inputs(case), None
    for seed in range(4):
        emulated.set_order(seed)
        found = results(case, *given, "cuda")
        first = first or found
        assert all(torch.equal(found[name], first[name]) for name in first)


def test_a_row_is_the_same_bits_beside_any_others(emulated):
    """One row alone is shared between warps; many go to a warp each."""
    for norm in ("row", "head", "none"):
        case = Variant(rows=300, heads=9, kv_heads=4, dim=16, norm=norm, rotation="positions")
        given, coords, _ = draw_inputs(case)
        weights = given.get("q_weight"), given.get("k_weight")
        whole = qk_norm_rope((given["q"], given["k"]), *weights, coords, given["table"], backend="cuda")
        alone = qk_norm_rope((given["q"][7:8], given["k"][7:8]), *weights, coords[7:8], given["table"], backend="cuda")
        assert all(torch.equal(a[0], b[7]) for a, b in zip(alone, whole))


@pytest.mark.parametrize("backend", ["cuda", "reference"])
@pytest.mark.parametrize(
    "case",
    [
        Variant(heads=4, kv_heads=2, dim=24, norm="row", sliced=True, dtype=torch.bfloat16),
        Variant(heads=2, kv_heads=2, dim=72, norm="none", packed=True, interleaved=False),
        Variant(heads=2, kv_heads=2, dim=8, norm="none", packed=True, rotation="none", dtype=torch.float16),
    ],
    ids=lambda case: f"{case.norm}-{case.dim}",
)
def test_variants_write_keys_and_values_into_pages(emulated, backend, case):
    tensors, coords, rope = draw_inputs(case)
    qkv = tensors["qkv"] if case.packed else tuple(tensors[name] for name in "qkv")
    given = qkv, tensors.get("q_weight"), tensors.get("k_weight"), coords, rope
    pool = torch.full((2, 16, case.kv_heads, case.dim), float("nan"), dtype=case.dtype)
    slots = torch.tensor([9, 8, 0, 3, 15])
    q, k = qk_norm_rope_cache(*given, *pool, slots, interleaved=case.interleaved, backend=backend)
    expected = qk_norm_rope(*given, interleaved=case.interleaved, return_v=True, backend=backend)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    assert torch.equal(pool[0, slots], k) and torch.equal(pool[1, slots], expected[2])
    pool[:, slots] = float("nan")
    assert pool.isnan().all()  # nothing else was touched


def test_variants_compile_whole_and_are_well_formed(emulated):
    case = Variant(heads=3, kv_heads=1, dim=16, norm="row", rotation="rows", interleaved=False)
    tensors, *_ = draw_inputs(case)
    inputs = [tensors[name].requires_grad_() for name in ("q", "k", "q_weight", "k_weight", "table")]
    arguments = (*inputs[:4], None, inputs[4], (16, 0, 0), 1e-6, False, False)
    torch.library.opcheck(OPS.qk_norm_rope.default, arguments)

    def project(q, k, q_weight, k_weight, table):
        outputs = qk_norm_rope((q.sin(), k.sin()), q_weight, k_weight, None, table.sin(), interleaved=False)
        return torch.cat(outputs, 1)

    expected = torch.autograd.grad(project(*inputs).square().sum(), inputs)
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda *a: checkpoint(project, *a, use_reentrant=False)):
        actual = torch.autograd.grad(function(*inputs).square().sum(), inputs)
        assert all(map(torch.equal, actual, expected))


def test_wan_by_its_own_words():
    """Wan2.1: WanRMSNorm over all channels, then pairs of neighbours as complex numbers in float64, per axis
    frequencies of theta 10000 from the grid of the latent."""
    frames, height, width, heads, dim = 2, 3, 2, 2, 16
    split = (dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6))
    x, weight = torch.randn(frames * height * width, heads * dim), torch.randn(heads * dim)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    turns = []
    for size in split:
        frequency = 1.0 / torch.pow(10000, torch.arange(0, size, 2).to(torch.float64).div(size))
        turns.append(torch.polar(torch.ones(8, size // 2).double(), torch.outer(torch.arange(8).double(), frequency)))
    t, y, z = (turn[:n] for turn, n in zip(turns, (frames, height, width)))
    grid = torch.cat(
        [
            t.view(frames, 1, 1, -1).expand(frames, height, width, -1),
            y.view(1, height, 1, -1).expand(frames, height, width, -1),
            z.view(1, 1, width, -1).expand(frames, height, width, -1),
        ],
        dim=-1,
    ).reshape(-1, 1, dim // 2)
    pairs = torch.view_as_complex(normed.double().reshape(-1, heads, dim // 2, 2))
    expected = torch.view_as_real(pairs * grid).flatten(2).float()
    q = x.unflatten(1, (heads, dim))
    coords = torch.cartesian_prod(*(torch.arange(n, dtype=torch.int32) for n in (frames, height, width)))
    by_axes = qk_norm_rope((q, q), weight, weight, coords, AxialRoPE(dim, theta=10000.0, split=split))
    by_table = qk_norm_rope((q, q), weight, weight, None, torch.view_as_real(grid[:, 0]).float())
    for actual in (*by_axes, *by_table):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_with_neither_norm_nor_rotation_nothing_is_copied():
    qkv = torch.randn(4, 3, 2, 16)
    q, k, v = qk_norm_rope(qkv, None, None, None, None, return_v=True)
    assert [x.data_ptr() for x in (q, k, v)] == [x.data_ptr() for x in qkv.unbind(1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qkv": (torch.zeros(4, 2, 16),)},
            r"qkv has length 1, expected \(q, k\) or \(q, k, v\), or one packed tensor",
        ),
        (
            {"qkv": (torch.zeros(4, 2, 16), torch.zeros(5, 2, 16))},
            r"k has shape \[5, 2, 16\], expected \[4, kv_heads, 16\]",
        ),
        ({"qkv": (torch.zeros(4, 2, 16), torch.zeros(4, 2, 16).half())}, r"k is torch.float16, .* \(as q\)"),
        ({"return_v": True}, r"return_v is set but qkv is \(q, k\), expected \(q, k, v\)"),
        ({"k_weight": None}, "q_weight is given but k_weight is None, expected both or none"),
        ({"q_weight": torch.ones(64)}, r"k_weight has shape \[16\], expected \[32\]"),
        ({"q_weight": torch.ones(48)}, r"q_weight has shape \[48\], expected \[16\]"),
        ({"rope": torch.zeros(9, 8)}, r"rope has shape \[9, 8\], expected \[positions, 8, 2\]"),
        ({"rope": torch.zeros(9, 8, 2), "coords": None}, r"rope has shape \[9, 8, 2\], expected \[4, 8, 2\]"),
        ({"rope": torch.zeros(9, 8, 2).double()}, "rope is torch.float64, expected torch.float32"),
        (
            {"rope": torch.zeros(9, 8, 2).requires_grad_()},
            r"rope requires a gradient beside coords, expected .* rope\[coords\]",
        ),
        (
            {"rope": torch.zeros(9, 8, 2), "coords": torch.zeros(4, 3).int()},
            r"coords has shape \[4, 3\], expected \[4\]",
        ),
        ({"rope": torch.zeros(2, 8, 2)}, r"coords holds 3, expected values in \[0, 2\)"),
    ],
)
def test_bad_input_of_variants(change, message):
    arguments = {
        "qkv": (torch.zeros(4, 4, 16), torch.zeros(4, 2, 16)),
        "q_weight": torch.ones(16),
        "k_weight": torch.ones(16),
        "coords": torch.arange(4, dtype=torch.int32),
        "rope": torch.zeros(9, 8, 2),
    }
    with pytest.raises(ValueError, match=f"^qk_norm_rope: {message}"):
        qk_norm_rope(**{**arguments, **change})


def test_a_row_too_wide_for_the_kernel_is_the_references(emulated):
    q, weight = torch.randn(2, 48, 256), torch.ones(48 * 256)
    with pytest.raises(ValueError, match="12288 channels are normalised together, expected at most 12280"):
        qk_norm_rope((q, q), weight, weight, None, None, backend="cuda")
    qk_norm_rope((q, q), weight, weight, None, None)
    check_variant(Variant(rows=2, heads=307, kv_heads=1, dim=40, rotation="none"), "cuda")  # 12280 channels


def test_values_that_a_table_cannot_turn_stop_the_kernel(emulated):
    x = torch.zeros(4, 2, 16)
    coords = torch.tensor([0, 9, 1, 1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="a position is negative or beyond the table"):
        qk_norm_rope((x, x), None, None, coords, torch.zeros(9, 8, 2), backend="cuda")


def test_norm_by_hand():
    qkv = torch.zeros(1, 3, 1, 8)
    qkv[0, 0, 0] = torch.tensor([3.0, 4.0, 0, 0, 0, 0, 0, 0])
    q, k = qk_norm_rope(qkv, torch.full((8,), 2.0), torch.ones(8), None, None, eps=0.125)
    scale = 2 / math.sqrt(25 / 8 + 0.125)
    torch.testing.assert_close(q[0, 0, :2], torch.tensor([3 * scale, 4 * scale]))
    assert not k.any()


def test_rotation_by_hand():
    """Head of 12: two pairs per axis. A pair (1, 0) turns into (cos, sin) of its angle."""
    qkv = torch.zeros(1, 3, 1, 12)
    qkv[..., 0::2] = 1
    coords = torch.tensor([[3, 5, 7]], dtype=torch.int32)
    q, _ = qk_norm_rope(qkv, torch.ones(12), torch.ones(12), coords, AxialRoPE(12, theta=100.0), eps=0.0)
    angles = torch.tensor([3, 3 / 10, 5, 5 / 10, 7, 7 / 10])
    expected = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], dim=1).flatten()
    torch.testing.assert_close(q.flatten(), expected)


def test_scores_depend_on_relative_positions():
    qkv, q_weight, k_weight, coords = sample(6, 2, 72, torch.float64)
    scores = []
    for offset in (0, 11):
        q, k = qk_norm_rope(qkv, q_weight, k_weight, coords + offset, AxialRoPE(72))
        scores.append(torch.einsum("rhd,shd->hrs", q, k))
    torch.testing.assert_close(scores[0], scores[1])


def test_axial_rope():
    assert AxialRoPE(72).split == (24, 24, 24)
    assert AxialRoPE(64).split == (20, 22, 22)
    assert AxialRoPE(128).split == (44, 42, 42)  # Wan's and DFoT's: a single spare pair is time's
    assert AxialRoPE(80).split == (28, 26, 26)
    rope = AxialRoPE(8, split=(2, 2, 4))
    assert rope.axes().tolist() == [0, 1, 2, 2]
    torch.testing.assert_close(rope.frequencies(), torch.tensor([1, 1, 1, 0.1], dtype=torch.float64))
    cos, sin = rope.tables_on("cpu", 5000)
    assert cos.shape == sin.shape and cos.shape[0] > 5000 and cos.shape[1] == 4
    torch.testing.assert_close(
        sin[4321], torch.tensor([4321.0, 4321.0, 4321.0, 432.1], dtype=torch.float64).sin().float()
    )
    assert rope.tables_on("cpu")[0].data_ptr() == cos.data_ptr()  # made once
    for arguments, message in (
        ({"head_dim": 7}, "head_dim is 7"),
        ({"head_dim": 8, "theta": -1.0}, "theta is -1.0, expected a finite number above 0"),
        ({"head_dim": 8, "theta": float("nan")}, "theta is nan"),
        ({"head_dim": 8, "split": (4, 4)}, r"split is \(4, 4\)"),
        ({"head_dim": 8, "split": (3, 3, 2)}, r"split is \(3, 3, 2\)"),
        ({"head_dim": 8, "split": (4, 4, 4)}, "with the sum 8"),
    ):
        with pytest.raises(ValueError, match=message):
            AxialRoPE(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(4, 2, 3, 16)}, r"qkv has shape \[4, 2, 3, 16\], expected \[rows, 3, heads, head_dim\]"),
        ({"qkv": torch.zeros(4, 3, 2, 16).int()}, "qkv is torch.int32, expected float32, float16 or bfloat16"),
        ({"q_weight": torch.zeros(8)}, r"q_weight has shape \[8\], expected \[16\]"),
        ({"k_weight": torch.zeros(16).half()}, "k_weight is torch.float16"),
        ({"coords": torch.zeros(4, 3)}, r"coords is torch.float32, expected torch.int32"),
        ({"coords": torch.zeros(3, 3, dtype=torch.int32)}, r"expected \[4, 3\]"),
        ({"coords": None}, "rope is given but coords is None"),
        ({"rope": None}, "coords is given but rope is None"),
        ({"rope": AxialRoPE(8)}, "rope is for heads of 8 channels, expected 16"),
        ({"coords": torch.full((4, 3), -2, dtype=torch.int32)}, "coords holds -2, expected values in"),
        ({"k_weight": torch.zeros(16, device="meta")}, "k_weight is on meta, expected cpu"),
        ({"backend": "cuda"}, "backend 'cuda' cannot serve: .*cpu"),
    ],
)
def test_bad_input(change, message):
    qkv, q_weight, k_weight, coords = sample(4, 2, 16)
    arguments = {"qkv": qkv, "q_weight": q_weight, "k_weight": k_weight, "coords": coords, "rope": AxialRoPE(16)}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{**arguments, **change})


@pytest.mark.parametrize(
    ("cache", "slots", "message"),
    [
        (torch.zeros(8, 2, 8), torch.arange(4), r"k_cache has shape \[8, 2, 8\], expected \[slots, 2, 16\]"),
        (
            torch.zeros(8, 16, 2).transpose(1, 2),
            torch.arange(4),
            r"k_cache has strides .*, expected a contiguous \[8, 2, 16\]",
        ),
        (torch.zeros(8, 2, 16).half(), torch.arange(4), "k_cache is torch.float16"),
        (torch.zeros(8, 2, 16), torch.arange(3), r"cache_rows has shape \[3\], expected \[4\]"),
        (torch.zeros(8, 2, 16), torch.arange(4).int(), "cache_rows is torch.int32"),
    ],
)
def test_bad_cache(cache, slots, message):
    qkv, q_weight, k_weight, coords = sample(4, 2, 16)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_cache(qkv, q_weight, k_weight, coords, AxialRoPE(16), cache, cache, slots)


def test_a_cache_between_16_bytes_is_refused(emulated):
    qkv, q_weight, k_weight, coords = sample(4, 2, 16)
    odd, even = (torch.zeros(8 * 2 * 16 + 4)[start:][: 8 * 2 * 16].view(8, 2, 16) for start in (1, 0))
    with pytest.raises(ValueError, match="begins elsewhere, expected a multiple of 16 bytes"):
        qk_norm_rope_cache(qkv, q_weight, k_weight, coords, AxialRoPE(16), odd, even, torch.arange(4), backend="cuda")


def test_tables_made_in_inference_mode_serve_training():
    qkv, q_weight, k_weight, coords = sample(4, 2, 16)
    rope = AxialRoPE(16)
    with torch.inference_mode():
        qk_norm_rope(qkv, q_weight, k_weight, coords, rope)
    q, k = qk_norm_rope(qkv.requires_grad_(), q_weight, k_weight, coords, rope)
    (q.sum() + k.sum()).backward()
    assert qkv.grad.isfinite().all()


def test_widths_that_only_the_reference_serves(emulated):
    inputs = sample(4, 2, 12)
    with pytest.raises(ValueError, match="head_dim is 12, expected a multiple of 8"):
        qk_norm_rope(*inputs, AxialRoPE(12), backend="cuda")
    for auto, plain in zip(*(qk_norm_rope(*inputs, AxialRoPE(12), backend=b) for b in ("auto", "reference"))):
        assert torch.equal(auto, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rope_alone_turns_pairs_of_channels(dtype):
    """Against complex numbers row by row; scores of float64 depend on relative positions alone."""
    rope = AxialRoPE(16, theta=1e4, split=(4, 6, 6))
    x, coords = torch.randn(5, 2, 3, 16, dtype=dtype), torch.randint(0, 50, (5, 3), dtype=torch.int32)
    angle = torch.stack([coords[:, axis] * w for axis, w in zip(rope.axes(), rope.frequencies(), strict=True)], 1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None, None]).flatten(-2)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    found = apply_rope(x, coords, rope)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), turned, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"apply_rope: rope is for heads of 16 channels, expected 8"):
        apply_rope(x[..., :8], coords, rope)
