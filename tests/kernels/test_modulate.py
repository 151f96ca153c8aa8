"""modulate and gated_residual_modulate: the CUDA kernels, executed by the block emulator, against plain PyTorch; and
FrameRows."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mimo_kernels import FrameRows, gated_residual_modulate, modulate
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [8, 40, 256, 264, 768, 1024, 1152, 1536, 1800, 2048, 2056, 8192]  # every size of the kernels, full and not
CASES = [(dim, torch.float32) for dim in WIDTHS] + [(dim, t) for dim in (40, 1152, 2056) for t in DTYPES[1:]]
OPS = torch.ops.mimo_kernels
NAMES = ["x", "branch", "gate", "scale", "shift", "weight", "bias"]


def frames() -> FrameRows:
    """Odd lengths, one-token and empty frames, shared groups, an unused group, history first, between and last."""
    return FrameRows([3, 1, 0, 5, 19, 1, 2, 4], [-1, 0, 3, 2, 4, -1, 2, -1])


def sample(rows: FrameRows, dim: int, dtype=torch.float32, parameters=None, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parameters = parameters or dtype
    groups = rows.num_groups + 1  # the last one unused
    shapes = [(rows.num_rows, dim)] * 2 + [(groups, dim)] * 3 + [(dim,)] * 2
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in zip(NAMES, shapes)}
    tensors["x"] = 2 * tensors["x"] + 3  # a mean that matters
    return {name: t.to(dtype if name in ("x", "branch") else parameters) for name, t in tensors.items()}


def run(
    tensors: dict[str, torch.Tensor], rows: FrameRows, backend: str, kind: torch.dtype | None = None, seed: int = 1
):
    """Outputs and all gradients, by name. Without a branch: modulate."""
    inputs = {name: t.to(kind or t.dtype).detach().requires_grad_() for name, t in tensors.items()}
    generator = torch.Generator().manual_seed(seed)
    with poisoned_memory():
        if "branch" in inputs:
            outputs = gated_residual_modulate(**inputs, rows=rows, backend=backend)
        else:
            outputs = (modulate(**inputs, rows=rows, backend=backend),)
        grads = [torch.randn(out.shape, generator=generator).to(tensors["x"].dtype).to(out.dtype) for out in outputs]
        gradients = torch.autograd.grad(outputs, list(inputs.values()), grads)
    names = ["x_new", "y"][-len(outputs) :] + [f"d{name}" for name in inputs]
    return dict(zip(names, (*outputs, *gradients)))


def check(tensors: dict[str, torch.Tensor], rows: FrameRows) -> None:
    inputs = {name: between_nans(t) for name, t in tensors.items()}
    actual, plain = run(inputs, rows, "cuda"), run(tensors, rows, "reference")
    exact = run(tensors, rows, "reference", torch.float64)
    for name in exact:
        assert actual[name].dtype == plain[name].dtype
        assert_within_budget(actual[name], plain[name], exact[name], name=name)


@pytest.mark.parametrize(("dim", "dtype"), CASES)
def test_gated_outputs_and_gradients(emulated, dim, dtype):
    check(sample(frames(), dim, dtype), frames())


@pytest.mark.parametrize(("dim", "dtype"), CASES)
def test_plain_outputs_and_gradients(emulated, dim, dtype):
    tensors = sample(frames(), dim, dtype)
    check({name: t for name, t in tensors.items() if name not in ("branch", "gate")}, frames())


@pytest.mark.parametrize("dim", [72, 2056])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_parameters_beside_narrow_tokens(emulated, dim, dtype):
    rows = frames()
    check(sample(rows, dim, dtype, torch.float32), rows)
    mixed = sample(rows, dim, dtype)
    check({name: t.float() if name in ("weight", "bias") else t for name, t in mixed.items()}, rows)


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("gated", [True, False])
def test_without_learned_weight_or_bias(emulated, missing, gated):
    tensors = {name: t for name, t in sample(frames(), 40, torch.bfloat16).items() if name not in missing}
    check({name: t for name, t in tensors.items() if gated or name not in ("branch", "gate")}, frames())


@pytest.mark.parametrize(
    "rows",
    [
        FrameRows([], []),
        FrameRows([0, 0], [-1, 0]),
        FrameRows([1], [0]),
        FrameRows([1], [-1]),
        FrameRows([64] * 5, [-1, -1, 0, 1, 2]),
        FrameRows([301], [1]),
        FrameRows([17, 150, 33], [0, -1, 0]),
    ],
    ids=lambda rows: f"{rows.num_frames}frames-{rows.num_rows}rows",
)
def test_frame_lists(emulated, rows):
    check(sample(rows, 16), rows)


def test_many_rows_per_block(emulated):
    """More rows than the emulated device holds at once, so that blocks take several rows and chunks are long."""
    rows = FrameRows([900, 4000, 1], [-1, 0, 1])
    tensors = sample(rows, 8)
    check(tensors, rows)


def test_strided_and_misaligned_inputs(emulated):
    rows, dim = frames(), 24
    tensors = sample(rows, dim)
    wide = torch.randn(rows.num_groups + 1, 6 * dim)
    tensors["shift"], tensors["scale"], tensors["gate"] = wide.chunk(6, dim=1)[:3]  # read in place
    plain = run(tensors, rows, "reference")
    shifted = dict(tensors)
    shifted["x"] = torch.cat([torch.zeros(1), tensors["x"].flatten()])[1:].view_as(tensors["x"])
    shifted["branch"] = tensors["branch"].t().contiguous().t()
    shifted["gate"] = torch.cat([torch.zeros(len(wide), 1), tensors["gate"]], dim=1)[:, 1:]
    for name, value in run(shifted, rows, "cuda").items():
        torch.testing.assert_close(value, plain[name], msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_the_same_bits_whoever_runs_first(emulated):
    rows = FrameRows([70, 1, 90, 30], [-1, 0, 1, 0])
    tensors = sample(rows, 136, torch.bfloat16)
    first = None
    for seed in range(20):
        emulated.set_order(seed)
        results = run(tensors, rows, "cuda")
        first = first or results
        assert all(torch.equal(results[name], first[name]) for name in results)


@pytest.mark.parametrize("used", [["x_new"], ["y"]])
def test_one_output_used(emulated, used):
    rows, results = frames(), []
    for backend in ("cuda", "reference"):
        inputs = {name: t.requires_grad_() for name, t in sample(rows, 32).items()}
        outputs = dict(zip(["x_new", "y"], gated_residual_modulate(**inputs, rows=rows, backend=backend)))
        loss = sum((outputs[name] * torch.arange(32)).sum() for name in used)
        results.append(torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_operators_are_well_formed(emulated):
    rows = frames()
    t = {name: t.requires_grad_() for name, t in sample(rows, 16).items()}
    affine, table = (t["weight"], t["bias"]), (rows.row_on("cpu"), *rows.chunks_on("cpu"))
    torch.library.opcheck(OPS.modulate.default, (t["x"], t["scale"], t["shift"], *affine, *table, 1e-6))
    torch.library.opcheck(OPS.modulate.default, (t["x"], t["scale"], t["shift"], None, None, *table, 1e-6))
    gated = (t["x"], t["branch"], t["gate"], t["scale"], t["shift"])
    torch.library.opcheck(OPS.gated_residual_modulate.default, (*gated, *affine, *table, 1e-6))
    plain = {name: value.detach() for name, value in t.items()}
    mean, rstd = torch.randn(2, rows.num_rows)
    rest = (plain["scale"], plain["weight"], plain["bias"], *rows.chunks_on("cpu"))
    for branch, gate in ((plain["branch"], plain["gate"]), (None, None)):
        torch.library.opcheck(
            OPS.modulate_backward.default, (plain["x"], None, plain["x"], mean, rstd, branch, gate, *rest)
        )


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_compiles_whole_and_under_checkpointing(emulated, backend):
    def layer(t, rows):
        x, y = gated_residual_modulate(**t, rows=rows, backend=backend)
        return modulate(x + y, t["scale"], t["shift"], rows, weight=t["weight"], bias=t["bias"], backend=backend)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (frames(), FrameRows([5, 9], [-1, 1])):
        t = {name: value.requires_grad_() for name, value in sample(rows, 16).items()}
        expected = torch.autograd.grad(layer(t, rows).sin().sum(), list(t.values()))
        for run_layer in (compiled, lambda *a: checkpoint(layer, *a, use_reentrant=False)):
            actual = torch.autograd.grad(run_layer(t, rows).sin().sum(), list(t.values()))
            for a, b in zip(actual, expected):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_autocast_with_float_parameters(emulated, backend):
    """What a network under autocast hands over: tokens and modulation from matrix products, weight and bias as they
    are."""
    tensors = sample(frames(), 16, torch.bfloat16)
    tensors |= {name: tensors[name].float() for name in ("weight", "bias")}
    with torch.autocast("cpu", torch.bfloat16):
        results = run(tensors, frames(), backend)
    for name, t in tensors.items():
        assert results[f"d{name}"].dtype == t.dtype
    assert results["x_new"].dtype == results["y"].dtype == torch.bfloat16


def test_rows_do_not_mix():
    """A row's output depends on its own row and group only."""
    rows = frames()
    tensors = sample(rows, 16)
    x = tensors["x"].requires_grad_()
    y = modulate(x, tensors["scale"], tensors["shift"], rows, weight=tensors["weight"], bias=tensors["bias"])
    (gradient,) = torch.autograd.grad(y[7].sum(), x)
    assert gradient[7].abs().max() > 0
    gradient[7] = 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(x=t["x"][1:]), r"x has shape \[34, 16\], expected \[35, D\], the rows of FrameRows"),
        (lambda t: t.update(x=t["x"][None]), r"x has shape \[1, 35, 16\], expected \[rows, D\]"),
        (lambda t: t.update(branch=t["branch"][:, :8]), r"branch has shape \[35, 8\], expected \[35, 16\]"),
        (lambda t: t.update(branch=t["branch"].half()), "branch is torch.float16"),
        (
            lambda t: t.update(scale=t["scale"][:4], shift=t["shift"][:4], gate=t["gate"][:4]),
            "scale has 4 rows, expected at least the 5 that FrameRows uses",
        ),
        (lambda t: t.update(gate=t["gate"][:5]), r"gate has shape \[5, 16\], expected \[6, 16\]"),
        (lambda t: t.update(weight=t["weight"][:8]), r"weight has shape \[8\], expected \[16\]"),
        (
            lambda t: t.update(scale=t["scale"].bfloat16()),
            "is torch.bfloat16, expected torch.float32",
        ),
        (
            lambda t: t.update(weight=t["weight"].half(), bias=t["bias"].half()),
            "weight is torch.float16, expected torch.float32",
        ),
        (lambda t: t.update(bias=t["bias"].to("meta")), "bias is on meta, expected cpu"),
        (lambda t: t.update(backend="triton"), "unknown backend 'triton'"),
        (lambda t: t.update(x=t["x"].int(), branch=t["branch"].int()), "x is torch.int32, expected float32"),
        (lambda t: t.update(rows=[35]), "rows is a list, expected FrameRows"),
    ],
)
def test_bad_input(change, message):
    arguments = sample(frames(), 16)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        gated_residual_modulate(**{"rows": frames()} | arguments)


