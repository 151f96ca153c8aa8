"""Hidden states of history: what sampling computes of finished frames, for every system."""

import pytest
import torch

from mimo import MiMo, MiMoConfig
from mimo.evaluation.representation import (
    hidden_states,
    history_batch,
    history_layers,
    history_policy,
    pooled_history,
)
from mimo.presets import NETWORK, TINY_SYSTEMS

SMALL = {"dim": 32, "heads": 2, "frames": 4, "video_frames": 4, "height": 2, "width": 3, "channels": 5}
SMALL |= {"depth": 3, "decoder_layer": 2, "repa_layer": 1}
OF_SYSTEM = {"far-long": {"height": 3}, "videomar": {"decoder_layer": 1}, "magi": {"decoder_layer": 1, "depth": 4}}


def network(system: str, **changes) -> MiMo:
    """Of a tiny preset, smaller still, in which nothing is zero."""
    options = NETWORK[f"{system}-tiny"] | SMALL | OF_SYSTEM.get(system, {}) | changes
    torch.manual_seed(0)
    model = MiMo(MiMoConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def clips(model: MiMo, count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *model.config.latent_shape, generator=torch.Generator().manual_seed(seed))


def attention_inputs(model: MiMo) -> list[list[torch.Tensor]]:
    """Per block what its attention is given from here on, call after call."""
    seen = [[] for _ in model.blocks]
    for block, calls in zip(model.blocks, seen, strict=True):
        block.attention.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args[0]))
    return seen


@torch.no_grad()
def frame_by_frame(model: MiMo, latents: torch.Tensor, **conditions) -> None:
    """One clip [1, T, H, W, C] as the sampler does it: every frame by itself, attending to those before it."""
    policy, past = history_policy(model), {}

    def attend(layer, q, k, v):
        keys, values = (torch.cat([*past.get((layer, x), []), new[None]]) for x, new in (("k", k), ("v", v)))
        past[layer, "k"], past[layer, "v"] = keys.split(1), values.split(1)  # [t, N, h, d]
        if model.config.attention == "factorized":  # every place sees itself in the frames before
            scores = torch.einsum("nhd,tnhd->nht", q, keys) / q.shape[-1] ** 0.5
            return torch.einsum("nht,tnhd->nhd", scores.softmax(-1), values)
        scores = torch.einsum("nhd,mhd->nhm", q, keys.flatten(0, 1)) / q.shape[-1] ** 0.5
        return torch.einsum("nhm,mhd->nhd", scores.softmax(-1), values.flatten(0, 1))

    for t, frame in enumerate(latents[0].flatten(1, 2)):
        kind, timestep = policy.kind, policy.timestep
        model.history_frame(frame[None], t, attend, timestep=timestep, kind=kind, **conditions)


@pytest.mark.parametrize("system", [system for system in TINY_SYSTEMS if system != "video-dit"])
def test_they_are_those_of_sampling(system):
    model = network(system)
    latents = clips(model)
    layers = history_layers(model)
    seen = attention_inputs(model)
    with torch.no_grad():
        states = hidden_states(model, history_batch(model, latents), layers)
    packed = [calls.pop() for calls in seen if calls]  # nothing runs behind the last layer that is read
    assert len(packed) == max(layers)
    tokens = model.config.tokens
    assert states[layers[-1]].shape == (2, 4 * tokens, 32)
    frame_by_frame(model, latents[1:])
    for layer, (whole, parts) in enumerate(zip(packed, seen)):
        apart = (whole.unflatten(0, (2, -1))[1] - torch.cat(parts)).abs().max()
        assert apart < 1e-4, f"into block {layer}"  # fp32 sums in another order; a frame too many moves it by 0.1


def test_the_last_layer_is_there_if_history_goes_through_it():
    assert history_layers(network("acdit")) == (1, 2)
    assert history_layers(network("mimo")) == (1, 2)
    assert history_layers(network("mimo", decoder_layer=3)) == (1, 2, 3)
    assert history_layers(network("far")) == (1, 2, 3)


def test_actions_and_intervals_are_told():
    model = network("far", num_actions=3)
    latents = clips(model)
    told, null = (
        pooled_history(model, history_batch(model, latents, actions=actions), (1, 3))
        for actions in (torch.zeros(2, 4, dtype=torch.int64), None)
    )
    assert told.shape == (2, 2, 32) and (told - null).abs().amin(0).max() > 1e-3
    model = network("acdit", max_interval=4)
    near, far = (
        pooled_history(model, history_batch(model, latents, intervals=torch.full((2,), interval)), (2,))
        for interval in (1, 4)
    )
    assert (near - far).abs().max() > 1e-3


def test_pooling_is_the_mean_over_all_tokens_and_each_clip_stands_alone():
    model = network("mimo")
    latents = clips(model, 3)
    layers = history_layers(model)
    together = pooled_history(model, history_batch(model, latents), layers)
    alone = pooled_history(model, history_batch(model, latents[1:2]), layers)
    torch.testing.assert_close(together[1:2], alone)
    with torch.no_grad():
        states = hidden_states(model, history_batch(model, latents), layers)
    torch.testing.assert_close(together[:, 1], states[2].mean(1))


def test_all_frames_at_once_see_all():
    model = network("video-dit")
    latents = clips(model)
    changed = latents.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        first, second = (hidden_states(model, history_batch(model, x), (3,))[3][:, :6] for x in (latents, changed))
    assert (first - second).abs().max() > 1e-3
