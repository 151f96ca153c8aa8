"""REPA: the loss against loops, what its gradient reaches, encoders, features in shards, runs and refusals."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mimo import MiMo, MiMoConfig
from mimo.cli import main
from mimo.config import Encoding, SampleConfig, TrainConfig
from mimo.data import DataError, LatentShards, ShapesDataset, to_float, write_video
from mimo.data.encode import verify, write_shards
from mimo.encoders import HOG, build_encoder
from mimo.errors import InputError
from mimo.recipes import build_recipe
from mimo.recipes.base import Draws, step_generator
from mimo.recipes.repa import Alignment, interpolation, resized
from mimo.runtime import config_encoder
from mimo.sampling.loading import load
from mimo.tokenizers import build_tokenizer
from mimo.tokenizers.weights import checksum
from mimo.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPS, FRAMES, HEIGHT, WIDTH, CHANNELS, E = 2, 3, 2, 3, 5, 7
SHAPE = {"depth": 3, "dim": 32, "heads": 2, "frames": FRAMES, "height": HEIGHT, "width": WIDTH, "channels": CHANNELS}
SMALL = SHAPE | {"decoder_depth": 1, "decoder_layer": 3, "parameterization": "flow"}
REPA = {"repa_weight": 0.5, "repa_layer": 2, "repa_encoder": "hog", "repa_channels": E, "repa_hidden": 8}
UNMASKED = {"mask_weight": 0.0, "mask_ratio": (0.0, 0.0)}
GRID = (4, 3, 2)  # of the features: longer, higher and narrower than the latents


def config(**changes) -> MiMoConfig:
    return MiMoConfig(**SMALL | REPA | changes)


def network(**changes) -> MiMo:
    """A small network in which nothing is zero, so that every path carries a signal."""
    torch.manual_seed(0)
    model = MiMo(config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def clips(count: int = CLIPS) -> torch.Tensor:
    return torch.randn(count, FRAMES, HEIGHT, WIDTH, CHANNELS, generator=torch.Generator().manual_seed(0))


def features(count: int = CLIPS, channels: int = E) -> torch.Tensor:
    return torch.randn(count, *GRID, channels, generator=torch.Generator().manual_seed(1))


def loss_of(model: MiMo, x: torch.Tensor, step: int = 0, **options):
    recipe = build_recipe(model.config, unmasked_from=options.pop("unmasked_from", None))
    return recipe.loss(model, x, generator=step_generator(0, step, "cpu"), step=step, **options)


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("target", [1, 2, 5, 8, 14])
def test_interpolation_is_torchs(source, target):
    x = torch.randn(1, 1, source, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, target, mode="linear", align_corners=False)[0, 0]
    torch.testing.assert_close(interpolation(source, target, torch.device("cpu")) @ x[0, 0], expected)


def test_axes_are_interpolated_one_after_the_other():
    x = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x.movedim(-1, 1), (8, 3, 7), mode="trilinear", align_corners=False).movedim(1, -1)
    torch.testing.assert_close(resized(x, (8, 3, 7)), expected)


@pytest.mark.parametrize("kinds", ["history", "future", "both"])
@pytest.mark.parametrize(
    "changes",
    [{}, UNMASKED | {"recipe": "acdit"}, {"mask_region": "all", "separate_ln": False}],
    ids=["mimo", "acdit", "adaln"],
)
def test_the_loss_against_loops(kinds, changes):
    """Place by place: the interpolation of what is there, and its cosine with the encoder's features."""
    model, x, y = network(repa_frames=kinds, **changes), clips(), features()
    parts = loss_of(model, x, features=y)
    recipe = build_recipe(model.config)
    given = {"labels": None, "actions": None, "intervals": None}
    prepared = recipe.frames(x.flatten(2, 3), given, Draws(step_generator(0, 0, "cpu"), CLIPS), 0)
    masked = prepared.keep is not None
    assert masked == ("recipe" not in changes)
    wanted = [kind for kind, name in (("clean", "history"), ("noisy", "future")) if kinds in (name, "both")]
    hidden = model(prepared.batch, taps=[(2, kind) for kind in wanted]).features
    per_kind = []
    for kind in wanted:
        rows = model.projection(hidden[2, kind]).view(CLIPS, FRAMES, -1, E)
        per_clip = []
        for clip in range(CLIPS):
            kept = prepared.keep[clip].tolist() if masked and kind == "clean" else list(range(HEIGHT * WIDTH))
            z, there = torch.zeros(E, FRAMES, HEIGHT, WIDTH), torch.zeros(1, FRAMES, HEIGHT, WIDTH)
            for number, token in enumerate(kept):
                z[:, :, token // WIDTH, token % WIDTH] = rows[clip, :, number].T
                there[:, :, token // WIDTH, token % WIDTH] = 1
            z, there = (F.interpolate(v[None], GRID, mode="trilinear", align_corners=False)[0] for v in (z, there))
            total, weights = 0.0, 0.0
            for t in range(GRID[0]):
                for i in range(GRID[1]):
                    for j in range(GRID[2]):
                        a, b, w = z[:, t, i, j], y[clip, t, i, j], there[0, t, i, j].item()
                        cosine = (a @ b / (a.norm() * b.norm()).clamp(min=1e-8)).item()
                        total, weights = total + w * (1 - cosine), weights + w
            per_clip.append(total / weights)
        per_kind.append(sum(per_clip) / CLIPS)
    expected = sum(per_kind) / len(per_kind)
    assert parts.alignment.item() == pytest.approx(expected, rel=1e-4) and 0.1 < expected < 2
    plain = build_recipe(model.config).loss_of(model(prepared.batch, reconstruct=prepared.reconstruct), prepared)
    assert parts.total.item() == pytest.approx(plain.total.item() + 0.5 * expected, rel=1e-5)
    assert torch.equal(parts.diffusion, plain.diffusion) and torch.equal(parts.mask, plain.mask)


def test_features_that_agree_cost_nothing_and_those_that_oppose_cost_two():
    alignment, shape = Alignment(config(repa_frames="future")), (CLIPS, *GRID)
    y = features()
    hidden = {(2, "noisy"): y.flatten(0, 3)}
    for scale, expected in ((3.0, 0.0), (-1.0, 2.0)):
        found = alignment.loss(lambda rows, scale=scale: scale * rows, hidden, None, y, shape)
        assert found.item() == pytest.approx(expected, abs=1e-5)


def test_a_clip_of_which_nothing_is_seen_has_no_loss():
    """One kept token of a wide frame can lie between the places of a coarse grid."""
    alignment, shape = Alignment(config(repa_frames="history")), (1, 2, 1, 9)
    rows = torch.randn(2, E, requires_grad=True)
    y = torch.randn(1, 2, 1, 3, E)
    found = alignment.loss(lambda rows: rows, {(2, "clean"): rows}, torch.tensor([[0]]), y, shape)
    found.backward()
    assert found.item() == 0 and not rows.grad.any()


@pytest.mark.parametrize("keep", [None, [[0, 2, 3, 5], [1, 2, 4, 5]]], ids=["whole", "masked"])
def test_the_gradient_is_that_of_finite_differences(keep):
    alignment, shape = Alignment(config(repa_channels=3)), (CLIPS, FRAMES, HEIGHT, WIDTH)
    generator = torch.Generator().manual_seed(0)
    kept = HEIGHT * WIDTH if keep is None else len(keep[0])
    sizes = (CLIPS * FRAMES * kept, 3), (CLIPS * FRAMES * HEIGHT * WIDTH, 3)
    rows = [torch.randn(*size, dtype=torch.float64, generator=generator, requires_grad=True) for size in sizes]
    y, index = features(channels=3).double(), None if keep is None else torch.tensor(keep)

    def loss(clean, noisy):
        return alignment.loss(lambda rows: rows, {(2, "clean"): clean, (2, "noisy"): noisy}, index, y, shape)

    assert torch.autograd.gradcheck(loss, rows)


def test_one_clip_is_aligned():
    """With features drawn at random on the latent's own grid, by history, which every step sees alike."""
    torch.manual_seed(0)
    c = config(**UNMASKED, recipe="acdit", repa_frames="history", repa_hidden=32)
    model, x, y = MiMo(c), clips(1), torch.randn(1, FRAMES, HEIGHT, WIDTH, E)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    curve = []
    for step in range(60):
        parts = loss_of(model, x, step=step, features=y)
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()
        curve.append(parts.alignment.item())
    assert curve[-1] < 0.1 * curve[0]


@pytest.mark.parametrize("kinds", ["history", "future", "both"])
def test_the_gradient_reaches_the_tapped_layers_and_nothing_behind_them(kinds):
    model = network(repa_frames=kinds)
    recipe, y = build_recipe(model.config), features()
    given = {"labels": None, "actions": None, "intervals": None}
    prepared = recipe.frames(clips().flatten(2, 3), given, Draws(step_generator(0, 0, "cpu"), CLIPS), 0)
    output = model(prepared.batch, taps=recipe.alignment.taps(prepared.batch.frames))
    shape = (CLIPS, FRAMES, HEIGHT, WIDTH)
    recipe.alignment.loss(model.projection, output.features, prepared.keep, y, shape).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for name, _ in model.named_parameters():
        first = name.split(".")[0]
        if first in ("head", "norm", "decoder") or name.startswith("blocks.2"):
            assert name not in reached
        elif "modulation" in name or first == "time":  # what tells noisy rows their timestep
            assert (name in reached) == (kinds != "history"), name
        elif name.startswith("blocks.1.norm2"):  # of clean rows, behind the last keys that noisy ones read
            assert (name in reached) == (kinds != "future"), name
        else:
            assert name in reached, name


def test_alignment_of_history_depends_on_kept_history_up_to_its_frame_alone():
    """Projected rows of clean frames see neither masked tokens, nor later frames, nor noise."""
    model = network(repa_frames="history")
    recipe = build_recipe(model.config)
    x = clips().flatten(2, 3)
    given = {"labels": None, "actions": None, "intervals": None}
    prepared = recipe.frames(x, given, Draws(step_generator(0, 0, "cpu"), CLIPS), 0)
    batch = prepared.batch
    batch.latents = batch.latents.clone().requires_grad_()
    rows = model.projection(model(batch, taps=[(2, "clean")]).features[2, "clean"]).view(CLIPS, FRAMES, -1, E)
    for clip in range(CLIPS):
        for t in range(FRAMES):
            (gradient,) = torch.autograd.grad(rows[clip, t].square().sum(), batch.latents, retain_graph=True)
            touched = (gradient.view(CLIPS, 2, FRAMES, HEIGHT * WIDTH, CHANNELS) != 0).any(-1)
            expected = torch.zeros_like(touched)
            expected[clip, 0, : t + 1, prepared.keep[clip]] = True
            assert torch.equal(touched, expected)


def test_reading_hidden_states_changes_no_prediction():
    model, x = network(), clips()
    recipe = build_recipe(model.config)
    given = {"labels": None, "actions": None, "intervals": None}
    batch = recipe.frames(x.flatten(2, 3), given, Draws(step_generator(0, 0, "cpu"), CLIPS), 0).batch
    plain, tapped = model(batch), model(batch, taps=recipe.alignment.taps(batch.frames))
    assert torch.equal(plain.velocity, tapped.velocity)
    assert all(torch.equal(plain.reconstruction[o], tapped.reconstruction[o]) for o in plain.reconstruction)


@pytest.mark.parametrize("kinds", ["history", "future", "both"])
def test_steps_that_have_no_future_frames_align_what_they_have(kinds):
    """Interleaved: odd steps optimise L_mask alone, on clean frames alone; and behind the last block they are read."""
    model = network(repa_frames=kinds, interleaved=True, repa_layer=3)
    parts = loss_of(model, clips(), step=1, features=features())
    assert (parts.alignment is None) == (kinds == "future")
    assert loss_of(model, clips(), step=0, features=features()).alignment > 0
    unmasked = loss_of(network(repa_frames=kinds), clips(), step=3, unmasked_from=2, features=features())
    assert unmasked.alignment > 0 and unmasked.mask == 0


@pytest.mark.parametrize("recipe", ["dfot", "far", "video_dit"])
def test_systems_of_one_copy_align_their_frames(recipe):
    one_copy = UNMASKED | {"recipe": recipe, "separate_ln": False, "repa_frames": "future"}
    parts = loss_of(network(**one_copy), clips(), features=features())
    assert 0 < parts.alignment < 2
    assert parts.total.item() == pytest.approx(parts.diffusion.item() + 0.5 * parts.alignment.item())


def test_parts_of_a_batch_have_the_loss_of_the_whole():
    model, x, y = network(), clips(4), features(4)
    whole = loss_of(model, x, features=y)
    halves = [loss_of(model, x[i : i + 2], features=y[i : i + 2], first=i, total=4) for i in (0, 2)]
    assert whole.alignment.item() == pytest.approx(sum(half.alignment.item() for half in halves) / 2, rel=1e-5)


def test_what_cannot_be_aligned_is_refused():
    with pytest.raises(ValueError, match="repa_layer=4: expected 1..depth=3 when repa_weight > 0"):
        config(repa_layer=4)
    with pytest.raises(ValueError, match="repa_encoder='dino': expected one of 'videomae', 'hog'"):
        config(repa_encoder="dino")
    one_copy = config(**UNMASKED, recipe="far", separate_ln=False)
    with pytest.raises(ValueError, match="repa_frames='both': expected 'future' with recipe='far'"):
        build_recipe(one_copy)
    for preset in ("far-long-tiny", "magi-tiny", "videomar-tiny"):  # they have no whole clip on the latent's grid
        with pytest.raises(ValueError, match="repa_weight=0.5: expected 0.0 with recipe="):
            build_recipe(dataclasses.replace(MiMoConfig.from_preset(preset), repa_weight=0.5, repa_layer=1))
    model = network()
    with pytest.raises(ValueError, match=r"features=None: expected \[2, .*, 7\] with repa_weight=0.5"):
        loss_of(model, clips())
    for wrong in (features(3), features(channels=6), features()[0]):
        with pytest.raises(ValueError, match=r"features are \[.*\]: expected \[2, \"T'\", .*, 7\]"):
            loss_of(model, clips(), features=wrong)


# Encoders -------------------------------------------------------------------------------------------------------------


def test_histograms_of_known_gradients():
    """A ramp along an axis has one direction; between the middles of two bins it is shared; a flat frame has none."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    slope = 0.02
    tilted = columns * math.cos(math.radians(20)) + rows * math.sin(math.radians(20))  # the border of bins 0 and 1
    frames = torch.stack([columns, rows, tilted, 0 * rows]) * slope
    video = torch.zeros(1, 4, 3, 16, 16)
    video[0, :, 1] = frames  # green
    found = HOG().encode(video)
    assert found.shape == (1, 4, 2, 2, 28) and HOG().grid(4, 16, 16) == (4, 2, 2)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(1, 4, 2, 2))
    inner = 7 / 8  # of a cell's columns have the whole slope, the one on the border half of it
    for frame, expected in ((0, {9: 0.5, 17: 0.5}), (1, {13: 1.0}), (2, {9: 0.5, 10: 0.5}), (3, {})):
        cell = torch.zeros(28)
        cell[27] = 0.1
        for channel, share in expected.items():
            cell[channel] = share * slope * (inner + 1 / 16)
        if frame == 2:
            assert set(found[0, 2, 0, 0].topk(3).indices.tolist()) == {9, 10, 27}
            continue
        torch.testing.assert_close(found[0, frame, 0, 0], cell / cell.norm(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="hog: a clip of 1 x 12 x 16: expected sides that 8 divides"):
        HOG().grid(1, 12, 16)


@pytest.fixture(scope="module")
def videomae(tmp_path_factory):
    """A folder in the layout of the released weights: VideoMAE as it was pre-trained, with its decoder."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
    decoder["decoder_intermediate_size"] = 8
    torch.manual_seed(0)
    found = transformers.VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, **size, **decoder)
    folder = tmp_path_factory.mktemp("videomae")
    transformers.VideoMAEForPreTraining(found).save_pretrained(folder)
    return folder


def test_videomae_is_transformers(videomae):
    from transformers import VideoMAEModel

    encoder = build_encoder("videomae", channels=16, weights=videomae)
    video = torch.rand(2, 7, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = encoder.encode(video)
    assert found.shape == (2, 2, 2, 2, 16) == (2, *encoder.grid(7, 48, 64), 16) and not found.requires_grad
    model = VideoMAEModel.from_pretrained(videomae).eval()
    picked = video[:, [0, 2, 4, 6]].flatten(0, 1)
    small = F.interpolate(picked, (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model((small / 2 + 0.5 - mean).div(std).unflatten(0, (2, 4))).last_hidden_state
    torch.testing.assert_close(found.flatten(1, 3), expected, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert checksum(encoder) == checksum(build_encoder("videomae", weights=videomae))


def test_refused_encoders(videomae, tmp_path):
    for words, arguments in (
        ("unknown encoder 'dino': known encoders are videomae, hog", {"name": "dino"}),
        ("the encoder 'hog' has no weights, but x was given", {"name": "hog", "weights": "x"}),
        (r"the encoder 'videomae' needs weights \(--encoder-weights\)", {"name": "videomae"}),
        ("repa_channels=16: expected 28, the channels of the encoder 'hog'", {"name": "hog", "channels": 16}),
        (r"none: no such folder with a config\.json", {"name": "videomae", "weights": tmp_path / "none"}),
        ("repa_channels=8: expected 16, .*videomae", {"name": "videomae", "weights": videomae, "channels": 8}),
    ):
        with pytest.raises(InputError, match=words):
            build_encoder(**arguments)
    folder = shutil.copytree(videomae, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged") as error:
        build_encoder("videomae", weights=folder)
    assert "\n" not in str(error.value)
    save_file({"other": torch.zeros(1)}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"not weights of VideoMAE: \d+ missing, first 'embeddings"):
        build_encoder("videomae", weights=folder)
    weights.unlink()
    with pytest.raises(InputError, match="damaged") as error:
        build_encoder("videomae", weights=folder)
    assert "\n" not in str(error.value)


def test_without_transformers_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="needs the package transformers: pip install transformers"):
        build_encoder("videomae", weights=tmp_path)


# Features in shards, runs ---------------------------------------------------------------------------------------------

PIXELS = {"num_frames": 3, "height": 16, "width": 16}
NETWORK = {"depth": 2, "dim": 16, "heads": 2, "frames": 3, "height": 2, "width": 2, "channels": 12, "video_frames": 3}
NETWORK |= {"compression": (1, 8, 8), "decoder_depth": 1, "decoder_layer": 1, "parameterization": "flow"}
NETWORK |= {"repa_weight": 0.5, "repa_layer": 1, "repa_encoder": "hog", "repa_channels": 28, "repa_hidden": 8}
TRAINING = {"batch_size": 4, "steps": 2, "lr": 1e-2, "warmup": 0, "precision": "fp32", "workers": 0, "log_every": 1}


def shards(out, dataset=None, encoder=None, **options):
    tokenizer = build_tokenizer("dct", compression=(1, 8, 8), channels=12)
    config = Encoding(shard_clips=3, batch_size=2, workers=0, **options)
    named = {"encoder": encoder, "encoder_name": "hog" if encoder else None}
    return write_shards(
        dataset or ShapesDataset(**PIXELS, length=5), tokenizer, out, config, tokenizer_name="dct", **named
    )


def trainer(dataset, encoder_weights=None, **changes) -> Trainer:
    sampling = SampleConfig(sampler="euler", steps=2, context_frames=1, num_frames=3)
    training = TrainConfig(**TRAINING, preview_every=0)
    return Trainer(MiMoConfig(**NETWORK | changes), training, sampling, dataset, encoder_weights=encoder_weights)


def test_shards_hold_the_features_of_their_clips(tmp_path):
    dataset, encoder = ShapesDataset(**PIXELS, length=5), HOG()
    out = shards(tmp_path / "out", dataset, encoder)
    found = LatentShards(out)
    assert set(found.sample(0, 0)) == {"latents"}, "who asks for none reads none"
    assert found.read_features("hog", 28) == checksum(encoder) == found.index.encoder_sha256
    seed = int(np.random.SeedSequence((0, 0)).generate_state(1, np.uint64)[0])
    for index in range(5):
        video = to_float(torch.from_numpy(dataset.sample(index, seed)["video"])[None])
        stored = torch.from_numpy(found.sample(index, 0)["features"])
        torch.testing.assert_close(stored, encoder.encode(video)[0], atol=1e-3, rtol=1e-3)
    tokenizer = build_tokenizer("dct", compression=(1, 8, 8), channels=12)
    assert verify(out, dataset, tokenizer, encoder) == 5
    encoder.encode = lambda video: HOG().encode(-video.flip(-1))
    with pytest.raises(DataError, match="features of clip . differ from clip . encoded anew"):
        verify(out, dataset, tokenizer, encoder)
    with pytest.raises(DataError, match="was begun with encoder 'hog', not None: take another --out"):
        shards(out, dataset)
    for wanted, words in (
        (("videomae", 28), "'hog' with 28 .* expected .*'videomae'"),
        (("hog", 9), "with 9 channels"),
    ):
        with pytest.raises(DataError, match=words):
            LatentShards(out).read_features(*wanted)
    with pytest.raises(DataError, match="holds no features of an encoder: expected latents that mimo encode wrote"):
        LatentShards(shards(tmp_path / "plain", dataset)).read_features("hog", 28)


def test_features_that_are_not_finite_stop_the_encoding(tmp_path):
    encoder = HOG()
    encoder.encode = lambda video: HOG().encode(video) / 0
    with pytest.raises(DataError, match="clip 0, pass 0: its features are not finite in fp16"):
        shards(tmp_path / "out", encoder=encoder)


def test_training_from_shards_is_training_from_videos(tmp_path):
    dataset = ShapesDataset(**PIXELS, length=5)
    stored = LatentShards(shards(tmp_path / "out", dataset, HOG(), dtype="fp32"))

    class Cut(ShapesDataset):  # as the shards' clips were drawn
        def sample(self, index, seed):
            return super().sample(index, int(np.random.SeedSequence((0, 0)).generate_state(1, np.uint64)[0]))

    one, other = trainer(stored), trainer(Cut(**PIXELS, length=5))
    assert one.encoder is None and other.encoder is not None
    assert one.configs["encoder"] == other.configs["encoder"] == {"weights": None, "sha256": checksum(HOG())}
    for made in (one, other):
        made.start_data()
        made.train_step()
    means = [made.sums.take()[0] for made in (one, other)]
    assert means[0] == pytest.approx(means[1], rel=1e-5) and means[0]["alignment"] > 0


def test_the_encoder_is_no_part_of_what_learns(videomae, tmp_path):
    made = trainer(ShapesDataset(**PIXELS, length=5), videomae, repa_encoder="videomae", repa_channels=16)
    before = {name: tensor.clone() for name, tensor in made.encoder.state_dict().items()}
    made.start_data()
    made.train_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in made.encoder.parameters())
    learnt = {parameter for group in made.optimizer.param_groups for parameter in group["params"]}
    assert learnt == set(made.model.parameters()) and learnt.isdisjoint(made.encoder.parameters())
    assert {name for name in made.ema.tensors if name.startswith("projection")} and not any(
        "encoder" in name for name in made.ema.tensors
    )
    folder = made.save(tmp_path)
    assert json.loads((folder / "state.json").read_text())["configs"]["encoder"]["weights"] == str(videomae.resolve())
    assert load(folder, device=torch.device("cpu")).model.projection is None, "sampling needs neither"


def test_a_run_keeps_its_encoder(tmp_path):
    folder = trainer(ShapesDataset(**PIXELS, length=5)).save(tmp_path)
    other = trainer(ShapesDataset(**PIXELS, length=5))
    other.configs["encoder"]["sha256"] = "0" * 64
    with pytest.raises(InputError, match="encoder is '.*' there and '0{64}' here"):
        other.load(folder)
    trainer(ShapesDataset(**PIXELS, length=5)).load(folder)


# The command line -----------------------------------------------------------------------------------------------------

WORDS = "--model.depth 1 --model.dim 16 --model.heads 2 --model.frames 3 --model.video-frames 3 --model.repa-layer 1"
WORDS += " --model.decoder-layer 1"
WORDS += " --model.height 2 --model.width 2 --model.repa-hidden 8"
RUN = "--steps 2 --train.batch-size 2 --train.workers 0 --train.preview-every 0 --train.log-every 1"
RUN += " --sample.context-frames 1 --sample.num-frames 3 --sample.steps 2 --device cpu"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        rng = np.random.default_rng(number)
        write_video(folder / f"{number}.mp4", rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    return folder


def command(*words) -> list[str]:
    return [str(word) for word in words]


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert main(command(*words)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def test_commands(tmp_path, videos, capsys):
    preset = ["--preset", "repa-tiny", *WORDS.split()]
    out = tmp_path / "latents"
    assert main(command("encode", *preset, "--data", videos, "--out", out, "--workers", 0, "--device", "cpu")) == 0
    assert main(["data", "check", str(out)]) == 0
    assert "with features 3 x 2 x 2 x 28 (hog), 2 readable" in capsys.readouterr().out
    train = ["train", *preset, *RUN.split(), "--data", out, "--out", tmp_path / "run"]
    assert main(command(*train)) == 0
    said = capsys.readouterr().out
    assert "alignment 0." in said or "alignment 1." in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(0 < row["alignment"] < 2 for row in rows)
    assert main(command("train", "--out", tmp_path / "run", "--resume", "--steps", 3)) == 0
    assert (
        main(command("sample", "--checkpoint", tmp_path / "run", "--context", videos / "0.mp4", "--out", tmp_path)) == 0
    )


def test_refused_commands(tmp_path, videos, capsys):
    preset = ["--preset", "repa-tiny", *WORDS.split()]
    train = ["train", *preset, *RUN.split(), "--out", tmp_path / "run", "--data"]
    plain = shards(tmp_path / "plain", ShapesDataset(**PIXELS, length=2))
    narrow = ["--model.channels", 12]
    assert "holds no features of an encoder" in refused(capsys, *train, plain, *narrow)
    mae = ["--model.repa-encoder", "videomae"]
    assert "needs weights (--encoder-weights)" in refused(capsys, *train, videos, *mae)
    assert "none: no such folder" in refused(capsys, *train, videos, *mae, "--encoder-weights", tmp_path / "none")
    assert "the encoder 'hog' has no weights" in refused(capsys, *train, videos, "--encoder-weights", tmp_path)
    assert "repa_channels=3: expected 28" in refused(capsys, *train, videos, "--model.repa-channels", 3)
    assert "--model.repa-frames" in refused(capsys, *train, videos, "--model.repa-frames", "past")
    assert "repa_layer=2: expected 1..depth=1" in refused(capsys, *train, videos, "--model.repa-layer", 2)
    small = ["--model.compression", 1, 2, 2, "--model.channels", 12]
    assert "hog: a clip of 3 x 4 x 4: expected sides that 8 divides" in refused(capsys, *train, videos, *small)
    unaligned = ["--model.repa-weight", 0, "--encoder-weights", tmp_path]
    assert "expected none, as nothing is aligned (repa_weight=0)" in refused(capsys, *train, videos, *unaligned)
    encode = ["encode", *preset, "--data", videos, "--out", tmp_path / "latents"]
    assert "needs weights (--encoder-weights)" in refused(capsys, *encode, *mae)
    assert not (tmp_path / "run").exists() and not (tmp_path / "latents").exists()


def test_a_config_of_before_repa_is_one_without():
    values = {name: value for name, value in MiMoConfig().to_dict().items() if not name.startswith("repa")}
    assert MiMoConfig.from_dict(values) == MiMoConfig() and MiMoConfig().repa_weight == 0
    assert MiMo(MiMoConfig(**SMALL)).projection is None and config_encoder(MiMoConfig()) is None
