"""The objective against loops over clips, frames and offsets; its randomness; and that it can be driven to nearly
zero."""

import dataclasses

import pytest
import torch
from torch import nn

from mimo import MiMo, MiMoConfig
from mimo.config import SampleConfig
from mimo.diffusion import build_schedule, compute_loss_weight
from mimo.network.frames import FrameBatch
from mimo.network.network import MiMoOutput
from mimo.recipes import build_recipe
from mimo.recipes.acdit import acdit
from mimo.recipes.base import step_generator
from mimo.recipes.mimo import kept_tokens
from mimo.sampling.sampler import Sampler
from mimo.training.average import EMA

CONFIG = MiMoConfig(
    depth=2,
    dim=32,
    heads=2,
    frames=4,
    height=2,
    width=3,
    channels=5,
    decoder_depth=1,
    decoder_layer=1,
)
K600 = {"min_snr_gamma": 5.0, "min_snr_decay": 0.96, "history_dropout": 0.4}


class Spy(nn.Module):
    """Stands in for the network: keeps what it was given and answers with random numbers, decoder and all."""

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__()
        self.config, self.seen = config, None

    def forward(self, batch: FrameBatch, *, reconstruct=True) -> MiMoOutput:
        frames = batch.frames
        generator, count, length = torch.Generator().manual_seed(5), len(frames.clips), frames.clips[0][-1].time + 1
        copies = batch.latents.unflatten(0, (count, -1, length)).unbind(1)
        kept = frames.clips[0][0].tokens
        keep = None if batch.tokens is None else batch.tokens.view(count, -1)[:, :kept]
        self.seen = {
            "history": copies[0],
            "noisy": None if batch.timestep is None else copies[-1],
            "timestep": None if batch.timestep is None else batch.timestep.view(count, length),
            "keep": keep,
            "drop_history": None if frames.alone is None else frames.alone.view(count, length),
            "sees": frames.sees,
            **{name: getattr(batch, name) for name in ("labels", "actions", "intervals", "recent")},
        }
        offsets = [o for o in self.config.mask_offsets if o < length] if reconstruct and keep is not None else []
        velocity = None if batch.timestep is None else torch.randn(copies[0].shape, generator=generator)
        shapes = {offset: (count, length - offset, *copies[0].shape[2:]) for offset in offsets}
        self.answer = MiMoOutput(velocity, {o: torch.randn(s, generator=generator) for o, s in shapes.items()}, {})
        return self.answer


def clips(config: MiMoConfig = CONFIG, count: int = 3) -> torch.Tensor:
    return torch.randn(count, *config.latent_shape, generator=torch.Generator().manual_seed(0))


def loss_of(config: MiMoConfig, step: int = 0, **given):
    spy = Spy(config)
    latents = clips(config)
    unmasked_from = given.pop("unmasked_from", None)
    recipe = build_recipe(config, unmasked_from=unmasked_from)
    return recipe.loss(spy, latents, generator=step_generator(0, step, "cpu"), step=step, **given), spy


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("offsets", [(0, 1), (0,), (1,), (2,), (0, 1, 2), (1, 2)])
@pytest.mark.parametrize("region", ["dropped", "all"])
def test_mask_loss_is_equation_5(offsets, region):
    config = dataclasses.replace(CONFIG, mask_offsets=offsets, mask_region=region)
    loss, spy = loss_of(config)
    x, keep = spy.seen["history"], spy.seen["keep"].tolist()
    frames_with_targets, total = 0, 0.0
    for t in range(config.frames):
        targets = [offset for offset in offsets if t + offset < config.frames]
        frames_with_targets += bool(targets)
        for clip in range(len(x)):
            for offset in targets:
                places = [n for n in range(config.tokens) if region == "all" or n not in keep[clip]]
                error = spy.answer.reconstruction[offset][clip, t, places] - x[clip, t + offset, places]
                total += error.square().mean().item() / len(targets)
    assert loss.mask.item() == pytest.approx(total / (len(x) * frames_with_targets), rel=1e-5)
    assert loss.total.item() == pytest.approx(loss.diffusion.item() + 0.5 * loss.mask.item(), rel=1e-6)


