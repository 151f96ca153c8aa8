"""The frame list: its masks against the rule frame by frame, ragged clips against each clip alone, and features by
layer."""

import dataclasses

import pytest
import torch

from mimo import MiMo, MiMoConfig
from mimo.network.frames import Frame, FrameBatch, FrameList, clean_and_noisy, noisy_alone, one_copy, two_copies
from mimo.recipes import build_recipe
from mimo.recipes.base import step_generator

TINY = MiMoConfig(depth=3, dim=32, heads=2, frames=4, height=2, width=3, channels=5, decoder_depth=1, decoder_layer=2)
DEVICE = torch.device("cpu")


def build(**changes) -> MiMo:
    """A small network in which nothing is zero."""
    torch.manual_seed(0)
    model = MiMo(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rule(frames: FrameList) -> torch.Tensor:
    """bool [R, R], from what each kind of list promises, two frames at a time."""
    listed = [(b, f) for b, clip in enumerate(frames.clips) for f in clip]
    alone = torch.zeros(len(listed), dtype=torch.bool)
    if frames.alone is not None:
        alone[[i for i, (_, f) in enumerate(listed) if f.kind != "clean"]] = frames.alone
    lens = [f.tokens for _, f in listed]
    dense = torch.zeros(sum(lens), sum(lens), dtype=torch.bool)
    starts = [sum(lens[:i]) for i in range(len(lens))]
    for i, (clip, frame) in enumerate(listed):
        for j, (other, key) in enumerate(listed):
            if frames.sees == "bidirectional":
                seen = clip == other
            elif frames.sees == "block_causal":
                seen = clip == other and j <= i and (not alone[i] or i == j)
            else:
                earlier = key.kind == "clean" and (key.time < frame.time or (key.time == frame.time and i == j))
                seen = clip == other and (i == j or (earlier and not alone[i]))
            dense[starts[i] : starts[i] + lens[i], starts[j] : starts[j] + lens[j]] = seen
    return dense


def ragged(sees: str) -> FrameList:
    """Three clips of other lengths and token counts, an empty frame among them."""
    if sees == "teacher_forcing":
        clips = [([2, 3], 4), ([1, 0, 2], 3), ([5], 2)]
        return FrameList(
            tuple(
                (
                    *(Frame(t, "clean", count) for t, count in enumerate(kept)),
                    *(Frame(t, "noisy", whole) for t in range(len(kept))),
                )
                for kept, whole in clips
            ),
            sees,
        )
    return FrameList(
        tuple(tuple(Frame(t, "noisy", n) for t, n in enumerate(c)) for c in ([2, 3], [1, 0, 4], [5])), sees
    )


@pytest.mark.parametrize("sees", ["teacher_forcing", "block_causal", "bidirectional"])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_masks_follow_from_the_list(sees, alike, alone):
    frames = ragged(sees)
    if alike:
        frames = two_copies(2, 3, 2, 4) if sees == "teacher_forcing" else one_copy(2, 3, 4, sees)
    if alone:
        draws = torch.rand(6, generator=torch.Generator().manual_seed(2)) < 0.5
        assert 0 < draws.sum() < 6
        isolated = frames.isolating(draws)
        if sees == "bidirectional":
            with pytest.raises(ValueError, match="sees='bidirectional': expected no window and no frame alone"):
                _ = isolated.mask
            return
        assert isolated._kept is frames._kept and frames.alone is None  # all else is shared
        frames = isolated
    assert torch.equal(frames.mask.to_dense(), rule(frames))
    last = rule(frames)
    packed = frames.packed(separate_ln=True, device=DEVICE)
    if packed.clean is not None:
        rows = torch.tensor([frame.kind == "clean" for frame in frames.frames])[packed.frame]
        last = last[~rows]
    assert torch.equal(frames.last_mask.to_dense(), last)
    assert frames.last_mask.repeats == 2 or not alike or alone
    assert frames.packed(separate_ln=True, device=DEVICE).frame is packed.frame  # made once


@pytest.mark.parametrize("separate_ln", [False, True])
def test_rows_coordinates_and_parts_follow_from_the_list(separate_ln):
    frames = FrameList(
        (
            (Frame(0, "coarse", 1, stride=2), Frame(1, "clean", 2), Frame(1, "noisy", 6), Frame(2, "noisy", 6)),
            (Frame(5, "clean", 3), Frame(6, "noisy", 6)),
        ),
        "block_causal",
    )
    packed = frames.packed(separate_ln=separate_ln, device=DEVICE)
    clean = -1 if separate_ln else 4
    groups = [0, clean, clean, *[1] * 6, *[2] * 6, clean, clean, clean, *[3] * 6]
    assert packed.rows.row_on("cpu").tolist() == groups
    tokens = torch.tensor([0, 0, 4, *range(6), *range(6), 1, 3, 5, *range(6)])
    coords = packed.coordinates(tokens, width=2)
    grid = [[t, y, x] for t in (1, 2) for y in range(3) for x in range(2)]
    assert coords[:3].tolist() == [[0, 0, 0], [1, 0, 0], [1, 2, 0]] and coords[3:15].tolist() == grid
    assert coords[15:18].tolist() == [[5, 0, 1], [5, 1, 1], [5, 2, 1]]
    x = torch.arange(24.0)[:, None]
    assert packed.clean.rows(x).flatten().tolist() == [1, 2, 15, 16, 17]
    assert packed.told_time.tolist() == [0, 1, 2, 6] and packed.told_clip.tolist() == [0, 0, 0, 1]
    assert packed.predicted.time.tolist() == [1, 2, 6] and packed.predicted.clip.tolist() == [0, 0, 1]
    assert packed.group.tolist() == [1, 2, 3]
    coarse, fine = packed.sizes.split(x)
    assert packed.sizes.frames.tolist() == [0] and coarse.flatten().tolist() == [0]
    assert fine.flatten().tolist() == list(range(1, 24)) and torch.equal(packed.sizes.join(coarse, fine), x)
    told = packed.clean.add(torch.zeros(24, 1), torch.tensor([[1.0], [2.0]])).flatten()
    assert told.nonzero().flatten().tolist() == [1, 2, 15, 16, 17] and told[15:18].tolist() == [2.0] * 3


def test_a_coarse_frame_has_the_coordinates_of_its_stride():
    frames = FrameList(((Frame(3, "coarse", 4, stride=4), Frame(4, "noisy", 64)),), "block_causal")
    coords = frames.packed(separate_ln=False, device=DEVICE).coordinates(None, width=8)
    assert coords[:4].tolist() == [[3, 0, 0], [3, 0, 4], [3, 4, 0], [3, 4, 4]]
    assert coords[4:].tolist() == [[4, y, x] for y in range(8) for x in range(8)]


@torch.no_grad()
@pytest.mark.parametrize("separate_ln", [True, False])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_ragged_clips_are_each_what_they_are_alone(separate_ln, positions):
    """Clips of 4, 2 and 3 frames, with a mask ratio each, actions, classes and intervals: velocity, reconstruction,
    taps."""
    told = {"num_classes": 3, "num_actions": 4, "max_interval": 5, "mask_offsets": (0, 1, 2)}
    model, generator = build(separate_ln=separate_ln, positions=positions, **told), torch.Generator().manual_seed(4)
    keeps = [torch.tensor([0, 2, 5]), torch.tensor([1, 2, 3, 4]), torch.tensor([0])]
    batches = []
    for clip, (keep, length) in enumerate(zip(keeps, (4, 2, 3), strict=True)):
        clean, noisy = torch.randn(2, 1, length, 6, 5, generator=generator).unbind()
        batches.append(
            clean_and_noisy(
                clean,
                noisy,
                1000 * torch.rand(1, length, generator=generator),
                keep=keep[None],
                labels=torch.tensor([clip]),
                actions=torch.randint(4, (1, 4), generator=generator)[:, :length],
                intervals=torch.tensor([clip + 1]),
            )
        )
    whole = FrameBatch(
        FrameList(tuple(batch.frames.clips[0] for batch in batches), "teacher_forcing"),
        **{name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("latents", "timestep", "tokens")},
        labels=torch.tensor([0, 1, 2]),
        actions=torch.stack([torch.nn.functional.pad(b.actions[0], (0, 4 - b.actions.shape[1])) for b in batches]),
        intervals=torch.tensor([1, 2, 3]),
    )
    taps = [(1, "clean"), (3, "noisy")]
    together, parts = model(whole, taps=taps), [model(batch, taps=taps) for batch in batches]

    def same(ragged, alone):
        torch.testing.assert_close(ragged, torch.cat([x.flatten(0, -2) for x in alone]), rtol=1e-5, atol=1e-5)

    same(together.velocity, [part.velocity for part in parts])
    assert sorted(together.reconstruction) == [0, 1, 2]
    for offset, made in together.reconstruction.items():  # a clip of two frames has none that is two later
        same(made, [part.reconstruction[offset] for part in parts if offset in part.reconstruction])
    for tap in taps:
        same(together.features[tap], [part.features[tap] for part in parts])


@torch.no_grad()
@pytest.mark.parametrize("separate_ln", [True, False])
def test_features_after_any_layer(separate_ln):
    """A tap behind layer l is the state that a network of l blocks would end with; of clean frames also by
    themselves."""
    model = build(separate_ln=separate_ln, decoder_layer=3)
    clean, noisy = torch.randn(2, 2, 4, 6, 5, generator=torch.Generator().manual_seed(1)).unbind()
    timestep = torch.full((2, 4), 300.0)
    batch = clean_and_noisy(clean, noisy, timestep)
    taps = [(layer, kind) for layer in (1, 2, 3) for kind in ("clean", "noisy")]
    output = model(batch, taps=taps)
    assert list(output.features) == taps and torch.equal(output.velocity, model(batch).velocity)
    for layer, kind in taps:
        found = output.features[layer, kind]
        assert found.shape == (2 * 4 * 6, 32)
        if kind == "clean":
            alone = model(clean_and_noisy(clean, None, None), taps=[(layer, kind)])
            assert alone.velocity is None
            torch.testing.assert_close(alone.features[layer, kind], found, rtol=1e-5, atol=1e-5)
    c = model._condition(timestep.flatten(), None, None)
    rows = batch.frames.packed(separate_ln=separate_ln, device=DEVICE).predicted.frame_rows
    norm = model.norm(output.features[3, "noisy"], None, model.norm.condition(torch.nn.functional.silu(c)), rows)[1]
    torch.testing.assert_close(model.head(norm).view_as(output.velocity), output.velocity, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output.features[1, "clean"], output.features[2, "clean"], atol=1e-3)
    single = model(noisy_alone(noisy, timestep), taps=[(2, "noisy")])
    assert single.features[2, "noisy"].shape == (48, 32)


def test_taps_carry_gradients_to_what_made_them():
    model = build()
    clean = torch.randn(1, 4, 6, 5, requires_grad=True)
    output = model(clean_and_noisy(clean, None, None), taps=[(2, "clean")])
    output.features[2, "clean"].square().sum().backward()
    assert (clean.grad != 0).all()
    assert model.blocks[1].mlp.down.weight.grad is not None and model.blocks[2].mlp.down.weight.grad is None


def test_what_does_not_fit_is_refused_by_name():
    model, frames = build(), torch.randn(1, 4, 6, 5)
    cases = [
        (
            lambda: model(clean_and_noisy(frames, None, None)),
            "clean frames alone: expected masked ones and a decoder, or taps",
        ),
        (
            lambda: model(clean_and_noisy(frames, None, None), taps=[(4, "clean")]),
            r"tap \(4, 'clean'\): expected \(1..3",
        ),
        (lambda: model(clean_and_noisy(frames, None, None), taps=[(1, "noisy")]), "the batch has no noisy frames"),
        (lambda: model(clean_and_noisy(frames, frames, torch.zeros(1, 4)), taps=[(3, "clean")]), "decoder_layer=2"),
        (lambda: model(noisy_alone(frames, torch.zeros(1, 3))), r"timestep is \[1, 3\]: expected \[1, 4\]"),
        (
            lambda: model(noisy_alone(frames[..., :4], torch.zeros(1, 4))),
            r"latents are \[4, 6, 4\]: expected \[4, 6, 5\]",
        ),
        (lambda: model(FrameBatch(one_copy(1, 4, 6), frames[0])), "timestep has 0 numbers: expected 4"),
        (lambda: model(FrameBatch(one_copy(1, 4, 5), frames[0], torch.zeros(4))), "tokens=None: expected whole frames"),
        (
            lambda: model(FrameBatch(one_copy(1, 4, 5), frames[0], torch.zeros(4), torch.zeros(3))),
            r"tokens are \[3\]: expected \[20\]",
        ),
        (
            lambda: model(
                FrameBatch(FrameList(((Frame(0, "masked", 6),),), "block_causal"), frames[0, :1], torch.zeros(1))
            ),
            "frames are masked: this network embeds",
        ),
        (
            lambda: FrameList(((Frame(0, "noisy", 6), Frame(0, "clean", 6)),), "teacher_forcing").mask,
            "expected clean frames, then others of the same times",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_lists_of_a_shape_that_comes_again_are_kept():
    """Also where frames are dropped: what is made anew then is the mask."""
    config = dataclasses.replace(TINY, history_dropout=0.5)
    recipe, model = build_recipe(config), MiMo(config)
    latents = torch.randn(2, 4, 2, 3, 5)
    for step in (0, 1):
        recipe.loss(model, latents, generator=step_generator(0, step, "cpu"))
    before = two_copies.cache_info()
    recipe.loss(model, latents, generator=step_generator(0, 1, "cpu"))
    assert two_copies.cache_info().misses == before.misses
