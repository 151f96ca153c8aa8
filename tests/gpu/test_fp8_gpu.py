"""Float8 products on a GPU: the rounding of the CPU's, ragged rows, compiled, checkpointed, and never something
else."""

import pytest
import torch
import torch.nn.functional as F

from mimo import MiMo, MiMoConfig
from mimo.network.fp8 import GRADIENTS, VALUES, Projection, require_float8, to_float8, use_float8
from mimo.recipes import build_recipe
from mimo.recipes.base import step_generator

CONFIG = MiMoConfig(
    **{"depth": 4, "dim": 144, "heads": 2, "frames": 5, "height": 8, "width": 8, "channels": 16, "decoder_depth": 2},
    **{"decoder_layer": 3, "min_snr_gamma": 5.0, "min_snr_decay": 0.96, "history_dropout": 0.3},
)
XL = [(1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152)]  # qkv, attention out, MLP up, MLP down


@pytest.fixture(autouse=True)
def served():
    try:
        require_float8(torch.device("cuda"))
    except ValueError as error:
        pytest.skip(str(error))


def projection(rows: int, inputs: int, outputs: int) -> tuple[Projection, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    layer = Projection(inputs, outputs).cuda()
    layer.float8 = True
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).cuda()
    x, dy = (torch.randn(rows, width, generator=generator).bfloat16().cuda() for width in (inputs, outputs))
    return layer, x.requires_grad_(), dy


def dequantised(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x8, scale = to_float8(x.detach(), dtype)
    return x8.double() * scale.double()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def step(layer, x, dy) -> list[torch.Tensor]:
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    return [y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)]


@pytest.mark.parametrize("dtype", [VALUES, GRADIENTS])
def test_rounding_equals_the_cpus(dtype):
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)) * 1e-5
    (x8, scale), (y8, other) = to_float8(x, dtype), to_float8(x.cuda(), dtype)
    assert torch.equal(scale, other.cpu()) and torch.equal(x8.view(torch.uint8), y8.cpu().view(torch.uint8))


@pytest.mark.parametrize("sizes", XL)
@pytest.mark.parametrize("rows", [1, 17, 1000, 2048])
def test_the_three_products_are_those_of_the_rounded_operands(rows, sizes):
    layer, x, dy = projection(rows, *sizes)
    y, dx, dw, db = step(layer, x, dy)
    x8, w8, dy8 = dequantised(x, VALUES), dequantised(layer.weight, VALUES), dequantised(dy, GRADIENTS)
    assert y.dtype == dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    # bf16 results, rounded twice with the bias; the forward's sums may be of fewer bits than fp32.
    assert relative(y, x8 @ w8.t() + layer.bias.double()) < 1e-2
    assert relative(dx, dy8 @ w8) < 4e-3
    assert relative(dw, dy8.t() @ x8) < 1e-3
    assert relative(db, dy.double().sum(0)) < 1e-2


def test_compiled_whole_with_changing_rows():
    layer, x, dy = projection(1000, 1152, 3456)
    expected = step(layer, x, dy)
    compiled = torch.compile(layer, fullgraph=True)

    def run(x, dy):
        with torch.autocast("cuda", torch.bfloat16):
            y = compiled(x)
        return [y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)]

    # The scale may come from a division that rounds in another way, which moves few values by a unit of float8.
    assert all(relative(a, b) < 1e-2 for a, b in zip(run(x, dy), expected, strict=True))
    for rows in (977, 64):
        _, x, dy = projection(rows, 1152, 3456)
        assert all(relative(a, b) < 1e-2 for a, b in zip(run(x, dy), step(layer, x, dy), strict=True))


def run_network(precision: str, *, recompute: bool = False, compiled: bool = False):
    torch.manual_seed(0)
    model = MiMo(CONFIG).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).cuda())
    if precision == "fp8":
        use_float8(model)
    for block in [*model.blocks, *model.decoder.blocks]:
        block.recompute = recompute
    if compiled:
        model.compute = torch.compile(model.compute, fullgraph=True)
    latents = torch.randn(4, *CONFIG.latent_shape, generator=torch.Generator().manual_seed(2)).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision != "fp32"):
        loss = build_recipe(CONFIG).loss(model, latents, generator=step_generator(0, 0, "cuda"))
    loss.total.backward()
    return loss.total.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def exact():
    return run_network("fp32")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_stays_near_fp32(exact, compiled):
    loss, grads = run_network("fp8", compiled=compiled)
    assert loss == pytest.approx(exact[0], rel=0.02)
    assert F.cosine_similarity(grads, exact[1], dim=0) > 0.98


def test_recomputed_blocks_give_the_same_bits():
    (one, grads), (other, again) = run_network("fp8"), run_network("fp8", recompute=True)
    assert one == other and torch.equal(grads, again)


def test_a_step_does_not_wait_for_the_device():
    layer, x, dy = projection(1000, 1152, 1152)
    step(layer, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