@pytest.mark.parametrize("changes", [{}, K600, {"min_snr_gamma": 5.0}, {"parameterization": "flow"}], ids=str)
def test_diffusion_loss_is_the_weighted_error_of_every_frame(changes):
    config = dataclasses.replace(CONFIG, **changes)
    loss, spy = loss_of(config)
    schedule, seen = build_schedule(config.parameterization), spy.seen
    x = seen["history"]
    assert torch.equal(x, clips(config).flatten(2, 3))
    t = seen["timestep"].long() if config.parameterization == "v" else seen["timestep"] / 1000
    alpha, sigma = (f(t)[..., None, None] for f in (schedule.alpha, schedule.sigma))
    assert (sigma > 0.05).all()  # as eps is read back from the noisy frames
    eps = (seen["noisy"] - alpha * x) / sigma
    v = alpha * eps - sigma * x if config.parameterization == "v" else eps - x
    error = (spy.answer.velocity - v).square().mean((2, 3))
    if config.min_snr_gamma is not None:
        error = error * compute_loss_weight(schedule.snr(t), 5.0, "v_prediction", config.min_snr_decay)
    assert loss.diffusion.item() == pytest.approx(error.mean().item(), rel=1e-4)
    assert abs(eps.mean()) < 0.2 and abs(eps.std() - 1) < 0.2


@pytest.mark.parametrize("residual", [False, True])
def test_history_may_be_noisy_and_frames_what_changes(residual):
    options = {"parameterization": "flow", "prediction": "clean", "history_noise": 0.5, "residual": residual}
    config = dataclasses.replace(CONFIG, **options, mask_ratio=(0.0, 0.0), mask_weight=0.0)
    loss, spy = loss_of(config)
    x, seen, tau = clips(config).flatten(2, 3), spy.seen["history"], spy.seen["timestep"] / 1000
    added = (seen - x).std((2, 3))
    assert (added > 0).all() and (added < 0.7).all() and added.std() > 0.05  # a deviation per frame, up to 0.5
    made = torch.cat([x[:, :1], x[:, 1:] - seen[:, :-1]], 1) if residual else x
    error = (spy.answer.velocity - made).square().mean((2, 3)) / tau.clamp(min=0.05).square()
    assert loss.diffusion.item() == pytest.approx(error.mean().item(), rel=1e-5)
    eps = (spy.seen["noisy"] - (1 - tau)[..., None, None] * made) / tau[..., None, None]
    assert abs(eps.mean()) < 0.2 and abs(eps.std() - 1) < 0.2


@pytest.mark.parametrize("name, value", [("history_noise", 0.1), ("residual", True), ("recent_frames", 1)])
def test_systems_without_clean_frames_refuse_what_is_theirs(name, value):
    unmasked = {"mask_ratio": (0.0, 0.0), "mask_weight": 0.0, "separate_ln": False}
    config = dataclasses.replace(CONFIG, recipe="far", **unmasked, **{name: value})
    with pytest.raises(ValueError, match=f"{name}={value}: expected .* with recipe='far'"):
        build_recipe(config)
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        Sampler(MiMo(config), SampleConfig())


def test_noisy_frames_are_told_the_ones_before_as_history_has_them():
    options = {"parameterization": "flow", "history_noise": 0.5, "recent_frames": 2, "history_dropout": 0.4}
    _, spy = loss_of(dataclasses.replace(CONFIG, **options))
    seen, drop = spy.seen["history"], spy.seen["drop_history"]
    told = spy.seen["recent"].unflatten(0, seen.shape[:2])
    assert drop.any() and not drop.all()
    for clip in range(len(seen)):
        for t in range(seen.shape[1]):
            for i in (1, 2):
                nothing = t < i or drop[clip, t]
                expected = torch.zeros_like(seen[0, 0]) if nothing else seen[clip, t - i]
                assert torch.equal(told[clip, t, :, (i - 1) * 5 : i * 5], expected)


def test_every_frame_and_clip_has_its_own_timestep_and_noise():
    _, spy = loss_of(CONFIG)
    assert spy.seen["timestep"].unique().numel() == spy.seen["timestep"].numel()


# --------------------------------------------------------------------------------------------------- what is random


def test_a_step_is_a_function_of_seed_and_step():
    config = dataclasses.replace(CONFIG, num_classes=7, num_actions=3, label_dropout=0.5, **K600)
    given = {"labels": torch.tensor([0, 3, 6]), "actions": torch.arange(12).view(3, 4) % 3}
    (first, a), (second, b), (third, c) = (loss_of(config, step, **given) for step in (4, 4, 5))
    assert first.total == second.total and first.total != third.total
    for name in ("noisy", "timestep", "keep", "labels", "actions", "drop_history"):
        assert torch.equal(a.seen[name], b.seen[name])
    assert not torch.equal(a.seen["noisy"], c.seen["noisy"])


def test_generators_of_steps_and_seeds_differ():
    draws = {
        torch.rand((), generator=step_generator(seed, step, "cpu")).item() for seed in (0, 1) for step in (0, 1, 2)
    }
    assert len(draws) == 6


