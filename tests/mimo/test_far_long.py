"""FAR-Long: coarse frames against loops, what a prediction depends on, the number of coarse frames, the multi-level
cache against full masks and full recomputation, and that it can be learnt."""

import math

import pytest
import torch
import torch.nn.functional as F

import mimo.network.network
from mimo import MiMo, MiMoConfig
from mimo.config import PRESETS, SampleConfig
from mimo.diffusion import build_schedule
from mimo.network.blocks import sinusoid
from mimo.network.frames import Frame, FrameBatch, FrameList, coarse_and_noisy, two_sizes
from mimo.network.network import MiMoOutput
from mimo.recipes import RECIPES, build_recipe
from mimo.recipes.base import Draws, step_generator
from mimo.sampling.history import CachePolicy
from mimo.sampling.multi_level import levels
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving
from mimo_kernels.ops.rope import apply_rope

CLASSES, ACTIONS, HEIGHT, WIDTH, CHANNELS, FRAMES, FINE, STRIDE = 3, 4, 2, 4, 5, 7, 3, 2
TOKENS, COARSE = HEIGHT * WIDTH, HEIGHT * WIDTH // STRIDE**2
SMALL = {
    **{"recipe": "far_long", "depth": 2, "dim": 32, "heads": 2, "decoder_layer": 1, "parameterization": "flow"},
    **{"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "channels": CHANNELS},
    **{"mask_weight": 0.0, "mask_ratio": (0.0, 0.0), "separate_ln": False},
    **{"clean_context": 0.3, "coarse_stride": STRIDE, "fine_frames": FINE},
}
TOLD = {"num_classes": CLASSES, "num_actions": ACTIONS}


def config(**changes) -> MiMoConfig:
    return MiMoConfig(**SMALL | changes)


def network(**changes) -> MiMo:
    """A small network in which nothing is zero, so that every path carries a signal."""
    torch.manual_seed(0)
    model = MiMo(config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(count: int = 2, frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, frames, HEIGHT, WIDTH, CHANNELS, generator=seeded(seed))


def drawn(recipe, count: int = 2, step: int = 0, **conditions):
    given = {"labels": None, "actions": None, "intervals": None} | conditions
    return recipe.frames(clips(count).flatten(2, 3), given, Draws(step_generator(0, step, "cpu"), count), step)


def with_coarse(recipe, number: int, **conditions):
    """What the recipe makes of some clips, at a step that draws this many coarse frames."""
    for step in range(100):
        prepared = drawn(recipe, step=step, **conditions)
        if sum(frame.kind == "coarse" for frame in prepared.batch.frames.clips[0]) == number:
            return prepared
    raise AssertionError(number)


# The network ----------------------------------------------------------------------------------------------------------


def by_loops(model: MiMo, frames: list[Frame], x, timestep, label: int, actions: list[int]) -> torch.Tensor:
    """The velocity of the noisy frames of one clip [F, N, C], in plain PyTorch: patches by loops, a dense mask, and the
    projections of each row looked up."""
    c = model.config
    rows, coords, number = [], [], []
    for f, frame in enumerate(frames):
        step = frame.stride
        for y in range(0, HEIGHT, step):
            for left in range(0, WIDTH, step):
                places = [(y + a) * WIDTH + left + b for a in range(step) for b in range(step)]
                embed = model.embed_coarse if frame.kind == "coarse" else model.embed
                rows.append(embed(torch.cat([x[f, place] for place in places])))
                coords.append([frame.time, y, left])
                number.append(f)
    h, coords, number = torch.stack(rows), torch.tensor(coords, dtype=torch.int32), torch.tensor(number)
    is_coarse = torch.tensor([frames[f].kind == "coarse" for f in number])[:, None]
    condition = model.time(sinusoid(timestep).to(x.dtype)) + model.classes.weight[label]
    condition = F.silu(condition + torch.stack([model.actions.weight[action] for action in actions]))
    sees = number[:, None] >= number[None, :]

    def modulated(norm, value):
        shift, scale, *gate = norm.modulation(condition)[number].unflatten(1, (-1, c.dim)).unbind(1)
        return F.layer_norm(value, (c.dim,), eps=1e-6) * (1 + scale) + shift, *gate

    for i, block in enumerate(model.blocks):
        attention, last = block.attention, i + 1 == c.depth
        y, gate = modulated(block.norm1, h)
        qkv = torch.where(is_coarse, attention.qkv_coarse(y), attention.qkv(y)).unflatten(1, (3, c.heads, -1))
        q, k = (F.rms_norm(part, (c.head_dim,), weight, 1e-6)
                for part, weight in ((qkv[:, 0], attention.q_norm), (qkv[:, 1], attention.k_norm)))  # fmt: skip
        q, k = apply_rope(torch.stack([q, k], 1), coords, model.rope).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(c.head_dim)
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, qkv[:, 2]).flatten(1)
        fine = attention.proj(out)
        h = h + gate * (fine if last else torch.where(is_coarse, attention.proj_coarse(out), fine))
        y, gate = modulated(block.norm2, h)
        h = h + gate * block.mlp.down(F.gelu(block.mlp.up(y), approximate="tanh"))
    y = model.head(modulated(model.norm, h)[0])
    return y[~is_coarse[:, 0]].unflatten(0, (-1, TOKENS))


def dense_attention(q, k, v, mask, *, backend):
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    seen = mask.to_dense()
    weights = scores.masked_fill(~seen, -1e30).softmax(-1).masked_fill(~seen.any(1)[:, None], 0.0)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("alike", [True, False])
@torch.no_grad()
def test_the_network_against_loops(alike):
    """Clips of the same list, and of lists with other numbers of coarse frames."""
    model = network(**TOLD)
    shapes = [(2, 3), (2, 3)] if alike else [(2, 3), (0, 1), (4, 2)]
    lists = [two_sizes(1, distant, fine, TOKENS, STRIDE).clips[0] for distant, fine in shapes]
    x = torch.randn(sum(map(sum, shapes)), TOKENS, CHANNELS, generator=seeded(1))
    timestep = torch.cat([torch.tensor([-2.0] * distant + [300.0 + 100 * i for i in range(fine)])
                          for distant, fine in shapes])  # fmt: skip
    labels, actions = torch.tensor([0, 2, CLASSES][: len(shapes)]), torch.arange(FRAMES).repeat(3, 1) % ACTIONS
    actions = actions[: len(shapes)]
    batch = FrameBatch(FrameList(tuple(lists), "block_causal"), x, timestep, labels=labels, actions=actions)
    velocity = model(batch).velocity
    assert velocity.dim() == (4 if alike else 2)
    expected, first = [], 0
    for b, frames in enumerate(lists):
        mine = slice(first, first + len(frames))
        told = [int(actions[b, frame.time]) for frame in frames]
        expected.append(by_loops(model, frames, x[mine], timestep[mine], int(labels[b]), told).flatten(0, 1))
        first += len(frames)
    torch.testing.assert_close(velocity.flatten(0, -2), torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("distant", "fine"), [(0, 3), (3, 1), (5, 3)])
def test_the_mask_against_an_independent_construction(distant, fine):
    """FAR's Fig. 3 (b): a token sees those of the same frame and of frames before, however many a frame has."""
    frame = torch.tensor([t for t in range(distant + fine) for _ in range(COARSE if t < distant else TOKENS)])
    expected = torch.block_diag(*[(frame[:, None] >= frame).int()] * 2).bool()
    listed = two_sizes(2, distant, fine, TOKENS, STRIDE)
    assert torch.equal(listed.mask.to_dense(), expected)
    predicted = (frame >= distant).repeat(2)
    assert torch.equal(listed.last_mask.to_dense(), expected[predicted])


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("distant", [0, 4])
def test_gradients_are_exactly_zero_where_nothing_is_seen(distant, alone):
    """A velocity depends on all coarse frames, on the fine ones before it and on its own, and on nothing else."""
    changes = {"history_dropout": 0.5} if alone else {}
    model, recipe = network(**changes), build_recipe(config(**changes))
    prepared = with_coarse(recipe, distant)
    batch, count = prepared.batch, distant + FINE
    batch.latents = batch.latents.clone().requires_grad_()
    dropped = torch.zeros(2, count, dtype=torch.bool) if batch.frames.alone is None else batch.frames.alone
    dropped = dropped.view(2, count)
    assert bool(dropped.any()) == alone and not dropped[:, :distant].any()
    velocity = model(batch).velocity
    for clip in range(2):
        for t in range(FINE):
            (gradient,) = torch.autograd.grad(velocity[clip, t].square().sum(), batch.latents, retain_graph=True)
            touched = (gradient.view(2, count, TOKENS, CHANNELS) != 0).any(-1)
            expected = torch.zeros(2, count, TOKENS, dtype=torch.bool)
            expected[clip, distant + t if dropped[clip, distant + t] else 0 : distant + t + 1] = True
            assert torch.equal(touched, expected), (clip, t)


def test_gradients_by_finite_differences(monkeypatch):
    """Of the loss, with respect to all parameters, along random directions in float64, which the kernels do not serve:
    their place is taken by dense attention under the same mask."""
    monkeypatch.setattr(mimo.network.network, "frame_attention", dense_attention)
    model = network(depth=2, dim=16, **TOLD).double()
    recipe = build_recipe(model.config)
    given = {"labels": torch.tensor([0, 2]), "actions": torch.arange(2 * FRAMES).view(2, FRAMES) % ACTIONS}
    names, parameters = zip(*model.named_parameters(), strict=True)
    prepared = with_coarse(recipe, 4, **given)
    prepared.batch.latents, target = prepared.batch.latents.double(), prepared.target.double()

    def loss() -> torch.Tensor:
        error = (model(prepared.batch).velocity - target).square()
        return (error * prepared.weight[..., None, None]).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=seeded(len(name)), dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-5)
                ends.append(loss())
                parameter.sub_(direction, alpha=sign * 1e-5)
        measured = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), measured, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("name", "plain", "millions"), [("far-long-b-dmlab", 130, 158), ("far-long-m-minecraft", 230, 280)]
)
def test_published_sizes(name, plain, millions):
    """FAR's Table 1. Its FAR-B and FAR-M are the same networks without what coarse frames add."""
    with torch.device("meta"):
        model = MiMo(MiMoConfig.from_preset(name))
    counts = {part: parameter.numel() for part, parameter in model.named_parameters()}
    added = sum(count for part, count in counts.items() if "coarse" in part)
    depth, dim = model.config.depth, model.config.dim
    assert added == depth * 3 * dim * (dim + 1) + (depth - 1) * dim * (dim + 1) + dim * (16 * 32 + 1)
    assert abs((sum(counts.values()) - added) / 1e6 - plain) < 1.5
    assert abs(sum(counts.values()) / 1e6 - millions) < 1.5


