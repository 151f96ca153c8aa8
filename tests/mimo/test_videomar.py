"""VideoMAR: what a masked token depends on, sampling against the forward of training, the loss against loops, gradients
by finite differences, and that one clip can be learnt."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mimo import MiMo, MiMoConfig
from mimo.cli import main
from mimo.config import SampleConfig, TrainConfig
from mimo.data import DataError, UnreadableVideo, VideoReader, open_dataset, write_video
from mimo.data.text import read_text
from mimo.diffusion import EpsilonSchedule
from mimo.network.cross import Text
from mimo.network.frames import Asked, FrameBatch
from mimo.network.network import MiMoOutput
from mimo.recipes import build_recipe, recipe_type
from mimo.recipes.base import Draws, HistoryPolicy, step_generator
from mimo.recipes.masked_tokens import masked_count
from mimo.recipes.videomar import next_frames
from mimo.sampling.frame_run import frame_generator
from mimo.sampling.masked import frame_temperature, mask_counts
from mimo.sampling.sampler import Sampler
from mimo.stages import parse_stages

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, TOKENS, CHANNELS, FRAMES = 3, 6, 5, 4
SMALL = {"recipe": "videomar", "depth": 2, "dim": 32, "heads": 2, "frames": FRAMES, "height": 2, "width": 3}
SMALL |= {"channels": CHANNELS, "token_depth": 1, "token_width": 16, "parameterization": "epsilon"}
SMALL |= {"mask_weight": 0.0, "mask_ratio": (0.4, 0.7), "decoder_layer": 1}
CLASS = {"num_classes": CLASSES, "cross_attention": True}


def network(**changes) -> MiMo:
    """A small network in which nothing is zero, whose head is no more than a part of what it is given: a token that is
    drawn stays of the size of the data."""
    torch.manual_seed(0)
    model = MiMo(MiMoConfig(**SMALL | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.01 if name.startswith("head.out") else 0.15) * torch.randn_like(parameter))
    return model


def clips(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, FRAMES, 2, 3, CHANNELS, generator=torch.Generator().manual_seed(seed))


def drawn(recipe, count: int = 3, step: int = 0, **conditions):
    given = {"labels": None, "actions": None, "intervals": None} | conditions
    return recipe.frames(clips(count).flatten(2, 3), given, Draws(step_generator(0, step, "cpu"), count), step)


# The frames and the loss ----------------------------------------------------------------------------------------------


def test_a_clip_ends_with_the_frame_that_is_masked():
    """Earlier frames whole, later ones left out; the frame is any of the clip, and tokens are as in the data."""
    recipe, x = build_recipe(MiMoConfig(**SMALL)), clips(8).flatten(2, 3)
    seen, places = set(), set()
    for step in range(12):
        batch = drawn(recipe, 8, step).batch
        counts = [len(clip) - 1 for clip in batch.frames.clips]
        seen |= set(counts)
        assert batch.frames is next_frames(tuple(counts), TOKENS) and batch.frames.sees == "block_causal"
        latents, masked = iter(batch.latents), iter(batch.masked.view(-1, TOKENS))
        ratio = masked_count(TOKENS, (0.4, 0.7), torch.rand((), generator=step_generator(0, step, "cpu")).item())
        for clip, count in enumerate(counts):
            for t in range(count + 1):
                assert torch.equal(next(latents), x[clip, t])
                hidden = next(masked)
                assert batch.frames.clips[clip][t].kind == ("masked" if t == count else "clean")
                assert hidden.sum() == (len(batch.asked.rows) // 8 if t == count else 0)
                places |= set(hidden.nonzero()[:, 0].tolist())
        assert 3 <= len(batch.asked.rows) // 8 <= 5 and ratio >= 3  # of 6 tokens, 0.4 to 0.7
        assert batch.timestep is None and next(latents, None) is None
    assert seen == set(range(FRAMES)) and places == set(range(TOKENS))


class Answer(torch.nn.Module):
    """A network whose eps are given."""

    def forward(self, batch, *, reconstruct):
        self.batch = batch
        self.eps = torch.randn(batch.asked.noisy.shape, generator=torch.Generator().manual_seed(9))
        return MiMoOutput(self.eps, {}, {})


def test_the_loss_against_a_loop():
    """Squared error of eps over masked tokens and draws alone; eps is read back from what the head is given."""
    recipe, answer, x, abar = build_recipe(MiMoConfig(**SMALL)), Answer(), clips(3).flatten(2, 3), [1.0]
    for t in range(1000):
        now, then = (math.cos(((t + k) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (0, 1))
        abar.append(abar[-1] * (1 - min(1 - then / now, 0.999)))
    loss = recipe.loss(answer, clips(3), generator=step_generator(0, 5, "cpu"))
    batch, errors = answer.batch, []
    counts = [len(clip) - 1 for clip in batch.frames.clips]
    assert batch.asked.noisy.shape == (4, len(batch.asked.rows), CHANNELS)
    for draw in range(4):
        for n, row in enumerate(batch.asked.rows.tolist()):
            clip, token = divmod(row, TOKENS)
            first = sum(count + 1 for count in counts[:clip]) + counts[clip]  # the frame in the list
            assert batch.masked.view(-1, TOKENS)[first, token]
            here = abar[int(batch.asked.timestep[draw, n]) + 1]
            clean = x[clip, counts[clip], token]
            eps = (batch.asked.noisy[draw, n] - math.sqrt(here) * clean) / math.sqrt(1 - here)
            errors.append((answer.eps[draw, n] - eps).square().mean())
    assert loss.total.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-3)
    assert batch.asked.timestep.unique().numel() > 0.9 * batch.asked.timestep.numel()


def test_a_part_of_a_batch_draws_what_the_whole_draws_for_it():
    recipe = build_recipe(MiMoConfig(**SMALL | CLASS, label_dropout=0.5))
    x, labels, found = clips(6).flatten(2, 3), torch.arange(6) % CLASSES, []
    for first, count in ((0, 6), (0, 2), (2, 4)):
        ours = slice(first, first + count)
        given = {"labels": labels[ours], "actions": None, "intervals": None}
        batch = recipe.frames(x[ours], given, Draws(step_generator(0, 3, "cpu"), count, first, 6), 0).batch
        found.append((batch.latents, batch.masked, batch.labels, *(t.transpose(0, 1) for t in batch.asked[1:])))
    for whole, one, other in zip(*found, strict=True):
        assert torch.equal(whole, torch.cat([one, other]))
    assert {CLASSES} < set(found[0][2].tolist())


@pytest.mark.parametrize("changes", [{}, CLASS])
def test_gradients_are_exactly_zero_where_nothing_is_seen(changes):
    """eps of a token depends on all earlier frames of its clip and on the tokens of its frame that are not masked."""
    model, recipe = network(**changes), build_recipe(MiMoConfig(**SMALL | changes))
    prepared = drawn(recipe, 4, labels=torch.tensor([0, 1, 2, 0]) if changes else None)
    batch = prepared.batch
    batch.latents = batch.latents.clone().requires_grad_()
    eps, rows = model(batch).velocity, 0
    each = len(batch.asked.rows) // 4
    for clip, frames in enumerate(batch.frames.clips):
        for n in range(clip * each, (clip + 1) * each):
            (gradient,) = torch.autograd.grad(eps[:, n].square().sum(), batch.latents, retain_graph=True)
            expected = torch.zeros_like(batch.masked)
            expected[rows : rows + len(frames) * TOKENS] = True
            assert torch.equal((gradient != 0).any(-1).flatten(), expected & ~batch.masked), (clip, n)
        rows += len(frames) * TOKENS


def test_every_parameter_learns():
    model = network(**CLASS)
    loss = build_recipe(model.config).loss(
        model, clips(), labels=torch.tensor([0, 2]), generator=step_generator(0, 1, "cpu")
    )
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0 and parameter.grad.isfinite().all(), name


def dense_attention(q, k, v, mask, *, backend):
    """frame_attention in float64, which it refuses itself: a row without keys gives 0."""
    seen = mask.to_dense()
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -1e9).softmax(-1) * seen
    return torch.einsum("hqk,khd->qhd", weights, v)


def test_gradients_by_finite_differences(monkeypatch):
    """The derivative of the loss along a random direction of every parameter, in float64."""
    monkeypatch.setattr("mimo.network.network.frame_attention", dense_attention)
    monkeypatch.setattr("mimo.network.cross.frame_attention", dense_attention)
    model = MiMo(network(**CLASS).config, backend="reference").double()
    model.load_state_dict(network(**CLASS).state_dict())
    recipe = build_recipe(model.config, backend="reference")

    def loss() -> torch.Tensor:
        generator = step_generator(0, 1, "cpu")
        given = {"labels": torch.tensor([0, 2]), "actions": None, "intervals": None}
        prepared = recipe.frames(clips().double().flatten(2, 3), given, Draws(generator, 2), None)
        error = model(prepared.batch).velocity - prepared.target
        return (error.square() * prepared.weight[..., None].double()).sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction, start = torch.randn(parameter.shape, generator=generator).double(), parameter.detach().clone()
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.copy_(start + step * direction)
                sides.append(loss().item())
                parameter.copy_(start)
        expected, found = (sides[0] - sides[1]) / 2e-5, (parameter.grad * direction).sum().item()
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_overfitting_one_clip_removes_most_of_the_loss():
    """Of the loss of a fresh head, which predicts no noise at all and so begins at 1."""
    c = MiMoConfig(**SMALL | {"token_width": 48})
    torch.manual_seed(0)
    model, recipe, steps = MiMo(c), build_recipe(c), 200
    clip = clips(1).expand(12, -1, -1, -1, -1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    curve = []
    for step in range(steps):
        loss = recipe.loss(model, clip, generator=step_generator(0, step, "cpu"))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        rate.step()
        curve.append(loss.total.item())
    assert sum(curve[:3]) / 3 > 0.8 and sum(curve[-20:]) / 20 < 0.25


# Sampling -------------------------------------------------------------------------------------------------------------


def told_eps(model, done, x, masked, tokens, noisy, t, labels):
    """eps of noisy tokens [S, n, C] at timestep t, from the forward of training over all frames."""
    counts, size = (len(done),) * len(x), len(x)
    frames = torch.stack([*done, x], 1).flatten(0, 1)
    hidden = torch.zeros(size, len(done) + 1, TOKENS, dtype=torch.bool)
    hidden[:, -1] = masked
    rows = (torch.arange(size)[:, None] * TOKENS + tokens).flatten()
    asked = Asked(rows, noisy.flatten(0, 1)[None], torch.full((1, rows.numel()), float(t)))
    batch = FrameBatch(next_frames(counts, TOKENS), frames, labels=labels, masked=hidden.flatten(), asked=asked)
    return model(batch).velocity[0].view_as(noisy)


@torch.no_grad()
def by_the_forward_of_training(model, context, seed, steps, mask_steps, weight, labels, temperature):
    schedule, done, size = EpsilonSchedule(), list(context.unbind(1)), len(context)
    visited = schedule.sampling_timesteps(steps).tolist()
    for t in range(len(done), FRAMES):
        x, masked = torch.zeros(size, TOKENS, CHANNELS), torch.ones(size, TOKENS, dtype=torch.bool)
        turns = torch.stack(
            [torch.randperm(TOKENS, generator=frame_generator(seed, s, t, "order")) for s in range(size)]
        )
        starts, noise = torch.empty(size, TOKENS, CHANNELS), torch.empty(size, steps, TOKENS, CHANNELS)
        for s in range(size):
            starts[s].normal_(generator=frame_generator(seed, s, t, "start"))
            noise[s].normal_(generator=frame_generator(seed, s, t, "steps"))
        for tokens in turns.split(mask_counts(TOKENS, mask_steps), 1):
            index = tokens[..., None].expand(-1, -1, CHANNELS)
            y = starts.gather(1, index)
            for i, at in enumerate(visited):
                eps = told_eps(model, done, x, masked, tokens, y, at, labels)
                if weight != 1:
                    null = None if labels is None else torch.full_like(labels, CLASSES)
                    without = told_eps(model, done, x, masked, tokens, y, at, null)
                    eps = without + weight * (eps - without)
                scaled = temperature(t) * noise[:, i].gather(1, index)
                y = schedule.step(eps, y, i, scaled)
            x = x.scatter(1, index, y)
            masked = masked.scatter(1, tokens, False)
        done.append(x)
    return torch.stack(done, 1)


@pytest.mark.parametrize(("told", "weight"), [(False, 1.0), (True, 1.0), (True, 3.0)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_sampling_is_the_forward_of_training(monkeypatch, told, weight, use_cache):
    """With a null branch that is told nothing in any frame, and VideoMAR's temperature."""
    model, labels = network(**CLASS if told else {}), torch.tensor([0, 2]) if told else None
    sampling = {"steps": 3, "mask_steps": 3, "class_guidance": weight, "token_temperature": (1.0, 0.9)}
    sampler = Sampler(model, SampleConfig(sampler="ddpm", num_frames=FRAMES, **sampling), use_cache=use_cache)
    context, seeds = clips(seed=5)[:, :1].flatten(2, 3), []
    original = Sampler._noise

    def noted(self, seed, *rest):
        seeds.append(seed)
        return original(self, seed, *rest)

    monkeypatch.setattr(Sampler, "_noise", noted)
    video = sampler.sample(context, FRAMES, labels=labels, generator=torch.Generator().manual_seed(3))
    paper = lambda t: 0.9 + 10.0 ** -(t + 1)  # noqa: E731 (App. B)
    expected = by_the_forward_of_training(model, context, seeds[0], 3, 3, weight, labels, paper)
    assert video.abs().max() < 100
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-4)


