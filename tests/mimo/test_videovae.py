"""DFoT's VideoVAE: names of the released layout, chunk behaviour, normalisation, and files that must not be trusted."""

import collections
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mimo.config import MiMoConfig
from mimo.data import to_float
from mimo.errors import InputError
from mimo.runtime import to_latents
from mimo.tokenizers import DCTTokenizer, build_tokenizer
from mimo.tokenizers.protocols import VariationalTokenizer
from mimo.tokenizers.videovae import K600_MEAN, K600_STD, VideoVAE, VideoVAEConfig, VideoVAETokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

# A quarter of the width at every level, everything else as released.
SMALL = {"hidden_size": 32, "hidden_size_mult": [1, 1, 2, 2], "temporal_length": 4, "z_channels": 16, "embed_dim": 16}
SMALL |= {"num_res_blocks": 1, "is_causal": False, "first_padding_mode": "zero", "attn_resolutions": []}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = VideoVAE(VideoVAEConfig.from_dict(SMALL))
    for parameter in model.parameters():  # norms and biases away from their neutral values
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tokenizer(model):
    return VideoVAETokenizer(model)


def video(frames=17, size=16, batch=1):
    return torch.rand(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def save_checkpoint(path, model, *, config=None, ema=None, state=None):
    state = model.state_dict() if state is None else state
    lightning = {f"vae.{key}": value for key, value in state.items()} | {"loss.logvar": torch.zeros(())}
    optimizer_states = [] if ema is None else [{"opt": {}, "ema": ema}, {"opt": {}}]
    checkpoint = {"model_cfg": SMALL if config is None else config, "state_dict": lightning}
    torch.save(checkpoint | {"optimizer_states": optimizer_states, "global_step": 7}, path)
    return path


# ---- layout


def expected_names():
    """The released Kinetics-600 network, spelled out level by level, in the order of its parameters."""

    def conv2d(name):
        return [f"{name}.weight", f"{name}.bias"]

    def conv3d(name):
        return conv2d(f"{name}.conv")

    def resnet(name, conv, shortcut=False):
        parts = [conv2d(f"{name}.norm1"), conv(f"{name}.conv1"), conv2d(f"{name}.norm2"), conv(f"{name}.conv2")]
        return sum(parts, []) + (conv(f"{name}.nin_shortcut") if shortcut else [])

    def middle(name):
        attention = sum((conv3d(f"{name}.attn_1.{part}") for part in ("q", "k", "v", "proj_out")), [])
        return (
            resnet(f"{name}.block_1", conv3d)
            + conv2d(f"{name}.attn_1.norm")
            + attention
            + resnet(f"{name}.block_2", conv3d)
        )

    names = conv2d("encoder.conv_in")
    for level, (conv, down, shortcut) in enumerate(
        [(conv2d, conv2d, False), (conv2d, conv3d, True), (conv3d, conv3d, True), (conv3d, None, False)]
    ):
        names += resnet(f"encoder.down.{level}.block.0", conv, shortcut) + resnet(f"encoder.down.{level}.block.1", conv)
        names += down(f"encoder.down.{level}.downsample.conv") if down else []
    names += middle("encoder.mid") + conv2d("encoder.norm_out") + conv3d("encoder.conv_out")
    names += conv3d("decoder.conv_in") + middle("decoder.mid")
    for level, shortcut in enumerate((True, True, False, False)):
        for block in range(3):
            names += resnet(f"decoder.up.{level}.block.{block}", conv3d, shortcut and block == 0)
        names += conv3d(f"decoder.up.{level}.upsample.conv") if level else []
    names += conv2d("decoder.up.3.upsample.temporal_up_conv")
    names += conv2d("decoder.norm_out") + conv3d("decoder.conv_out") + conv3d("quant_conv") + conv3d("post_quant_conv")
    return names


def test_names_and_their_order_are_those_of_the_released_network():
    with torch.device("meta"):
        released = VideoVAE(VideoVAEConfig.kinetics600())
    assert [name for name, _ in released.named_parameters()] == expected_names() == list(released.state_dict())
    shapes = {name: tuple(parameter.shape) for name, parameter in released.named_parameters()}
    assert shapes["encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert shapes["encoder.down.0.downsample.conv.weight"] == (128, 128, 3, 3)
    assert shapes["encoder.down.1.downsample.conv.conv.weight"] == (256, 256, 3, 3, 3)
    assert shapes["encoder.conv_out.conv.weight"] == (32, 512, 3, 3, 3)
    assert shapes["decoder.up.1.upsample.conv.conv.weight"] == (256, 256, 1, 3, 3)
    assert shapes["decoder.up.3.upsample.temporal_up_conv.weight"] == (512, 512, 2, 1, 1)
    assert shapes["quant_conv.conv.weight"] == (32, 32, 1, 1, 1)


def test_released_checkpoint(tmp_path, model, tokenizer):
    loaded = VideoVAETokenizer.from_pretrained(save_checkpoint(tmp_path / "vae.ckpt", model))
    assert torch.equal(loaded.encode(video(5)), tokenizer.encode(video(5)))
    assert loaded.mean.tolist() == pytest.approx(K600_MEAN) and loaded.std.tolist() == pytest.approx(K600_STD)


def test_ema_list_is_preferred_and_goes_by_order(tmp_path, model, tokenizer):
    stale = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    ema = [parameter.detach().clone() for parameter in model.parameters()]
    path = save_checkpoint(tmp_path / "vae.ckpt", model, ema=ema, state=stale)
    assert torch.equal(VideoVAETokenizer.from_pretrained(path).encode(video(1)), tokenizer.encode(video(1)))
    with pytest.raises(InputError, match=rf"holds {len(ema) - 1} EMA weights, expected {len(ema)}"):
        VideoVAETokenizer.from_pretrained(save_checkpoint(tmp_path / "b.ckpt", model, ema=ema[:-1]))


def test_own_folder_and_build_tokenizer(tmp_path, model):
    VideoVAETokenizer(model, [0.5] * 16, [2.0] * 16).save(tmp_path / "vae")
    loaded = build_tokenizer("videovae", compression=(4, 8, 8), channels=16, weights=tmp_path / "vae")
    assert loaded.mean.tolist() == [0.5] * 16 and loaded.config == model.config
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.model.state_dict().items())
    with pytest.raises(InputError, match=r"compresses \(4, 8, 8\) to 16 channels, but \(1, 8, 8\) to 16 was asked for"):
        build_tokenizer("videovae", compression=(1, 8, 8), weights=tmp_path / "vae")


# ---- behaviour


def test_17_frames_give_5_latents_and_back(tokenizer):
    latents = tokenizer.encode(video())
    assert latents.shape == (1, 5, 2, 2, 16) and tokenizer.latent_shape(17, 16, 16) == (5, 2, 2, 16)
    assert tokenizer.num_frames(5) == 17 and tokenizer.num_frames(1) == 1
    assert tokenizer.decode(latents).shape == (1, 17, 3, 16, 16)


def test_chunks_are_independent(tokenizer):
    """Frames 1-4 decide latent 1 and nothing else, all of them; latent 1 decides frames 1-4."""
    x = video()
    latents = tokenizer.encode(x)
    decoded = tokenizer.decode(latents)
    for frame in (0, 1, 2, 3, 4, 5, 16):
        y = x.clone()
        y[:, frame] += 0.5
        changed = (tokenizer.encode(y) - latents).abs().amax((0, 2, 3, 4)) > 1e-6
        assert changed.nonzero().flatten().tolist() == [(frame + 3) // 4]
    for t in (0, 1, 4):
        z = latents.clone()
        z[:, t] += 0.5
        changed = (tokenizer.decode(z) - decoded).abs().amax((0, 2, 3, 4)) > 1e-6
        assert changed.nonzero().flatten().tolist() == [f for f in range(17) if (f + 3) // 4 == t]


def test_first_chunk_is_three_zero_frames_and_the_first(model, tokenizer):
    x = video(1)
    chunk = torch.cat([torch.zeros(1, 3, 3, 16, 16), x.transpose(1, 2)], dim=2)
    mean = model.moments(chunk)[:, :16].squeeze(2).movedim(1, -1)
    expected = (mean - torch.tensor(K600_MEAN)) / torch.tensor(K600_STD)
    assert torch.allclose(tokenizer.encode(x)[:, 0], expected, atol=1e-6)
    config = VideoVAEConfig.from_dict(SMALL | {"first_padding_mode": "same"})
    same = VideoVAE(config)
    same.load_state_dict(model.state_dict())
    still = VideoVAETokenizer(same).encode(x)[:, 0]
    mean = model.moments(x.transpose(1, 2).expand(-1, -1, 4, -1, -1))[:, :16].squeeze(2).movedim(1, -1)
    assert torch.allclose(still, (mean - torch.tensor(K600_MEAN)) / torch.tensor(K600_STD), atol=1e-6)


def test_memory_bound_changes_nothing(model, tokenizer):
    few = VideoVAETokenizer(model, chunks=3)
    latents = few.encode(video(13))
    assert torch.allclose(latents, tokenizer.encode(video(13)), atol=1e-5)
    assert torch.allclose(few.decode(latents), tokenizer.decode(latents), atol=1e-4)


def test_attention_and_time_padding_against_formulas(model):
    attention = model.encoder.mid.attn_1
    x = torch.randn(2, 64, 3, 2, 4)
    h = F.group_norm(x, 32, attention.norm.weight, attention.norm.bias, 1e-6)
    q, k, v = (
        torch.einsum("oi,bithw->bthwo", conv.conv.weight[:, :, 0, 0, 0], h) + conv.conv.bias
        for conv in (attention.q, attention.k, attention.v)
    )
    q, k, v = (y.reshape(2, 3, 8, 64) for y in (q, k, v))
    out = torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v
    projected = out @ attention.proj_out.conv.weight[:, :, 0, 0, 0].T + attention.proj_out.conv.bias
    expected = x + projected.view(2, 3, 2, 4, 64).permute(0, 4, 1, 2, 3)
    assert torch.allclose(attention(x), expected, atol=1e-5)
    conv = model.encoder.conv_out
    padded = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
    assert torch.allclose(conv(x), F.conv3d(padded, conv.conv.weight, conv.conv.bias, padding=(0, 1, 1)), atol=1e-5)


class Functional:
    """The small non-causal network written out, layer by layer, over the checkpoint's tensors."""

    def __init__(self, state):
        self.state = state

    def tensors(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def norm(self, name, x):
        return F.group_norm(x, 32, *self.tensors(name), 1e-6)

    def conv3d(self, name, x, *, stride=1, pad=1):
        weight, bias = self.tensors(f"{name}.conv")
        if weight.shape[2] == 3:
            x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
        return F.conv3d(x, weight, bias, stride, (0, pad, pad) if weight.shape[-1] == 3 else 0)

    def conv2d(self, name, x, *, stride=1, pad=1):
        weight, bias = self.tensors(name)
        frames = [
            F.conv2d(x[:, :, t], weight, bias, stride, pad if weight.shape[-1] == 3 else 0) for t in range(x.shape[2])
        ]
        return torch.stack(frames, dim=2)

    def resnet(self, name, x, conv, norm):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (x if h.shape == x.shape else conv(f"{name}.nin_shortcut", x))

    def resnet3d(self, name, x):
        return self.resnet(name, x, self.conv3d, self.norm)

    def resnet2d(self, name, x):
        def norm(name, x):
            return torch.stack([self.norm(name, x[:, :, t]) for t in range(x.shape[2])], dim=2)

        return self.resnet(name, x, self.conv2d, norm)

    def middle(self, name, x):
        x = self.resnet3d(f"{name}.block_1", x)
        h = self.norm(f"{name}.attn_1.norm", x)
        q, k, v = (self.conv3d(f"{name}.attn_1.{part}", h).permute(0, 2, 3, 4, 1).flatten(2, 3) for part in "qkv")
        out = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v
        out = out.unflatten(2, x.shape[-2:]).permute(0, 4, 1, 2, 3)
        return self.resnet3d(f"{name}.block_2", x + self.conv3d(f"{name}.attn_1.proj_out", out))

    def out(self, name, x):
        return self.conv3d(f"{name}.conv_out", F.silu(self.norm(f"{name}.norm_out", x)))

    def encode(self, x):
        def shrink(x):
            return F.pad(x, (0, 1, 0, 1))

        x = self.resnet2d("encoder.down.0.block.0", self.conv2d("encoder.conv_in", x))
        x = self.resnet2d(
            "encoder.down.1.block.0", self.conv2d("encoder.down.0.downsample.conv", shrink(x), stride=2, pad=0)
        )
        x = self.conv3d("encoder.down.1.downsample.conv", shrink(x), stride=2, pad=0)
        x = self.resnet3d("encoder.down.2.block.0", x)
        x = self.conv3d("encoder.down.2.downsample.conv", shrink(x), stride=2, pad=0)
        x = self.resnet3d("encoder.down.3.block.0", x)
        return self.conv3d("quant_conv", self.out("encoder", self.middle("encoder.mid", x)))

    def decode(self, z):
        def grow(x, times):
            return F.interpolate(x, scale_factor=(times, 2, 2), mode="trilinear", align_corners=False)

        def level(number, x):
            return self.resnet3d(f"decoder.up.{number}.block.1", self.resnet3d(f"decoder.up.{number}.block.0", x))

        x = level(3, self.middle("decoder.mid", self.conv3d("decoder.conv_in", self.conv3d("post_quant_conv", z))))
        x = F.conv_transpose3d(x, *self.tensors("decoder.up.3.upsample.temporal_up_conv"))
        x = level(2, self.conv3d("decoder.up.3.upsample.conv", grow(x, 1)))
        x = level(1, self.conv3d("decoder.up.2.upsample.conv", grow(x, 2)))
        x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        return self.out("decoder", level(0, self.conv3d("decoder.up.1.upsample.conv", x)))


@torch.no_grad()
def test_network_against_the_layers_written_out(model):
    written, x = Functional(model.state_dict()), video(4, 16, batch=2).transpose(1, 2)
    moments = model.moments(x)
    assert moments.shape == (2, 32, 1, 2, 2)
    assert torch.allclose(moments, written.encode(x), atol=1e-5)
    assert torch.allclose(model.decode(moments[:, :16]), written.decode(moments[:, :16]), atol=1e-5)


def test_causal_model():
    torch.manual_seed(0)
    config = VideoVAEConfig.from_dict(SMALL | {"is_causal": True, "temporal_length": 17, "first_padding_mode": "same"})
    tokenizer, x = VideoVAETokenizer(VideoVAE(config)), video()
    latents = tokenizer.encode(x)
    assert latents.shape[1] == 5 and tokenizer.decode(latents).shape == x.shape
    with pytest.raises(ValueError, match="at most 17"):
        tokenizer.latent_shape(21, 16, 16)


def test_missing_fields_have_the_defaults_of_the_class():
    """As DFoT's constructor has them: a causal model that repeats the first frame, which the released one is not."""
    config = VideoVAEConfig.from_dict({})
    assert (config.z_channels, config.embed_dim, config.resolution, config.temporal_length) == (4, 4, 256, 17)
    assert config.is_causal and config.first_padding_mode == "same"
    released = VideoVAEConfig.kinetics600()
    assert (released.z_channels, released.embed_dim, released.resolution, released.temporal_length) == (16, 16, 128, 4)
    assert not released.is_causal and released.first_padding_mode == "zero"
    without = {key: value for key, value in SMALL.items() if key != "first_padding_mode"}
    torch.manual_seed(0)
    tokenizer = VideoVAETokenizer(VideoVAE(VideoVAEConfig.from_dict(without)))
    bright, same = torch.ones(1, 5, 3, 16, 16), torch.ones(1, 1, 3, 16, 16).expand(-1, 8, -1, -1, -1)
    chunks = tokenizer.model.moments(same[:, :4].transpose(1, 2))[:, :16]
    expected = (chunks.permute(0, 2, 3, 4, 1) - tokenizer.mean) / tokenizer.std
    assert torch.allclose(tokenizer.encode(bright)[:, :1], expected, atol=1e-6), "latent 0 sees copies of frame 0"


def test_draws_are_of_the_posterior(tokenizer):
    """(z - mean) / deviation is the noise of the clip's own seed, whatever the batch."""
    x, seeds = video(9, batch=3), torch.tensor([7, 8, 7])
    drawn, means = tokenizer.draw(x, seeds), tokenizer.encode(x)
    padded = torch.cat([torch.zeros(3, 3, 3, 16, 16), x], dim=1).transpose(1, 2)  # 12 frames
    with torch.no_grad():
        moments = [tokenizer.model.moments(padded[:, :, first : first + 4]) for first in (0, 4, 8)]
    log_variance = torch.cat(moments, dim=2)[:, 16:].permute(0, 2, 3, 4, 1)
    noise = (drawn - means) * tokenizer.std / (0.5 * log_variance.clamp(-30, 20)).exp()
    for clip, seed in enumerate(seeds.tolist()):
        expected = torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(noise[clip], expected, atol=1e-3)
    assert torch.allclose(tokenizer.draw(x[1:2], seeds[1:2]), drawn[1:2], atol=1e-5)
    assert isinstance(tokenizer, VariationalTokenizer) and not isinstance(DCTTokenizer(), VariationalTokenizer)
    with torch.no_grad():  # an extreme log variance is clamped
        model = VideoVAE(tokenizer.config)
        model.quant_conv.conv.weight.zero_(), model.quant_conv.conv.bias.fill_(1000.0)
    assert VideoVAETokenizer(model).draw(x[:1], seeds[:1]).isfinite().all()


def test_training_takes_what_it_is_told_to(tokenizer):
    config, device = MiMoConfig.from_preset("mimo-b-k600"), torch.device("cpu")
    clips = (torch.rand(2, 5, 16, 16, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    batch = {"video": clips, "noise_seed": torch.tensor([3, 4])}
    x = to_float(clips)
    means, _ = to_latents(batch, tokenizer, config, device)
    drawn, _ = to_latents(batch, tokenizer, config, device, "sample")
    assert torch.equal(means, tokenizer.encode(x)) and torch.equal(drawn, tokenizer.draw(x, torch.tensor([3, 4])))
    assert not torch.equal(means, drawn)


def test_tokenizer_is_frozen(tokenizer):
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert not tokenizer.encode(video(1).requires_grad_()).requires_grad


# ---- refusals


class Trap:
    """Runs code when unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_pickled_objects_are_refused_unless_trusted(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = collections.UserDict(SMALL)  # released checkpoints hold an OmegaConf object here
    path = save_checkpoint(tmp_path / "vae.ckpt", model, config=config)
    with pytest.raises(InputError, match=r"vae\.ckpt: holds pickled objects.*trust_pickle=True") as error:
        VideoVAETokenizer.from_pretrained(path)
    assert "\n" not in str(error.value)
    loaded = build_tokenizer("videovae", compression=(4, 8, 8), weights=path, trust_pickle=True)
    assert torch.equal(loaded.encode(video(1)), tokenizer.encode(video(1)))
    torch.save({"model_cfg": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(InputError, match="holds pickled objects"):
        VideoVAETokenizer.from_pretrained(tmp_path / "trap.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_damaged_files_are_named(tmp_path, model):
    path = save_checkpoint(tmp_path / "vae.ckpt", model)
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    for name, why in {
        "cut": "not a whole",
        "text": "not a whole|pickled",
        "other": "no 'model_cfg'",
        "none": "No such",
    }.items():
        with pytest.raises(InputError, match=rf"{name}\.ckpt: .*({why})") as error:
            VideoVAETokenizer.from_pretrained(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(error.value)
    VideoVAETokenizer(model).save(tmp_path / "vae")
    weights = tmp_path / "vae" / "model.safetensors"
    state = load_file(weights)
    save_file(dict(itertools.islice(state.items(), 10)), weights)
    with pytest.raises(InputError, match=r"model\.safetensors: not weights of this VideoVAE: .* missing, first"):
        VideoVAETokenizer.from_pretrained(tmp_path / "vae")
    save_file(state | {"quant_conv.conv.bias": torch.zeros(3)}, weights)
    with pytest.raises(InputError, match=r"'quant_conv.conv.bias' is \[3\], expected \[32\]"):
        VideoVAETokenizer.from_pretrained(tmp_path / "vae")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        VideoVAETokenizer.from_pretrained(tmp_path / "vae")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"colour": 1}, "unknown field 'colour'"),
        ({"temporal_length": 5}, "temporal_length 5, expected 4 k"),
        ({"encoder_temporal_downsample": ["", "", "TimeDownsampleRes2x", ""]}, "change time alone"),
        ({"encoder_attention": "LinAttnBlock"}, "unknown layer 'LinAttnBlock'"),
        ({"encoder_spatial_downsample": ["Downsample"] * 4}, "no encoder downsampling at the last level"),
    ],
)
def test_other_configurations(change, why):
    with pytest.raises(InputError, match=why):
        VideoVAE(VideoVAEConfig.from_dict(SMALL | change))


def test_sizes_that_do_not_fit(model, tokenizer):
    for size in ((16, 16, 16), (17, 12, 16), (17, 16, 12), (0, 16, 16)):
        with pytest.raises(
            ValueError, match=rf"a clip of {size[0]} x {size[1]} x {size[2]}: expected 1 \+ a multiple of 4"
        ):
            tokenizer.latent_shape(*size)
    with pytest.raises(ValueError, match="expected 16 channels"):
        tokenizer.decode(torch.zeros(1, 5, 2, 2, 4))
    with pytest.raises(InputError, match="2 means and 16 deviations, expected 16 of each"):
        VideoVAETokenizer(model, [0.0] * 2, [1.0] * 16)
