"""The systems beside MiMo: what a prediction depends on, cached sampling against the full mask, losses against loops,
and that one clip can be learnt."""

import dataclasses
import math

import pytest
import torch

from mimo import MiMo, MiMoConfig
from mimo.config import PRESETS, SampleConfig
from mimo.diffusion import build_schedule, compute_loss_weight
from mimo.network.frames import noisy_alone
from mimo.network.network import MiMoOutput
from mimo.recipes import RECIPES, build_recipe, recipe_type
from mimo.recipes.base import Draws, step_generator
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving

CLASSES, ACTIONS, TOKENS, CHANNELS, FRAMES = 3, 4, 6, 5, 4
SMALL = {"depth": 2, "dim": 32, "heads": 2, "frames": FRAMES, "height": 2, "width": 3, "channels": CHANNELS}
UNMASKED = {"mask_weight": 0.0, "mask_ratio": (0.0, 0.0), "decoder_layer": 1}
ONE_COPY = SMALL | UNMASKED | {"separate_ln": False, "parameterization": "flow"}
SYSTEMS = {
    "acdit": SMALL | UNMASKED | {"recipe": "acdit", "parameterization": "flow"},
    "dfot": ONE_COPY | {"recipe": "dfot"},
    "far": ONE_COPY | {"recipe": "far", "clean_context": 0.3},
    "video_dit": ONE_COPY | {"recipe": "video_dit"},
}
CACHED = ("dfot", "far")  # systems whose history is conditioned; the others are MiMo's, see test_sampler.py
K600 = {"parameterization": "v", "min_snr_gamma": 5.0, "min_snr_decay": 0.96}


def config(system: str, **changes) -> MiMoConfig:
    return MiMoConfig(**SYSTEMS[system] | changes)


