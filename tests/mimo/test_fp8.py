"""Float8 products: against products written out with the same rounding, and as part of network and training."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import mimo.network.fp8
from mimo import MiMo, MiMoConfig
from mimo.config import SampleConfig, TrainConfig
from mimo.data import ShapesDataset
from mimo.network.fp8 import GRADIENTS, VALUES, Projection, to_float8, use_float8
from mimo.recipes import build_recipe
from mimo.recipes.base import step_generator
from mimo.training.loop import train
from mimo.training.trainer import Trainer

CONFIG = MiMoConfig(
    **{"depth": 2, "dim": 32, "heads": 2, "decoder_depth": 1, "decoder_layer": 1, "frames": 3, "height": 3, "width": 3},
    **{"channels": 8, "parameterization": "flow", "history_dropout": 0.2},
)
STEP = {VALUES: 2**-4, GRADIENTS: 2**-3}  # largest relative error of rounding: half a unit of 3 and of 2 bits


def projection(rows: int = 37, inputs: int = 48, outputs: int = 32) -> tuple[Projection, torch.Tensor, torch.Tensor]:
    """A float8 projection, its rows and the gradient of its result."""
    generator = torch.Generator().manual_seed(rows)
    layer = Projection(inputs, outputs)
    layer.float8 = True
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x, dy = (torch.randn(rows, width, generator=generator) for width in (inputs, outputs))
    return layer, x.requires_grad_(), dy


def dequantised(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x after rounding to float8, in fp64."""
    x8, scale = to_float8(x.detach(), dtype)
    return x8.double() * scale.double()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# Rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [VALUES, GRADIENTS])
@given(exponent=st.integers(-60, 60), seed=st.integers(0, 1000), bf16=st.booleans())
@settings(max_examples=40, deadline=None)
def test_rounding_is_of_half_a_unit_at_every_magnitude(dtype, exponent, seed, bf16):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x = x.bfloat16() if bf16 else x
    x8, scale = to_float8(x, dtype)
    assert x8.dtype == dtype and x8.is_contiguous() and scale.shape == () and scale.dtype == torch.float32
    back = x8.double() * scale.double()
    smallest = torch.finfo(dtype).smallest_normal * scale.double()  # below it, errors are absolute
    assert ((back - x.double()).abs() <= 1.001 * STEP[dtype] * x.double().abs().clamp(min=smallest)).all()
    assert x8.float().abs().max() == torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", [VALUES, GRADIENTS])
def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden(dtype):
    x8, scale = to_float8(torch.zeros(3, 4), dtype)
    assert (x8.float() == 0).all() and scale.isfinite()
    for bad in (float("nan"), float("inf"), -float("inf")):
        x8, scale = to_float8(torch.tensor([[1.0, bad]]), dtype)
        assert (x8.float() * scale).isnan().any()


def test_a_transposed_operand_comes_out_contiguous():
    x = torch.randn(8, 6)
    assert torch.equal(to_float8(x.t(), VALUES)[0].float(), to_float8(x, VALUES)[0].float().t())
    assert to_float8(x.t(), VALUES)[0].is_contiguous()


# One projection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 37, 64])
def test_the_three_products_are_those_of_the_rounded_operands(rows):
    """Any number of rows: dL/dW sums over them, padded with zeros to a multiple of 16."""
    layer, x, dy = projection(rows)
    y = layer(x)
    y.backward(dy)
    x8, w8, dy8 = dequantised(x, VALUES), dequantised(layer.weight, VALUES), dequantised(dy, GRADIENTS)
    assert relative(y, x8 @ w8.t() + layer.bias.double()) < 1e-6
    assert relative(x.grad, dy8 @ w8) < 1e-6
    assert relative(layer.weight.grad, dy8.t() @ x8) < 1e-6
    assert torch.equal(layer.bias.grad, dy.sum(0))
    assert relative(y, F.linear(x, layer.weight, layer.bias)) > 1e-3  # it was float8, not something finer


def test_products_leave_out_the_bias_and_keep_leading_dimensions():
    layer, x, _ = projection(12)
    assert torch.equal(layer.product(x) + layer.bias, layer(x))
    assert torch.equal(layer.product(x.view(3, 4, -1)), layer.product(x).view(3, 4, -1))


