"""Networks whose attention is spatial and temporal in turn, and tokens of several latent positions: who sees whom, and
cached sampling against the full mask."""

import pytest
import torch

from mimo import MiMo, MiMoConfig
from mimo.config import SampleConfig
from mimo.network.frames import Frame, FrameList, clean_and_noisy, noisy_alone, to_latents, to_tokens
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving

CLASSES, TOKENS, CHANNELS, FRAMES = 3, 4, 8, 4
SMALL = {"depth": 2, "dim": 32, "heads": 2, "frames": FRAMES, "height": 4, "width": 4, "channels": 2, "patch": 2}
FACTORIZED = SMALL | {"attention": "factorized", "positions": "sincos", "mask_weight": 0.0, "mask_ratio": (0.0, 0.0)}
FACTORIZED |= {"decoder_layer": 1, "parameterization": "flow"}
ACDIT = FACTORIZED | {"recipe": "acdit"}
DFOT = FACTORIZED | {"recipe": "dfot", "separate_ln": False, "num_classes": CLASSES}


def network(values, **changes) -> MiMo:
    """A small network in which nothing is zero, so that every path carries a signal."""
    torch.manual_seed(0)
    model = MiMo(MiMoConfig(**values | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


# Who sees whom --------------------------------------------------------------------------------------------------------


def listed(sees: str, alone: bool) -> FrameList:
    """Clips of 3 and 2 frames, of 4 and 2 tokens."""
    both = []
    for frames, tokens in ((3, 4), (2, 2)):
        clean = [Frame(t, "clean", tokens) for t in range(frames)] if sees == "teacher_forcing" else []
        both.append((*clean, *(Frame(t, "noisy", tokens) for t in range(frames))))
    made = FrameList(tuple(both), sees)
    return made.isolating(torch.tensor([False, True, False, False, True])) if alone else made


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("sees", ["teacher_forcing", "block_causal"])
def test_a_token_sees_its_own_place_in_the_frames_that_its_frame_sees(sees, alone):
    frames = listed(sees, alone)
    rows = [
        (b, f, n) for b, clip in enumerate(frames.clips) for f, frame in enumerate(clip) for n in range(frame.tokens)
    ]
    joint, tracks, device = frames.mask.to_dense(), frames.tracks.mask.to_dense(), torch.device("cpu")
    way = frames.by_tracks(device)
    assert torch.equal(way.to_frames[way.to_tracks], torch.arange(len(rows)))
    seen = torch.zeros_like(joint)
    seen[way.to_tracks[:, None], way.to_tracks] = tracks
    same_place = torch.tensor([[q[2] == k[2] for k in rows] for q in rows])
    assert torch.equal(seen, joint & same_place)
    same_frame = torch.tensor([[q[:2] == k[:2] for k in rows] for q in rows])
    assert torch.equal(way.frames.to_dense(), same_frame)


def test_frames_of_several_sizes_have_no_tracks():
    frames = FrameList(((Frame(0, "noisy", 4), Frame(1, "noisy", 3)),), "block_causal")
    with pytest.raises(ValueError, match=r"frames of \[3, 4\] tokens in a clip: expected one size"):
        frames.packed(separate_ln=False, device=torch.device("cpu"), factorized=True)


@pytest.mark.parametrize("copies", [1, 2])
def test_gradients_are_exactly_zero_where_nothing_is_seen(copies):
    """Behind a spatial and a temporal block a token has seen all tokens of the frames that its frame sees, no other."""
    model, x = network(ACDIT if copies == 2 else DFOT), clips(2, 2, FRAMES).requires_grad_()
    drop = torch.tensor([[False, False, True, False]] * 2)
    told = torch.full((2, FRAMES), 300.0)
    if copies == 2:
        velocity = model(clean_and_noisy(x[0], x[1], told, drop_history=drop)).velocity
    else:
        velocity = model(noisy_alone(x[1], told, drop_history=drop)).velocity
    for t in range(FRAMES):
        (gradient,) = torch.autograd.grad(velocity[1, t, 2].square().sum(), x, retain_graph=True)
        touched = (gradient != 0).any(-1)  # [copies, B, T, N]
        expected = torch.zeros_like(touched)
        expected[1, 1, t] = True
        if not drop[1, t]:
            expected[0 if copies == 2 else 1, 1, :t] = True
        assert torch.equal(touched, expected), t


def test_what_a_factorized_network_cannot_be():
    for changes, message in (
        ({"depth": 3}, "depth=3: expected an even number, of spatial and temporal blocks in turn"),
        ({"mask_ratio": (0.2, 0.5)}, r"mask_ratio=\(0.2, 0.5\): expected \(0, 0\) with attention='factorized'"),
        ({"patch": 3}, "patch=3: expected a divisor of height=4 and width=4"),
        ({"attention": "both"}, "attention='both': expected one of 'joint', 'factorized'"),
    ):
        with pytest.raises(ValueError, match=message):
            MiMoConfig(**ACDIT | changes)


# Sampling -------------------------------------------------------------------------------------------------------------

GUIDED = {"history_guidance": 1.5, "class_guidance": 2.0}


@pytest.mark.parametrize(
    ("values", "sampling"),
    [(ACDIT, {}), (ACDIT, {"history_guidance": 1.5, "window": 2, "sink": 1}), (DFOT, GUIDED)],
    ids=["acdit", "acdit, window", "dfot"],
)
def test_cached_sampling_is_the_full_mask(values, sampling):
    model, context = network(values), [clips(count, seed=5) for count in (1, 2)]
    labels = torch.tensor([0, 2]) if values is DFOT else None
    videos = []
    for use_cache in (True, False):
        config = SampleConfig(sampler="euler", steps=2, num_frames=FRAMES, **sampling)
        sampler = Sampler(model, config, use_cache=use_cache)
        generator = torch.Generator().manual_seed(3)
        videos.append(sampler.sample(context, FRAMES, generator=generator, labels=labels, trajectories=2))
    for cached, whole in zip(*videos, strict=True):
        torch.testing.assert_close(cached, whole, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_a_sampled_frame_is_the_forward_of_training():
    model, x, t = network(ACDIT), clips(2, FRAMES), 3
    frames, noise = [], clips(2, seed=9)

    def attend(layer, q, k, v):
        """What the frames before left, place by place."""
        assert layer == 0  # spatial blocks have no history
        q, k, v = (y.unflatten(0, (2, TOKENS)) for y in (q, k, v))
        kept = [*frames, (k, v)]
        k, v = (torch.stack(part, 2) for part in zip(*kept, strict=True))  # [S, N, frames, h, d]
        out = torch.nn.functional.scaled_dot_product_attention(q[:, :, :, None], *(y.transpose(2, 3) for y in (k, v)))
        if recording:
            frames.append(kept[-1])
        return out[:, :, :, 0].flatten(0, 1)

    recording = True
    for moment in range(t):
        model.history_frame(x[:, moment], moment, attend)
    recording = False
    velocity = model.future_frame(noise, torch.full((2,), 300.0), t, attend)
    every = torch.cat([torch.zeros_like(x[:, :t]), noise[:, None]], 1)
    expected = model(clean_and_noisy(x[:, : t + 1], every, torch.full((2, t + 1), 300.0))).velocity[:, t]
    torch.testing.assert_close(velocity, expected, rtol=2e-5, atol=2e-5)


def test_a_saved_run_goes_on_where_it_stopped(tmp_path):
    sampler = Sampler(network(ACDIT), SampleConfig(sampler="euler", steps=2, num_frames=FRAMES))
    whole = list(sampler.stream(clips(2, 1), FRAMES, generator=torch.Generator().manual_seed(1)))
    saving = Saving(tmp_path / "unfinished", every=1)
    stream = sampler.stream(clips(2, 1), FRAMES, generator=torch.Generator().manual_seed(1), saving=saving)
    made = [next(stream)]
    stream.close()
    made += list(sampler.resume(saving))
    assert all(torch.equal(one, other) for one, other in zip(made, whole, strict=True))


# Long videos ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_long_videos_stand_between_the_times_of_training(monkeypatch):
    """Frame t of 10 stands at t * 3 / 9, on the line between the embeddings of the times beside it; the last frame
    stands where a clip of training ends. A video as long as a clip is what it was."""
    model, place = network(ACDIT), torch.tensor([[0, 1, 0]])
    for t in range(10):
        at, share = divmod(t, 3)
        both = [model.positions(place + torch.tensor([[time, 0, 0]])) for time in (at, at + 1)]
        expected = both[0] + share / 3 * (both[1] - both[0])
        found = model.positions(place.float() + torch.tensor([[t * (3 / 9), 0, 0]]))
        torch.testing.assert_close(found, expected)
    seen, original = [], type(model.positions).forward
    monkeypatch.setattr(type(model.positions), "forward", lambda p, c: seen.append(c[:, 0].unique()) or original(p, c))
    videos = {}
    for use_cache, frames, interpolate in [(True, 10, True), (False, 10, True), (True, 4, True), (True, 4, False)]:
        config = SampleConfig(sampler="euler", steps=2, num_frames=frames, interpolate=interpolate)
        sampler, seen[:] = Sampler(model, config, use_cache=use_cache), []
        generator = torch.Generator().manual_seed(3)
        videos[use_cache, frames, interpolate] = sampler.sample(clips(1, 2), frames, generator=generator)
        times, every = torch.cat(seen).float(), torch.arange(10) / 3 if frames == 10 else torch.arange(4.0)
        assert ((times[:, None] - every).abs().amin(1) < 1e-6).all() and len((3 * times).round().unique()) == frames
    torch.testing.assert_close(videos[True, 10, True], videos[False, 10, True], rtol=2e-5, atol=2e-5)
    assert torch.equal(videos[True, 4, True], videos[True, 4, False])
    with pytest.raises(
        ValueError, match="interpolate=True: expected False, or a network with positions='sincos', not 'rope'"
    ):
        Sampler(network(ACDIT, positions="rope"), SampleConfig(sampler="euler", interpolate=True))


# Patches --------------------------------------------------------------------------------------------------------------


def test_tokens_of_several_positions():
    latents = torch.randn(2, 3, 4, 6, 5)
    tokens = to_tokens(latents, 2)
    assert tokens.shape == (2, 3, 6, 20) and torch.equal(to_latents(tokens, (2, 3), 2), latents)
    for y in range(4):
        for x in range(6):
            place, part = y // 2 * 3 + x // 2, y % 2 * 2 + x % 2
            assert torch.equal(tokens[:, :, place, 5 * part : 5 * part + 5], latents[:, :, y, x])
    assert torch.equal(to_tokens(latents, 1), latents.flatten(2, 3))
    assert torch.equal(to_latents(to_tokens(latents, 1), (4, 6), 1), latents)