# What a step is made of -----------------------------------------------------------------------------------------------


def test_the_number_of_coarse_frames_is_uniform_and_one_for_the_batch():
    recipe, counts = build_recipe(config()), [0] * (FRAMES - FINE + 1)
    for step in range(400):
        frames = drawn(recipe, step=step).batch.frames
        assert len(set(frames.clips)) == 1
        kinds = [frame.kind for frame in frames.clips[0]]
        number = kinds.count("coarse")
        assert kinds == ["coarse"] * number + ["noisy"] * FINE
        assert [frame.time for frame in frames.clips[0]] == list(range(number + FINE))
        counts[number] += 1
    assert all(abs(count - 80) < 30 for count in counts), counts  # 5 numbers; 8 is a standard deviation


def test_where_a_clip_begins_is_drawn_for_each():
    """Frames and actions are those of one place of the clip; every place occurs."""
    recipe = build_recipe(config(num_actions=ACTIONS, label_dropout=0.0, clean_context=1.0))
    x = torch.arange(FRAMES).float().view(1, FRAMES, 1, 1).expand(2, FRAMES, TOKENS, CHANNELS).contiguous()
    actions = torch.arange(FRAMES).expand(2, FRAMES) % ACTIONS
    places, differ = set(), False
    for step in range(60):
        given = {"labels": None, "actions": actions, "intervals": None}
        batch = recipe.frames(x, given, Draws(step_generator(0, step, "cpu"), 2), step).batch
        times = batch.latents[:, 0, 0].view(2, -1).long()
        assert torch.equal(times - times[:, :1], torch.arange(times.shape[1]).expand_as(times))
        assert torch.equal(batch.actions, times % ACTIONS)
        assert times.max() < FRAMES
        places |= {(times.shape[1], int(first)) for first in times[:, 0]}
        differ |= bool(times[0, 0] != times[1, 0])
    assert differ and places == {(n, first) for n in range(FINE, FRAMES + 1) for first in range(FRAMES - n + 1)}