def test_the_temperature_of_a_frame_is_the_papers():
    for t in range(7):
        assert frame_temperature((1.0, 0.9), t) == pytest.approx(0.9 + 10 ** -(t + 1))
        assert frame_temperature((0.9, 0.9), t) == 0.9 and frame_temperature((1.0, 1.0), t) == 1.0


def test_a_sequence_is_the_same_alone_and_an_interrupted_run_goes_on(tmp_path):
    from mimo.sampling.saving import Saving

    config = SampleConfig(sampler="ddpm", steps=2, mask_steps=2, num_frames=FRAMES, token_temperature=(1.0, 0.9))
    sampler = Sampler(network(**CLASS), config)
    options = {"labels": torch.tensor([1, 2]), "ids": [4, 7]}
    whole = list(sampler.stream(None, FRAMES, generator=torch.Generator().manual_seed(1), **options))
    alone = list(
        sampler.stream(None, FRAMES, labels=torch.tensor([2]), ids=[7], generator=torch.Generator().manual_seed(1))
    )
    for frame, one in zip(whole, alone, strict=True):
        torch.testing.assert_close(frame[1:], one, rtol=1e-5, atol=1e-5)
    saving = Saving(tmp_path / "unfinished", every=1)
    stream = sampler.stream(None, FRAMES, generator=torch.Generator().manual_seed(1), saving=saving, **options)
    made = [next(stream), next(stream)]
    stream.close()
    made += list(sampler.resume(saving))
    assert all(torch.equal(one, other) for one, other in zip(made, whole, strict=True))


