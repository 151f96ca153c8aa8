"""Sampler against Algorithms 2 and 4 written out with the full-mask forward, and against itself: cached, uncached,
batched, forked."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mimo.network.blocks
import mimo.sampling.history
import mimo.sampling.sampler
import mimo_kernels.core.checks
from mimo import MiMo, MiMoConfig
from mimo.config import SampleConfig
from mimo.diffusion import FlowSchedule, VPredictionSchedule
from mimo.network.frames import clean_and_noisy
from mimo.network.recent import recent_frames
from mimo.sampling.guidance import guidance_branches
from mimo.sampling.history import CachePolicy
from mimo.sampling.loading import round_weights
from mimo.sampling.sampler import Sampler
from mimo_kernels import FrameCache, paged_frame_attention

TOKENS, CHANNELS, CLASSES, ACTIONS = 8, 5, 3, 4


def network(**options) -> MiMo:
    """Small, and with weights that make everything matter: DiT's initial zeros would hide it."""
    torch.manual_seed(0)
    base = {"depth": 2, "dim": 32, "heads": 2, "frames": 6, "height": 2, "width": 4, "channels": CHANNELS}
    base |= {"mask_weight": 0.0, "parameterization": "flow", "decoder_layer": 1}
    model = MiMo(MiMoConfig(**base | options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def config(**options) -> SampleConfig:
    return SampleConfig(**{"sampler": "euler", "steps": 3, "num_frames": 6} | options)


def context(clips: int = 2, frames: int = 2) -> torch.Tensor:
    return torch.randn(clips, frames, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(5))


def seed(number: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def conditions(clips: int = 2, frames: int = 6) -> dict:
    actions = torch.randint(ACTIONS, (clips, frames), generator=seed(3))
    return {"labels": torch.arange(clips) % CLASSES, "actions": actions}


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def model() -> MiMo:
    return network()


@pytest.fixture(scope="module")
def conditional() -> MiMo:
    return network(num_classes=CLASSES, num_actions=ACTIONS)


class Starts:
    """Records the noise that every frame starts from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.noise: list[torch.Tensor] = []
        original = Sampler._noise

        def record(sampler, seed, ids, positions, use, scale):
            noise = original(sampler, seed, ids, positions, use, scale)
            if use == "start":
                self.noise.append(noise.clone())
            return noise

        monkeypatch.setattr(Sampler, "_noise", record)


@torch.no_grad()
def algorithm_4(model, schedule, steps, given, starts, w_history=1.0, w_class=1.0, labels=None, actions=None):
    """The paper's Algorithm 4 with one full-mask forward per branch and step, and class guidance beside it."""
    frames = list(given.unbind(1))
    timesteps = schedule.embedding(schedule.sampling_timesteps(steps))
    for x in starts:
        t = len(frames)
        history = torch.stack([*frames, torch.full_like(x, math.nan)], 1).nan_to_num(77.0)  # frame t: never seen
        for i in range(steps):

            def velocity(drop=False, labels=labels, actions=actions, x=x, t=t, history=history, i=i):
                noisy = torch.zeros_like(history)
                noisy[:, t] = x
                recent = None
                if model.config.recent_frames:
                    recent = recent_frames(history, model.config.recent_frames).mul(0.0 if drop else 1.0).flatten(0, 1)
                batch = clean_and_noisy(
                    history,
                    noisy,
                    timesteps[i].expand(len(x), t + 1),
                    labels=labels,
                    actions=None if actions is None else actions[:, : t + 1],
                    drop_history=torch.full((len(x), t + 1), drop),
                    recent=recent,
                )
                return model(batch).velocity[:, t]

            v = velocity()
            guided = v
            if w_history != 1:
                guided = guided + (w_history - 1) * (v - velocity(drop=True))
            if w_class != 1:
                # Nobody is told anything: neither the frame nor its history.
                null = None if actions is None else torch.full_like(actions, ACTIONS)
                guided = guided + (w_class - 1) * (v - velocity(labels=None, actions=null))
            x = schedule.step(guided, x, i)
        frames.append(x + frames[-1] if model.config.residual else x)
    return torch.stack(frames, 1)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("w_history, w_class", [(1.0, 1.0), (1.5, 1.0), (1.0, 2.0), (1.5, 2.0)])
def test_equals_algorithm_4_with_the_full_mask(conditional, monkeypatch, w_history, w_class, use_cache):
    starts = Starts(monkeypatch)
    guided = config(history_guidance=w_history, class_guidance=w_class)
    sampler = Sampler(conditional, guided, use_cache=use_cache)
    given = context()
    video = sampler.sample(given, 5, generator=seed(), **conditions(frames=5))
    schedule = FlowSchedule()
    expected = algorithm_4(conditional, schedule, 3, given, starts.noise, w_history, w_class, **conditions(frames=5))
    close(video, expected)
    assert torch.equal(video[:, :2], given)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("told", [0, 1, 3])
def test_clean_latents_of_what_changes(monkeypatch, use_cache, told):
    """Contexts of two frames: the third of those told is none."""
    model = network(prediction="clean", residual=True, recent_frames=told)
    starts = Starts(monkeypatch)
    sampler = Sampler(model, config(history_guidance=1.5), use_cache=use_cache)
    video = sampler.sample(context(), 5, generator=seed())
    close(video, algorithm_4(model, FlowSchedule("clean"), 3, context(), starts.noise, 1.5))
    ragged = sampler.sample([context(1, 3)[0], context()[1]], 5, generator=seed(), trajectories=2)
    alone = sampler.sample(context()[1:], 4, generator=seed(), ids=[3])
    close(ragged[3], alone[0])


def test_nothing_that_changes_repeats_the_last_frame_with_its_noise():
    model = network(prediction="clean", residual=True)
    for parameter in model.head.parameters():
        parameter.data.zero_()
    video = Sampler(model, config()).sample(context(), 5, generator=seed())
    assert torch.equal(video[:, 2:], video[:, 1:2].expand(-1, 3, -1, -1))
    noisy = Sampler(model, config(history_noise=(0.5, 0.5))).sample(context(), 5, generator=seed())
    steps = noisy[:, 3:] - noisy[:, 2:-1]
    assert torch.equal(noisy[:, 2], video[:, 2]) and abs(steps.std() - 0.5) < 0.1
    assert not torch.equal(Sampler(model, config()).sample(None, 2, generator=seed())[:, 0], video[:, 0])


def test_ddim_from_nothing(monkeypatch):
    model = network(parameterization="v", separate_ln=False)
    starts = Starts(monkeypatch)
    video = Sampler(model, config(sampler="ddim", history_guidance=1.05)).sample(None, 3, batch=2, generator=seed())
    nothing = torch.empty(2, 0, TOKENS, CHANNELS)
    close(video, algorithm_4(model, VPredictionSchedule(), 3, nothing, starts.noise, 1.05))


POLICIES = {
    "whole": CachePolicy(),
    "window": CachePolicy(3),
    "window and sink": CachePolicy(2, sink=1),
    "alone": CachePolicy(1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_cached_equals_full_mask(conditional, name):
    """Ragged contexts, trajectories, both guidances: history recomputed with FrameMask against pages."""
    given = [context(1, 4)[0], context(1, 1)[0]]
    guided = config(history_guidance=1.5, class_guidance=2.0)
    videos = []
    for use_cache in (True, False):
        sampler = Sampler(conditional, guided, policy=POLICIES[name], use_cache=use_cache, page_size=3)
        videos.append(sampler.sample(given, 8, trajectories=2, generator=seed(), **conditions(frames=8)))
    assert [len(video) for video in videos[0]] == [8, 8, 5, 5]
    for cached, full in zip(*videos, strict=True):
        close(cached, full)
    if name != "whole":
        whole = Sampler(conditional, guided).sample(given, 8, trajectories=2, generator=seed(), **conditions(frames=8))
        assert not torch.allclose(whole[0], videos[0][0], atol=1e-2)


def test_same_seed_same_video_alone_batched_and_forked(model):
    sampler, given = Sampler(model, config(history_guidance=1.5)), context(3)
    batched = sampler.sample(given, 5, generator=seed())
    assert torch.equal(batched, sampler.sample(given, 5, generator=seed()))  # the cache of the first run, used again
    for clip in range(3):
        close(sampler.sample(given[clip : clip + 1], 5, generator=seed(), ids=[clip]), batched[clip : clip + 1])
    forked = sampler.sample(given[:1], 5, generator=seed(), trajectories=3)
    close(forked, sampler.sample(given[:1].expand(3, -1, -1, -1), 5, generator=seed()))
    for one, other in itertools.combinations(forked[:, 2:].unbind(), 2):
        assert not torch.allclose(one, other, atol=1e-2)
    assert not torch.allclose(sampler.sample(given, 5, generator=seed(2)), batched, atol=1e-2)
    generator = seed()
    first, second = (sampler.sample(given, 5, generator=generator) for _ in range(2))
    assert torch.equal(first, batched) and not torch.equal(second, batched)


def test_trajectories_store_their_context_once(model, monkeypatch):
    caches = []

    class Recorded(FrameCache):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            caches.append(self)

    monkeypatch.setattr(mimo.sampling.history, "FrameCache", Recorded)
    stream = Sampler(model, config()).stream(context(2, 4), 6, trajectories=10, generator=seed())
    next(stream)
    (cache,) = caches
    assert cache.num_pages - cache.num_free_pages == 2 * 4 + 20 * 1
    assert cache.num_pages == 2 * 4 + 20 * 2  # known before the run
    stream.close()
    assert cache.num_free_pages == cache.num_pages


class Syncs(TorchDispatchMode):
    """Counts what would read a value back from a device."""

    READS = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.is_nonzero,
        torch.ops.aten.equal,
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in self.READS
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_back_inside_a_frame(monkeypatch):
    # Operators look at values that lie on the host, to refuse wrong ones; on a GPU they do not.
    monkeypatch.setattr(mimo_kernels.core.checks, "on_host", lambda x: False)
    with Syncs() as syncs:
        torch.ones(1).item()
    assert syncs.count == 1
    # Learned positions: RoPE's reference looks at positions on the CPU, where it costs nothing, to refuse negative
    # ones.
    model = network(num_classes=CLASSES, num_actions=ACTIONS, positions="learned", frames=8)
    sampler = Sampler(model, config(history_guidance=1.5, class_guidance=2.0), policy=CachePolicy(3, sink=1))
    stream = sampler.stream(context(), 8, generator=seed(), **conditions(frames=8))
    next(stream)
    with Syncs() as syncs:
        for _ in range(4):
            next(stream)
    assert syncs.count == 0


class Recorded:
    """What a CUDA graph does, on the CPU: the second call is recorded operator by operator, later calls run the record
    again on the same memory and run no Python of the function."""

    def __init__(self, function, captures):
        self.function, self.calls, self.record = function, 0, []

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            self.function()
        elif self.calls == 2:
            with self.Recorder(self.record):
                self.function()
        else:
            for function, args, kwargs, outputs in self.record:
                for old, new in zip(outputs, self.tensors(function(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    @staticmethod
    def tensors(tree) -> list[torch.Tensor]:
        return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

    class Recorder(TorchDispatchMode):
        def __init__(self, record):
            super().__init__()
            self.record = record

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.record.append((function, args, kwargs or {}, Recorded.tensors(out)))
            return out


@pytest.mark.parametrize("graph", ["step", "frame"])
def test_one_recording_serves_all_steps_and_frames(monkeypatch, graph):
    """Nothing that changes from step to step, frame to frame or run to run reaches the network but through memory."""
    conditional = network(depth=1, num_classes=CLASSES, num_actions=ACTIONS)
    policy = CachePolicy(2, sink=1)  # the cache grows, then loses frames
    guided = config(steps=2, history_guidance=1.5, class_guidance=2.0, history_noise=(0.0, 0.3))
    options = [conditions(frames=5), conditions(frames=5) | {"labels": torch.tensor([2, 0])}]
    expected = [
        Sampler(conditional, guided, policy=policy).sample(context(), 5, generator=seed(), **o) for o in options
    ]
    monkeypatch.setattr(mimo.sampling.sampler, "Replayed", Recorded)
    # The reference takes lengths from the host; the kernel reads them where a graph leaves them.
    kernel = partial(paged_frame_attention, backend="triton")
    monkeypatch.setattr(
        mimo.sampling.history, "paged_frame_attention", lambda *args, backend, **rest: kernel(*args, **rest)
    )
    sampler = Sampler(conditional, guided, policy=policy, graph=graph)
    for o, video in zip(options, expected, strict=True):
        close(sampler.sample(context(), 5, generator=seed(), **o), video)
    (run,) = sampler._idle.values()
    if graph == "step":
        assert run.step.calls == 2 * 2 * 3 and run.record.calls == 2 * 2
    else:  # one launch per frame
        assert run.frame.calls == 2 * 3 and run.step.calls == run.record.calls == 0
    assert run.history.cache.num_free_pages == run.history.cache.num_pages


def test_window_comes_from_the_config_or_from_a_policy(model):
    one = Sampler(model, config(window=2, sink=1)).sample(context(), 6, generator=seed())
    other = Sampler(model, config(), policy=CachePolicy(2, sink=1)).sample(context(), 6, generator=seed())
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="window=2 and a policy: expected one of them"):
        Sampler(model, config(window=2), policy=CachePolicy(3))


def test_long_video_in_constant_memory():
    model = network(depth=1)
    sampler = Sampler(model, config(steps=1, window=4, sink=2))
    video = sampler.sample(context(1), 300, generator=seed())
    assert video.shape == (1, 300, TOKENS, CHANNELS) and video.isfinite().all()
    (run,) = sampler._idle.values()
    assert run.history.cache.num_pages == run.history.cache.num_free_pages == 6


def test_stream_hands_out_frames_as_they_are_done(model):
    done, sampler = [], Sampler(model, config())
    stream = sampler.stream(context(), 5, generator=seed(), progress=lambda *now: done.append(now))
    frames = [next(stream)]
    assert done == [(1, 3)]
    frames += stream
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert len(sampler.latencies) == 3 and all(latency() > 0 for latency in sampler.latencies)
    assert torch.equal(torch.stack(frames, 1), sampler.sample(context(), 5, generator=seed())[:, 2:])


def test_two_streams_and_an_abandoned_one(model):
    sampler = Sampler(model, config())
    expected = sampler.sample(context(), 5, generator=seed())[:, 2:]
    one, other = (sampler.stream(context(), 5, generator=seed(n)) for n in (1, 2))
    frames = [next(one), next(other), next(one), next(other), next(one)]
    close(torch.stack(frames[::2], 1), expected)
    other.close()
    close(sampler.sample(context(), 5, generator=seed())[:, 2:], expected)


def test_failure_inside_a_frame_leaves_the_sampler_usable(model, monkeypatch):
    sampler = Sampler(model, config())
    expected = sampler.sample(context(), 5, generator=seed())
    original, calls = MiMo.history_frame, itertools.count()

    def fails(*args, **options):
        if next(calls) == 3:
            raise RuntimeError("out of luck")
        return original(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of luck"):
        patch.setattr(MiMo, "history_frame", fails)
        sampler.sample(context(), 5, generator=seed())
    assert torch.equal(sampler.sample(context(), 5, generator=seed()), expected)


def test_a_whole_frame_in_one_piece_is_the_same_video(model):
    for policy in (CachePolicy(), CachePolicy(2, sink=1)):
        videos = [
            Sampler(model, config(history_guidance=1.5, history_noise=(0.0, 0.5)), policy=policy, graph=graph).sample(
                [context(1, 3)[0], context(1, 1)[0]], 7, generator=seed(), trajectories=2
            )
            for graph in ("step", "frame")
        ]
        assert all(torch.equal(one, other) for one, other in zip(*videos, strict=True))


def test_history_goes_straight_into_the_pages(model, monkeypatch):
    """The pass of a finished frame writes each layer's keys and values once, where they stay, and nothing else does."""
    written = []
    original = mimo.network.blocks.qk_norm_rope_cache

    def record(qkv, *args, **options):
        *_, keys, values, rows = args
        before = keys.clone(), values.clone()
        q, k = original(qkv, *args, **options)
        others = torch.ones(len(keys), dtype=torch.bool).index_fill(0, rows, False)
        for pool, old, new in zip((keys, values), before, (k, qkv[:, 2]), strict=True):
            assert torch.equal(pool[rows], new) and torch.equal(pool[others], old[others])
        written.append(keys.data_ptr())
        return q, k

    monkeypatch.setattr(mimo.network.blocks, "qk_norm_rope_cache", record)
    monkeypatch.setattr(FrameCache, "write", lambda *_: pytest.fail("keys and values were copied into the cache"))
    Sampler(model, config()).sample(context(2, 2), 5, generator=seed())
    assert (
        len(written) == 2 * (2 + 2) and len(set(written)) == 2
    )  # 2 layers, 2 frames given and 2 made; the last is not


@pytest.mark.parametrize("told", [(), ("labels",), ("labels", "actions")])
def test_norms_are_told_once_per_frame_what_every_step_would_tell_them(conditional, monkeypatch, told):
    """And a run that is used again is told anew: weights and conditions may have changed."""
    given = {name: conditions(2, 5)[name] for name in told}
    sampler = Sampler(conditional, config(class_guidance=1.5))
    sampler.sample(context(), 5, generator=seed(), **{name: (x + 1) % 3 for name, x in given.items()})
    calls, original = [], type(conditional).modulations

    def count(model, *args, **options):
        calls.append(1)
        return original(model, *args, **options)

    monkeypatch.setattr(type(conditional), "modulations", count)
    once = sampler.sample(context(), 5, generator=seed(), **given)
    assert len(calls) == (3 if "actions" in told else 1)  # an action belongs to a frame, and 3 are made
    monkeypatch.setattr(mimo.sampling.sampler, "MODULATION_BYTES", 0)
    close(once, Sampler(conditional, config(class_guidance=1.5)).sample(context(), 5, generator=seed(), **given))
    assert len(calls) <= 3


def test_temperature_and_history_noise_change_late_frames(model, monkeypatch):
    starts = Starts(monkeypatch)
    plain = Sampler(model, config()).sample(context(), 5, generator=seed())
    cool = Sampler(model, config(temperature=(1.0, 0.5))).sample(context(), 5, generator=seed())
    for noise, scaled, factor in zip(starts.noise[:3], starts.noise[3:], (1.0, 0.75, 0.5), strict=True):
        close(scaled, factor * noise)
    close(cool[:, 2], plain[:, 2])
    assert not torch.allclose(cool[:, 3], plain[:, 3], atol=1e-2)
    videos = []
    for use_cache in (True, False):
        sampler = Sampler(model, config(history_noise=(0.0, 0.5)), use_cache=use_cache)
        videos.append(sampler.sample(context(), 5, generator=seed()))
    close(*videos)
    close(videos[0][:, :4], plain[:, :4])  # frame 2 joins the history without noise, frame 3 with
    assert not torch.allclose(videos[0][:, 4], plain[:, 4], atol=1e-2)


def test_autocast_keeps_keys_and_values_in_its_dtype(model):
    sampler = Sampler(model, config(steps=2))
    exact = sampler.sample(context(), 4, generator=seed())
    with torch.autocast("cpu", torch.bfloat16):
        video = sampler.sample(context(), 4, generator=seed())
    (run,) = sampler._idle.values()
    assert run.history.cache.dtype == torch.bfloat16 and video.dtype == torch.float32
    assert 1e-4 < (video - exact).abs().max() < 0.3


def test_weights_rounded_ahead_make_the_same_video():
    """Autocast rounds them before every product; biases, norms and whatever it leaves alone stay as they are."""
    model, given = network(num_classes=CLASSES), {"labels": torch.tensor([0, 2])}
    sampler = Sampler(model, config(class_guidance=1.5, context_frames=2))
    videos = []
    for rounds in (False, True):
        if rounds:
            round_weights(model)
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            videos.append(sampler.sample(context(), 6, generator=seed(), **given))
    assert torch.equal(*videos)


def test_guidance_branches():
    assert [(b.weight, b.history, b.condition) for b in guidance_branches(1.0, 1.0)] == [(1.0, 0, True)]
    assert [(b.weight, b.history, b.condition) for b in guidance_branches(1.5, 1.0)] == [
        (1.5, 0, True),
        (-0.5, None, True),
    ]
    assert [(b.weight, b.history, b.condition) for b in guidance_branches(1.5, 3.0)] == [
        (3.5, 0, True),
        (-0.5, None, True),
        (-2.0, 0, False),
    ]


def test_a_branch_that_is_told_less_brings_its_history():
    found = [(b.weight, b.history, b.condition) for b in guidance_branches(1.5, 3.0, own_history=True)]
    assert found == [(3.5, 0, True), (-2.0, 1, False), (-0.5, None, True)]
    assert guidance_branches(1.5, 1.0, own_history=True) == guidance_branches(1.5, 1.0)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", POLICIES)
def test_the_null_branch_is_told_no_action_in_any_frame(conditional, name, use_cache):
    """All weight on it, it makes the video of a network that is told nothing from the first frame on."""
    given, told = [context(1, 4)[0], context(1, 1)[0]], conditions(frames=8)
    options = {"policy": POLICIES[name], "use_cache": use_cache, "page_size": 3}
    videos = [
        Sampler(conditional, config(class_guidance=w), **options).sample(
            given, 8, trajectories=2, generator=seed(), **(told if w == 0 else {})
        )
        for w in (0.0, 1.0)
    ]
    for one, other in zip(*videos, strict=True):
        close(one, other)


def test_a_history_of_its_own_takes_as_many_pages_again(conditional):
    """Only where the condition changes history, and is guided by; forks share the context in each."""
    for told, w, histories in (
        (("actions",), 2.0, 2),
        (("labels", "actions"), 2.0, 2),
        (("labels",), 2.0, 1),
        (("actions",), 1.0, 1),
    ):
        given = {name: conditions()[name] for name in told}
        sampler = Sampler(conditional, config(class_guidance=w, history_guidance=1.5))
        stream = sampler.stream(context(2, 4), 6, trajectories=10, generator=seed(), **given)
        next(stream)
        cache = stream.run.history.cache
        assert cache.num_pages == histories * (2 * 4 + 20 * 2)
        assert cache.num_pages - cache.num_free_pages == histories * (2 * 4 + 20 * 1)
        stream.close()
        assert cache.num_free_pages == cache.num_pages


def test_wrong_use_is_named(model, conditional):
    sampler = Sampler(model, config())

    def refuses(match: str, *args, sampler=sampler, **options):
        with pytest.raises(ValueError, match=match):
            sampler.sample(*args, **options)

    refuses("num_frames=2: the context has 2 frames already", context(), 2)
    refuses(r"a context is \[2, 7, 5\]: expected \[frames, 8, 5\]", context()[:, :, 1:], 4)
    refuses("expected a clip and a trajectory, got 0 clips", [], 4)
    refuses("batch=3: the context has 2 clips", context(), 4, batch=3)
    refuses("3 ids for 2 sequences", context(), 4, ids=[1, 2, 3])
    refuses("trajectories=0", context(), 4, trajectories=0)
    refuses(r"labels are \[2\] for 2 clips and 0 classes", context(), 4, labels=torch.zeros(2, dtype=torch.int64))
    actions = torch.zeros(2, 3, dtype=torch.int64)
    refuses(
        r"actions are \[2, 3\]: expected \[2, 4\]",
        context(),
        4,
        actions=actions,
        sampler=Sampler(conditional, config()),
    )
    learned = Sampler(network(positions="learned"), config())
    refuses("num_frames=7: learned positions end at 6", context(), 7, sampler=learned)
    with pytest.raises(ValueError, match="sampler='ddim': a 'flow' network is sampled by 'euler'"):
        Sampler(model, config(sampler="ddim"))
    with pytest.raises(ValueError, match="graph='whole': expected 'step' or 'frame'"):
        Sampler(model, config(), graph="whole")
    with pytest.raises(ValueError, match="window=0: expected 1 or more"):
        CachePolicy(0)
    with pytest.raises(ValueError, match="sink=-1"):
        CachePolicy(2, sink=-1)
