"""Attention maps against a dense softmax, and against what the network's own attention makes of the values."""

import numpy as np
import pytest
import torch

from mimo import MiMo, MiMoConfig
from mimo.evaluation.attention_maps import centre_query_weights, drawn_heads, latent_frames, overlay, shown_layers
from mimo.evaluation.representation import hidden_states, history_batch
from mimo.presets import NETWORK

SMALL = {"dim": 32, "heads": 4, "depth": 3, "decoder_layer": 2, "frames": 3, "video_frames": 3}
SMALL |= {"height": 3, "width": 4, "channels": 5}
TOKENS, CENTRE = 12, 6  # row 1, column 2 of 3 x 4


def network(preset: str, **changes) -> MiMo:
    torch.manual_seed(0)
    model = MiMo(MiMoConfig(**NETWORK[preset] | SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch_of(model: MiMo, clips: int = 2):
    latents = torch.randn(clips, *model.config.latent_shape, generator=torch.Generator().manual_seed(1))
    return history_batch(model, latents)


@pytest.mark.parametrize("preset", ["mimo-tiny", "far-tiny"])
def test_they_are_a_dense_softmax_of_those_rows(preset):
    model = network(preset)
    batch = batch_of(model)
    kept = {}

    def keep(layer):
        def hook(module, args):
            y, coords, rope, attend, *rest = args

            def attend_and_keep(q, k, v):
                out = attend(q, k, v)
                kept[layer] = q, k, v, out
                return out

            return y, coords, rope, attend_and_keep, *rest

        return hook

    heads = (0, 3)
    weights = centre_query_weights(model, batch, (1, 2), heads)
    hooks = [model.blocks[i].attention.register_forward_pre_hook(keep(i + 1)) for i in range(2)]
    with torch.no_grad():
        hidden_states(model, batch, (1, 2))
    for hook in hooks:
        hook.remove()
    for layer in (1, 2):
        q, k, v, out = (x.detach().double().unflatten(0, (2, -1)) for x in kept[layer])  # [B, T N, h, d]
        row = 2 * TOKENS + CENTRE
        scores = torch.einsum("bhd,blhd->bhl", q[:, row], k) / q.shape[-1] ** 0.5
        expected = scores.softmax(-1)[:, heads]
        found = weights[layer].double().flatten(2)
        assert found.shape == (2, 2, 3 * TOKENS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 2).double(), rtol=0, atol=1e-5)
        # And what the network's own attention collected, under its own mask, is the mean of the values with them.
        collected = torch.einsum("bhl,blhd->bhd", found, v[:, :, heads])
        torch.testing.assert_close(collected, out[:, row][:, heads], rtol=1e-4, atol=1e-5)


def test_looking_changes_nothing_and_leaves_nothing_behind():
    model = network("mimo-tiny")
    batch = batch_of(model)
    with torch.no_grad():
        before = hidden_states(model, batch, (2,))[2]
        centre_query_weights(model, batch, (1, 2), (0,))
        assert torch.equal(hidden_states(model, batch, (2,))[2], before)
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)


def test_bad_input():
    model = network("mimo-tiny")
    with pytest.raises(ValueError, match="^head 4: expected one below 4$"):
        centre_query_weights(model, batch_of(model), (1,), (4,))
    model = network("magi-tiny", decoder_layer=1, depth=4)
    with pytest.raises(ValueError, match="^attention='factorized': expected 'joint'"):
        centre_query_weights(model, batch_of(model), (1,), (0,))


def test_which_layers_and_heads_are_shown():
    assert shown_layers(range(1, 29)) == (4, 8, 12, 16, 20)
    assert shown_layers(range(1, 13)) == (4, 8, 12)
    assert shown_layers((1, 2, 3)) == (1, 2, 3)
    heads = drawn_heads(16, 4, seed=0)
    assert len(set(heads)) == 4 and heads == drawn_heads(16, 4, seed=0) != drawn_heads(16, 4, seed=1)
    assert drawn_heads(2, 4, seed=0) == (0, 1)


def test_the_picture_is_red_where_the_weight_is_and_blue_at_the_query():
    video = np.full((2, 24, 32, 3), 100, np.uint8)
    weights = np.zeros((2, TOKENS))
    weights[0, 5], weights[1, 0] = 0.9, 0.45  # row 1, column 1; the first token
    shown = overlay(video, weights, (3, 4)).astype(int)
    assert (shown[0, 8:16, 8:16] == [224, 20, 20]).all(), "0.8 of red"
    assert (shown[1, :8, :8] == [162, 60, 60]).all(), "half as much"
    assert (shown[0, :8] == 100).all() and (shown[1, 12, 20] == [40, 80, 255]).all()
    clip = np.arange(17)[:, None, None, None]
    assert latent_frames(clip, 5, 4).flatten().tolist() == [0, 4, 8, 12, 16]
    assert latent_frames(clip[:8], 2, 4).flatten().tolist() == [3, 7]
