"""The memory-bound operators as a fraction of the speed of a copy, against eager PyTorch, torch.compile, Liger and
QuACK.

    python benchmarks/ops_bench.py [--out bench_results] [--shapes k600-xl wan-tf] [--ops modulate] [--seconds 0.3]
                                   [--minutes 4]

Writes ops.json and ops.csv under --out after every operator, ops.png at the end, and prints a table last. With
--minutes it begins no operator that would not fit. Exits with status 1 if a kernel of ours failed or was wrong. On a
GPU every time is that of a captured graph, so it holds no host time; the graph goes through copies of the inputs that
together exceed any L2 cache. Bytes are those that have to move: every input read once, every output written once.
Without a GPU it runs a small shape on the CPU, where the compiled kernels do not run.

Then counts what one block of MiMo-XL costs beside its arithmetic, forward and backward: operator calls that touch
memory, and the bytes of their operands and results; once with plain PyTorch, once with the kernels of this package.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import common  # first: it finds the packages of this checkout
import torch
import torch._functorch.config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimo import MiMo, MiMoConfig
from mimo.network.frames import clean_and_noisy
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
from mimo_kernels.ops.gelu import bias_gelu
from mimo_kernels.ops.losses import weighted_squared_error

ROTATION_BYTES = 256 * 2**20  # inputs and outputs of one round, at least; no L2 cache is as large
LATENT_CHANNELS = 16
OURS = "mimo_kernels"
PREPARE_SECONDS = 60  # for an implementation to compile and run once
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # relative root mean square deviation from fp32
COLUMNS = {
    "shape": "shape",
    "op": "operator",
    "direction": "direction",
    "implementation": "implementation",
    "us": "us",
    "us_p20": "20%",
    "us_p80": "80%",
    "gb_per_s": "GB/s",
    "percent_of_copy": "% of copy",
    "speedup_of_ours": "ours is x faster",
    "error": "rms error",
}
PLOT = {
    "group": "case",
    "bar": "implementation",
    "value": "percent_of_copy",
    "panel": "direction",
    "unit": "% of copy",
}


@dataclass
class Shape:
    name: str
    clips: int
    frames: int
    tokens: int
    kept: int
    heads: int
    head_dim: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def rows(self) -> FrameRows:
        """Clip after clip, history before future."""
        lens = ([self.kept] * self.frames + [self.tokens] * self.frames) * self.clips
        groups = []
        for clip in range(self.clips):
            groups += [-1] * self.frames + list(range(clip * self.frames, (clip + 1) * self.frames))
        return FrameRows(lens, groups)


GPU_SHAPES = [
    Shape("k600-xl", 32, 5, 256, 160, 16, 72),
    Shape("wan-tf", 1, 21, 1560, 1560, 12, 128),
    Shape("ucf-xl", 32, 16, 64, 40, 16, 72),
    Shape("k600-b", 32, 5, 256, 160, 12, 64),
]
CPU_SHAPES = [Shape("cpu-small", 2, 4, 64, 40, 4, 72)]


@dataclass
class Op:
    """inputs: a new set of tensors, in which the differentiable ones have gradients. forward_bytes, backward_bytes:
    what has to move."""

    name: str
    inputs: Callable[[], list[torch.Tensor]]
    call: Callable  # (backend, *inputs) -> outputs
    forward_bytes: int
    backward_bytes: int
    peers: dict[str, Callable] = field(default_factory=dict)  # other packages, for a part of the work


def operators(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Op]:
    rows, dim = shape.rows(), shape.dim
    rows.row_on(device)  # the tables travel before anything is timed
    rows.chunks_on(device)
    unit = rows.num_rows * dim * dtype.itemsize  # one pass over the packed tokens
    groups = shape.clips * shape.frames
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()

    coords = torch.randint(0, 32, (rows.num_rows, 3), generator=generator, device=device, dtype=torch.int32)
    rope = AxialRoPE(shape.head_dim)
    spatial = sample_tube_mask(groups, shape.tokens, shape.kept, generator=generator, device=device)
    full = groups * shape.tokens
    index = (spatial + torch.arange(groups, device=device)[:, None] * shape.tokens).flatten()
    latents = (shape.clips, shape.frames, shape.tokens, LATENT_CHANNELS)
    latent_unit = full * LATENT_CHANNELS * dtype.itemsize
    frame_weight = torch.rand(shape.clips, shape.frames, generator=generator, device=device) / (full * LATENT_CHANNELS)
    kept_unit, full_unit = (n * dim * dtype.itemsize for n in (index.numel(), full))

    def tokens_and_modulation(gated: bool) -> Callable:
        return lambda: [
            *(random(rows.num_rows, dim) for _ in range(1 + gated)),
            *(random(groups, dim) for _ in range(2 + gated)),
            *(random(dim) for _ in range(2)),
        ]

    return [
        Op(
            "modulate",
            tokens_and_modulation(gated=False),
            lambda backend, x, scale, shift, w, b: modulate(x, scale, shift, rows, weight=w, bias=b, backend=backend),
            2 * unit,
            3 * unit,
            layer_norm_peers(),
        ),
        Op(
            "gated_residual_modulate",
            tokens_and_modulation(gated=True),
            lambda backend, x, branch, gate, scale, shift, w, b: gated_residual_modulate(
                x, branch, gate, scale, shift, rows, weight=w, bias=b, backend=backend
            ),
            4 * unit,
            6 * unit,
        ),
        Op(
            "qk_norm_rope",
            lambda: [
                random(rows.num_rows, 3, shape.heads, shape.head_dim),
                random(shape.head_dim),
                random(shape.head_dim),
            ],
            lambda backend, qkv, q_weight, k_weight: qk_norm_rope(
                qkv, q_weight, k_weight, coords, rope, return_v=True, backend=backend
            ),
            6 * unit,
            8 * unit,
        ),
        Op(
            "qk_norm_rope (Wan)",  # all heads of a row are normalised together
            lambda: [*(random(rows.num_rows, shape.heads, shape.head_dim) for _ in "qk"), *(random(dim) for _ in "qk")],
            lambda backend, q, k, q_weight, k_weight: qk_norm_rope(
                (q, k), q_weight, k_weight, coords, rope, backend=backend
            ),
            4 * unit,
            6 * unit,
        ),
        Op(
            "qk_norm_rope (no norm, halves)",
            lambda: [random(rows.num_rows, shape.heads, shape.head_dim) for _ in "qk"],
            lambda backend, q, k: qk_norm_rope((q, k), None, None, coords, rope, interleaved=False, backend=backend),
            4 * unit,
            4 * unit,
        ),
        Op(
            "gather_tokens",
            lambda: [random(full, dim)],
            lambda backend, x: gather_tokens(x, index, backend=backend),
            2 * kept_unit,
            kept_unit + full_unit,
        ),
        Op(
            "scatter_tokens",
            lambda: [random(index.numel(), dim), random(dim)],
            lambda backend, x, fill: scatter_tokens(x, index, full, fill, backend=backend),
            kept_unit + full_unit,
            kept_unit + full_unit,
        ),
        Op(
            "bias_gelu",
            lambda: [random(rows.num_rows, 4 * dim), random(4 * dim)],
            lambda backend, x, bias: bias_gelu(x, bias, backend=backend),
            8 * unit,
            12 * unit,
        ),
        Op(
            "weighted_squared_error",
            lambda: [random(*latents), random(*latents).detach()],
            lambda backend, x, target: weighted_squared_error(x, target, frame_weight, backend=backend),
            2 * latent_unit,
            3 * latent_unit,
        ),
    ]


def layer_norm_peers() -> dict[str, Callable]:
    """Plain LayerNorm with weight and bias of other packages: fewer operands than ours, the same passes over the
    tokens."""
    peers = {}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        peers["Liger layer_norm"] = lambda x, scale, shift, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-6)
    except ImportError:
        pass
    try:
        from quack import rmsnorm

        peers["QuACK rmsnorm"] = lambda x, scale, shift, w, b: rmsnorm(x, w.float(), eps=1e-6)
    except ImportError:
        pass
    return peers


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def results(function: Callable, inputs: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs = as_tuple(function(*inputs))
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, differentiable(inputs), grads)]


def differentiable(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t for t in inputs if t.requires_grad]


def deviation(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Largest relative root mean square deviation of any output or gradient."""
    pairs = ((a.float(), e.float()) for a, e in zip(actual, exact, strict=True))
    return max(((a - e).square().mean().sqrt() / e.square().mean().sqrt()).item() for a, e in pairs)