@pytest.mark.parametrize(
    ("dim", "message"), [(12, "D is 12, expected a multiple of 8"), (8200, "D is 8200, .* up to 8192")]
)
def test_widths_that_only_the_reference_serves(emulated, dim, message):
    tensors = sample(frames(), dim)
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot serve: {message}"):
        gated_residual_modulate(**tensors, rows=frames(), backend="cuda")
    for auto, plain in zip(
        *(gated_residual_modulate(**tensors, rows=frames(), backend=b) for b in ("auto", "reference"))
    ):
        assert torch.equal(auto, plain)


def test_frame_rows():
    rows = FrameRows([2, 0, 3, 1], torch.tensor([-1, 0, 1, -1]))
    assert (rows.num_rows, rows.num_frames, rows.num_groups) == (6, 4, 2)
    assert rows.row_on("cpu").tolist() == [-1, -1, 1, 1, 1, -1]
    assert rows.offsets_on("cpu").tolist() == [0, 2, 2, 5, 6]
    assert rows.group_on("cpu").tolist() == [-1, 0, 1, -1]
    assert rows.row_on("meta") is rows.row_on("meta")
    for lens, groups, message in (
        ([1], [0, 1], "1 lens and 2 groups"),
        ([1, -2], [0, 1], "a frame has -2 rows"),
        ([1], [-2], "a frame has group -2"),
        ([1.5], [0], r"lens is torch.float32 \[1\], expected one whole number per frame"),
        ([[1, 2]], [0, 1], r"lens is torch.int64 \[1, 2\]"),
        ([1], torch.zeros(1), "groups is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            FrameRows(lens, groups)
    assert FrameRows([], []).num_rows == 0


@pytest.mark.parametrize("lens", [[5, 0, 100, 64], [40000, 1, 17000], [1] * 50])
def test_chunks_cover_every_row_once(lens):
    groups = [i % 3 - 1 for i in range(len(lens))]
    rows = FrameRows(lens, groups)
    chunks, first = rows.chunks_on("cpu")
    assert (chunks[:, 1] > chunks[:, 0]).all() and (chunks[:, 1] - chunks[:, 0]).max() <= 64
    seen = torch.zeros(rows.num_rows, dtype=torch.int64)
    for begin, end, group in chunks.tolist():
        seen[begin:end] += 1
        assert (rows.row_on("cpu")[begin:end] == group).all()
    assert (seen == 1).all()
    for group in range(-1, rows.num_groups):
        assert (chunks[first[group + 1] : first[group + 2], 2] == group).all()
    assert first[-1] == len(chunks)