def test_autocast_decides_the_result_and_weights_keep_fp32():
    layer, x, dy = projection()
    fine = layer.product(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        product = layer.product(x)
        y = layer(x)
        y.backward(dy.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, product + layer.bias.bfloat16())
    assert torch.equal(product, fine.bfloat16())  # rounded once
    assert relative(x.grad, dequantised(dy.bfloat16(), GRADIENTS) @ dequantised(layer.weight, VALUES)) < 1e-6
    assert layer.weight.grad.dtype == layer.weight.dtype == x.grad.dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_that_are_not_asked_for():
    layer, x, dy = projection()
    layer.weight.requires_grad_(False)
    layer(x).backward(dy)
    expected = x.grad
    layer, x, dy = projection()
    layer(x.detach()).backward(dy)
    assert layer.weight.grad is not None and x.grad is None
    assert relative(expected, dequantised(dy, GRADIENTS) @ dequantised(layer.weight, VALUES)) < 1e-6


def test_a_gradient_that_is_no_whole_block_of_memory():
    one, other = projection(), projection()
    one[0](one[1]).sum().backward()  # an expanded scalar
    other[0](other[1]).backward(torch.ones(37, 32))
    assert torch.equal(one[1].grad, other[1].grad) and torch.equal(one[0].weight.grad, other[0].weight.grad)


def test_what_is_kept_for_the_backward_is_one_byte_per_number():
    layer, x, _ = projection()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {(t.dtype, tuple(t.shape)) for t in kept} == {
        (VALUES, (37, 48)),
        (torch.float32, ()),
        (torch.float32, (32, 48)),  # the weight itself, no copy
    }
    assert any(t.data_ptr() == layer.weight.data_ptr() for t in kept)


def test_checkpointing_gives_the_same_bits():
    one, other = projection(), projection()
    one[0](one[1]).backward(one[2])
    checkpoint(other[0], other[1], use_reentrant=False).backward(other[2])
    assert torch.equal(one[1].grad, other[1].grad) and torch.equal(one[0].weight.grad, other[0].weight.grad)


def test_compiled_whole():
    layer, x, dy = projection()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        expected.backward(dy.bfloat16())
        grads = x.grad.clone(), layer.weight.grad.clone()
        x.grad = layer.weight.grad = layer.bias.grad = None
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        y.backward(dy.bfloat16())
        assert compiled(torch.randn(21, 48)).shape == (21, 32)  # another number of rows
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 2**-7
    assert relative(x.grad, grads[0]) < 1e-6 and relative(layer.weight.grad, grads[1]) < 1e-6


# The network ----------------------------------------------------------------------------------------------------------


def network(**options) -> MiMo:
    torch.manual_seed(0)
    model = MiMo(MiMoConfig(**CONFIG.to_dict() | options))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def loss_of(model: MiMo, precision: str):
    latents = torch.randn(2, *CONFIG.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        return build_recipe(model.config).loss(model, latents, generator=step_generator(0, 0, "cpu"))


def test_the_projections_of_all_blocks_are_converted_and_nothing_else():
    model = network()
    before = dict(model.named_parameters())
    plain = copy.deepcopy(model)
    use_float8(model)
    converted = {name for name, module in model.named_modules() if getattr(module, "float8", False)}
    blocks = ["blocks.0", "blocks.1", "decoder.blocks.0"]
    layers = ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")
    assert converted == {f"{block}.{layer}" for block in blocks for layer in layers}
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(getattr(module, "float8", False) for module in plain.modules())


def test_every_converted_layer_multiplies_in_float8(monkeypatch):
    shapes = []
    multiply = mimo.network.fp8._multiply
    monkeypatch.setattr(
        mimo.network.fp8, "_multiply", lambda a, b, *r, **o: shapes.append(a.dtype) or multiply(a, b, *r, **o)
    )
    model = network()
    loss_of(model, "bf16").total.backward()
    assert not shapes
    use_float8(model)
    shapes.clear()
    loss_of(model, "fp8").total.backward()
    offsets = len(CONFIG.mask_offsets)  # the decoder runs once for each
    products = 4 * (CONFIG.depth + offsets * CONFIG.decoder_depth)
    assert shapes.count(VALUES) == products and shapes.count(GRADIENTS) == 2 * products


@pytest.mark.parametrize("changes", [{}, {"separate_ln": False}])
def test_a_step_stays_near_fp32(changes):
    losses, grads = {}, {}
    for precision in ("fp32", "fp8"):
        model = network(**changes)
        if precision == "fp8":
            use_float8(model)
        loss = loss_of(model, precision)
        loss.total.backward()
        losses[precision] = loss.total.item()
        grads[precision] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert losses["fp8"] == pytest.approx(losses["fp32"], rel=0.03) and losses["fp8"] != losses["fp32"]
    assert F.cosine_similarity(grads["fp8"], grads["fp32"], dim=0) > 0.98
    assert grads["fp8"].isfinite().all()


def test_recomputed_blocks_give_the_same_bits():
    grads = []
    for recompute in (False, True):
        model = network()
        use_float8(model)
        for block in [*model.blocks, *model.decoder.blocks]:
            block.recompute = recompute
        # One attention kernel, whichever pass it is in.
        with sdpa_kernel(SDPBackend.MATH):
            loss_of(model, "fp8").total.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_whole_step_compiles_in_one_graph():
    model = network()
    use_float8(model)
    expected = loss_of(model, "fp8")
    model.compute = torch.compile(model.compute, fullgraph=True, backend="eager")
    assert loss_of(model, "fp8").total.item() == pytest.approx(expected.total.item(), rel=1e-4)


# What cannot be served ------------------------------------------------------------------------------------------------


def test_sizes_that_float8_cannot_multiply_are_refused_by_name():
    model = network(dim=24, heads=1)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attention\.qkv has 24 inputs and 72 outputs: expected multiples of 16"
    ):
        use_float8(model)
    assert not any(getattr(module, "float8", False) for module in model.modules())


def test_a_device_without_float8_products_is_refused_and_nothing_falls_back(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    model = network()
    with pytest.raises(
        ValueError, match=r"precision='fp8': torch .* has no float8 matrix product on cpu.*only supported"
    ) as error:
        use_float8(model)
    assert "\n" not in str(error.value)
    assert not any(getattr(module, "float8", False) for module in model.modules())
    layer, x, _ = projection()
    with pytest.raises(RuntimeError, match="only supported"):
        layer(x)


# Training -------------------------------------------------------------------------------------------------------------

NETWORK = {
    **{"depth": 1, "dim": 16, "heads": 2, "decoder_depth": 1, "decoder_layer": 1, "parameterization": "flow"},
    **{"frames": 3, "height": 2, "width": 2, "channels": 12, "compression": (1, 2, 2), "video_frames": 3},
}


def make_trainer(precision: str, **options) -> Trainer:
    config = MiMoConfig(**NETWORK)
    base = {"batch_size": 4, "steps": 6, "lr": 1e-2, "warmup": 2, "ema_decay": 0.9, "workers": 0, "log_every": 2}
    training = TrainConfig(**base | {"save_every": 100, "preview_every": 0, "precision": precision} | options)
    frames, height, width = config.video_shape
    dataset = ShapesDataset(num_frames=frames, height=height, width=width, length=20)
    return Trainer(config, training, SampleConfig(sampler="euler", steps=2, context_frames=1, num_frames=3), dataset)


def test_training_is_off_by_default_and_continues_exactly(tmp_path):
    assert TrainConfig().precision == "bf16"
    straight = make_trainer("fp8")
    records = train(straight)
    assert all(record["diffusion"] > 0 for record in records)
    first = make_trainer("fp8")
    first.start_data()
    for _ in range(3):
        first.train_step()
    saved = first.save(tmp_path)
    second = make_trainer("fp8")
    second.load(saved)
    train(second)
    one, other = straight.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(tensor.dtype == torch.float32 for tensor in one.values())
    plain = make_trainer("bf16")
    train(plain)
    assert any(not torch.equal(one[name], tensor) for name, tensor in plain.model.state_dict().items())
    assert one.keys() == plain.model.state_dict().keys()


def test_samples_are_drawn_without_float8():
    trainer = make_trainer("fp8")
    assert not any(getattr(module, "float8", False) for module in trainer.averaged().modules())


def test_a_network_too_odd_for_float8_is_refused_when_training_starts():
    narrow = NETWORK | {"dim": 24, "heads": 1}
    dataset = ShapesDataset(num_frames=3, height=4, width=4, length=20)
    with pytest.raises(ValueError, match="expected multiples of 16"):
        Trainer(
            MiMoConfig(**narrow), TrainConfig(batch_size=4, precision="fp8"), SampleConfig(sampler="euler"), dataset
        )


# The check that decides whether it may be recommended -----------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8_check():
    """benchmarks/fp8_check.py, which imports its neighbours as scripts do."""
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("fp8_check")
    finally:
        sys.path.remove(folder)


def verdict(fp8_check, *, curve=lambda step: 1.0, cosine=0.99, loss=1.0) -> dict[str, bool]:
    base = [1 / (1 + step / 10) for step in range(100)]
    curves = {name: [x * (1 + 0.001 * i) for x in base] for i, name in enumerate(fp8_check.TWINS)}
    curves["fp8"] = [x * curve(step) for step, x in enumerate(base)]
    rows = [{"precision": name, "group": group, "cosine": 0.999} for name in ("bf16", "fp8") for group in ("a", "b")]
    rows[-1]["cosine"] = cosine
    checks = fp8_check.judge(rows, {"fp32": 1.0, "bf16": 1.0, "fp8": loss}, curves)
    return {check["check"].partition(" (")[0]: check["holds"] for check in checks}


def test_the_verdict_falls_with_every_fault(fp8_check):
    names = ("step loss", "gradients", "curve end", "curve gap")
    assert verdict(fp8_check) == dict.fromkeys(names, True)
    assert verdict(fp8_check, loss=1.03)["step loss"] is False
    assert verdict(fp8_check, cosine=0.96)["gradients"] is False
    assert verdict(fp8_check, curve=lambda step: 1.02)["curve end"] is False
    bump = verdict(fp8_check, curve=lambda step: 1.06 if 30 <= step < 60 else 1.0)
    assert bump["curve gap"] is False and bump["curve end"] is True
    nan = float("nan")
    assert not any(verdict(fp8_check, curve=lambda step: nan, cosine=nan, loss=nan).values())


def test_a_step_is_compared_and_a_wrong_scale_is_seen(fp8_check, monkeypatch):
    model = network()
    batch, other = (torch.randn(2, *CONFIG.latent_shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    rows, losses = fp8_check.compare_step(CONFIG, model.state_dict(), batch, other)
    cosine = {
        precision: min(row["cosine"] for row in rows if row["precision"] == precision)
        for precision in losses
        if precision != "fp32"
    }
    assert cosine["bf16"] > cosine["fp8"] > cosine["another batch, fp32"]
    assert {row["group"] for row in rows} == set(fp8_check.GROUPS)
    right = mimo.network.fp8.to_float8
    monkeypatch.setattr(
        mimo.network.fp8, "to_float8", lambda x, dtype: (right(x, dtype)[0], right(x.abs().mean(), dtype)[1])
    )
    rows, _ = fp8_check.compare_step(CONFIG, model.state_dict(), batch, other)
    assert min(row["cosine"] for row in rows if row["precision"] == "fp8") < fp8_check.COSINE


def test_the_curves_train(fp8_check):
    config = MiMoConfig(**CONFIG.to_dict() | {"frames": 5, "height": 2, "width": 2, "channels": 16})
    pool = fp8_check.make_latents(config, 3, 0, torch.device("cpu"))
    assert pool.shape == (3, *config.latent_shape)
    (first, _), (again, _), (twin, _) = (
        fp8_check.Run(config, "fp8", torch.device("cpu"), twin=n).train(pool, 3, 2, lr=1e-3) for n in (0, 0, 1)
    )
    assert first == again != twin and twin[0] == pytest.approx(first[0], rel=0.05)
