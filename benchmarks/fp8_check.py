"""May a network be trained with float8 products (`--train.precision fp8`)? Accuracy first, then time.

    python benchmarks/fp8_check.py [--out bench_results] [--network PRESET] [--steps N] [--clips N]

A network is trained for N steps on procedural clips, in fp8 once and in bf16 three times, with the same clips, noise
and masks; the bf16 runs start from weights that differ by bf16's own rounding, 2^-8. Then, at the weights that bf16 has
reached (at the start all gates are zero, and most gradients with them), one step on clips not seen is made in bf16 and
in fp8 and compared with fp32. fp8 passes if all of these hold:

    step loss     |loss - fp32's| / fp32's <= 1 %
    gradients     cosine with fp32's >= 0.98 for every group of parameters
    curve end     |mean loss of the last quarter / that of the bf16 runs - 1| <= 1 %
    curve gap     the loss, smoothed over a tenth of the steps, lies above the mean of the bf16 runs by <= 3 %, from the
                  first tenth of the steps on

Why these. 3 and 2 bits of mantissa put 2.6 % and 5.2 % of rounding noise (rms) on values and on gradients: 4 to 6 % on
a product of two. Noise of a fifth of a gradient (cosine 0.98) still adds little to one that differs from batch to batch
by most of its own length, which the table shows as "another batch". Rounding without a bias leaves the curve where it
is, a bias shows as a gap that grows. Short trainings are chaotic, and any rounding moves a bump of the curve by some
steps: hence the mean of three bf16 runs, whose own spread is printed, and a wider bound on the gap. It is one-sided, as
a lower loss is no fault.

On a GPU the network is mimo-xl-k600, and every projection of it is timed in bf16 and fp8, forward and backward, as it
is and compiled. Without one a small network is trained on the CPU, whose float8 products are emulated: its times say
nothing. Ends with status 1 if fp8 fails, 2 if this machine has no float8 product.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo import MiMo, MiMoConfig
from mimo.data import ShapesDataset, to_float
from mimo.network.fp8 import Projection, require_float8, use_float8
from mimo.recipes import build_recipe
from mimo.recipes.base import step_generator
from mimo.runtime import autocast, config_tokenizer

LOSS, COSINE, END, GAP = 0.01, 0.98, 0.01, 0.03
TWINS = ("bf16", "bf16, second run", "bf16, third run")
POOL = 64  # clips that are trained on
SMALL = {"depth": 3, "dim": 64, "heads": 2, "frames": 5, "height": 6, "width": 6, "channels": 16, "decoder_layer": 2}
SMALL |= {"decoder_depth": 1, "history_dropout": 0.1, "parameterization": "flow"}
GROUPS = {
    "qkv": ("attention.qkv.",),
    "attention out": ("attention.proj.",),
    "MLP up": ("mlp.up.",),
    "MLP down": ("mlp.down.",),
    "norms, modulation": ("norm",),
    "embeddings, heads": ("",),
}


def make_latents(config: MiMoConfig, count: int, seed: int, device: torch.device) -> Tensor:
    """Clips of moving shapes through the analytic tokenizer, [count, T, H, W, C]."""
    frames, height, width = config.video_shape
    dataset, tokenizer = ShapesDataset(num_frames=frames, height=height, width=width), config_tokenizer(config)
    clips = [to_float(torch.from_numpy(dataset.sample(index, seed)["video"])[None]) for index in range(count)]
    return torch.cat([tokenizer.encode(clip) for clip in clips]).to(device)


class Run:
    """One network in one precision."""

    def __init__(self, config: MiMoConfig, precision: str, device: torch.device, twin: int = 0):
        self.recipe, self.precision, self.device = build_recipe(config), precision, device
        torch.manual_seed(0)
        self.model = MiMo(config).to(device)
        if twin:
            torch.manual_seed(twin)
            for parameter in self.model.parameters():
                parameter.data *= 1 + 2**-8 * (2 * torch.rand_like(parameter) - 1)
        if precision == "fp8":
            use_float8(self.model)

    def loss(self, latents: Tensor, step: int) -> Tensor:
        with autocast(self.device, self.precision):
            return self.recipe.loss(self.model, latents, generator=step_generator(0, step, self.device)).total

    def train(self, pool: Tensor, steps: int, clips: int, lr: float) -> tuple[list[float], float]:
        """The loss of every step, and milliseconds per step."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.001, fused=True)
        losses, start = [], time.perf_counter()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / max(1, steps // 10))
            chosen = torch.randint(len(pool), (clips,), generator=torch.Generator().manual_seed(step))
            loss = self.loss(pool[chosen.to(self.device)], step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        values = torch.stack(losses).tolist()  # waits for the device
        return values, 1000 * (time.perf_counter() - start) / steps

    def gradients(self, latents: Tensor, step: int) -> tuple[float, dict[str, Tensor]]:
        """The loss of one step, and its gradients by group, each as one vector."""
        self.model.zero_grad()
        loss = self.loss(latents, step)
        loss.backward()
        groups: dict[str, list[Tensor]] = {name: [] for name in GROUPS}
        for name, parameter in self.model.named_parameters():
            group = next(group for group, parts in GROUPS.items() if any(part in name for part in parts))
            if parameter.grad is not None:
                groups[group].append(parameter.grad.flatten())
        return loss.item(), {name: torch.cat(grads) for name, grads in groups.items() if grads}


def compare_step(config: MiMoConfig, weights: dict, latents: Tensor, other: Tensor) -> tuple[list[dict], dict]:
    """Rows of relative error and cosine per group and precision, and the losses."""
    rows, losses, exact = [], {}, {}
    cases = {"fp32": ("fp32", latents, 0), "bf16": ("bf16", latents, 0), "fp8": ("fp8", latents, 0)}
    cases["another batch, fp32"] = "fp32", other, 1
    for case, (precision, batch, step) in cases.items():
        run = Run(config, precision, latents.device)
        run.model.load_state_dict(weights)
        losses[case], found = run.gradients(batch, step)
        exact = exact or found
        if case == "fp32":
            continue
        for group, gradient in found.items():
            error = (gradient - exact[group]).norm() / exact[group].norm()
            cosine = F.cosine_similarity(gradient, exact[group], dim=0)
            row = {"what": "relative error of gradients", "group": group, "precision": case}
            rows.append(row | {"error": error.item(), "cosine": cosine.item()})
    return rows, losses


def smooth(losses: list[float]) -> Tensor:
    """The mean over a tenth of the steps, from every step on that has so many behind it."""
    window = max(1, len(losses) // 10)
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(1)


def judge(rows: list[dict], losses: dict[str, float], curves: dict[str, list[float]]) -> list[dict]:
    """The checks, each with what was found, its bound and whether it holds. What is not a number holds nowhere."""
    quarter, tenth = max(1, len(curves["fp8"]) // 4), len(curves["fp8"]) // 10
    ends = {name: sum(curve[-quarter:]) / quarter for name, curve in curves.items()}
    smoothed = {name: smooth(curve)[tenth:] for name, curve in curves.items()}

    def against_bf16(values: dict) -> dict:
        """Each run against the mean of the bf16 runs that are not itself."""
        others = {name: [values[twin] for twin in TWINS if twin != name] for name in values}
        return {name: value / (sum(others[name]) / len(others[name])) - 1 for name, value in values.items()}

    off = {name: abs(value) for name, value in against_bf16(ends).items()}
    above = {name: value.max().item() for name, value in against_bf16(smoothed).items()}
    cosines = {row["group"]: row["cosine"] for row in rows if row["precision"] == "fp8"}
    worst = min(cosines, key=lambda group: cosines[group] if cosines[group] == cosines[group] else -1.0)
    checks = [
        ("step loss", abs(losses["fp8"] - losses["fp32"]) / losses["fp32"], "<=", LOSS),
        (f"gradients ({worst})", cosines[worst], ">=", COSINE),
        ("curve end", off["fp8"], "<=", END),
        ("curve gap", above["fp8"], "<=", GAP),
    ]
    among_bf16 = {"curve end": max(off[twin] for twin in TWINS), "curve gap": max(above[twin] for twin in TWINS)}
    return [
        {
            "check": name,
            "found": found,
            "among_bf16": among_bf16.get(name),
            "bound": f"{sign} {bound:.4g}",
            "holds": found <= bound if sign == "<=" else found >= bound,
        }
        for name, found, sign, bound in checks
    ]


def time_projections(config: MiMoConfig, clips: int, device: torch.device) -> list[dict]:
    """Milliseconds of forward and backward of each projection over the rows of a training step."""
    kept = config.tokens - int(sum(config.mask_ratio) / 2 * config.tokens)
    rows, dim, hidden = clips * config.frames * (kept + config.tokens), config.dim, int(config.dim * config.mlp_ratio)
    sizes = {"qkv": (dim, 3 * dim), "attention out": (dim, dim), "MLP up": (dim, hidden), "MLP down": (hidden, dim)}
    found = []
    for name, (inputs, outputs) in sizes.items():
        x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(rows, outputs, device=device, dtype=torch.bfloat16)
        timed = {}
        for precision in ("bf16", "fp8"):
            layer = Projection(inputs, outputs).to(device)
            layer.float8 = precision == "fp8"
            timed[precision] = both_ways(layer, layer, x, dy)
            timed[f"{precision}, compiled"] = both_ways(torch.compile(layer, fullgraph=True), layer, x, dy)
        timings = common.interleaved(timed, device)
        for version, timing in timings.items():
            row = {"projection": name, "rows": rows, "inputs": inputs, "outputs": outputs, "version": version}
            row |= {"ms": timing.median, "p20": timing.p20, "p80": timing.p80}
            row["tflops"] = 6 * rows * inputs * outputs / timing.median * 1e-9
            found.append(row | {"bf16_over_this": timings["bf16"].median / timing.median})
    return found


def both_ways(function: Callable, layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = function(x)
        torch.autograd.grad(y, (x, *layer.parameters()), dy)

    return run


def plot_curves(path: Path, title: str, curves: dict[str, list[float]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: {path.name} is not drawn")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    smoothed = {name: smooth(curve) for name, curve in curves.items()}
    first = len(curves["bf16"]) - len(smoothed["bf16"])
    steps = range(first, len(curves["bf16"]))
    mean = sum(smoothed[twin] for twin in TWINS) / len(TWINS)
    for name, curve in smoothed.items():
        style = {"label": name, "color": "C1" if name == "fp8" else "C0", "alpha": 0.5 if "," in name else 1.0}
        axes[0].plot(steps, curve, **style)
        axes[1].plot(steps, 100 * (curve / mean - 1), **style)
    axes[0].set_ylabel("loss, mean over a tenth of the steps")
    axes[0].set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    axes[1].set_ylabel("against the mean of bf16, %")
    axes[1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--network", help="a preset; the default is mimo-xl-k600, without a GPU a small network")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--clips", type=int, help="clips per step")
    arguments = parser.parse_args()

    device = common.default_device()
    gpu = device.type == "cuda"
    try:
        require_float8(device)
        if arguments.network or gpu:
            config = MiMoConfig.from_preset(arguments.network or "mimo-xl-k600")
        else:
            config = MiMoConfig(**SMALL)
    except ValueError as error:
        parser.error(str(error))
    steps, clips = arguments.steps or (300 if gpu else 150), arguments.clips or (8 if gpu else 4)
    if min(steps, clips) < 1:
        parser.error(f"--steps {steps} and --clips {clips}: expected at least 1")
    header, limits = common.machine(device), common.ceilings(device)
    common.print_header("Float8 products against bf16 and fp32", header, limits)
    print(f"  {steps} steps of {clips} clips, depth {config.depth}, width {config.dim}")

    pool, unseen = (make_latents(config, count, seed, device) for count, seed in ((POOL, 0), (2 * clips, 1)))
    curves, step_ms, weights = {}, {}, {}
    for name in (*TWINS, "fp8"):
        run = Run(config, name.partition(",")[0], device, twin=TWINS.index(name) if name in TWINS else 0)
        curves[name], step_ms[name] = run.train(pool, steps, clips, lr=8e-4)
        weights = weights or {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        del run
    rows, losses = compare_step(config, weights, unseen[:clips], unseen[clips:])
    checks = judge(rows, losses, curves)
    layers = time_projections(config, 2 * clips, device) if gpu else []

    passed = all(check["holds"] for check in checks)
    plot = {"group": "group", "bar": "precision", "value": "error", "panel": "what", "unit": "|g - g32| / |g32|"}
    extra = {"passed": passed, "checks": checks, "network": config.to_dict(), "steps": steps, "clips": clips}
    extra |= {"step_losses": losses, "step_ms": step_ms, "projections": layers, "curves": curves}
    path = common.write_results(arguments.out, "fp8", header, limits, rows, plot, **extra)
    plot_curves(arguments.out / "fp8_loss.png", header["device"], curves)
    columns = {"group": "parameters", "precision": "precision", "error": "relative error", "cosine": "cosine"}
    print(common.format_table(rows, columns))
    print("  loss of the step: " + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))
    print("  ms per step, not compiled: " + ", ".join(f"{name} {ms:.4g}" for name, ms in step_ms.items()))
    if layers:
        columns = {"projection": "projection", "rows": "rows", "inputs": "in", "outputs": "out", "version": "version"}
        columns |= {"ms": "ms", "tflops": "TFLOP/s", "bf16_over_this": "bf16 / this"}
        print(common.format_table(layers, columns))
    else:
        print("  No GPU: a small network, float8 products emulated. The accuracy counts, the times say nothing.")
    for check in checks:
        spread = "" if check["among_bf16"] is None else f" (a bf16 run against the others: {check['among_bf16']:.4g})"
        verdict = "PASS" if check["holds"] else "FAIL"
        print(f"  {verdict}  {check['check']}: {check['found']:.4g}, expected {check['bound']}{spread}")
    print(f"{'PASS' if passed else 'FAIL'}: fp8 {'may' if passed else 'may not'} be recommended for this network here")
    print(path)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
