"""MAGI's intervals: drawn by the data, told to the network, chosen when sampling. And the actions a sample is told."""

import json

import numpy as np
import pytest
import torch

from mimo import MiMo, MiMoConfig, checkpoint
from mimo.cli import main
from mimo.config import SampleConfig, TrainConfig
from mimo.data import VideoFolder, write_video
from mimo.errors import InputError
from mimo.network.frames import clean_and_noisy
from mimo.recipes import build_recipe
from mimo.recipes.base import step_generator
from mimo.runtime import to_latents
from mimo.sampling.history import CachePolicy
from mimo.sampling.loading import load
from mimo.sampling.request import read_actions, read_context
from mimo.sampling.sampler import Sampler
from mimo.training.conditions import check_conditions
from mimo.training.loop import train
from mimo.training.trainer import Trainer

HIGHEST = 5
NETWORK = {
    **{"depth": 2, "dim": 16, "heads": 2, "decoder_depth": 1, "decoder_layer": 1, "max_interval": HIGHEST},
    **{"frames": 3, "height": 2, "width": 2, "channels": 12, "compression": (1, 2, 2), "video_frames": 3},
    **{"parameterization": "flow"},
}
OPTIMISATION = {
    **{"batch_size": 4, "steps": 4, "lr": 1e-2, "warmup": 2, "precision": "fp32", "ema_decay": 0.9, "workers": 0},
    **{"log_every": 2, "save_every": 100, "preview_every": 0, "interval": (1, HIGHEST)},
}
SAMPLING = SampleConfig(sampler="euler", steps=2, context_frames=1, num_frames=3)


