"""A whole training step on a GPU: bf16 near fp32, the same bits twice, and no wait for the device."""

import dataclasses

import pytest
import torch

from mimo import MiMo, MiMoConfig
from mimo.recipes import build_recipe
from mimo.recipes.base import step_generator

CONFIG = MiMoConfig(
    depth=4,
    dim=144,
    heads=2,
    frames=5,
    height=8,
    width=8,
    channels=16,
    decoder_depth=2,
    decoder_layer=3,
    min_snr_gamma=5.0,
    min_snr_decay=0.96,
    num_classes=7,
    num_actions=3,
    history_dropout=0.3,
)

FACTORIZED = MiMoConfig(
    recipe="magi",
    attention="factorized",
    positions="sincos",
    learned_places=True,
    qk_norm=False,
    depth=4,
    dim=144,
    heads=2,
    frames=5,
    height=16,
    width=16,
    channels=4,
    patch=2,
    mask_weight=0.0,
    mask_ratio=(0.7, 1.0),
    decoder_layer=1,
    parameterization="epsilon",
    token_depth=2,
    token_width=128,
    noise_levels=4,
    cross_attention=True,
    num_classes=7,
)


def told(config: MiMoConfig) -> dict[str, torch.Tensor]:
    given = {"labels": torch.arange(4).cuda()}
    if config.repa_weight > 0:
        features = torch.randn(4, 8, 7, 14, config.repa_channels, generator=torch.Generator().manual_seed(3))
        given["features"] = features.cuda()
    return given | ({"actions": torch.arange(20).view(4, 5).cuda() % 3} if config.num_actions else {})


def run(config: MiMoConfig, backend: str, dtype: torch.dtype, step: int = 0):
    torch.manual_seed(0)
    model = MiMo(config, backend).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).cuda())
    generator = step_generator(0, step, "cuda")
    latents = torch.randn(4, *config.latent_shape, generator=torch.Generator().manual_seed(2)).cuda()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        loss = build_recipe(config).loss(model, latents, generator=generator, step=step, **told(config))
    loss.total.backward()
    return loss, [parameter.grad for parameter in model.parameters()]


ALIGNED = {"repa_weight": 0.5, "repa_layer": 2, "repa_channels": 48, "repa_hidden": 64}


@pytest.mark.parametrize(
    "changes", [{}, {"separate_ln": False}, {"parameterization": "flow", "min_snr_gamma": None}, ALIGNED]
)
def test_bf16_kernels_stay_near_plain_fp32(changes):
    if changes.get("parameterization") == "flow":
        changes = changes | {"min_snr_decay": None}
    config = dataclasses.replace(CONFIG, **changes)
    loss, _ = run(config, "auto", torch.bfloat16)
    exact, _ = run(config, "reference", torch.float32)
    assert (loss.alignment is None) == (exact.alignment is None) == (config.repa_weight == 0)
    for part, expected in ((a, b) for a, b in zip(loss, exact, strict=True) if a is not None):
        assert abs(part.item() - expected.item()) < 0.02 * expected.item()


def test_bf16_tracks_stay_near_plain_fp32():
    """One token per frame: the temporal layers of a factorized network."""
    loss, _ = run(FACTORIZED, "auto", torch.bfloat16)
    exact, _ = run(FACTORIZED, "reference", torch.float32)
    assert abs(loss.total.item() - exact.total.item()) < 0.02 * exact.total.item()


@pytest.mark.parametrize(
    "config", [CONFIG, FACTORIZED, dataclasses.replace(CONFIG, **ALIGNED)], ids=["joint", "factorized", "aligned"]
)
def test_a_step_gives_the_same_bits_twice(config):
    (first, first_grads), (second, second_grads) = (run(config, "auto", torch.bfloat16) for _ in range(2))
    assert first.total.item() == second.total.item()
    assert all(torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True))


@pytest.mark.parametrize("config", [CONFIG, FACTORIZED], ids=["joint", "factorized"])
def test_a_step_never_waits_for_the_device(config):
    model, recipe = MiMo(config).cuda(), build_recipe(config)
    latents, given = torch.randn(4, *config.latent_shape, device="cuda"), told(config)

    def step(number: int) -> None:
        generator = step_generator(0, number, "cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = recipe.loss(model, latents, generator=generator, **given)
        loss.total.backward()

    for number in range(3):  # tables, layouts and kernels are made on first use
        step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
