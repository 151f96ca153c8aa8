"""What noisy frames are told of the frames right before them: windows of a token and its neighbours, on the rows of
noisy frames alone."""

import pytest
import torch

from mimo import MiMo, MiMoConfig
from mimo.network.frames import FrameBatch, FrameList, clean_and_noisy
from mimo.network.recent import Recent, recent_frames


def network(**options) -> MiMo:
    torch.manual_seed(0)
    base = {"depth": 1, "dim": 16, "heads": 2, "frames": 4, "height": 3, "width": 4, "channels": 2}
    model = MiMo(MiMoConfig(**base | {"mask_weight": 0.0, "decoder_layer": 1, "recent_frames": 1} | options))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def test_it_is_a_convolution():
    config = MiMoConfig(dim=16, heads=2, height=3, width=4, channels=2, recent_frames=2)
    embed, x = Recent(config), torch.randn(5, 12, 4)
    weight = embed.proj.weight.view(16, 3, 3, 4).permute(0, 3, 1, 2)
    grid = x.unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(grid, weight, embed.proj.bias, padding=1)
    torch.testing.assert_close(embed(x), expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_only_the_noisy_frame_that_is_told_is_another():
    """Of two alike clips and of two that differ in length; masked history or not."""
    model, x, noisy = network(), torch.randn(2, 4, 12, 2), torch.randn(2, 4, 12, 2)
    for keep in (None, torch.arange(9).expand(2, -1)):
        outputs = []
        for changed in (False, True):
            recent = recent_frames(x, 1).flatten(0, 1)
            recent[6] += changed  # frame 2 of clip 1
            batch = clean_and_noisy(x, noisy, torch.full((2, 4), 500), keep=keep, recent=recent)
            outputs.append(model(batch, reconstruct=False).velocity)
        differs = (outputs[0] != outputs[1]).any(-1).any(-1)
        assert differs.nonzero().tolist() == [[1, 2]]


def test_clips_that_differ_are_told_the_same():
    model, x, noisy, t = network(), torch.randn(2, 4, 12, 2), torch.randn(2, 4, 12, 2), torch.full((2, 4), 500)
    recent = recent_frames(x, 1)
    whole = [
        model(clean_and_noisy(x[b : b + 1, :n], noisy[b : b + 1, :n], t[:1, :n], recent=recent[b, :n])).velocity
        for b, n in ((0, 4), (1, 2))
    ]
    lists = [clean_and_noisy(x[b : b + 1, :n], noisy[b : b + 1, :n], t[:1, :n]).frames for b, n in ((0, 4), (1, 2))]
    latents = torch.cat([x[0], noisy[0], x[1, :2], noisy[1, :2]])
    both = FrameList((*lists[0].clips, *lists[1].clips), "teacher_forcing")
    told = torch.cat([recent[0], recent[1, :2]])
    out = model(FrameBatch(both, latents, torch.full((6,), 500), recent=told)).velocity
    torch.testing.assert_close(out.view(6, 12, 2), torch.cat([part[0] for part in whole]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recent, expected", [(None, r"\[8, 12, 2\]"), (torch.zeros(4, 12, 2), r"\[8, 12, 2\]")])
def test_what_does_not_fit_is_refused(recent, expected):
    x = torch.randn(2, 4, 12, 2)
    with pytest.raises(ValueError, match=f"expected {expected} with recent_frames=1"):
        network()(clean_and_noisy(x, x, torch.full((2, 4), 500), recent=recent))
    with pytest.raises(ValueError, match="recent is .*: expected None with recent_frames=0"):
        network(recent_frames=0)(clean_and_noisy(x, x, torch.full((2, 4), 500), recent=torch.zeros(8, 12, 2)))
