"""mimo.tokenizers: shapes, inversion, scale and independence of chunks."""

import pytest
import torch

from mimo import demo
from mimo.data import ShapesDataset, open_dataset, to_float
from mimo.errors import InputError
from mimo.tokenizers import DCTTokenizer, LappedTokenizer, build_tokenizer
from mimo.tokenizers.dct import dct_matrix
from mimo.tokenizers.weights import checksum

SHAPES = [((1, 8, 8), None), ((1, 4, 4), 48), ((1, 1, 1), 3), ((1, 4, 8), None), ((4, 8, 8), None), ((3, 2, 6), None)]


def video(frames=13, height=48, width=72, batch=2):
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_dct_matrix_is_the_orthonormal_dct():
    for n in (1, 2, 3, 8, 16):
        matrix = dct_matrix(n)
        assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(matrix[0], torch.full((n,), n**-0.5, dtype=torch.float64))
    i = torch.arange(8, dtype=torch.float64)
    expected = 0.5 * torch.cos(torch.pi * 3 * (2 * i + 1) / 16)
    assert torch.allclose(dct_matrix(8)[3], expected)


@pytest.mark.parametrize(("compression", "channels"), SHAPES)
def test_dct_inverts_exactly(compression, channels):
    tokenizer, x = build_tokenizer("dct", compression=compression, channels=channels), video()
    latents = tokenizer.encode(x)
    assert latents.shape[1:] == tokenizer.latent_shape(13, 48, 72) and latents.dtype == torch.float32
    assert tokenizer.num_frames(latents.shape[1]) == 13
    back = tokenizer.decode(latents)
    assert back.shape == x.shape and (back - x).abs().max() < 4e-6


def test_dct_is_exact_under_autocast():
    tokenizer, x = DCTTokenizer((1, 8, 8)), video()
    with torch.autocast("cpu", torch.bfloat16):
        assert (tokenizer.decode(tokenizer.encode(x)) - x).abs().max() < 4e-6


def test_dct_keeps_distances():
    tokenizer, x = DCTTokenizer((1, 8, 8)), video()
    y = x + 0.1 * torch.randn_like(x)
    pixels, latents = (x - y).square().mean(), (tokenizer.encode(x) - tokenizer.encode(y)).square().mean()
    assert latents == pytest.approx(pixels.item() * tokenizer.scale**2, rel=1e-5)


def test_dct_first_channel_is_the_mean_of_the_patch():
    tokenizer, x = DCTTokenizer((1, 8, 8)), video()
    means = x.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).mean((2, 4, 6))
    assert torch.allclose(tokenizer.encode(x)[..., 0], means * 192**0.5 * tokenizer.scale, atol=1e-5)


@pytest.mark.parametrize(("compression", "channels"), [((1, 8, 8), 48), ((4, 8, 8), 16), ((1, 32, 32), 32)])
def test_dct_with_fewer_channels_keeps_the_best_of_a_smooth_clip(compression, channels):
    t = torch.linspace(0, 1, 5).view(5, 1, 1, 1)
    y, x = torch.linspace(0, 3, 64).view(1, 1, 64, 1), torch.linspace(0, 2, 64).view(1, 1, 1, 64)
    clip = torch.sin(x + 0.5 * y + 0.3 * t).expand(5, 3, 64, 64)[None].contiguous()
    tokenizer = build_tokenizer("dct", compression=compression, channels=channels)
    latents = tokenizer.encode(clip)
    assert latents.shape[-1] == channels
    error = (tokenizer.decode(latents) - clip).square().mean()
    assert error < 0.01 * clip.var()
    # What is kept is kept unchanged: encoding again changes nothing.
    assert torch.allclose(tokenizer.encode(tokenizer.decode(latents)), latents, atol=1e-5)