class Answer(torch.nn.Module):
    """A network whose velocity is given."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, batch, *, reconstruct):
        self.batch = batch
        return MiMoOutput(self.velocity, {}, {})


def test_the_loss_against_loops():
    """Coarse frames are clean, told -2 and have no loss; the mean is over the fine ones that are not clean. The frames
    of a clip are all alike here, wherever it is cut."""
    recipe, x = build_recipe(config()), clips(3, 1)[:, 0].flatten(1, 2)
    answer = Answer(torch.randn(3, FINE, TOKENS, CHANNELS, generator=seeded(7)))
    still, tried = clips(3, 1).expand(-1, FRAMES, -1, -1, -1), 0
    for step in range(40):
        loss = recipe.loss(answer, still, generator=step_generator(0, step, "cpu"))
        count = len(answer.batch.frames.clips[0])
        told = answer.batch.timestep.view(3, count)
        latents = answer.batch.latents.view(3, count, TOKENS, CHANNELS)
        distant, total = count - FINE, 0.0
        assert (told[:, :distant] == -2).all() and (told[:, distant:] >= -1).all()
        if (told[:, distant:] < 100).all(1).any():
            continue  # eps can hardly be told from the frame, or a clip has no loss
        tried += 1
        for clip in range(3):
            errors = []
            for f in range(count):
                if told[clip, f] < 0:
                    assert torch.equal(latents[clip, f], x[clip])
                    continue
                tau = told[clip, f].item() / 1000
                eps = (latents[clip, f] - (1 - tau) * x[clip]) / tau
                errors.append((answer.velocity[clip, f - distant] - (eps - x[clip])).square().mean())
            total += torch.stack(errors).mean().item() / 3
        assert loss.total.item() == pytest.approx(total, rel=1e-3)
    assert tried > 5


def test_a_part_of_a_batch_draws_what_the_whole_draws_for_it():
    recipe = build_recipe(config(**TOLD, label_dropout=0.5, history_dropout=0.4))
    x, labels = clips(6).flatten(2, 3), torch.arange(6) % CLASSES
    actions = torch.arange(6 * FRAMES).view(6, FRAMES) % ACTIONS
    for step in range(4):
        found = []
        for first, count in ((0, 6), (0, 2), (2, 4)):
            ours = slice(first, first + count)
            given = {"labels": labels[ours], "actions": actions[ours], "intervals": None}
            batch = recipe.frames(x[ours], given, Draws(step_generator(0, step, "cpu"), count, first, 6), 0).batch
            alone = batch.frames.alone
            alone = torch.zeros(len(batch.timestep), dtype=torch.bool) if alone is None else alone
            parts = batch.latents, batch.timestep, batch.labels, batch.actions, alone
            found.append([part.reshape(count, -1) for part in parts])
        for whole, one, other in zip(*found, strict=True):
            assert torch.equal(whole, torch.cat([one, other]))


def test_every_parameter_learns():
    model = network(**TOLD, label_dropout=0.0)
    recipe = build_recipe(model.config)
    prepared = with_coarse(
        recipe, 3, labels=torch.tensor([0, 2]), actions=torch.arange(2 * FRAMES).view(2, FRAMES) % ACTIONS
    )
    recipe.loss_of(model(prepared.batch, reconstruct=False), prepared).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_overfitting_one_clip_removes_nine_tenths_of_the_loss():
    """Wherever it is cut, the actions tell which frame is which."""
    c = config(dim=64, frames=4, fine_frames=2, num_actions=4, label_dropout=0.0)
    torch.manual_seed(0)
    model, recipe, steps = MiMo(c), build_recipe(c), 340
    clip, actions = clips(1, 4).expand(16, -1, -1, -1, -1), torch.arange(4).expand(16, -1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    curve = []
    for step in range(steps):
        loss = recipe.loss(model, clip, actions=actions, generator=step_generator(0, step, "cpu"))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        rate.step()
        curve.append(loss.total.item())
    assert sum(curve[-20:]) / 20 < 0.1 * sum(curve[:5]) / 5


# Sampling -------------------------------------------------------------------------------------------------------------


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
    """Every step of every branch of every frame as one forward pass over all frames, as training has it for the last
    frame of a clip: the latest FINE frames whole, those before them coarse."""
    schedule = build_schedule("flow")
    timesteps, done = schedule.embedding(schedule.sampling_timesteps(steps)), list(context.unbind(1))
    for x in starts:
        t = len(done)
        distant = max(0, t + 1 - FINE)
        for i in range(steps):

            def velocity(*, told=True, alone=False, x=x, t=t, i=i, distant=distant):
                timestep = torch.full((len(x), t + 1), -1.0)
                timestep[:, :distant], timestep[:, t] = -2.0, timesteps[i]
                drop = torch.zeros(len(x), t + 1 - distant, dtype=torch.bool)
                drop[:, -1] = alone
                given = {}
                if labels is not None:
                    given["labels"] = labels if told else torch.full_like(labels, CLASSES)
                if actions is not None:
                    given["actions"] = actions[:, : t + 1] if told else torch.full_like(actions[:, : t + 1], ACTIONS)
                whole = torch.stack([*done, x], 1)
                parts = whole[:, :distant], whole[:, distant:], timestep
                return model(coarse_and_noisy(*parts, stride=STRIDE, drop_history=drop, **given)).velocity[:, -1]

            v = guided = velocity()
            if history_guidance != 1:
                guided = guided + (history_guidance - 1) * (v - velocity(alone=True))
            if class_guidance != 1:
                guided = guided + (class_guidance - 1) * (v - velocity(told=False))
            x = schedule.step(guided, x, i)
        done.append(x)
    return torch.stack(done, 1)


GUIDANCE = [(1.0, 1.0, ()), (1.5, 1.0, ()), (1.0, 2.0, ("actions",)), (1.5, 2.0, ("labels", "actions"))]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("history_guidance", "class_guidance", "told"), GUIDANCE)
def test_multi_level_sampling_is_the_forward_of_training(
    monkeypatch, history_guidance, class_guidance, told, use_cache
):
    model = network(num_classes=CLASSES if "labels" in told else 0, num_actions=ACTIONS * ("actions" in told))
    every = {"labels": torch.tensor([0, 2]), "actions": torch.randint(ACTIONS, (2, FRAMES), generator=seeded(3))}
    given = {name: every[name] if name in told else None for name in every}
    sampling = {"history_guidance": history_guidance, "class_guidance": class_guidance, "num_frames": FRAMES}
    sampler = Sampler(model, SampleConfig(sampler="euler", steps=2, **sampling), use_cache=use_cache)
    starts, context = starts_of(monkeypatch), clips(seed=5)[:, :1].flatten(2, 3)
    video = sampler.sample(context, FRAMES, generator=seeded(4), **given)
    expected = by_full_masks(model, context, starts, 2, history_guidance, class_guidance, **given)
    torch.testing.assert_close(video, expected, rtol=2e-5, atol=2e-5)


def guided(**options) -> SampleConfig:
    base = {"sampler": "euler", "steps": 2, "num_frames": 9, "history_guidance": 1.5, "class_guidance": 2.0}
    return SampleConfig(**base | options)


def start(sampler: Sampler, **options):
    """Contexts of five frames, of one and of none; two trajectories each, labels and actions."""
    c = sampler.model.config
    given = [torch.randn(count, c.tokens, c.token_channels, generator=seeded(count)) for count in (5, 1, 0)]
    told = {"labels": torch.tensor([0, 2, 1]), "actions": torch.arange(27).view(3, 9) % ACTIONS}
    return sampler.stream(given, 9, trajectories=2, generator=seeded(1), **told, **options)


@pytest.mark.parametrize(
    "changes",
    [{"fine_frames": 1}, {"fine_frames": 2, "max_interval": 5}, {"fine_frames": 5}]
    + [{"patch": 2, "height": 4, "width": 8}, {"positions": "sincos"}],
    ids=str,
)
def test_cached_equals_recomputed(changes):
    """Ragged contexts and trajectories, both guidances, noise on the history: sequences cross the window at different
    frames."""
    model = network(**TOLD, **changes)
    options = {"intervals": torch.tensor([1, 5, 2])} if "max_interval" in changes else {}
    videos = [
        torch.stack(list(start(Sampler(model, guided(history_noise=(0.0, 0.3)), use_cache=cached), **options)), 1)
        for cached in (True, False)
    ]
    torch.testing.assert_close(*videos, rtol=5e-5, atol=5e-5)
    assert videos[0].shape == (6, 4, TOKENS, model.config.token_channels)


@torch.no_grad()
def test_encoding_again_against_a_full_recomputation():
    """After every frame, what lies in the pages is what a pass over all frames so far makes of them."""
    model = network(num_actions=ACTIONS)
    sampler = Sampler(model, guided(history_guidance=1.0), page_size=2)
    context, actions = clips(1, 2)[0].flatten(1, 2), torch.arange(9).view(1, 9) % ACTIONS
    stream, frames = sampler.stream([context], 9, actions=actions, generator=seeded(2)), [*context]
    for made in stream:
        frames.append(made[0])
        if len(frames) == 9:
            break  # the last frame is not remembered
        cache, seqs = stream.run.history.cache, stream.run.history.seqs
        listed = levels(len(frames), model.config)
        assert [frame.kind for frame in listed] == ["coarse"] * max(0, len(frames) - 2) + ["noisy"] * 2
        for seq, told in zip(seqs, (actions[0, : len(frames)], torch.full((len(frames),), ACTIONS)), strict=True):
            expected = []

            def attend(layer, q, k, v, listed=listed, expected=expected):
                expected.append(torch.stack([k, v]))
                number = torch.tensor([f for f, frame in enumerate(listed) for _ in range(frame.tokens)])
                scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
                weights = scores.masked_fill(number[:, None] < number, -math.inf).softmax(-1)
                return torch.einsum("hqk,khd->qhd", weights, v)

            timestep = torch.tensor([-2.0 if frame.kind == "coarse" else -1.0 for frame in listed])
            whole = FrameList((tuple(listed),), "block_causal"), torch.stack(frames), timestep
            model.history_frames(*whole, attend, actions=told)
            found = [torch.stack(cache.frame(seq, index)) for index in cache.frame_indices(seq)]
            assert [kept.shape[2] for kept in found] == [frame.tokens for frame in listed]
            torch.testing.assert_close(torch.cat(found, 2).transpose(0, 1), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stop", [1, 3])
def test_continued_frames_are_the_same_bit_for_bit(tmp_path, stop):
    model = network(**TOLD)
    expected = list(start(Sampler(model, guided())))
    stream = start(Sampler(model, guided()), saving=Saving(tmp_path, every=1))
    for frame in expected[:stop]:
        assert torch.equal(next(stream), frame)
    stream.close()
    sampler = Sampler(network(**TOLD), guided())
    rest = list(sampler.resume(Saving(tmp_path, every=1)))
    assert len(rest) == len(expected) - stop and all(map(torch.equal, rest, expected[stop:]))
    (run,) = sampler._idle.values()
    assert run.history.cache.num_free_pages == run.history.cache.num_pages


@pytest.mark.parametrize(("given", "made"), [(144, 156), (36, 30)])
def test_rollouts_of_the_papers_protocols(given, made):
    """144 -> 156 and the beginning of 36 -> 264 frames with actions: memory is known before the run, and small."""
    model = network(depth=1, dim=16, num_actions=ACTIONS, frames=300, fine_frames=2)
    sampler = Sampler(model, guided(steps=1, history_guidance=1.0, class_guidance=1.5, num_frames=300))
    actions = torch.randint(ACTIONS, (1, 300), generator=seeded(0))
    context = torch.randn(1, given, TOKENS, CHANNELS, generator=seeded(1))
    stream = sampler.stream(context, 300, actions=actions, generator=seeded(2))
    frames = [next(stream) for _ in range(made)]
    assert torch.stack(frames).isfinite().all() and stream.progress.total == 300 - given
    cache, page = stream.run.history.cache, COARSE
    used = 2 * (TOKENS // page + given + made - (2 if made + given == 300 else 1))  # the last one is not remembered
    assert cache.page_size == page and cache.num_pages - cache.num_free_pages == used
    stream.close()
    assert cache.num_pages == 2 * (2 * TOKENS // page + 298)  # two histories
    whole = Sampler(
        network(recipe="far", coarse_stride=0, fine_frames=0, num_actions=ACTIONS, depth=1, dim=16), guided()
    )
    told = {"labels": False, "actions": True}
    assert sampler.cache_bytes(1, given, 300, **told) < 0.3 * whole.cache_bytes(1, given, 300, **told)


def test_an_abandoned_run_gives_its_pages_back():
    sampler = Sampler(network(**TOLD), guided())
    stream = start(sampler)
    next(stream), next(stream)
    cache = stream.run.history.cache
    assert cache.num_free_pages < cache.num_pages
    stream.close()
    assert cache.num_free_pages == cache.num_pages


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coarse_stride": 3}, "coarse_stride=3: expected 2 or more, dividing 2 x 4 tokens"),
        ({"coarse_stride": 1}, "coarse_stride=1: expected 2 or more"),
        ({"coarse_stride": -2}, "coarse_stride=-2: expected zero or more"),
        ({"fine_frames": 0}, "fine_frames=0: expected 1..frames=7 with coarse_stride=2"),
        ({"fine_frames": 8}, "fine_frames=8: expected 1..frames=7"),
        ({"coarse_stride": 0}, "fine_frames=3: expected 0 when coarse_stride is 0"),
    ],
)
def test_configurations_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "far_long"])
def test_other_recipes_have_no_coarse_frames(recipe):
    """And FAR-Long is nothing without."""
    name = next(name for name in PRESETS if MiMoConfig.from_preset(name).recipe == recipe)
    changes = {"height": 4, "width": 4, "coarse_stride": 2, "fine_frames": 1}
    values = MiMoConfig.from_preset(name).to_dict() | changes
    with pytest.raises(ValueError, match=f"coarse_stride=2: expected 0 with recipe='{recipe}'"):
        build_recipe(MiMoConfig(**values))
    with pytest.raises(ValueError, match="coarse_stride=0: expected 2 or more with recipe='far_long'"):
        build_recipe(config(coarse_stride=0, fine_frames=0))


def test_lists_and_policies_that_do_not_fit():
    model, x = network(), clips(1).flatten(2, 3)
    plain = network(recipe="far", coarse_stride=0, fine_frames=0)
    batch = coarse_and_noisy(x[:, :2], x[:, 2:], torch.zeros(1, FRAMES), stride=STRIDE)
    with pytest.raises(ValueError, match="frames are coarse: this network embeds 'clean' and 'noisy' ones"):
        plain(batch)
    wide = FrameList(((Frame(0, "coarse", 1, 4), Frame(1, "noisy", TOKENS)),), "block_causal")
    with pytest.raises(ValueError, match="a coarse frame has 1 tokens, stride 4: expected 2, stride 2"):
        model(FrameBatch(wide, x[0, :2], torch.zeros(2)))
    with pytest.raises(ValueError, match=r"timestep is \[1, 5\]: expected \[1, 7\]"):
        coarse_and_noisy(x[:, :2], x[:, 2:], torch.zeros(1, 5), stride=STRIDE)
    for options, message in (
        (
            {"config": guided(window=2)},
            "window=2, sink=0: expected none, as 'far_long' keeps the latest 3 frames whole",
        ),
        ({"config": guided(), "graph": "frame"}, "graph='frame': expected 'step'"),
        ({"config": guided(interpolate=True)}, "interpolate=True: expected False"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampler(model, **options)
    with pytest.raises(ValueError, match="coarse_tokens=2: expected 0, as 'far' has no coarse frames"):
        Sampler(plain, guided(), policy=CachePolicy(3, coarse_tokens=2))
    with pytest.raises(ValueError, match="coarse_tokens=2: expected a window that frames leave and no sink"):
        CachePolicy(coarse_tokens=2)
