"""MAGI: what a prediction depends on, its masks, noise and loss against loops, cached sampling against the full mask,
and the paper's numbers."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import mimo.network.blocks
import mimo.network.network
from mimo import MiMo, MiMoConfig
from mimo.cli import main
from mimo.config import SampleConfig, TrainConfig
from mimo.data import VideoReader, write_video
from mimo.diffusion import EpsilonSchedule
from mimo.network.cross import Text
from mimo.network.frames import to_tokens
from mimo.network.network import MiMoOutput
from mimo.recipes import build_recipe
from mimo.recipes.base import Draws, step_generator
from mimo.recipes.masked_tokens import masked_count
from mimo.sampling.masked import MaskedRun
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving

TOKENS, CHANNELS, FRAMES = 4, 8, 3
SMALL = {"depth": 2, "dim": 32, "heads": 2, "frames": FRAMES, "height": 4, "width": 4, "channels": 2, "patch": 2}
SMALL |= {"recipe": "magi", "attention": "factorized", "positions": "sincos", "qk_norm": False, "learned_places": True}
SMALL |= {"mask_weight": 0.0, "mask_ratio": (0.5, 0.8), "decoder_layer": 1, "parameterization": "epsilon"}
SMALL |= {"token_depth": 1, "token_width": 32, "token_draws": 2, "noise_levels": 4, "max_noise": 0.6}
BOTH = pytest.mark.parametrize("forcing", ["complete", "masked"])


def network(**changes) -> MiMo:
    """A small network in which nothing is zero, so that every path carries a signal."""
    torch.manual_seed(0)
    model = MiMo(MiMoConfig(**SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def clips(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, FRAMES, 4, 4, 2, generator=torch.Generator().manual_seed(seed))


def drawn(config: MiMoConfig, count: int = 2, step: int = 0, first: int = 0, total: int | None = None):
    """What the recipe makes of clips `first`, `first` + 1, ... of `total` ones."""
    total = total or count
    x = to_tokens(clips(total), config.patch)[first : first + count]
    given = {"labels": None, "actions": None, "intervals": None}
    return build_recipe(config).frames(x, given, Draws(step_generator(0, step, "cpu"), count, first, total), step)


# The frames and the loss ----------------------------------------------------------------------------------------------


@BOTH
def test_what_the_frames_are(forcing):
    """Masks of one size per step and places of their own per frame; noise of the level that is told, one per clip, in
    what others see; targets that are the noise of what the head is asked."""
    config = MiMoConfig(**SMALL | {"teacher_forcing": forcing, "height": 32, "width": 32})
    tokens, copies = config.tokens, 2 if forcing == "complete" else 1
    x = torch.randn(8, FRAMES, tokens, CHANNELS)
    sizes, levels = set(), []
    for step in range(6):
        draws = Draws(step_generator(0, step, "cpu"), 8)
        expected = masked_count(
            tokens, config.mask_ratio, torch.rand((), generator=step_generator(0, step, "cpu")).item()
        )
        given = {"labels": None, "actions": None, "intervals": torch.arange(8)}
        prepared = build_recipe(config).frames(x, given, draws, step)
        batch = prepared.batch
        kinds = [frame.kind for frame in batch.frames.clips[0]]
        assert kinds == ["clean"] * FRAMES * (copies - 1) + ["masked"] * FRAMES
        assert batch.frames.sees == ("teacher_forcing" if copies == 2 else "block_causal")
        masked = batch.masked.view(8, copies, FRAMES, tokens)
        assert not masked[:, : copies - 1].any() and (masked[:, -1].sum(-1) == expected).all()
        sizes.add(expected)
        assert len({tuple(row.tolist()) for row in masked[:, -1].flatten(0, 1)}) == 8 * FRAMES  # places per frame
        latents, noise = batch.latents.view(8, copies, FRAMES, tokens, -1), batch.noise.view(8, copies, FRAMES)
        assert (noise[:, 0] == noise[:, 0, :1]).all() and torch.equal(batch.intervals, torch.arange(8))
        if copies == 2:
            assert torch.equal(latents[:, 1], x) and not noise[:, 1].any()
        added = (latents[:, 0] - x).flatten(1)
        for clip in range(8):
            level = noise[clip, 0, 0].item()
            deviation = 0.6 * level / 3
            levels.append(level)
            assert added[clip].std().item() == pytest.approx(deviation, rel=0.05, abs=1e-6)
        # What is asked: the masked tokens, each `token_draws` times.
        asked, schedule = batch.asked, EpsilonSchedule()
        assert torch.equal(torch.sort(asked.rows).values, masked[:, -1].flatten().nonzero()[:, 0])
        clean = x.flatten(0, 2)[asked.rows]
        found = schedule.add_noise(clean.expand(2, -1, -1), prepared.target, asked.timestep.long())
        torch.testing.assert_close(asked.noisy, found)
        assert prepared.target.std() == pytest.approx(1, abs=0.02)
        torch.testing.assert_close(prepared.weight, torch.full((2, len(clean)), 1 / prepared.target.numel()))
    assert len(sizes) > 3 and set(levels) == {0, 1, 2, 3}


class Answer(torch.nn.Module):
    def forward(self, batch, *, reconstruct):
        self.batch = batch
        return MiMoOutput(torch.zeros_like(batch.asked.noisy), {}, {})


def test_the_loss_is_the_mean_over_masked_tokens():
    config = MiMoConfig(**SMALL)
    loss = build_recipe(config).loss(Answer(), clips(3), generator=step_generator(0, 5, "cpu"), step=5)
    target = drawn(config, 3, 5).target
    assert loss.total.item() == pytest.approx(target.square().mean().item(), rel=1e-5)


@BOTH
def test_a_part_of_a_batch_draws_what_the_whole_draws_for_it(forcing):
    config = MiMoConfig(**SMALL | {"teacher_forcing": forcing})
    whole, *parts = (drawn(config, count, 3, first, 6) for first, count in ((0, 6), (0, 2), (2, 4)))
    for name in ("latents", "noise", "masked"):
        every = [getattr(part.batch, name) for part in parts]
        assert torch.equal(getattr(whole.batch, name), torch.cat(every)), name
    for field in ("noisy", "timestep"):
        both = [getattr(part.batch.asked, field) for part in parts]
        assert torch.equal(getattr(whole.batch.asked, field), torch.cat(both, 1)), field
    assert torch.equal(whole.target, torch.cat([part.target for part in parts], 1))


@BOTH
def test_gradients_are_exactly_zero_where_nothing_is_seen(forcing):
    """With CTF a frame depends on complete frames before it and on what is not masked of itself; with MTF on what is
    not masked of the frames up to it. Nobody looks at masked latents."""
    model = network(teacher_forcing=forcing)
    batch = drawn(model.config).batch
    batch.latents = batch.latents.clone().requires_grad_()
    eps, copies = model(batch).velocity, 2 if forcing == "complete" else 1
    known = ~batch.masked.view(2, copies, FRAMES, TOKENS)
    frame = batch.asked.rows // TOKENS  # of the masked frames, clip after clip
    for clip in range(2):
        for t in range(FRAMES):
            chosen = eps[:, frame == clip * FRAMES + t].square().sum()
            (gradient,) = torch.autograd.grad(chosen, batch.latents, retain_graph=True)
            touched = (gradient.view(2, copies, FRAMES, TOKENS, CHANNELS) != 0).any(-1)
            expected = torch.zeros_like(touched)
            expected[clip, -1, t] = True
            expected[clip, 0, :t] = True
            assert torch.equal(touched, expected & known), (clip, t)


def dense_attention(q, k, v, mask, backend="auto"):
    """In float64, which no kernel serves."""
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask.to_dense(), -math.inf).softmax(-1).nan_to_num()  # rows that see nothing
    return torch.einsum("...hqk,...khd->...qhd", weights, v)


@BOTH
def test_gradients_by_finite_differences(forcing, monkeypatch):
    """Along a random direction of every parameter."""
    for module in (mimo.network.network, mimo.network.blocks):
        monkeypatch.setattr(module, "frame_attention", dense_attention)
    model = network(teacher_forcing=forcing, dim=16, max_interval=2).double()
    batch, target = (prepared := drawn(model.config)).batch, prepared.target.double()
    batch.latents, batch.intervals = batch.latents.double(), torch.tensor([1, 2])
    batch.asked = batch.asked._replace(noisy=batch.asked.noisy.double())

    def loss() -> torch.Tensor:
        return (model(batch).velocity - target).square().mean()

    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, parameter, gradient in zip(names, parameters, torch.autograd.grad(loss(), parameters), strict=True):
        direction, ends = torch.randn_like(gradient), []
        with torch.no_grad():
            for shift in (1e-5, -2e-5):
                parameter.add_(direction, alpha=shift)
                ends.append(loss())
            parameter.add_(direction, alpha=1e-5)
        assert (ends[0] - ends[1]).item() / 2e-5 == pytest.approx(
            (gradient * direction).sum().item(), rel=1e-5, abs=1e-9
        ), name


@pytest.mark.parametrize("told", ["nothing", "class", "text"])
def test_every_parameter_learns(told):
    """Also of what the paper has not: classes or texts, attended to across."""
    changes = {} if told == "nothing" else {"cross_attention": True, "label_dropout": 0.0}
    model = network(max_interval=3, **changes, **{"class": {"num_classes": 3}, "text": {"text_dim": 8}}.get(told, {}))
    given = {"intervals": torch.tensor([1, 3]), "generator": step_generator(0, 0, "cpu"), "step": 0}
    texts = Text(torch.randn(2, 5, 8), (5, 0))  # one clip has none
    given |= {"class": {"labels": torch.tensor([0, 2])}, "text": {"text": texts}}.get(told, {})
    build_recipe(model.config).loss(model, clips(), **given).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@BOTH
def test_one_clip_can_be_learnt(forcing):
    torch.manual_seed(0)
    config = MiMoConfig(**SMALL | {"teacher_forcing": forcing, "dim": 64, "token_width": 64, "token_depth": 2})
    model, recipe, clip, curve, steps = MiMo(config), build_recipe(config), clips(1).expand(8, -1, -1, -1, -1), [], 120
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, steps)
    for step in range(steps):
        loss = recipe.loss(model, clip, generator=step_generator(0, step, "cpu"), step=step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        rate.step()
        curve.append(loss.total.item())
    assert sum(curve[-20:]) / 20 < 0.2 * sum(curve[:5]) / 5


# Sampling -------------------------------------------------------------------------------------------------------------


def sampling(**changes) -> SampleConfig:
    return SampleConfig(**{"sampler": "ddpm", "steps": 3, "mask_steps": 2, "num_frames": 4} | changes)


@pytest.mark.parametrize("changes", [{}, {"interpolate": True, "history_noise": (0.2, 0.6)}], ids=["", "long, noisy"])
@BOTH
def test_cached_sampling_is_the_full_mask(forcing, changes):
    model, context, videos = network(teacher_forcing=forcing), to_tokens(clips(), 2)[:, :1], []
    for use_cache in (True, False):
        sampler = Sampler(model, sampling(**changes), use_cache=use_cache)
        videos.append(sampler.sample(context, 4, generator=torch.Generator().manual_seed(3), trajectories=2))
    torch.testing.assert_close(*videos, rtol=2e-5, atol=2e-5)


@BOTH
@torch.no_grad()
def test_every_step_of_a_frame_is_the_forward_of_training(forcing, monkeypatch):
    """What the head is told in every mask step, over the cache, is what training would tell it of finished frames and
    of one whose later tokens are masked."""
    model = network(teacher_forcing=forcing)
    seen, original = [], MaskedRun._features

    def features(run, told):
        z = original(run, told)
        seen.append((run.x.clone(), run.masked.clone(), z[0].clone()))
        return z

    monkeypatch.setattr(MaskedRun, "_features", features)
    context = to_tokens(clips(), 2)[:, :1]
    generator = torch.Generator().manual_seed(3)
    video = Sampler(model, sampling(num_frames=FRAMES)).sample(context, FRAMES, generator=generator)
    assert len(seen) == 2 * 2
    template = drawn(model.config).batch
    for number, (x, masked, z) in enumerate(seen):
        t = 1 + number // 2
        now = torch.cat([video[:, :t], x[:, None], torch.zeros_like(video[:, t + 1 :])], 1)
        hidden = torch.zeros(2, FRAMES, TOKENS, dtype=torch.bool)
        hidden[:, t] = masked
        if forcing == "complete":
            now = torch.stack([video, now], 1)
            hidden = torch.stack([torch.zeros_like(hidden), hidden], 1)
        rows = (torch.arange(2)[:, None] * FRAMES + t) * TOKENS + torch.arange(TOKENS)
        told = []
        monkeypatch.setattr(model.head, "forward", lambda noisy, timestep, z, told=told: told.append(z) or noisy)
        asked = template.asked._replace(rows=rows.flatten())
        batch = dataclasses.replace(
            template, latents=now.flatten(0, -3), masked=hidden.flatten(), noise=None, asked=asked
        )
        model(batch)
        torch.testing.assert_close(z, told[0].view_as(z), rtol=2e-5, atol=2e-5)


def test_a_saved_run_goes_on_where_it_stopped(tmp_path):
    sampler, given = Sampler(network(), sampling(history_noise=(0.2, 0.4))), to_tokens(clips(), 2)[:, :1]
    whole = list(sampler.stream(given, 4, generator=torch.Generator().manual_seed(1)))
    saving = Saving(tmp_path / "unfinished", every=1)
    stream = sampler.stream(given, 4, generator=torch.Generator().manual_seed(1), saving=saving)
    made = [next(stream)]
    stream.close()
    made += list(sampler.resume(saving))
    assert all(torch.equal(one, other) for one, other in zip(made, whole, strict=True))


def test_the_network_is_told_how_noisy_history_is():
    """history_noise of 0.2 and 0.6 on the first and the last frame made, 0.4 between: levels 1, 2, and none on the
    last, which nobody sees. What was given is level 0."""
    model, told = network(), []
    original = model.history_frame
    model.history_frame = lambda *a, noise, **named: told.append(noise.tolist()) or original(*a, noise=noise, **named)
    sampler = Sampler(model, sampling(history_noise=(0.2, 0.6)))
    sampler.sample(to_tokens(clips(), 2)[:, :1], 4, generator=torch.Generator().manual_seed(3))
    assert told == [[0, 0], [1, 1], [2, 2]]
    with pytest.raises(ValueError, match=r"history_noise=\(0.0, 0.7\): expected at most max_noise=0.6, as in training"):
        Sampler(model, sampling(history_noise=(0.0, 0.7)))


# From its data to a video ---------------------------------------------------------------------------------------------

NARROW = (
    "--model.depth 2 --model.dim 16 --model.heads 2 --model.token-depth 1 --model.token-width 16 --model.height 4 "
    "--model.width 4 --model.frames 3 --model.video-frames 3 --model.max-interval 2 --train.interval 1 2 "
    "--train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 --train.preview-every 2 "
    "--sample.steps 2 --sample.mask-steps 2 --sample.num-frames 3 --steps 2"
).split()


def test_from_its_data_to_a_long_video(tmp_path, capsys):
    """UCF-101 as the paper has it: annotated clips, frames of a drawn interval that the network is told; then a video
    twice as long as a clip, from a given frame. What is wrong with an option is one line and status 2."""
    rng = np.random.default_rng(0)
    for number in range(2):
        write_video(tmp_path / "data" / f"{number}.avi", rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8))
    entries = [{"video_path": f"{number}.avi", "label": 0} for number in range(2)]
    (tmp_path / "data" / "train.json").write_text(json.dumps(entries))
    data, run = tmp_path / "data" / "train.json", tmp_path / "run"
    train = ["train", "--preset", "magi-xl-ucf101-uncond", "--data", data, "--layout", "ucf101", "--ignore-labels"]
    train = [str(word) for word in (*train, *NARROW)]
    for more, message in (
        ("--model.patch 3", "patch=3: expected a divisor of height=4 and width=4"),
        ("--model.depth 3", "depth=3: expected an even number"),
        ("--model.teacher-forcing half", "half"),
        ("--model.noise-levels 1", "noise_levels=1: expected two or more"),
        ("--model.max-noise 0", "max_noise=0.0: expected more than zero"),
        (
            "--model.positions rope",
            "interpolate=True: expected False, or a network with positions='sincos', not 'rope'",
        ),
        ("--sample.history-noise 0 0.8", "history_noise=(0.0, 0.8): expected at most max_noise=0.7, as in training"),
        ("--train.interval 1 3", "interval"),
    ):
        assert main([*train, "--out", str(tmp_path / "refused"), *more.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert main([*train, "--out", str(run)]) == 0
    record = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 2 and 0 < record["diffusion"] < 10 and record["mask"] == 0
    sample = ["sample", "--checkpoint", str(run), "--out", str(tmp_path / "samples"), "--context"]
    sample += [str(tmp_path / "data" / "0.avi"), "--context-frames", "1", "--frames", "6", "--interval", "2"]
    assert main([*sample, "--history-noise", "0", "0.8"]) == 2
    assert "history_noise=(0.0, 0.8): expected at most" in capsys.readouterr().err
    assert main([*sample, "--history-noise", "0.1", "0.4", "--interpolate", "True"]) == 0
    with VideoReader(tmp_path / "samples" / "sample.mp4") as video:
        assert video.num_frames == 6


# What is refused, and the paper's numbers -----------------------------------------------------------------------------


def test_what_cannot_be_served_is_refused():
    plain = {"token_depth": 0, "parameterization": "flow", "mask_ratio": (0.0, 0.0)}
    for changes, message in (
        ({"noise_levels": 1}, "noise_levels=1: expected two or more, of which the lowest is none, or 0"),
        (plain | {"noise_levels": 0}, "learned_places=True: expected none without a token head"),
        (plain | {"learned_places": False}, "noise_levels=4: expected none without a token head"),
        ({"max_noise": 0.0}, "max_noise=0.0: expected more than zero"),
        ({"teacher_forcing": "half"}, "teacher_forcing='half': expected one of 'complete', 'masked'"),
    ):
        with pytest.raises(ValueError, match=message):
            MiMoConfig(**SMALL | changes)
    for changes, message in (
        ({"num_actions": 2}, "num_actions=2: expected 0 with recipe='magi'"),
        (
            plain | {"noise_levels": 0, "learned_places": False},
            "token_depth=0: expected a token head with recipe='magi'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_recipe(MiMoConfig(**SMALL | changes))


@pytest.mark.parametrize(
    ("name", "shape", "batch", "epochs", "clips_in_all"),
    [
        ("magi-xl-k600", (5, 32, 32, 8), 256, 150, 480_000),
        ("magi-xl-ucf101-uncond", (16, 32, 32, 4), 128, 1400, 13_320),
        ("magi-xl-ucf101-uncond-mtf", (16, 32, 32, 4), 128, 1400, 13_320),
        ("magi-xl-ucf101-uncond-3d", (5, 32, 32, 16), 128, 1400, 13_320),
    ],
)
def test_presets_say_what_the_paper_says(name, shape, batch, epochs, clips_in_all):
    """App. A: 20 blocks of a spatial and a temporal layer, 1280 wide, MLP 5120, 16 heads, a head of 3 x 1024, patches
    of 2; intervals 1..25, 10,000 steps of warm-up, weight decay 0.02, EMA 0.9999, bf16; 64 mask steps, 100 of
    diffusion."""
    config, train, sample = (kind.from_preset(name) for kind in (MiMoConfig, TrainConfig, SampleConfig))
    assert (config.depth, config.dim, config.dim * config.mlp_ratio, config.heads) == (2 * 20, 1280, 5120, 16)
    assert (config.attention, config.positions, config.patch) == ("factorized", "sincos", 2)
    assert (config.token_depth, config.token_width, config.mask_ratio) == (3, 1024, (0.7, 1.0))
    assert (config.max_interval, train.interval) == (25, (1, 25)) and config.latent_shape == shape
    assert config.video_frames == (17 if shape[0] == 5 else 16) and config.tokens == 256
    assert config.teacher_forcing == ("masked" if name.endswith("mtf") else "complete")
    assert (train.batch_size, train.warmup, train.weight_decay) == (batch, 10_000, 0.02)
    assert (train.ema_decay, train.precision) == (0.9999, "bf16")
    assert train.steps == math.floor(epochs * clips_in_all / batch)
    assert (sample.mask_steps, sample.steps, sample.interpolate) == (64, 100, True)
    assert sample.context_frames == (2 if name.endswith("k600") else 0) and sample.num_frames == shape[0]
    with torch.device("meta"):
        model = MiMo(config)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(850, rel=0.06)  # "approximately 850 million"