def test_a_part_of_a_batch_draws_what_the_whole_draws_for_it():
    config = dataclasses.replace(CONFIG, num_classes=7, num_actions=3, label_dropout=0.5, **K600)
    latents, given = clips(config, 6), {"labels": torch.arange(6), "actions": torch.arange(24).view(6, 4) % 3}
    spies = []
    for first, count in ((0, 6), (0, 2), (2, 2), (4, 2)):
        spies.append(Spy(config))
        part = {name: values[first : first + count] for name, values in given.items()}
        generator = step_generator(0, 3, "cpu")
        build_recipe(config).loss(
            spies[-1], latents[first : first + count], **part, generator=generator, first=first, total=6
        )
    for name in ("noisy", "timestep", "keep", "labels", "actions", "drop_history"):
        parts = torch.cat([spy.seen[name] for spy in spies[1:]])
        assert torch.equal(spies[0].seen[name], parts), name
        assert len(parts.view(6, -1).unique(dim=0)) > 1, f"{name}: the parts differ"


def test_masks_are_tubes_with_a_ratio_in_range():
    config = dataclasses.replace(CONFIG, height=8, width=8)
    kept = set()
    for step in range(60):
        _, spy = loss_of(config, step)
        keep = spy.seen["keep"]
        assert (keep.diff(dim=1) > 0).all() and keep.min() >= 0 and keep.max() < 64
        assert not torch.equal(keep[0], keep[1])
        kept.add(keep.shape[1])
    assert min(kept) >= 64 - 32 and max(kept) <= 64 - 16 and len(kept) > 10


@pytest.mark.parametrize(
    ("ratio", "multiple", "kept"),
    [(0.25, 1, 48), (0.5, 1, 32), (0.3, 1, 45), (0.3, 16, 48), (0.01, 1, 64), (0.1, 16, 48), (0.9, 16, 16)],
)
def test_kept_tokens(ratio, multiple, kept):
    assert kept_tokens(64, ratio, multiple) == kept


def test_dropout_rates_and_null_values():
    config = dataclasses.replace(CONFIG, num_classes=7, num_actions=3, label_dropout=0.25, **K600)
    labels, actions = torch.tensor([0, 3, 6]), torch.arange(12).view(3, 4) % 3
    null_labels, null_actions, no_history = [], [], []
    for step in range(200):
        _, spy = loss_of(config, step, labels=labels, actions=actions)
        for name, null, clean, counts in (("labels", 7, labels, null_labels), ("actions", 3, actions, null_actions)):
            dropped = spy.seen[name] == null
            assert torch.equal(spy.seen[name][~dropped], clean[~dropped])
            counts.append(dropped.float().mean())
        no_history.append(spy.seen["drop_history"].float().mean())
    for counts, rate in ((null_labels, 0.25), (null_actions, 0.25), (no_history, 0.4)):
        assert abs(torch.stack(counts).mean() - rate) < 0.05
    _, spy = loss_of(CONFIG, labels=labels, actions=actions)
    assert spy.seen["labels"] is None and spy.seen["actions"] is None and spy.seen["drop_history"] is None


# ---------------------------------------------------------------------------------------------------------- variants


def test_acdit_masks_nothing_and_has_no_decoder():
    config = acdit(CONFIG)
    loss, spy = loss_of(config)
    assert spy.seen["keep"] is None and loss.mask == 0 and loss.total == loss.diffusion
    assert MiMo(config).decoder is None


def test_masking_without_the_loss_still_drops_history():
    loss, spy = loss_of(dataclasses.replace(CONFIG, mask_weight=0.0))
    assert spy.seen["keep"] is not None and loss.total == loss.diffusion


def test_interleaved_steps_alternate_between_the_losses():
    config = dataclasses.replace(CONFIG, interleaved=True)
    even, spy = loss_of(config, 2)
    assert even.total == even.diffusion > 0 and even.mask == 0 and spy.seen["keep"] is not None
    odd, spy = loss_of(config, 3)
    assert odd.diffusion == 0 and odd.mask > 0 and spy.seen["noisy"] is None
    assert odd.total.item() == pytest.approx(0.5 * odd.mask.item())
    with pytest.raises(ValueError, match="step=None"):
        build_recipe(config).loss(Spy(config), clips(), generator=step_generator(0, 0, "cpu"))


def test_interleaved_steps_reach_their_own_parameters():
    config = dataclasses.replace(CONFIG, interleaved=True)
    torch.manual_seed(0)
    model = MiMo(config)
    for step, trained, untouched in ((0, "head.weight", "decoder.query"), (1, "decoder.query", "head.weight")):
        model.zero_grad()
        build_recipe(config).loss(model, clips(), generator=step_generator(0, step, "cpu"), step=step).total.backward()
        parameters = dict(model.named_parameters())
        assert parameters[trained].grad.abs().sum() > 0 and parameters[untouched].grad is None


