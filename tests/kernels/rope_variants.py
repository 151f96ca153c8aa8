"""The variants of qk_norm_rope beside that of our own networks: what a call can be made of, and its oracle in float64,
written from the equations with neither the operator nor its reference."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mimo_kernels import AxialRoPE, qk_norm_rope
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

NORMS, ROTATIONS = ("none", "head", "row"), ("none", "axes", "positions", "rows")


@dataclass(frozen=True)
class Variant:
    """norm: of every head, of a row's heads together, or none. rotation: AxialRoPE, a table with a position for every
    row, or a learned entry of it for every row. packed: one tensor. sliced: rows of q and k lie apart."""

    rows: int = 5
    heads: int = 3
    kv_heads: int = 3
    dim: int = 16
    norm: str = "row"
    rotation: str = "axes"
    interleaved: bool = True
    packed: bool = False
    sliced: bool = False
    return_v: bool = False
    dtype: torch.dtype = torch.float32
    float_weights: bool = False
    seed: int = 0


@st.composite
def variants(draw) -> Variant:
    packed, heads = draw(st.booleans()), draw(st.integers(1, 7))
    return Variant(
        rows=draw(st.sampled_from([0, 1, 2, 7, 23])),
        heads=heads,
        kv_heads=heads if packed else draw(st.integers(1, 7)),
        dim=8 * draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 11, 16, 17, 31, 32])),
        norm=draw(st.sampled_from(NORMS)),
        rotation=draw(st.sampled_from(ROTATIONS)),
        interleaved=draw(st.booleans()),
        packed=packed,
        sliced=not packed and draw(st.booleans()),
        return_v=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        float_weights=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


def draw_inputs(case: Variant) -> tuple[dict[str, Tensor], Tensor | None, AxialRoPE | None]:
    """(what has gradients by name: q, k, v or qkv, weights, table;  coords;  AxialRoPE)"""
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if case.packed:
        tensors = {"qkv": random(case.rows, 3, case.heads, case.dim)}
    else:
        sizes = {"q": case.heads, "k": case.kv_heads, "v": case.kv_heads}
        whole = random(case.rows, sum(sizes.values()), case.dim)
        parts = zip(sizes, whole.split(list(sizes.values()), 1))
        tensors = {name: x if case.sliced else x.contiguous() for name, x in parts}
    if case.norm != "none":
        columns = (case.heads, case.kv_heads) if case.norm == "row" else (1, 1)
        kind = torch.float32 if case.float_weights else case.dtype
        tensors |= {f"{n}_weight": random(c * case.dim, dtype=kind) for n, c in zip("qk", columns)}
    coords, rope = None, None
    if case.rotation == "axes":
        rope = AxialRoPE(case.dim, theta=50.0)
        coords = torch.randint(0, 300, (case.rows, 3), generator=generator, dtype=torch.int32)
    elif case.rotation != "none":  # no turns: nothing may rest on cos^2 + sin^2 = 1
        positions = 11 if case.rotation == "positions" else case.rows
        tensors["table"] = random(positions, case.dim // 2, 2, dtype=torch.float32)
        if case.rotation == "positions":
            coords = torch.randint(0, 11, (case.rows,), generator=generator, dtype=torch.int32)
    return tensors, coords, rope


def oracle(case: Variant, tensors: dict[str, Tensor], coords: Tensor | None, rope: AxialRoPE | None) -> list[Tensor]:
    """q, k, v by the equations, channel by channel."""
    if case.packed:
        q, k, v = tensors["qkv"].unbind(1)
    else:
        q, k, v = (tensors[name] for name in "qkv")
    outputs = []
    for name, x in (("q", q), ("k", k)):
        if case.norm != "none":
            weight = tensors[f"{name}_weight"].view(-1, case.dim)
            over = (1, 2) if case.norm == "row" else (2,)
            x = x / (x.square().mean(over, keepdim=True) + 1e-5).sqrt() * weight
        if case.rotation != "none":
            if rope is not None:
                angle = coords.long()[:, rope.axes()] * rope.frequencies()  # [rows, dim / 2]
                cos, sin = angle.cos(), angle.sin()
            else:
                table = tensors["table"] if coords is None else tensors["table"][coords.long()]
                cos, sin = table.unbind(-1)
            pair = torch.arange(case.dim // 2)
            a, b = (2 * pair, 2 * pair + 1) if case.interleaved else (pair, pair + case.dim // 2)
            turned = torch.zeros_like(x)
            turned[..., a] = x[..., a] * cos[:, None] - x[..., b] * sin[:, None]
            turned[..., b] = x[..., a] * sin[:, None] + x[..., b] * cos[:, None]
            x = turned
        outputs.append(x)
    return [*outputs, v] if case.return_v else outputs


def results(case: Variant, tensors: dict[str, Tensor], coords, rope, backend: str | None) -> dict[str, Tensor]:
    """Outputs and gradients by name; of the oracle where backend is None."""
    constant = {"table"} if case.rotation == "positions" else set()
    given = {name: x.detach().requires_grad_(name not in constant) for name, x in tensors.items()}
    wanted = [x for name, x in given.items() if name not in constant]
    generator = torch.Generator().manual_seed(case.seed + 1)
    with poisoned_memory():
        if backend is None:
            outputs = oracle(case, given, coords, rope)
        else:
            qkv = given["qkv"] if case.packed else tuple(given[name] for name in "qkv")
            weights = given.get("q_weight"), given.get("k_weight")
            turns = rope if rope is not None else given.get("table")
            options = {"eps": 1e-5, "interleaved": case.interleaved, "return_v": case.return_v, "backend": backend}
            outputs = qk_norm_rope(qkv, *weights, coords, turns, **options)
        incoming = [torch.randn(out.shape, generator=generator).to(case.dtype).to(out.dtype) for out in outputs]
        found = torch.autograd.grad(outputs, wanted, incoming, allow_unused=True)
    names = ["q", "k", "v"][: len(outputs)] + [f"d{name}" for name in given if name not in constant]
    pairs = zip(names, (*outputs, *found), strict=True)
    return {name: x for name, x in pairs if x is not None}  # v may be nobody's


def check_variant(case: Variant, backend: str) -> None:
    tensors, coords, rope = draw_inputs(case)
    exact = results(case, {name: x.double() for name, x in tensors.items()}, coords, rope, None)
    plain = results(case, tensors, coords, rope, "reference")
    given = tensors if case.sliced or backend == "reference" else {n: between_nans(x) for n, x in tensors.items()}
    actual = plain if backend == "reference" else results(case, given, coords, rope, backend)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert actual[name].dtype == plain[name].dtype
        assert_within_budget(actual[name], plain[name], exact[name], name=f"{name} of {case}")