def test_temporal_dct_treats_chunks_alone():
    """17 frames give 5 latents; frame 0 is latent 0, frames 1-4 are latent 1, and so on."""
    tokenizer, x = DCTTokenizer((4, 8, 8)), video(17)
    latents = tokenizer.encode(x)
    assert latents.shape[1] == 5
    for frame in range(17):
        y = x.clone()
        y[:, frame] += 0.1
        changed = (tokenizer.encode(y) - latents).abs().amax((0, 2, 3, 4)) > 1e-6
        assert changed.nonzero().flatten().tolist() == [(frame + 3) // 4]


@pytest.mark.parametrize("compression", [(1, 8, 8), (1, 4, 6), (1, 5, 1), (4, 8, 8)])
def test_lapped_inverts_exactly_and_keeps_distances(compression):
    tokenizer, x = build_tokenizer("lapped", compression=compression), video(5, 40, 24)
    latents = tokenizer.encode(x)
    torch.testing.assert_close(tokenizer.decode(latents), x, rtol=0, atol=2e-6)
    if compression[0] == 1:
        assert latents.square().sum().item() == pytest.approx((x * tokenizer.scale).square().sum().item(), rel=1e-5)


def test_lapped_patches_overlap_by_half_and_show_no_edges():
    """Where the DCT of patches ends with an edge, this has faded; a picture of one colour still needs one channel."""
    tokenizer, latents = LappedTokenizer((1, 8, 8)), torch.zeros(1, 1, 3, 3, 192)
    latents[0, 0, 1, 1, 0] = 1
    row = tokenizer.decode(latents)[0, 0, 0, 12]
    assert not row[:4].any() and not row[20:].any() and row[4:20].all()
    assert row[4].abs() < 0.2 * row.max() and row[8] < 0.6 * row.max()
    flat = tokenizer.encode(torch.full((1, 1, 3, 24, 24), 0.5))[0, 0]
    torch.testing.assert_close(flat[..., 0], torch.full((3, 3), 4 * 0.5 / 0.4))
    assert flat[..., 1:].abs().max() < 1e-5
    edges = []
    for name in ("dct", "lapped"):  # what a network gets wrong: independent errors of patches, of low frequency
        wrong = torch.randn(1, 8, 6, 6, 6, generator=torch.Generator().manual_seed(0))
        steps = build_tokenizer(name, channels=6).decode(wrong).diff(dim=-1).square().mean((0, 1, 2, 3))
        edges.append((steps[7::8].mean() / steps.mean()).item())
    assert edges[0] > 4 and edges[1] < 2, edges


def test_lapped_channels_keep_more_of_the_demos_clips_than_those_of_patches():
    dataset = ShapesDataset(num_frames=2, height=48, width=48, **demo.SHAPES)
    clips = to_float(torch.stack([torch.from_numpy(dataset.sample(i, 0)["video"]) for i in range(16)]))
    tokenizers = [build_tokenizer(name, channels=24) for name in ("dct", "lapped")]
    lost = [(t.decode(t.encode(clips)) - clips).square().mean().item() for t in tokenizers]
    assert lost[1] < 0.92 * lost[0]


def test_lapped_latents_are_those_of_its_definition():
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    clip = torch.stack([(0.5 * y + 0.7 * x).sin(), (0.2 * y - 0.4 * x).cos(), (y - x) / 10 - 0.2])[None, None]
    assert LappedTokenizer.definition == "lapped 1"
    first = LappedTokenizer((1, 8, 8), 24).encode(clip)[0, 0, 0, 0]
    assert first[[0, 1, 2, 5, 23]].tolist() == pytest.approx([0.6805, 2.5055, -1.0865, 0.4947, -0.0755], abs=4e-4)


def about_unit_variance(latents):
    deviations = latents.flatten(0, -2).std(0)
    return 0.6 < deviations[0] < 1.4 and deviations[1:].max() < deviations[0]


def test_first_dct_channel_of_the_demos_clips_has_about_unit_variance():
    dataset = ShapesDataset(num_frames=5, height=64, width=64, **demo.SHAPES)
    clips = to_float(torch.stack([torch.from_numpy(dataset.sample(i, 0)["video"]) for i in range(16)]))
    for compression, channels in (((1, 8, 8), 24), ((1, 8, 8), None), ((1, 4, 4), 12), ((4, 8, 8), 16)):
        assert about_unit_variance(DCTTokenizer(compression, channels).encode(clips))


def test_first_dct_channel_of_real_clips_has_about_unit_variance(shared_data):
    dataset = open_dataset(shared_data / "clips", num_frames=17, height=64, width=64)
    clips = to_float(torch.stack([torch.from_numpy(dataset.sample(i, 0)["video"]) for i in range(4)]))
    for compression, channels in (((1, 8, 8), None), ((1, 4, 4), None), ((4, 8, 8), 16), ((1, 32, 32), 32)):
        assert about_unit_variance(DCTTokenizer(compression, channels).encode(clips))


def test_dct_latents_are_those_of_its_definition():
    """Other numbers are another definition: then count `DCTTokenizer.definition` up, so that older latents are
    refused."""
    t, y, x = torch.meshgrid(torch.arange(5.0), torch.arange(8.0), torch.arange(8.0), indexing="ij")
    red, green, blue = (0.3 * t + 0.5 * y + 0.7 * x).sin(), (0.2 * t * y - 0.4 * x).cos(), (y - x) / 10 + t / 20 - 0.2
    clip = torch.stack([red, green, blue], dim=1)[None]
    expected = {
        (1, 8, 8): [-0.0378, 0.0296, 0.0669, 0.1931, 0.0191],
        (4, 8, 8): [0.0952, 0.1913, -0.1021, 0.6727, -0.1489],
    }
    assert DCTTokenizer.definition == "dct 2"
    for compression, values in expected.items():
        last = DCTTokenizer(compression, 24).encode(clip)[0, -1, 0, 0]
        assert last[[0, 1, 2, 5, 23]].tolist() == pytest.approx(values, abs=1e-4), compression


def test_checksums_tell_tokenizers_apart():
    same = {checksum(DCTTokenizer((1, 8, 8), channels)) for channels in (None, 24)}
    networks = []
    for scale in (1.0, 2.0):
        network = torch.nn.Linear(2, 2)
        with torch.no_grad():
            network.weight.fill_(1), network.bias.zero_()
        network.scale = scale
        networks.append(checksum(network))
    assert len(same) == 1 and len({*same, *networks}) == 3 and all(len(text) == 64 for text in {*same, *networks})


def test_dct_refuses_other_sizes():
    tokenizer = DCTTokenizer((4, 8, 8))
    for size in ((16, 64, 64), (17, 60, 64), (17, 64, 60), (17, 0, 64)):
        with pytest.raises(
            ValueError, match=rf"a clip of {size[0]} x {size[1]} x {size[2]}: expected 1 \+ a multiple of 4"
        ):
            tokenizer.latent_shape(*size)
    with pytest.raises(ValueError, match="height a multiple of 8"):
        tokenizer.encode(video(17, 60, 64))
    with pytest.raises(ValueError, match="expected 768 channels"):
        tokenizer.decode(torch.zeros(1, 1, 2, 2, 16))
    with pytest.raises(ValueError, match="expected 1 to 192"):
        DCTTokenizer((1, 8, 8), 193)
    with pytest.raises(ValueError, match="expected 1 to 0"):
        DCTTokenizer((1, 0, 8))
    with pytest.raises(ValueError, match="unknown tokenizer 'jpeg': known tokenizers are dct, lapped, dcae, videovae"):
        build_tokenizer("jpeg")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "config.json: is damaged: nested too deeply"),
        (
            '{"_class_name": "AutoencoderDC", "latent_channels": "many"}',
            "config.json: is no configuration of this network",
        ),
        ('{"_class_name": "AutoencoderDC", "latent_chanels": 8}', "config.json: is no configuration of this network"),
        ('{"tokenizer": "videovae", "model_cfg": 3}', "config.json: is no configuration of this network"),
        ('{"tokenizer": "videovae"}', "config.json: is no configuration of this network: KeyError"),
        ("[]", "config.json: it is a list of 0, expected an object"),
    ],
)
def test_a_configuration_that_is_none_is_refused(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    name, compression = ("dcae", (1, 32, 32)) if "Autoencoder" in text else ("videovae", (4, 8, 8))
    with pytest.raises(InputError) as caught:
        build_tokenizer(name, compression=compression, weights=tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