def network(system: str, **changes) -> MiMo:
    """A small network in which nothing is zero, so that every path carries a signal."""
    torch.manual_seed(0)
    model = MiMo(config(system, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def clips(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, FRAMES, 2, 3, CHANNELS, generator=torch.Generator().manual_seed(seed))


def drawn(recipe, count: int = 2, step: int = 0, **conditions):
    """What a recipe makes of some clips."""
    given = {"labels": None, "actions": None, "intervals": None} | conditions
    return recipe.frames(clips(count).flatten(2, 3), given, Draws(step_generator(0, step, "cpu"), count), step)


# What depends on what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "alone"), [("dfot", False), ("dfot", True), ("far", False), ("far", True), ("video_dit", False)]
)
def test_gradients_are_exactly_zero_where_nothing_is_seen(system, alone):
    """A velocity depends on all tokens of the frames it sees and of its own, and on no other."""
    changes = {"history_dropout": 0.5} if alone else {}
    model, recipe = network(system, **changes), build_recipe(config(system, **changes))
    prepared = drawn(recipe)
    batch = prepared.batch
    batch.latents = batch.latents.clone().requires_grad_()
    dropped = batch.frames.alone if alone else torch.zeros(2 * FRAMES, dtype=torch.bool)
    assert not alone or 0 < dropped.sum() < dropped.numel()
    velocity = model(batch).velocity
    for clip in range(2):
        for t in range(FRAMES):
            (gradient,) = torch.autograd.grad(velocity[clip, t].square().sum(), batch.latents, retain_graph=True)
            touched = (gradient.view(2, FRAMES, TOKENS, CHANNELS) != 0).any(-1)
            expected = torch.zeros(2, FRAMES, TOKENS, dtype=torch.bool)
            first = 0 if not dropped.view(2, FRAMES)[clip, t] else t
            expected[clip, first : FRAMES if system == "video_dit" else t + 1] = True
            assert torch.equal(touched, expected), (clip, t)


# Sampling -------------------------------------------------------------------------------------------------------------


def policy_of(model):
    return recipe_type(model.config).history_policy(model.config)


def starts_of(monkeypatch) -> list[torch.Tensor]:
    """The noise that every frame will start from."""
    found, original = [], Sampler._noise

    def record(sampler, seed, ids, positions, use, scale):
        noise = original(sampler, seed, ids, positions, use, scale)
        found.append(noise.clone())
        return noise

    monkeypatch.setattr(Sampler, "_noise", record)
    return found


@torch.no_grad()
def by_full_masks(model, context, starts, steps, history_guidance, class_guidance, labels, actions):
    """Every step of every branch of every frame as one forward pass over all frames, as training has it: finished
    frames are told the timestep of history, and a branch that is told nothing is told nothing in any frame."""
    schedule, history = build_schedule("flow"), policy_of(model).timestep
    timesteps, done = schedule.embedding(schedule.sampling_timesteps(steps)), list(context.unbind(1))
    for x in starts:
        t = len(done)
        for i in range(steps):

            def velocity(*, told=True, alone=False, x=x, t=t, i=i):
                timestep = torch.full((len(x), t + 1), history)
                timestep[:, t] = timesteps[i]
                drop = torch.zeros(len(x), t + 1, dtype=torch.bool)
                drop[:, t] = alone
                given = {}
                if labels is not None:
                    given["labels"] = labels if told else torch.full_like(labels, CLASSES)
                if actions is not None:
                    given["actions"] = actions[:, : t + 1] if told else torch.full_like(actions[:, : t + 1], ACTIONS)
                batch = noisy_alone(torch.stack([*done, x], 1), timestep, drop_history=drop, **given)
                return model(batch).velocity[:, t]

            v = guided = velocity()
            if history_guidance != 1:
                guided = guided + (history_guidance - 1) * (v - velocity(alone=True))
            if class_guidance != 1:
                guided = guided + (class_guidance - 1) * (v - velocity(told=False))
            x = schedule.step(guided, x, i)
        done.append(x)
    return torch.stack(done, 1)


GUIDANCE = [(1.0, 1.0), (1.5, 1.0), (1.0, 2.0), (1.5, 2.0)]
TOLD = [(), ("labels",), ("actions",), ("labels", "actions")]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("history_guidance", "class_guidance", "told"),
    [(h, c, told) for h, c in GUIDANCE for told in TOLD if told or c == 1],
)
@pytest.mark.parametrize("system", CACHED)
def test_cached_sampling_is_the_forward_of_training(
    monkeypatch, system, history_guidance, class_guidance, told, use_cache
):
    model = network(system, num_classes=CLASSES if "labels" in told else 0, num_actions=ACTIONS * ("actions" in told))
    generator = torch.Generator().manual_seed(3)
    every = {"labels": torch.tensor([0, 2]), "actions": torch.randint(ACTIONS, (2, FRAMES), generator=generator)}
    given = {name: every[name] if name in told else None for name in every}
    sampling = {"history_guidance": history_guidance, "class_guidance": class_guidance, "num_frames": FRAMES}
    sampler = Sampler(model, SampleConfig(sampler="euler", steps=3, **sampling), use_cache=use_cache)
    starts, context = starts_of(monkeypatch), clips(seed=5)[:, :1].flatten(2, 3)
    video = sampler.sample(context, FRAMES, generator=generator, **given)
    expected = by_full_masks(model, context, starts, 3, history_guidance, class_guidance, **given)
    torch.testing.assert_close(video, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("told", TOLD)
@torch.no_grad()
def test_clips_made_at_once_are_the_forward_of_training(monkeypatch, told):
    """One timestep for all frames, all branches told the same in all of them; the frames come out one by one."""
    model = network(
        "video_dit", num_classes=CLASSES if "labels" in told else 0, num_actions=ACTIONS * ("actions" in told)
    )
    generator = torch.Generator().manual_seed(3)
    every = {"labels": torch.tensor([0, 2]), "actions": torch.randint(ACTIONS, (2, FRAMES), generator=generator)}
    given, null = {name: every[name] for name in told}, {"labels": CLASSES, "actions": ACTIONS}
    starts, weight = starts_of(monkeypatch), 2.0 if told else 1.0
    sampling = SampleConfig(sampler="euler", steps=3, class_guidance=weight, num_frames=FRAMES)
    stream = Sampler(model, sampling).stream(None, FRAMES, batch=2, generator=generator, **given)
    video = torch.stack(list(stream), 1)
    schedule = build_schedule("flow")
    x, timesteps = torch.stack(starts[:FRAMES], 1), schedule.embedding(schedule.sampling_timesteps(3))
    for i in range(3):
        v, without = (
            model(noisy_alone(x, timesteps[i].expand(2, FRAMES), sees="bidirectional", **conditions)).velocity
            for conditions in (given, {name: torch.full_like(values, null[name]) for name, values in given.items()})
        )
        x = schedule.step(weight * v + (1 - weight) * without, x, i)
    torch.testing.assert_close(video, x, rtol=2e-5, atol=2e-5)


def test_a_network_that_makes_clips_at_once_refuses_what_concerns_history():
    model, plain = network("video_dit"), {"sampler": "euler", "steps": 2, "num_frames": FRAMES}
    for name, value in (("history_guidance", 1.5), ("window", 2), ("history_noise", (0.0, 0.1))):
        with pytest.raises(ValueError, match=f"{name}=.*'video_dit' makes clips at once"):
            Sampler(model, SampleConfig(**plain, **{name: value}))
    with pytest.raises(ValueError, match="the context has 1 frames: expected none"):
        Sampler(model, SampleConfig(**plain)).sample(clips()[:, :1].flatten(2, 3), FRAMES)


def test_a_clip_made_at_once_goes_on_where_it_stopped(tmp_path):
    sampler = Sampler(network("video_dit"), SampleConfig(sampler="euler", steps=2, num_frames=FRAMES))
    whole = list(sampler.stream(None, FRAMES, generator=torch.Generator().manual_seed(1)))
    saving = Saving(tmp_path / "unfinished", every=1)
    stream = sampler.stream(None, FRAMES, generator=torch.Generator().manual_seed(1), saving=saving)
    made = [next(stream), next(stream)]
    stream.close()
    rest = sampler.resume(saving)
    made += list(rest)
    assert all(torch.equal(one, other) for one, other in zip(made, whole, strict=True))


@pytest.mark.parametrize("system", SYSTEMS)
def test_history_is_conditioned_as_the_paper_has_it(system):
    model = network(system, num_classes=CLASSES, num_actions=ACTIONS)
    policy = policy_of(model)
    assert policy.timestep == {"dfot": 0.0, "far": -1.0}.get(system)
    assert policy.at_once == (system == "video_dit")
    everything = {"labels", "actions"}
    expected = {"acdit": {"actions"}, "dfot": everything, "far": everything, "video_dit": set()}[system]
    assert policy.conditions == expected
    assert not policy_of(network(system)).conditions


def test_history_without_qk_norm_goes_into_the_pages():
    """Where queries and keys are not normalised, another operator writes them."""
    for positions in ("rope", "sincos"):
        model, videos = network("acdit", qk_norm=False, positions=positions), []
        for use_cache in (True, False):
            sampler = Sampler(model, SampleConfig(sampler="euler", steps=2, num_frames=FRAMES), use_cache=use_cache)
            generator = torch.Generator().manual_seed(1)
            videos.append(sampler.sample(clips()[:, :1].flatten(2, 3), FRAMES, generator=generator))
        torch.testing.assert_close(*videos, rtol=2e-5, atol=2e-5)


# The frames and the loss ----------------------------------------------------------------------------------------------


class Answer(torch.nn.Module):
    """A network whose velocity is given."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, batch, *, reconstruct):
        self.batch = batch
        return MiMoOutput(self.velocity, {}, {})


@pytest.mark.parametrize("changes", [{}, K600, {"parameterization": "v", "min_snr_gamma": 5.0}], ids=str)
@pytest.mark.parametrize("system", ["dfot", "far", "video_dit"])
def test_losses_against_loops(system, changes):
    """v-prediction and flow, with and without (fused) min-SNR; clean frames of FAR have none, the mean is over the
    others."""
    if system == "video_dit":
        changes = {name: value for name, value in changes.items() if name != "min_snr_decay"}
    c = config(system, **changes)
    recipe, schedule = build_recipe(c), build_schedule(c.parameterization)
    answer = Answer(torch.randn(3, FRAMES, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(7)))
    for step in range(50):  # until eps can be read back from the noisy frames
        loss = recipe.loss(answer, clips(3), generator=step_generator(0, step, "cpu"))
        told = answer.batch.timestep.view(3, FRAMES)
        clean = told < 0
        t = (told.long() if c.parameterization == "v" else told / 1000).masked_fill(clean, 0)
        reads = (schedule.sigma(t)[~clean] > 0.1).all() and (schedule.alpha(t) > 0.01).all()
        if reads and clean.any() == (system == "far") and not clean.all(1).any():
            break
    x, noisy = clips(3).flatten(2, 3), answer.batch.latents.view(3, FRAMES, TOKENS, CHANNELS)
    assert step < 49
    snr = schedule.snr(t).masked_fill(clean, math.inf)
    total = 0.0
    for clip in range(3):
        errors = []
        for frame in range(FRAMES):
            if clean[clip, frame]:
                assert torch.equal(noisy[clip, frame], x[clip, frame]) and told[clip, frame] == -1
                continue
            alpha, sigma = schedule.alpha(t[clip, frame]), schedule.sigma(t[clip, frame])
            eps = (noisy[clip, frame] - alpha * x[clip, frame]) / sigma
            target = alpha * eps - sigma * x[clip, frame] if c.parameterization == "v" else eps - x[clip, frame]
            error = (answer.velocity[clip, frame] - target).square().mean()
            if c.min_snr_gamma is not None:
                weight = compute_loss_weight(snr[clip : clip + 1], 5.0, "v_prediction", c.min_snr_decay)
                error = error * weight[0, frame]
            errors.append(error)
        total += torch.stack(errors).mean().item() / 3
    assert loss.total.item() == pytest.approx(total, rel=1e-4) and loss.mask == 0
    if system == "video_dit":
        assert (
            (told == told[:, :1]).all() and told.unique().numel() == 3 and answer.batch.frames.sees == "bidirectional"
        )
    else:
        assert told[~clean].unique().numel() == (~clean).sum() and answer.batch.frames.sees == "block_causal"


def test_frames_are_clean_with_the_given_probability():
    recipe = build_recipe(config("far", clean_context=0.1))
    share = [(drawn(recipe, 8, step).batch.timestep < 0).float().mean() for step in range(200)]
    assert abs(torch.stack(share).mean() - 0.1) < 0.01
    whole = build_recipe(config("far", clean_context=1.0)).loss(
        network("far", clean_context=1.0), clips(), generator=step_generator(0, 0, "cpu")
    )
    assert whole.total == 0  # nothing is left to predict, and nothing is divided by zero


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_part_of_a_batch_draws_what_the_whole_draws_for_it(system):
    changes = {"history_dropout": 0.4} if system != "video_dit" else {}
    recipe = build_recipe(config(system, num_classes=CLASSES, num_actions=ACTIONS, label_dropout=0.5, **changes))
    x, labels, actions = clips(6).flatten(2, 3), torch.arange(6) % CLASSES, torch.arange(24).view(6, 4) % ACTIONS
    found = []
    for first, count in ((0, 6), (0, 2), (2, 4)):
        ours = slice(first, first + count)
        given = {"labels": labels[ours], "actions": actions[ours], "intervals": None}
        batch = recipe.frames(x[ours], given, Draws(step_generator(0, 3, "cpu"), count, first, 6), 0).batch
        parts = batch.latents.view(count, -1), batch.timestep.view(count, -1), batch.labels, batch.actions
        if changes:
            parts = *parts, batch.frames.alone.view(count, -1)
        found.append(parts)
    for whole, first, second in zip(*found, strict=True):
        assert torch.equal(whole, torch.cat([first, second]))
    assert {CLASSES} < set(found[0][2].tolist()) and (found[0][3] == ACTIONS).any()


def test_what_a_recipe_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="recipe='dit': expected one of 'mimo', 'acdit', 'dfot', 'far', "):
        MiMoConfig(recipe="dit")
    for system, changes, message in (
        ("dfot", {"separate_ln": True}, "separate_ln=True: expected False with recipe='dfot'"),
        ("dfot", {"clean_context": 0.1}, "clean_context=0.1: expected 0.0"),
        ("far", {"mask_weight": 0.5, "mask_ratio": (0.2, 0.5)}, "mask_ratio=.*expected .* with recipe='far'"),
        ("acdit", {"mask_ratio": (0.2, 0.5)}, r"mask_ratio=\(0.2, 0.5\)"),
        ("video_dit", {"history_dropout": 0.1}, "history_dropout=0.1: expected 0.0"),
        ("video_dit", K600, "min_snr_decay=0.96: expected None"),
    ):
        wrong = config(system, **changes)
        for build in (build_recipe, lambda c: Sampler(MiMo(c), SampleConfig(sampler="euler"))):
            with pytest.raises(ValueError, match=message):
                build(wrong)
    with pytest.raises(ValueError, match="unmasked_steps: expected 0, as the recipe 'far' masks nothing"):
        build_recipe(config("far"), unmasked_from=3)


def test_old_configurations_are_mimo():
    values = {name: value for name, value in MiMoConfig().to_dict().items() if name not in ("recipe", "clean_context")}
    assert MiMoConfig.from_dict(values) == MiMoConfig() and recipe_type(MiMoConfig()) is recipe_type(MiMoConfig())


def test_every_recipe_has_presets():
    assert {MiMoConfig.from_preset(name).recipe for name in PRESETS} == set(RECIPES)


@pytest.mark.parametrize(
    ("name", "millions"), [("far-b-ucf101-uncond", 130), ("far-l-ucf101", 457), ("far-xl-ucf101", 674)]
)
def test_fars_networks_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = MiMo(MiMoConfig.from_preset(name))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_parameter_learns(system):
    changes = {"num_classes": CLASSES, "num_actions": ACTIONS, "label_dropout": 0.0}
    model = network(system, **changes)
    given = {"labels": torch.tensor([0, 2]), "actions": torch.arange(8).view(2, 4) % ACTIONS}
    loss = build_recipe(model.config).loss(model, clips(), generator=step_generator(0, 0, "cpu"), **given)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("system", SYSTEMS)
def test_overfitting_one_clip_removes_nine_tenths_of_the_loss(system, one_thread):
    c = config(system, dim=64)
    torch.manual_seed(0)
    model, recipe, steps = MiMo(c), build_recipe(dataclasses.replace(c)), 260
    clip = clips(1).expand(16, -1, -1, -1, -1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    curve = []
    for step in range(steps):
        loss = recipe.loss(model, clip, generator=step_generator(0, step, "cpu"))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        rate.step()
        curve.append(loss.total.item())
    assert sum(curve[-20:]) / 20 < 0.1 * sum(curve[:5]) / 5