def graphed(calls: list[Callable], device: torch.device) -> Callable:
    """All calls in one captured graph; on the CPU one after the other."""

    def together() -> None:
        for call in calls:
            call()

    together()  # compiles
    if device.type != "cuda":
        return together
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        together()
    return graph.replay


def implementations(op: Op, device: torch.device) -> dict[str, Callable]:
    def eager(*inputs):
        return op.call("reference", *inputs)

    ours = {OURS: lambda *inputs: op.call("cuda", *inputs)} if device.type == "cuda" else {}
    return ours | {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False)} | op.peers


def bench(
    op: Op, shape: Shape, device: torch.device, dtype: torch.dtype, copy_gb_per_s: float, seconds: float
) -> list[dict]:
    copies = max(1, -(-ROTATION_BYTES // op.forward_bytes)) if device.type == "cuda" else 1
    sets = [op.inputs() for _ in range(copies)]
    grads = [torch.randn_like(out) for out in as_tuple(op.call("reference", *sets[0]))]
    exact = results(
        lambda *inputs: op.call("reference", *inputs),
        [t.detach().float().requires_grad_(t.requires_grad) for t in sets[0]],
        [g.float() for g in grads],
    )
    rows, forward, backward = {}, {}, {}
    for name, function in implementations(op, device).items():
        rows[name] = {"implementation": name}
        try:
            with common.at_most(PREPARE_SECONDS):
                if name not in op.peers:
                    rows[name]["error"] = deviation(results(function, sets[0], grads), exact)
                    if not rows[name]["error"] <= TOLERANCE[dtype]:
                        raise AssertionError(
                            f"wrong: rms error {rows[name]['error']:.2e}, allowed {TOLERANCE[dtype]:.0e}"
                        )
                plain = [[t.detach() for t in inputs] for inputs in sets]
                forward[name] = graphed([lambda i=i, f=function: f(*i) for i in plain], device)
                outputs = [(as_tuple(function(*inputs)), inputs) for inputs in sets]
                backward[name] = graphed([lambda o=o, i=i: gradient(o, i, grads) for o, i in outputs], device)
        except Exception as error:  # that a peer fails is a result; that ours does, main tells
            forward.pop(name, None)
            rows[name]["note"] = f"failed: {common.one_line(error)}"
    del exact

    table = []
    for direction, functions, moved in (
        ("forward", forward, op.forward_bytes),
        ("backward", backward, op.backward_bytes),
    ):
        timings = common.interleaved(functions, device, seconds=seconds, min_runs=10 if device.type == "cuda" else 3)
        for name, row in rows.items():
            row = {"shape": shape.name, "op": op.name, "direction": direction, "bytes": moved, **row}
            row["case"] = f"{op.name}\n{shape.name}"
            if name in timings:
                median, p20, p80 = (
                    1000 * ms / copies for ms in (timings[name].median, timings[name].p20, timings[name].p80)
                )
                speed = moved / median * 1e-3
                row |= {"us": median, "us_p20": p20, "us_p80": p80, "runs": timings[name].runs, "gb_per_s": speed}
                row["percent_of_copy"] = 100 * speed / copy_gb_per_s
                if OURS in timings:
                    row["speedup_of_ours"] = timings[name].median / timings[OURS].median
            table.append(row)
    return table


def gradient(outputs: tuple[torch.Tensor, ...], inputs: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    torch.autograd.grad(outputs, differentiable(inputs), grads[: len(outputs)], retain_graph=True, allow_unused=True)


class Traffic(TorchDispatchMode):
    """Counts operator calls that touch memory, and the bytes of their operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if tensors and not function.is_view and "empty" not in str(function):
            self.calls += 1
            self.bytes += sum(t.nbytes for t in tensors)
        return out


def block_traffic(device: torch.device, dtype: torch.dtype) -> list[dict]:
    """One block of MiMo-XL in training: what three blocks cost more than two."""
    gpu = device.type == "cuda"
    preset = MiMoConfig.from_preset("mimo-xl-k600" if gpu else "mimo-tiny")
    clips, frames, tokens = (32 if gpu else 1), preset.frames, preset.height * preset.width
    x, noise = (torch.randn(clips, frames, tokens, preset.channels, device=device, dtype=dtype) for _ in range(2))
    timestep = torch.full((clips, frames), 500.0, device=device)
    keep = sample_tube_mask(clips, tokens, tokens * 5 // 8, device=device)
    rows = []
    backends = {"plain PyTorch": "reference"} | ({"mimo_kernels": "auto"} if gpu else {})
    for name, backend in backends.items():
        counts = []
        for depth in (2, 3):
            config = dataclasses.replace(preset, depth=depth, decoder_layer=depth, mask_weight=0.0)
            model = MiMo(config, backend).to(device, dtype)

            def step(model=model) -> None:
                model(clean_and_noisy(x, noise, timestep, keep=keep)).velocity.sum().backward()
                model.zero_grad()

            step()  # tables are made, plans uploaded
            with Traffic() as traffic:
                step()
            counts.append(traffic)
        calls, moved = (getattr(counts[1], what) - getattr(counts[0], what) for what in ("calls", "bytes"))
        passes = moved / (clips * frames * (tokens + keep.shape[1]) * preset.dim * dtype.itemsize)
        rows.append({"block": name, "calls": calls, "mib": moved / 2**20, "passes": passes})
    return rows


def main() -> int:
    device = common.default_device()
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in shapes], metavar="NAME")
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="operators; all by default")
    parser.add_argument("--seconds", type=float, default=0.3, help="timed per implementation and direction")
    parser.add_argument("--minutes", type=float, help="begin no operator that would end later")
    arguments = parser.parse_args()
    budget = common.Budget(arguments.minutes)
    torch.manual_seed(0)
    if device.type == "cuda":
        # A graph cannot be captured on the default stream, and a backward runs on its forward's stream.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    torch._functorch.config.donated_buffer = False  # the backward is timed alone, again and again

    header, limits = common.machine(device), common.ceilings(device)
    common.print_header("memory-bound operators", header, limits)
    if device.type != "cuda":
        print(
            "  no GPU: a small shape in fp32 on the CPU without the compiled kernels; the figures say"
            " nothing about them"
        )
    pieces = [
        (shape, op)
        for shape in shapes
        if not arguments.shapes or shape.name in arguments.shapes
        for op in operators(shape, device, dtype)
        if not arguments.ops or op.name in arguments.ops
    ]
    rows = []
    for shape, op in budget.of(pieces):
        print(f"{shape.name}: {op.name}", flush=True)
        torch.compiler.reset()
        rows += bench(op, shape, device, dtype, limits["copy_gb_per_s"], arguments.seconds)
        common.save_results(arguments.out, "ops", header, limits, rows, PLOT)
    traffic = block_traffic(device, dtype)
    result = common.save_results(arguments.out, "ops", header, limits, rows, PLOT, block_traffic=traffic)
    common.draw(arguments.out, result)

    measured = [row for row in rows if "us" in row]
    for note in dict.fromkeys(f"{row['implementation']}: {row['note']}" for row in rows if "note" in row):
        print(f"not measured: {note}")
    if budget.left_out:
        names = ", ".join(f"{op.name} of {shape.name}" for shape, op in budget.left_out)
        print(f"not measured within {arguments.minutes:g} minutes: {names}")
    print("\none MiMo block, forward and backward; a pass is all its tokens read or written once:")
    columns = {"block": "", "calls": "operator calls", "mib": "MiB moved", "passes": "passes"}
    print(common.format_table(traffic, columns))
    print("\n" + common.format_table(measured, COLUMNS))
    print(", ".join(str(arguments.out / f"ops.{kind}") for kind in ("json", "csv", "png")))
    wrong = dict.fromkeys(
        f"{row['case']}: {row['note']}".replace("\n", " of ")
        for row in rows
        if row["implementation"] == OURS and "note" in row
    )
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
