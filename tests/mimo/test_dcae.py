"""DC-AE: FAR's configurations and released layouts, the losses, and training one."""

import itertools
import json
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mimo import checkpoint, records
from mimo.data import ShapesDataset, batches, to_float
from mimo.errors import InputError
from mimo.tokenizers import build_tokenizer
from mimo.tokenizers.dcae import DCAETokenizer, far_config
from mimo.tokenizers.losses import LPIPS, adaptive_weight, patch_discriminator
from mimo.tokenizers.train import TokenizerTrainer, TokenizerTraining, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

AutoencoderDC = pytest.importorskip("diffusers").AutoencoderDC


def small_config(compression=8):
    """FAR's, with fewer channels and one block per level."""
    config = far_config(compression, channels=4, width=8)
    one = tuple(min(1, count) for count in config["encoder_layers_per_block"])
    return config | {"encoder_layers_per_block": one, "decoder_layers_per_block": one}


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return DCAETokenizer(AutoencoderDC(**small_config()))


def video(frames=3, size=16):
    return torch.rand(2, frames, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---- tokenizer


def test_far_configurations():
    """The numbers of FAR's model_32x_c32_config.json and model_8x_c32_config.json."""
    full, small = far_config(32), far_config(8)
    assert full["encoder_block_out_channels"] == (128, 256, 512, 512, 1024, 1024)
    assert full["encoder_layers_per_block"] == (0, 4, 8, 2, 2, 2) and full["decoder_layers_per_block"] == (
        0,
        5,
        10,
        2,
        2,
        2,
    )
    assert full["decoder_norm_types"] == ("batch_norm",) * 3 + ("rms_norm",) * 3 and full["scaling_factor"] == 0.2889
    assert small["encoder_block_types"] == ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    assert small["decoder_act_fns"] == ("relu", "relu", "relu", "silu") and small["latent_channels"] == 32
    with pytest.raises(InputError, match="compression 12, expected 8, 16 or 32"):
        far_config(12)


@pytest.mark.parametrize("compression", [8, 16, 32])
def test_compression(compression):
    tokenizer = DCAETokenizer(AutoencoderDC(**small_config(compression)))
    assert tokenizer.compression == (1, compression, compression)
    latents = tokenizer.encode(video(1, 64))
    assert latents.shape[1:] == tokenizer.latent_shape(1, 64, 64) == (1, 64 // compression, 64 // compression, 4)
    assert tokenizer.decode(latents).shape == (2, 1, 3, 64, 64)


def test_frames_are_independent_and_scaled(tokenizer):
    x = video()
    latents = tokenizer.encode(x)
    assert latents.shape == (2, 3, 2, 2, 4) and latents.dtype == torch.float32 and tokenizer.num_frames(3) == 3
    plain = tokenizer.model.encode(x[:, 1]).latent.movedim(1, -1) * 0.2889
    assert torch.allclose(latents[:, 1], plain, atol=1e-6)
    picture = tokenizer.model.decode(latents[:, 1].movedim(-1, 1) / 0.2889).sample
    assert torch.allclose(tokenizer.decode(latents)[:, 1], picture, atol=1e-5)
    bounded = DCAETokenizer(tokenizer.model, frames=2)
    assert torch.allclose(bounded.encode(x), latents, atol=1e-5)
    assert torch.allclose(bounded.decode(latents), tokenizer.decode(latents), atol=1e-5)


def test_diffusers_folder(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "dcae")
    loaded = build_tokenizer("dcae", compression=(1, 8, 8), channels=4, weights=tmp_path / "dcae")
    assert torch.equal(loaded.encode(video()), tokenizer.encode(video())) and loaded.scale == 0.2889
    by_diffusers = AutoencoderDC.from_pretrained(tmp_path / "dcae")
    assert torch.equal(DCAETokenizer(by_diffusers).encode(video()), tokenizer.encode(video()))
    with pytest.raises(InputError, match=r"compresses \(1, 8, 8\) to 4 channels, but \(1, 8, 8\) to 32 was asked for"):
        build_tokenizer("dcae", compression=(1, 8, 8), channels=32, weights=tmp_path / "dcae")


def test_far_state_dict(tmp_path, tokenizer, monkeypatch):
    """FAR publishes a bare state dict (.pth); its architecture is known from the compression."""
    monkeypatch.setattr("mimo.tokenizers.dcae.far_config", small_config)
    torch.save(tokenizer.model.state_dict(), tmp_path / "far.pth")
    save_file(tokenizer.model.state_dict(), tmp_path / "far.safetensors")
    for name in ("far.pth", "far.safetensors"):
        loaded = build_tokenizer("dcae", compression=(1, 8, 8), weights=tmp_path / name)
        assert torch.equal(loaded.encode(video()), tokenizer.encode(video()))
    with pytest.raises(InputError, match=r"far\.pth: not weights of this AutoencoderDC: .* missing"):
        build_tokenizer("dcae", compression=(1, 16, 16), weights=tmp_path / "far.pth")


def test_hub_id(tokenizer, monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        if name == "owner/gone":
            raise OSError("owner/gone is not there\nand more")
        return tokenizer.model

    monkeypatch.setattr(AutoencoderDC, "from_pretrained", from_pretrained)
    assert build_tokenizer("dcae", weights="owner/name").channels == 4
    assert asked == [("owner/name", {"use_safetensors": True})], "pickles are not fetched"
    with pytest.raises(InputError, match="owner/gone: cannot be read from the hub: owner/gone is not there$"):
        build_tokenizer("dcae", weights="owner/gone")


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    """In a folder that is here a file is meant: nobody is asked for it."""

    class Asked:
        def from_pretrained(self, *_, **__):
            raise AssertionError("the network was asked")

    monkeypatch.setattr("mimo.tokenizers.dcae.autoencoder_class", Asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    with pytest.raises(InputError, match="weights/dcae: no folder in diffusers' layout, no state dict and no hub id"):
        DCAETokenizer.from_pretrained("weights/dcae")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_refusals(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Trap()}, "trap.pth")
    with pytest.raises(InputError, match=r"trap\.pth: holds pickled objects"):
        build_tokenizer("dcae", weights="trap.pth")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(InputError, match=r"none\.pth: No such file"):
        build_tokenizer("dcae", weights="none.pth")
    with pytest.raises(InputError, match=r"no folder in diffusers' layout"):
        build_tokenizer("dcae", weights="nowhere")
    with pytest.raises(InputError, match="the tokenizer 'dcae' needs weights"):
        build_tokenizer("dcae")
    with pytest.raises(InputError, match="'dct' has no weights"):
        build_tokenizer("dct", weights="x")
    tokenizer.save("dcae")
    (tmp_path / "dcae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(InputError, match="is of class 'AutoencoderKL', expected 'AutoencoderDC'"):
        build_tokenizer("dcae", weights="dcae")
    with pytest.raises(ValueError, match="a clip of 1 x 12 x 16: expected sides that 8 divides"):
        tokenizer.latent_shape(1, 12, 16)
    with pytest.raises(ValueError, match="expected 4 channels"):
        tokenizer.decode(torch.zeros(1, 1, 2, 2, 3))


# ---- losses


def vgg_weights():
    """The layout of torchvision's VGG-16 and of LPIPS's linear layers, random numbers."""
    generator, state, cin = torch.Generator().manual_seed(0), {}, 3
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    for index, width in zip(indices, widths, strict=True):
        state[f"features.{index}.weight"] = torch.randn(width, cin, 3, 3, generator=generator) * (2 / (9 * cin)) ** 0.5
        state[f"features.{index}.bias"] = torch.randn(width, generator=generator) * 0.1
        cin = width
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for i, width in enumerate((64, 128, 256, 512, 512))
    }
    return state, linear


def test_lpips_against_its_formula(tmp_path):
    state, linear = vgg_weights()
    save_file(state | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg.safetensors")
    torch.save(linear, tmp_path / "lin.pth")
    lpips = LPIPS(tmp_path / "vgg.safetensors", tmp_path / "lin.pth")
    x, y = video(1, 16)[:, 0], video(2, 16)[:, 1]

    def features(h):
        h = (h - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        maps = []
        for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            h = F.max_pool2d(h, 2) if maps else h
            for index in block:
                h = F.relu(F.conv2d(h, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1))
            maps.append(h)
        return [h / h.square().sum(1, keepdim=True).sqrt() for h in maps]

    expected = sum(
        ((f - g).square() * linear[f"lin{i}.model.1.weight"]).sum(1).mean()
        for i, (f, g) in enumerate(zip(features(x), features(y), strict=True))
    )
    assert lpips(x, y) == pytest.approx(expected.item(), rel=1e-4) and lpips(x, x) == 0
    with pytest.raises(InputError, match=r"lin\.pth: 'features\.0\.weight' is absent, expected \[64, 3, 3, 3\]"):
        LPIPS(tmp_path / "lin.pth", tmp_path / "lin.pth")


def test_discriminator_and_adaptive_weight():
    assert patch_discriminator(8)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    assert adaptive_weight((w * 2).sum(), (w * w).sum() / 2, w) == pytest.approx(8**0.5 / 5, rel=1e-3)
    assert adaptive_weight((w * 2).sum(), 0 * w.sum(), w) == 1e4


# ---- training

TRAINING = {"compression": 8, "channels": 4, "width": 8, "frames": 2, "batch_size": 2, "steps": 4, "lr": 2e-3}
TRAINING |= {"ema_decay": 0.5, "precision": "fp32", "workers": 0, "log_every": 2, "save_every": 2}


@pytest.fixture
def small_network(monkeypatch):
    monkeypatch.setattr("mimo.tokenizers.train.far_config", lambda *_: small_config())


def shapes(size=32):
    return ShapesDataset(num_frames=2, height=size, width=size, length=20)


def test_training_lowers_the_loss(small_network):
    trainer = TokenizerTrainer(TokenizerTraining(**TRAINING), shapes(16))
    clip = next(batches(trainer.dataset, 2, seed=0))["video"]
    losses = [trainer.train_step(clip)["l1"].item() for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]


def test_train_tokenizer_writes_what_build_tokenizer_reads(tmp_path, small_network, capsys):
    folder = train_tokenizer(shapes(), tmp_path, TokenizerTraining(**TRAINING))
    tokenizer = build_tokenizer("dcae", compression=(1, 8, 8), channels=4, weights=folder)
    stream = batches(shapes(), 8, seed=9)
    latents = torch.cat([tokenizer.encode(to_float(next(stream)["video"])) for _ in range(4)])
    assert latents.square().mean().sqrt() == pytest.approx(1, abs=0.25)
    out = capsys.readouterr().out
    assert "step 4/4" in out and "PSNR" in out and f"scale {tokenizer.scale:.4f}" in out
    with pytest.raises(InputError, match="already holds checkpoints"):
        train_tokenizer(shapes(), tmp_path, TokenizerTraining(**TRAINING))


def test_resumed_training_equals_an_undisturbed_one(tmp_path, small_network):
    config = TRAINING | {"disc_weight": 0.5, "disc_start": 1}
    train_tokenizer(shapes(), tmp_path / "whole", TokenizerTraining(**config))
    train_tokenizer(shapes(), tmp_path / "parts", TokenizerTraining(**config | {"steps": 2}))
    train_tokenizer(shapes(), tmp_path / "parts", TokenizerTraining(**config), resume=True)
    for name in ("model", "ema", "disc", "optimizer", "disc_optimizer"):
        file = f"checkpoints/step_00000004/{name}/shard-00001-model-00001-of-00001.safetensors"
        whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(InputError, match="another configuration: lr is"):
        train_tokenizer(shapes(), tmp_path / "parts", TokenizerTraining(**config | {"lr": 1.0}), resume=True)


def test_discriminator_phase_leaves_the_encoder_alone(small_network):
    trainer = TokenizerTrainer(TokenizerTraining(**TRAINING, disc_weight=0.5, disc_start=1), shapes())
    stream = batches(trainer.dataset, 2, seed=0)
    assert set(trainer.train_step(next(stream)["video"])) == {"l1", "mse"}
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    parts = trainer.train_step(next(stream)["video"])
    assert set(parts) == {"l1", "adversarial", "discriminator", "mse"}
    changed = {
        name.split(".")[0] for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"decoder"}


def test_perceptual_loss_takes_part(tmp_path, small_network):
    state, linear = vgg_weights()
    save_file(state, tmp_path / "vgg.safetensors")
    save_file(linear, tmp_path / "lin.safetensors")
    files = {"lpips_vgg": tmp_path / "vgg.safetensors", "lpips_linear": tmp_path / "lin.safetensors"}
    trainer = TokenizerTrainer(TokenizerTraining(**TRAINING, **files), shapes())
    for video in itertools.islice(batches(trainer.dataset, 1, seed=0), 1):
        assert trainer.train_step(video["video"])["lpips"] > 0


def test_bad_settings(tmp_path, small_network):
    for bad, why in (
        ({"lpips_vgg": "x"}, "expected to be given together with lpips_linear"),
        ({"precision": "int8"}, "precision='int8': expected one of 'bf16', 'fp32'"),
        ({"steps": 0}, "steps=0: expected more than zero"),
    ):
        with pytest.raises(ValueError, match=why):
            TokenizerTraining(**TRAINING | bad)
    with pytest.raises(InputError, match="frames of 20 x 20: expected sides that compression 8 divides"):
        train_tokenizer(shapes(20), tmp_path, TokenizerTraining(**TRAINING))
    trainer = TokenizerTrainer(TokenizerTraining(**TRAINING), shapes())
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="the loss of step 0 is nan"):
        trainer.train_step(next(batches(trainer.dataset, 1, seed=0))["video"])


def test_damaged_checkpoints_of_a_tokenizer_are_passed_over_or_refused(tmp_path, small_network, caplog):
    config = TRAINING | {"steps": 2, "save_every": 1}
    train_tokenizer(shapes(), tmp_path, TokenizerTraining(**config))
    older, newest = checkpoint.step_folders(tmp_path)
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(records.sealed(state | {"ema_updates": "2"}))
    with pytest.raises(InputError, match='ema_updates is "2", expected a whole number'):
        train_tokenizer(shapes(), tmp_path, TokenizerTraining(**config), resume=True)
    (newest / "state.json").write_text("{")
    train_tokenizer(shapes(), tmp_path, TokenizerTraining(**config), resume=True)
    assert "passed over: " in caplog.text and "step_00000002: state.json: is damaged" in caplog.text
    assert checkpoint.latest(tmp_path) == (newest, [])
    for folder in (older, newest):
        (folder / "state.json").write_text("{")
    with pytest.raises(InputError, match="has no whole checkpoint to resume from: .*step_00000002.*begins anew"):
        train_tokenizer(shapes(), tmp_path, TokenizerTraining(**config), resume=True)