def network(**options) -> MiMo:
    """With weights that make everything matter: DiT's initial zeros would hide it."""
    torch.manual_seed(0)
    model = MiMo(MiMoConfig(**NETWORK | options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def context(clips: int, frames: int) -> torch.Tensor:
    return torch.randn(clips, frames, 4, 12, generator=torch.Generator().manual_seed(1))


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.fixture(scope="module")
def model() -> MiMo:
    return network()


# The network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_every_row_of_a_clip_hears_of_its_interval_and_of_no_other(positions):
    model = network(positions=positions)
    history, noisy, t = context(2, 3), context(2, 3) + 1, torch.full((2, 3), 500.0)
    keep = torch.tensor([[0, 2, 3], [0, 1, 3]])

    def run(*intervals):
        return model(clean_and_noisy(history, noisy, t, keep=keep, intervals=torch.tensor(intervals)))

    one, other = run(2, 4), run(2, 5)
    for a, b in zip([one.velocity, *one.reconstruction.values()], [other.velocity, *other.reconstruction.values()]):
        assert torch.equal(a[0], b[0])
        assert ((a[1] - b[1]).abs().amax((1, 2)) > 0).all()
    # Frame 0's velocity depends on no history, so its own rows were told; history's rows feed the reconstruction.


def test_gradients_reach_the_intervals_of_the_batch_alone(model):
    recipe = build_recipe(model.config)
    latents = context(2, 3).unflatten(2, (2, 2))
    model.zero_grad()
    loss = recipe.loss(model, latents, intervals=torch.tensor([2, 5]), generator=step_generator(0, 0, "cpu"))
    loss.total.backward()
    reached = model.intervals.weight.grad.abs().amax(1) > 0
    assert reached.tolist() == [False, True, False, False, True]
    model.zero_grad()


def test_steps_of_the_mask_loss_alone_are_told_too():
    model = network(interleaved=True, mask_ratio=(0.5, 0.5))
    given = {"intervals": torch.tensor([1, 4]), "generator": step_generator(0, 1, "cpu"), "step": 1}
    build_recipe(model.config).loss(model, context(2, 3).unflatten(2, (2, 2)), **given).total.backward()
    assert (model.intervals.weight.grad.abs().amax(1) > 0).tolist() == [True, False, False, True, False]


def test_a_network_that_is_not_told_has_no_embedding():
    assert network(max_interval=0).intervals is None
    names = {name for name, _ in network().named_parameters()} - {
        name for name, _ in network(max_interval=0).named_parameters()
    }
    assert names == {"intervals.weight"} and network().intervals.weight.shape == (HIGHEST, 16)


def test_the_network_refuses_what_does_not_fit(model):
    given = context(2, 3), context(2, 3), torch.full((2, 3), 1.0)
    with pytest.raises(ValueError, match=r"intervals: expected \[2\] of them, each in 1..5"):
        model(clean_and_noisy(*given))
    with pytest.raises(ValueError, match=r"intervals: expected \[2\] of them"):
        model(clean_and_noisy(*given, intervals=torch.tensor([1, 2, 3])))
    with pytest.raises(ValueError, match=r"expected None, as the network knows no intervals \(max_interval=0\)"):
        network(max_interval=0)(clean_and_noisy(*given, intervals=torch.tensor([1, 2])))


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [CachePolicy(), CachePolicy(2, sink=1)])
def test_cached_equals_full_mask(model, policy):
    """Ragged contexts, trajectories, history guidance, another interval for every clip."""
    clips = [context(1, 1)[0], context(1, 2)[0]]
    config = SampleConfig(sampler="euler", steps=2, history_guidance=1.5, num_frames=4)
    options = {"intervals": torch.tensor([5, 2]), "trajectories": 2}
    cached, full = (
        list(Sampler(model, config, policy=policy, use_cache=use).stream(clips, 4, generator=seed(), **options))
        for use in (True, False)
    )
    torch.testing.assert_close(torch.stack(cached), torch.stack(full), rtol=2e-5, atol=2e-5)


def test_a_cached_frame_equals_the_forward_of_training(model):
    """One step of Euler from tau = 1: the velocity of the forward pass with history, noise and interval of that
    frame."""
    sampler = Sampler(model, SampleConfig(sampler="euler", steps=1, num_frames=3))
    starts = []
    noise = sampler._noise
    sampler._noise = lambda *arguments: starts.append(noise(*arguments).clone()) or starts[-1]
    given, intervals = context(2, 2), torch.tensor([3, 4])
    video = sampler.sample(given, 3, generator=seed(), intervals=intervals)
    noisy = torch.zeros(2, 3, 4, 12)
    noisy[:, 2] = starts[0]
    history = torch.cat([given, torch.full((2, 1, 4, 12), 77.0)], 1)  # frame 2 of history is never seen
    with torch.no_grad():
        batch = clean_and_noisy(history, noisy, torch.full((2, 3), 1000.0), intervals=intervals)
        velocity = model(batch).velocity[:, 2]
    torch.testing.assert_close(video[:, 2], starts[0] - velocity, rtol=2e-5, atol=2e-5)


def test_the_interval_decides_what_is_drawn(model):
    sampler = Sampler(model, SAMPLING)

    def draw(*intervals):
        return sampler.sample(context(2, 1), 3, generator=seed(), intervals=torch.tensor(intervals))

    one, other = draw(1, 3), draw(1, 4)  # the second run reuses the buffers of the first
    assert torch.equal(one[0], other[0]) and (one[1, 1:] - other[1, 1:]).abs().max() > 1e-3
    assert torch.equal(draw(1, 3), one)
    assert sampler.sample(None, 2, generator=seed(), intervals=torch.tensor([1, 2, 3])).shape[0] == 3


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        (None, r"intervals=None: expected 2 numbers in 1\.\.5"),
        ([1, 6], r"intervals=\[1, 6\]: expected 2 numbers in 1\.\.5"),
        ([0, 1], r"intervals=\[0, 1\]: expected 2"),
        ([1], r"intervals=\[1\]: expected 2"),
    ],
)
def test_the_sampler_refuses_what_does_not_fit(model, intervals, message):
    given = None if intervals is None else torch.tensor(intervals)
    with pytest.raises(ValueError, match=message):
        Sampler(model, SAMPLING).sample(context(2, 1), 3, intervals=given)
    with pytest.raises(ValueError, match=r"intervals=\[1, 2\]: expected None, .*max_interval=0"):
        Sampler(network(max_interval=0), SAMPLING).sample(context(2, 1), 3, intervals=torch.tensor([1, 2]))


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos of 12 frames: at most 5 apart when 3 are taken."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name in "abc":
        write_video(folder / f"{name}.mp4", rng.integers(0, 255, (12, 16, 16, 3), dtype=np.uint8))
    return folder


def make_trainer(folder, **options) -> Trainer:
    config, training = MiMoConfig(**NETWORK), TrainConfig(**OPTIMISATION | options)
    frames, height, width = config.video_shape
    dataset = VideoFolder(folder, num_frames=frames, height=height, width=width, interval=training.interval)
    return Trainer(config, training, SAMPLING, dataset)


def state_of(trainer: Trainer) -> dict:
    return dict(trainer.model.state_dict()) | checkpoint.optimizer_tensors(trainer.optimizer, trainer.model)


