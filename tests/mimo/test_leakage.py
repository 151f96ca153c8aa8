"""What a prediction must not depend on has a gradient of exactly zero; what it may depend on has one that is not."""

import pytest
import torch

from mimo import MiMo, MiMoConfig
from mimo.network.frames import clean_and_noisy

CLIPS, FRAMES, TOKENS, CHANNELS, KEPT = 2, 4, 6, 3, 4


def build(**changes) -> MiMo:
    """A small network in which nothing is zero, so that every path carries a gradient."""
    torch.manual_seed(0)
    size = {"depth": 3, "dim": 32, "heads": 2, "decoder_depth": 2, "decoder_layer": 2}
    shape = {"frames": FRAMES, "height": 2, "width": 3, "channels": CHANNELS}
    model = MiMo(MiMoConfig(**(size | shape | {"mask_offsets": (0, 1, 2)} | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    history, noisy = torch.randn(2, CLIPS, FRAMES, TOKENS, CHANNELS, generator=generator).unbind()
    timestep = 1000 * torch.rand(CLIPS, FRAMES, generator=generator)
    keep = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])
    return history.requires_grad_(), noisy.requires_grad_(), timestep, keep


def touched(gradient: torch.Tensor | None) -> torch.Tensor:
    """bool [B, T, N]: the tokens with a gradient that is not exactly zero."""
    return (gradient != 0).any(-1)


ABLATIONS = [
    {},
    {"separate_ln": False},
    {"positions": "learned"},
    {"decoder_layer": 3},
    {"num_actions": 2},
]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_velocity_sees_earlier_history_and_its_own_frame_alone(changes, masked):
    model = build(**changes)
    history, noisy, timestep, keep = inputs()
    output = model(clean_and_noisy(history, noisy, timestep, keep=keep if masked else None))
    visible = torch.ones(CLIPS, TOKENS, dtype=torch.bool)
    if masked:
        visible = torch.zeros_like(visible).scatter(1, keep, True)
    for clip in range(CLIPS):
        for t in range(FRAMES):
            target = output.velocity[clip, t].square().sum()
            of_history, of_noisy = torch.autograd.grad(target, (history, noisy), retain_graph=True)
            expected = torch.zeros(CLIPS, FRAMES, TOKENS, dtype=torch.bool)
            expected[clip, t] = True
            assert torch.equal(touched(of_noisy), expected)
            expected[clip, t] = False
            expected[clip, :t] = visible[clip]
            assert torch.equal(touched(of_history), expected)


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_a_reconstruction_sees_kept_history_up_to_its_frame_alone(changes):
    model = build(**changes)
    history, noisy, timestep, keep = inputs()
    output = model(clean_and_noisy(history, noisy, timestep, keep=keep))
    assert sorted(output.reconstruction) == [0, 1, 2]
    visible = torch.zeros(CLIPS, TOKENS, dtype=torch.bool).scatter(1, keep, True)
    for offset, prediction in output.reconstruction.items():
        assert prediction.shape == (CLIPS, FRAMES - offset, TOKENS, CHANNELS)
        for clip in range(CLIPS):
            for t in range(FRAMES - offset):
                target = prediction[clip, t].square().sum()
                of_history, of_noisy = torch.autograd.grad(
                    target, (history, noisy), retain_graph=True, allow_unused=True, materialize_grads=True
                )
                expected = torch.zeros(CLIPS, FRAMES, TOKENS, dtype=torch.bool)
                assert torch.equal(touched(of_noisy), expected)
                expected[clip, : t + 1] = visible[clip]
                assert torch.equal(touched(of_history), expected)


def test_a_frame_whose_history_is_dropped_sees_itself_alone():
    model = build()
    history, noisy, timestep, keep = inputs()
    drop = torch.tensor([[False, False, True, False], [False, True, False, True]])
    output = model(clean_and_noisy(history, noisy, timestep, keep=keep, drop_history=drop))
    whole = model(clean_and_noisy(history, noisy, timestep, keep=keep))
    for clip in range(CLIPS):
        for t in range(FRAMES):
            target = output.velocity[clip, t].square().sum()
            of_history, of_noisy = torch.autograd.grad(target, (history, noisy), retain_graph=True)
            assert touched(of_noisy)[clip, t].all()
            assert touched(of_history).any() == (t > 0 and not drop[clip, t])
            changed = not torch.equal(output.velocity[clip, t], whole.velocity[clip, t])
            assert changed == (drop[clip, t].item() and t > 0)
    for offset, prediction in output.reconstruction.items():
        assert torch.equal(prediction, whole.reconstruction[offset])