def test_what_it_cannot_serve_is_refused():
    assert recipe_type(MiMoConfig(**SMALL)).history_policy(MiMoConfig(**SMALL | CLASS)) == HistoryPolicy(
        None, frozenset({"labels"})
    )
    for changes, message in (
        ({"num_actions": 4}, "num_actions=4: expected 0 with recipe='videomar'"),
        ({"history_dropout": 0.1}, "history_dropout=0.1: expected 0.0"),
        ({"token_depth": 0, "parameterization": "flow"}, "token_depth=0: expected a token head with recipe='videomar'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_recipe(MiMoConfig(**SMALL | changes))
    with pytest.raises(ValueError, match="unmasked_steps: expected 0, as the recipe 'videomar' predicts"):
        build_recipe(MiMoConfig(**SMALL), unmasked_from=3)
    model = network()
    for changes, message in (
        (
            {"temperature": (1.0, 0.9)},
            r"temperature=\(1.0, 0.9\): expected \(1.0, 1.0\), as the network has a token head",
        ),
        ({"sampler": "euler"}, "sampler='euler': a 'epsilon' network is sampled by 'ddpm'"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampler(model, SampleConfig(**{"sampler": "ddpm", "steps": 2, "num_frames": FRAMES} | changes))
    batch = drawn(build_recipe(MiMoConfig(**SMALL))).batch
    batch.masked = None
    with pytest.raises(ValueError, match="masked rows: expected them with a token head"):
        model(batch)


# Texts ----------------------------------------------------------------------------------------------------------------

TEXT = {"cross_attention": True, "text_dim": 7, "text_tokens": 4}


def texts(*lengths: int, seed: int = 2) -> torch.Tensor:
    """Features followed by zeros, [B, 4, 7]."""
    features = torch.randn(len(lengths), 4, 7, generator=torch.Generator().manual_seed(seed))
    return features * (torch.arange(4) < torch.tensor(lengths)[:, None])[..., None]


@torch.no_grad()
def test_a_clip_is_told_its_own_text_and_no_padding():
    model, given = network(**TEXT), Text.padded(texts(2, 4, 1, 0))
    assert given.lengths == (2, 4, 1, 0)
    recipe = build_recipe(model.config)
    batch = drawn(recipe, 4).batch
    batch.text = given
    eps = model(batch).velocity.unflatten(1, (4, -1))
    elsewhere = texts(2, 4, 1, 0)
    elsewhere[0, 2:] = 9.0  # behind the end
    batch.text = Text(elsewhere, given.lengths)
    assert torch.equal(model(batch).velocity.unflatten(1, (4, -1)), eps)
    elsewhere[1, 3] += 1.0
    changed = model(batch).velocity.unflatten(1, (4, -1)) != eps
    assert changed[:, 1].any() and not changed[:, [0, 2, 3]].any()
    batch.text = None  # the null token, which clip 3 was told before
    nothing = model(batch).velocity.unflatten(1, (4, -1))
    torch.testing.assert_close(nothing[:, 3], eps[:, 3], rtol=1e-5, atol=1e-5)
    assert (nothing[:, :3] != eps[:, :3]).any(-1).all()
    batch.text = Text(torch.zeros(4, 4, 6), given.lengths)
    with pytest.raises(ValueError, match=r"text features are \[4, 4, 6\]: expected \[clips, tokens, text_dim=7\]"):
        model(batch)


def test_some_clips_are_told_nothing_in_training():
    recipe, given = build_recipe(MiMoConfig(**SMALL | TEXT, label_dropout=0.5)), Text.padded(texts(*[3] * 8))
    lengths = [drawn(recipe, 8, step, text=given).batch.text.lengths for step in range(4)]
    assert {n for one in lengths for n in one} == {0, 3} and len(set(lengths)) > 1
    model = network(**TEXT)
    loss = recipe.loss(model, clips(8), text=given, generator=step_generator(0, 0, "cpu"))
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_sampling_with_texts_is_the_same_with_and_without_a_cache():
    """Under guidance, whose null branch has a history of its own; a text of zeros is the null token."""
    model, made = network(**TEXT), []
    config = SampleConfig(sampler="ddpm", steps=2, mask_steps=2, num_frames=3, class_guidance=2.0)
    context = clips(seed=5)[:, :1].flatten(2, 3)
    for given, use_cache in (
        (texts(3, 1), True),
        (texts(3, 1), False),
        (texts(0, 1), True),
        (texts(3, 1)[:, :3], True),
    ):
        generator = torch.Generator().manual_seed(3)
        made.append(Sampler(model, config, use_cache=use_cache).sample(context, 3, text=given, generator=generator))
    for other in (made[1], made[3]):  # however long it is padded
        torch.testing.assert_close(made[0], other, rtol=1e-4, atol=1e-4)
    assert (made[0][0, 1:] != made[2][0, 1:]).any()
    torch.testing.assert_close(made[0][1], made[2][1], rtol=1e-4, atol=1e-4)
    unguided = SampleConfig(sampler="ddpm", steps=2, mask_steps=2, num_frames=3)
    plain = Sampler(model, unguided).sample(context, 3, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made[2][0], plain[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"text is \[2, 4, 6\]: expected \[2, tokens, text_dim=7\]"):
        Sampler(model, config).sample(context, 3, text=torch.zeros(2, 4, 6))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"words": torch.ones(2, 7)}, r"has no tensor 'text', only \['words'\]"),
        ({"text": torch.ones(2, 6)}, r"'text' is \[2, 6\], expected features 7 wide"),
        ({"text": torch.ones(7)}, r"'text' is torch.float32 \[7\], expected float \[tokens, width\]"),
        ({"text": torch.ones(2, 7, dtype=torch.int32)}, "'text' is torch.int32"),
        ({"text": torch.full((2, 7), torch.nan)}, "'text' is not finite"),
        ({"text": torch.eye(2, 7) * torch.tensor([[1.0], [0.0]])}, "'text' ends with a row of zeros"),
        (b"no tensors", "not a readable safetensors file"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(tmp_path, tensors, message):
    file = tmp_path / "a.text.safetensors"
    if isinstance(tensors, bytes):
        file.write_bytes(tensors)
    else:
        save_file(tensors, file)
    with pytest.raises(UnreadableVideo, match=f"a.text.safetensors: {message}"):
        read_text(file, tokens=4, width=7)


def test_a_text_is_cut_or_followed_by_zeros(tmp_path):
    for length, dtype in ((2, torch.float16), (4, torch.bfloat16), (6, torch.float32)):
        features = torch.randn(length, 7).to(dtype)
        save_file({"text": features}, tmp_path / "a.text.safetensors")
        found = torch.from_numpy(read_text(tmp_path / "a.text.safetensors", tokens=4, width=7))
        assert found.shape == (4, 7) and not found[length:].any()
        assert torch.equal(found[:length], features[:4].float())


@pytest.fixture
def folder(tmp_path):
    """Two videos with a text beside each."""
    for number, length in enumerate((1, 6)):
        video = np.random.default_rng(number).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
        write_video(tmp_path / "clips" / f"{number}.mp4", video)
        save_file({"text": torch.randn(length, 7).half()}, tmp_path / "clips" / f"{number}.text.safetensors")
    return tmp_path / "clips"


TRAIN = (
    "train --preset videomar-tiny --steps 2 --model.depth 1 --model.dim 16 --model.heads 2 --model.token-width 16 "
    "--model.height 1 --model.width 1 --model.frames 3 --model.video-frames 3 --train.batch-size 2 --train.workers 0 "
    "--train.preview-every 2 --sample.steps 2 --sample.mask-steps 2 --sample.num-frames 3 --sample.context-frames 1 "
    "--model.cross-attention --model.text-dim 7 --model.text-tokens 4"
).split()


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def test_a_run_of_stages_from_videos_and_texts(folder, tmp_path, capsys):
    """From its data layout to a video, two stages on the way; and what is refused."""
    run, text = tmp_path / "run", folder / "1.text.safetensors"
    stages = ["--train.stages", "1:2x8x8"]
    assert main([*TRAIN, "--data", str(folder), "--out", str(run), *stages]) == 0
    given = ["sample", "--checkpoint", run, "--context", folder / "0.mp4", "--out"]
    assert main([str(w) for w in (*given, tmp_path / "out", "--text", text, "--class-guidance", "3")]) == 0
    with VideoReader(tmp_path / "out" / "sample.mp4") as video:
        assert video.num_frames == 3
    again = (*given, tmp_path / "again")
    assert "--class-guidance 3: expected a --text to guide to" in refused(capsys, *again, "--class-guidance", 3)
    assert "--text nothing: No such file" in refused(capsys, *again, "--text", "nothing")
    assert "expected features 7 wide" in refused(capsys, *again, "--text", wide(tmp_path))
    assert "--history-guidance 2: this model was trained" in refused(capsys, *again, "--history-guidance", 2)
    assert "steps=1001: expected 1..1000" in refused(capsys, *again, "--steps", 1001)
    assert "for the noise of a frame" in refused(capsys, *again, "--steps", 1000, "--count", 10**9)
    assert "--mask-steps 0: expected more than zero" in refused(capsys, *again, "--mask-steps", 0)
    assert "--token-temperature" in refused(capsys, *again, "--token-temperature", -1, 1)
    assert "temperature=(1.0, 0.5): expected (1.0, 1.0)" in refused(capsys, *again, "--temperature", 1, 0.5)
    words = [*TRAIN, "--data", folder, "--out", tmp_path / "other"]
    assert "stages='2x2'" in refused(capsys, *words, "--train.stages", "2x2")
    assert "stages='1:2x7x8': dct" in refused(capsys, *words, "--train.stages", "1:2x7x8")
    assert "text_dim=7, but the clips have no text" in refused(
        capsys, *TRAIN, "--data", "shapes", "--out", tmp_path / "other"
    )
    assert "token_width" in refused(capsys, *words, "--model.token-width", 0)
    assert "mask_ratio" in refused(capsys, *words, "--model.mask-ratio", 0, 1)
    assert "text_dim=7: expected 0 without cross_attention" in refused(capsys, *words, "--model.no-cross-attention")
    text.unlink()
    assert "1.text.safetensors: no such file: expected the features of a text beside" in refused(capsys, *words)


def wide(tmp_path):
    save_file({"text": torch.ones(2, 8)}, tmp_path / "wide.safetensors")
    return tmp_path / "wide.safetensors"


def test_annotations_name_texts(folder):
    entries = [{"video_path": f"{n}.mp4", "text_path": f"{1 - n}.text.safetensors"} for n in range(2)]
    (folder / "all.json").write_text(json.dumps(entries))
    options = {"num_frames": 3, "height": 8, "width": 8, "text": (4, 7)}
    dataset, beside = (open_dataset(path, **options) for path in (folder / "all.json", folder))
    assert np.array_equal(dataset.sample(0, 0)["text"], beside.sample(1, 0)["text"])
    assert folder / "0.text.safetensors" in dataset.sources()
    del entries[1]["text_path"]
    (folder / "all.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match="entry 1 has no 'text_path', though others do"):
        open_dataset(folder / "all.json", **options)


# The presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "video", "compression", "tokens"),
    [("videomar-256", (25, 256, 256), (4, 8, 8), 1024), ("videomar-480", (49, 480, 768), (8, 16, 16), 1440)],
)
def test_presets_hold_the_papers_numbers(name, video, compression, tokens):
    """Sec. 5.1, and of its Table 2 the tokens and the six frames that are made, of Table 3 the parameters."""
    config, training, sampling = (kind.from_preset(name) for kind in (MiMoConfig, TrainConfig, SampleConfig))
    assert (config.depth, config.dim, config.token_depth, config.token_width) == (36, 1536, 3, 1280)
    assert (config.video_shape, config.compression, config.tokens, config.frames) == (video, compression, tokens, 7)
    assert (config.mask_ratio, config.positions, config.text_dim) == ((0.7, 1.0), "rope", 1536)
    assert config.cross_attention and config.recipe == "videomar"
    frames = [stage.frames for stage in parse_stages(training.stages)] + [video[0]]
    assert frames == ([5, 13, 25] if name == "videomar-256" else [49])
    assert (training.betas, training.weight_decay, training.lr) == ((0.9, 0.95), 0.02, 1e-4)
    assert (sampling.steps, sampling.mask_steps, sampling.class_guidance) == (100, 64, 3.0)
    assert (sampling.context_frames, sampling.num_frames) == (1, 7)
    assert [round(frame_temperature(sampling.token_temperature, t), 4) for t in range(3)] == [1.0, 0.91, 0.901]
    with torch.device("meta"):
        model = MiMo(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e8) == 14