def test_training_on_a_folder_and_its_exact_continuation(folder, tmp_path):
    straight = make_trainer(folder)
    before = straight.model.intervals.weight.detach().clone()
    train(straight)
    assert ((straight.model.intervals.weight - before).abs().amax(1) > 1e-3).all()
    first = make_trainer(folder)
    first.start_data()
    for _ in range(2):
        first.train_step()
    second = make_trainer(folder)
    second.load(first.save(tmp_path))
    train(second)
    one, other = state_of(straight), state_of(second)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_another_range_is_another_configuration(folder, tmp_path):
    saved = make_trainer(folder).save(tmp_path)
    with pytest.raises(InputError, match=r"train\.interval is \[1, 5\] there and \[1, 3\] here"):
        make_trainer(folder, interval=(1, 3)).load(saved)


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        (3, r"interval=3: expected a pair LOW HIGH, as the network is told it \(max_interval=5\)"),
        ((1, 6), r"interval=\(1, 6\): expected at most max_interval=5"),
    ],
)
def test_training_refuses_intervals_the_network_cannot_be_told(folder, interval, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(folder, interval=interval)


@pytest.mark.parametrize("interval", [0, (0, 2), (3, 2), (1, 2, 3), (1.5, 2), True, "3"])
def test_a_range_is_a_number_or_a_pair(interval):
    with pytest.raises(ValueError, match="interval="):
        TrainConfig(interval=interval)


def test_a_range_survives_json():
    config = TrainConfig(interval=(1, 25))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_clips_of_unknown_or_unfit_interval_are_refused(model):
    latents = {"latents": context(2, 3).unflatten(2, (2, 2))}
    with pytest.raises(InputError, match="max_interval=5, but the clips have no interval"):
        check_conditions(latents, model.config)
    with pytest.raises(InputError, match=r"interval 7 in the data, expected 1\.\.5"):
        check_conditions(latents | {"interval": torch.tensor([1, 7])}, model.config)
    _, conditions = to_latents(latents | {"interval": torch.tensor([1, 5])}, None, model.config, torch.device("cpu"))
    assert conditions["intervals"].tolist() == [1, 5]


# The command line -----------------------------------------------------------------------------------------------------

SMALL = (
    "--model.depth 1 --model.dim 16 --model.heads 2 --model.decoder-layer 1 --model.frames 3 --model.video-frames 3 "
    "--model.height 2 --model.width 2 --train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 "
    "--sample.steps 2 --sample.context-frames 1 --sample.num-frames 3 --steps 2"
).split()


def command(*words) -> int:
    return main([str(word) for word in words])


def run_of(folder, out, *more) -> None:
    assert command("train", "--preset", "mimo-tiny", "--data", folder, "--out", out, *SMALL, *more) == 0


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    more = ("--model.max-interval", 5, "--train.interval", 2, 5, "--train.preview-every", 2)
    run_of(folder, run, *more, "--train.lr", 0.1, "--train.ema-decay", 0, "--steps", 6)
    return run


def sample(run, out, *words) -> bytes:
    assert command("sample", "--checkpoint", run, "--out", out, *words) == 0
    return (out / "sample.gif").read_bytes()


def test_commands_train_and_sample_with_intervals(trained, folder, tmp_path):
    assert load(trained).train_config.interval == (2, 5)
    assert list((trained / "previews").glob("*.mp4"))
    default, two, five = (sample(trained, tmp_path / name, *more) for name, more in
                          (("a", ()), ("b", ("--interval", 2)), ("c", ("--interval", 5))))  # fmt: skip
    assert default == two != five
    given = ("--context", folder / "a.mp4", "--context-frames", 2)
    assert sample(trained, tmp_path / "d", *given, "--interval", 3)


def test_the_context_is_cut_at_the_interval(folder):
    whole = read_context(folder / "a.mp4", 12, 0, 1, (16, 16))
    assert torch.equal(read_context(folder / "a.mp4", 3, 1, 4, (16, 16)), whole[:, 1::4])
    with pytest.raises(InputError, match=r"3 context frames 6 frames apart, so 13 in all, are asked for, it holds 12"):
        read_context(folder / "a.mp4", 3, 0, 6, (16, 16))


def test_sampling_refuses_intervals_that_training_did_not_see(trained, folder, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert command("sample", "--checkpoint", trained, *out, "--interval", 6) == 2
    assert "--interval 6: expected 2..5, as the model was trained" in capsys.readouterr().err
    plain = tmp_path / "plain"
    run_of(folder, plain, "--train.preview-every", 0)
    assert command("sample", "--checkpoint", plain, *out, "--interval", 3) == 2
    assert "--interval 3: expected 1, as the model was trained" in capsys.readouterr().err


def test_latent_shards_carry_their_intervals(folder, tmp_path, capsys):
    shape = SMALL[SMALL.index("--model.frames") : SMALL.index("--train.batch-size")]
    words = ("--data", folder, "--out", tmp_path / "latents", *shape, "--interval", 1, 5, "--workers", 0)
    assert command("encode", "--preset", "mimo-tiny", *words) == 0
    told = ("--model.max-interval", 5, "--train.preview-every", 2)
    run_of(tmp_path / "latents", tmp_path / "run", *told, "--train.interval", 1, 5)
    words = ("--data", tmp_path / "latents", "--out", tmp_path / "other", *SMALL, *told, "--train.interval", 1, 4)
    assert command("train", "--preset", "mimo-tiny", *words) == 2
    assert "was encoded with interval [1, 5], training has [1, 4]" in capsys.readouterr().err


# Actions --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minecraft(tmp_path_factory):
    """TECO's layout, an npz beside each video; and FAR's, an annotation that says where the actions lie."""
    root, rng, entries = tmp_path_factory.mktemp("minecraft"), np.random.default_rng(0), []
    teco, far = root / "teco", root / "far"
    far.mkdir()
    for name in "ab":
        write_video(teco / f"{name}.mp4", rng.integers(0, 255, (12, 16, 16, 3), dtype=np.uint8))
        actions = rng.integers(0, 4, 12)
        np.savez(teco / f"{name}.npz", actions=actions)
        np.savez(far / f"{name}.npz", actions=3 - actions)
        entries.append({"video_path": str(teco / f"{name}.mp4"), "action_path": str(far / f"{name}.npz")})
    (far / "list.json").write_text(json.dumps(entries))
    return root


def test_videos_with_actions_beside_or_named(minecraft, tmp_path):
    more = ("--model.num-actions", 4, "--train.preview-every", 0)
    run_of(minecraft / "teco", tmp_path / "teco", *more, "--train.lr", 0.1, "--train.ema-decay", 0, "--steps", 8)
    run_of(minecraft / "far" / "list.json", tmp_path / "far", *more, "--allow-outside")
    video = ("--context", minecraft / "teco" / "a.mp4", "--frames", 6)
    beside = sample(tmp_path / "teco", tmp_path / "a", *video)
    named = sample(tmp_path / "teco", tmp_path / "b", *video, "--actions", minecraft / "teco" / "a.npz")
    other = sample(tmp_path / "teco", tmp_path / "c", *video, "--actions", minecraft / "far" / "a.npz")
    assert beside == named != other
    nothing = sample(tmp_path / "teco", tmp_path / "d", "--actions", minecraft / "teco" / "a.npz")
    assert nothing != sample(tmp_path / "teco", tmp_path / "e", "--actions", minecraft / "teco" / "b.npz")


def test_actions_are_those_of_the_frames(minecraft):
    known = np.load(minecraft / "teco" / "a.npz")["actions"]
    got = read_actions(minecraft / "teco" / "a.mp4", None, 3, 2, 4, 4)
    assert got.dtype == torch.int64 and got.tolist() == [known[2:11:4].tolist()]
    assert read_actions(None, minecraft / "teco" / "b.npz", 12, 0, 1, 4).shape == (1, 12)


def test_actions_that_do_not_fit_are_refused_by_name(minecraft, folder, tmp_path):
    def refused(*arguments):
        with pytest.raises(InputError) as error:
            read_actions(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    video = minecraft / "teco" / "a.mp4"
    assert "13 actions from frame 0 on, 1 apart, are asked for, a.npz holds 12" in refused(video, None, 13, 0, 1, 4)
    assert f"{folder / 'a.npz'} does not exist" in refused(folder / "a.mp4", None, 3, 0, 1, 4)
    assert "none.npz: no such file" in refused(video, minecraft / "teco" / "none.npz", 3, 0, 1, 4)
    assert "actions reach from" in refused(video, None, 12, 0, 1, 2)
    np.save(tmp_path / "a.npy", np.zeros(12, int))
    assert "a.npy: not a readable npz file" in refused(video, tmp_path / "a.npy", 3, 0, 1, 4)
    np.savez(tmp_path / "a.npz", video=np.zeros((12, 8, 8, 3), np.uint8))
    assert "has no array 'actions'" in refused(tmp_path / "a.npz", None, 3, 0, 1, 4)


def test_actions_for_a_model_without_them(trained, minecraft, tmp_path, capsys):
    words = ("--checkpoint", trained, "--out", tmp_path / "out", "--actions", minecraft / "teco" / "a.npz")
    assert command("sample", *words) == 2
    assert "this model has no actions" in capsys.readouterr().err
