"""Sampling on a GPU: captured graphs against eager execution and against the CPU, and no waiting inside a frame."""

import pytest
import torch

import mimo.sampling.sampler
from mimo import MiMo, MiMoConfig
from mimo.config import SampleConfig
from mimo.network.frames import frame_rows
from mimo.sampling.history import CachePolicy
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving

DEVICE = torch.device("cuda")


def network(dtype: torch.dtype = torch.float32, **options) -> MiMo:
    torch.manual_seed(0)
    base = {"depth": 3, "dim": 144, "heads": 2, "frames": 6, "height": 8, "width": 8, "channels": 8}
    base |= {"mask_weight": 0.0, "parameterization": "flow", "decoder_layer": 1, "num_classes": 3, "num_actions": 4}
    model = MiMo(MiMoConfig(**base | options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(DEVICE, dtype)


def config(**options) -> SampleConfig:
    base = {"sampler": "euler", "steps": 4, "num_frames": 6, "history_guidance": 1.5, "class_guidance": 2.0}
    return SampleConfig(**base | options)


def draw(sampler: Sampler, frames: int = 6, **options) -> torch.Tensor:
    given = torch.randn(2, 2, 64, 8, generator=torch.Generator().manual_seed(5))
    device = sampler.model.embed.weight.device
    options |= {"labels": torch.tensor([0, 2]), "actions": torch.arange(2 * frames).view(2, frames) % 4}
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    return sampler.sample(given.to(device), frames, generator=torch.Generator().manual_seed(1), **moved)


TRACKS = {"attention": "factorized", "depth": 4, "mask_ratio": (0.0, 0.0)}  # every place has a history of its own


@pytest.fixture
def eager(monkeypatch):
    """Sampler without graphs."""

    def make(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(mimo.sampling.sampler, "Replayed", lambda function, captures: function)
            sampler = Sampler(*args, **options)
            video = draw(sampler)
        return video

    return make


@pytest.mark.parametrize("graph", ["step", "frame"])
@pytest.mark.parametrize("policy", [CachePolicy(), CachePolicy(3, sink=1)], ids=["whole", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_eager(eager, policy, dtype, graph):
    model, noisy = network(dtype), config(history_noise=(0.0, 0.3))
    expected = eager(model, noisy, policy=policy)
    sampler = Sampler(model, noisy, graph=graph, policy=policy)
    assert torch.equal(draw(sampler), expected)
    assert torch.equal(draw(sampler), expected)  # the same graphs, a second run
    (run,) = sampler._idle.values()
    captured = [run.frame] if graph == "frame" else [run.step, run.record]
    assert all(replayed.graph is not None for replayed in captured)


@pytest.mark.parametrize("graph", ["step", "frame"])
def test_graph_of_tracks_equals_eager(eager, graph):
    model = network(torch.bfloat16, **TRACKS)
    expected = eager(model, config())
    sampler = Sampler(model, config(), graph=graph)
    for _ in range(2):  # captured, replayed
        torch.testing.assert_close(draw(sampler), expected, rtol=0, atol=0)


FAR_LONG = {
    **{"recipe": "far_long", "mask_ratio": (0.0, 0.0), "separate_ln": False, "clean_context": 0.1},
    **{"coarse_stride": 4, "fine_frames": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_multi_level_cache_equals_eager_and_its_recomputation(eager, dtype):
    """The steps are captured, the pass that moves the border is not; pages have 4 rows."""
    model = network(dtype, **FAR_LONG)
    expected = eager(model, config())
    sampler = Sampler(model, config())
    assert torch.equal(draw(sampler), expected)
    assert torch.equal(draw(sampler), expected)  # the same graph, a second run
    (run,) = sampler._idle.values()
    assert run.step.graph is not None and run.record.graph is None and sampler.page_size == 4
    whole = draw(Sampler(model, config(), use_cache=False))
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    assert (expected - whole).norm() < limit * whole.norm()


def test_graphs_outlive_the_rows_that_others_push_out(eager):
    model = network()
    expected = eager(model, config())
    sampler = Sampler(model, config())
    draw(sampler)
    frame_rows.cache_clear()
    torch.cuda.empty_cache()
    torch.empty(2**28, device=DEVICE).fill_(float("nan"))
    assert torch.equal(draw(sampler), expected)


def test_plain_pytorch_is_sampled_without_graphs():
    """Its attention takes lengths from the host, so it is not captured."""
    model, reference = network(), MiMo(network().config, backend="reference").eval().to(DEVICE)
    reference.load_state_dict(model.state_dict())
    sampler = Sampler(reference, config())
    video = draw(sampler)
    (run,) = sampler._idle.values()
    assert run.step.graph is None and run.record.graph is None
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.testing.assert_close(video, draw(Sampler(model, config())), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("graph", ["step", "frame"])
def test_continued_run_makes_the_same_frames(tmp_path, graph):
    model = network(torch.bfloat16)

    def sampler():
        return Sampler(model, config(class_guidance=1.0), policy=CachePolicy(3, sink=1), graph=graph)

    def seed():
        return torch.Generator().manual_seed(0)

    expected = list(sampler().stream(None, 10, batch=2, generator=seed()))
    saving = Saving(tmp_path, every=4)
    stream = sampler().stream(None, 10, batch=2, generator=seed(), saving=saving)
    for _ in range(6):
        next(stream)
    stream.close()
    continued = sampler().resume(saving)
    assert continued.progress.done == 4
    for frame, same in zip(continued, expected[4:], strict=True):
        assert torch.equal(frame, same)


def test_a_failed_capture_leaves_no_graph(monkeypatch):
    sampler = Sampler(network(), config())
    stream = sampler.stream(None, 6, generator=torch.Generator().manual_seed(0))
    original, calls = MiMo.future_frame, iter(range(99))

    def fails(*args, **options):
        if next(calls) == 1:  # while it is captured
            raise RuntimeError("out of luck")
        return original(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(MiMo, "future_frame", fails)
        next(stream)
    assert stream.run.step.graph is None
    assert draw(sampler).isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_than_the_current_one():
    video = draw(Sampler(network(), config()))
    torch.testing.assert_close(draw(Sampler(network().to("cuda:1"), config())).to(DEVICE), video, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, TRACKS], ids=["joint", "factorized"])
def test_equals_the_cpu_and_the_full_mask(options):
    model = network(**options)
    cpu = network(**options).cpu()
    torch.backends.cuda.matmul.allow_tf32 = False
    video = draw(Sampler(model, config()))
    torch.testing.assert_close(video.cpu(), draw(Sampler(cpu, config())), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(video, draw(Sampler(model, config(), use_cache=False)), rtol=1e-3, atol=1e-3)


def test_trajectories_equal_repeated_contexts():
    model = network()
    forked = draw(Sampler(model, config(class_guidance=1.0)), trajectories=3)
    given = torch.randn(2, 2, 64, 8, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    repeated = Sampler(model, config(class_guidance=1.0)).sample(
        given.repeat_interleave(3, 0),
        6,
        labels=torch.tensor([0, 2], device=DEVICE).repeat_interleave(3),
        actions=(torch.arange(12, device=DEVICE).view(2, 6) % 4).repeat_interleave(3, 0),
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(forked, repeated, rtol=1e-4, atol=1e-4)


def test_autocast_graphs_outlive_the_context():
    sampler = Sampler(network(), config())
    videos = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            videos.append(draw(sampler))
        torch.cuda.empty_cache()
        torch.empty(2**28, device=DEVICE).fill_(float("nan"))  # what was freed is gone
    assert torch.equal(*videos)


@pytest.mark.parametrize("graph", ["step", "frame"])
def test_nothing_waits_for_the_device_inside_a_frame(graph):
    policy = CachePolicy(4, sink=1)
    sampler = Sampler(network(torch.bfloat16), config(class_guidance=1.0), policy=policy, graph=graph)
    stream = sampler.stream(None, 12, batch=2, generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # captures both graphs
        next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        frames = [next(stream) for _ in range(8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(frames).isfinite().all()
    assert all(latency() > 0 for latency in sampler.latencies)


def test_long_video_in_constant_memory():
    model = network(torch.bfloat16, depth=1)
    sampler = Sampler(model, config(steps=2), policy=CachePolicy(4, sink=2))
    stream = sampler.stream(None, 300, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        next(stream)
    before = torch.cuda.memory_allocated()
    for frame in stream:
        assert frame.shape == (1, 64, 8)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_made_token_by_token_are_those_of_the_cpu(dtype):
    """VideoMAR's network: masked frames, cross-attention, the token head under guidance; in bf16 near enough."""
    head = {"recipe": "videomar", "parameterization": "epsilon", "token_depth": 1, "token_width": 32}
    head |= {"mask_ratio": (0.7, 1.0), "num_actions": 0, "cross_attention": True}
    sampling = SampleConfig(sampler="ddpm", steps=3, mask_steps=3, num_frames=4, class_guidance=2.0)
    context, made = torch.randn(2, 1, 64, 8, generator=torch.Generator().manual_seed(5)), []
    for device in ("cpu", "cuda"):
        model = network(**head).to(device, torch.float32 if device == "cpu" else dtype)
        labels, generator = torch.tensor([0, 2], device=device), torch.Generator().manual_seed(1)
        video = Sampler(model, sampling).sample(context.to(device), 4, labels=labels, generator=generator)
        made.append(video.float().cpu())
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    torch.testing.assert_close(made[1], made[0], **close)