def test_the_unmasked_phase_masks_nothing():
    before, spy = loss_of(CONFIG, 9, unmasked_from=10)
    assert spy.seen["keep"] is not None and before.mask > 0
    after, spy = loss_of(CONFIG, 10, unmasked_from=10)
    assert spy.seen["keep"] is None and after.total == after.diffusion


# ---------------------------------------------------------------------------------------------------------- training


def test_ema_follows_the_model():
    torch.manual_seed(0)
    model = MiMo(CONFIG)
    ema = EMA(model, 0.9)
    expected = None
    for skipped in (1, 0, 0, 1, 0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = ema.tensors["head.weight"].clone()
        ema.update(model, torch.tensor(float(skipped)))
        now = model.head.weight.detach().clone()
        if skipped:
            assert torch.equal(ema.tensors["head.weight"], before)
        elif expected is None:
            assert torch.equal(ema.tensors["head.weight"], now)
            expected = now
        else:
            decay = 2 / 19 if ema.updates == 2 else 3 / 20  # warm: the first counts as number 0
            expected = decay * expected + (1 - decay) * now
    torch.testing.assert_close(ema.tensors["head.weight"], expected)
    assert ema.updates == 3
    assert ema.tensors.keys() == model.state_dict().keys()
    assert not any(tensor.requires_grad for tensor in ema.tensors.values())


@pytest.mark.parametrize("changes", [{"parameterization": "flow"}, K600 | {"history_dropout": 0.0}], ids=["flow", "v"])
def test_overfitting_one_clip_removes_nine_tenths_of_both_losses(changes, one_thread):
    shape = {"frames": 3, "height": 2, "width": 3, "channels": 4}
    config = dataclasses.replace(CONFIG, dim=64, **shape, **changes)
    torch.manual_seed(0)
    model, recipe, steps = MiMo(config), build_recipe(config), 260
    clip = clips(config, 1).expand(16, -1, -1, -1, -1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    curve = []
    for step in range(steps):
        loss = recipe.loss(model, clip, generator=step_generator(0, step, "cpu"))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        rate.step()
        curve.append([loss.diffusion.item(), loss.mask.item()])
    curve = torch.tensor(curve)
    start, end = curve[:5].mean(0), curve[-20:].mean(0)
    assert (end < 0.1 * start).all(), (start, end)


# ----------------------------------------------------------------------------------------- history of its own making

OWN = {"parameterization": "flow", "prediction": "clean", "recent_frames": 1, "mask_ratio": (0.0, 0.0)}


class Copies(Spy):
    """Says of every frame what it is told of the one before, plus one."""

    calls = 0

    def forward(self, batch: FrameBatch, *, reconstruct=True) -> MiMoOutput:
        self.calls += 1
        answer = super().forward(batch, reconstruct=reconstruct)
        return answer._replace(velocity=batch.recent.view_as(answer.velocity) + 1)


@pytest.mark.parametrize("residual", [False, True])
def test_history_of_the_last_steps_is_what_the_network_makes_in_none_one_or_two_passes(residual):
    config = dataclasses.replace(CONFIG, frames=6, mask_weight=0.0, residual=residual, **OWN)
    recipe, x, seen_passes = build_recipe(config, own_history_from=10), clips(config).flatten(2, 3), set()
    for step in (0, 9, *range(10, 22)):
        spy = Copies(config)
        recipe.loss(spy, clips(config), generator=step_generator(0, step, "cpu"), step=step)
        passes = spy.calls - 1
        assert passes == 0 or step >= 10
        seen_passes.add(passes)
        expected = x
        for _ in range(passes):
            before = torch.cat([torch.zeros_like(x[:, :1]), expected[:, :-1]], 1)
            made = before + 1 + (before if residual else 0)
            expected = torch.cat([x[:, :3], made[:, 3:]], 1)
        torch.testing.assert_close(spy.seen["history"], expected, rtol=1e-5, atol=1e-5)
    assert seen_passes == {0, 1, 2}


def test_own_history_carries_no_gradient_and_needs_the_step():
    config = dataclasses.replace(CONFIG, frames=4, mask_weight=0.0, **OWN)
    recipe, model = build_recipe(config, own_history_from=0), MiMo(config)
    given = {"generator": step_generator(0, 3, "cpu")}
    recipe.loss(model, clips(config), step=3, **given).total.backward()
    assert model.head.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="step=None"):
        recipe.loss(model, clips(config), **given)
    with pytest.raises(ValueError, match="own_history_steps: expected 0, as the recipe 'far' has no clean history"):
        far = dataclasses.replace(CONFIG, recipe="far", mask_ratio=(0.0, 0.0), mask_weight=0.0, separate_ln=False)
        build_recipe(far, own_history_from=3)
