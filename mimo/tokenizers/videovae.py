"""DFoT's video autoencoder (Song et al. 2025, "History-Guided Video Diffusion"): 3D convolutions, 4x time and 8x space.

Shapes: x [B, C, T, H, W] inside the network. Parameter names and their order are those of the released checkpoints,
whose EMA weights are a bare list in that order.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import nn

from mimo.errors import InputError
from mimo.folders import atomic_path
from mimo.tokenizers.weights import configured_by, load_safetensors, load_state, load_torch, read_json

# Mean and standard deviation of each latent channel over Kinetics-600, from DFoT's dataset configuration.
K600_MEAN = (-0.284, 0.016, -0.728, -0.138, 0.941, -2.504, 0.147, -0.062) + (
    *(0.833, 0.151, -0.627, 0.269, 0.268, -0.732, -1.598, 0.199),
)
K600_STD = (5.591, 5.257, 7.033, 6.401, 6.091, 11.233, 5.608, 7.5) + (
    *(5.277, 5.46, 5.179, 6.8, 5.474, 5.111, 7.078, 5.024),
)


@dataclass(frozen=True)
class VideoVAEConfig:
    """The fields of a checkpoint's `model_cfg`. A field that is missing there has the default of DFoT's class, which is
    not what the released Kinetics-600 model has: see `kinetics600`."""

    hidden_size: int = 128
    z_channels: int = 4
    hidden_size_mult: tuple[int, ...] = (1, 2, 4, 4)
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    resolution: int = 256
    temporal_length: int = 17
    double_z: bool = True
    embed_dim: int = 4
    num_res_blocks: int = 2
    q_conv: str = "PaddedConv3D"
    encoder_conv_in: str = "Conv2d"
    encoder_conv_out: str = "PaddedConv3D"
    encoder_attention: str = "AttnBlock3D"
    encoder_resnet_blocks: tuple[str, ...] = ("ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D")
    encoder_spatial_downsample: tuple[str, ...] = ("Downsample", *["Spatial2xTime2x3DDownsample"] * 2, "")
    encoder_temporal_downsample: tuple[str, ...] = ("", "", "", "")
    encoder_mid_resnet: str = "ResnetBlock3D"
    decoder_conv_in: str = "PaddedConv3D"
    decoder_conv_out: str = "PaddedConv3D"
    decoder_attention: str = "AttnBlock3D"
    decoder_resnet_blocks: tuple[str, ...] = ("ResnetBlock3D",) * 4
    decoder_spatial_upsample: tuple[str, ...] = ("", "SpatialUpsample2x", *["Spatial2xTime2x3DUpsample"] * 2)
    decoder_temporal_upsample: tuple[str, ...] = ("", "", "", "")
    decoder_mid_resnet: str = "ResnetBlock3D"
    use_quant_layer: bool = True
    is_causal: bool = True
    first_padding_mode: str = "same"

    @classmethod
    def kinetics600(cls, **changes) -> VideoVAEConfig:
        """The released Kinetics-600 model, or one that differs from it in some fields."""
        released = {"z_channels": 16, "embed_dim": 16, "resolution": 128, "temporal_length": 4, "is_causal": False}
        return cls(**released | {"first_padding_mode": "zero"} | changes)

    @classmethod
    def from_dict(cls, values: dict) -> VideoVAEConfig:
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"videovae: unknown field {unknown[0]!r} in model_cfg, known are {', '.join(sorted(known))}"
            )
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()}
        return cls(**plain)

    def __post_init__(self) -> None:
        if any((*self.encoder_temporal_downsample, *self.decoder_temporal_upsample)):
            raise InputError("videovae: layers that change time alone are not supported, expected '' at every level")
        if self.encoder_spatial_downsample[-1] or self.decoder_spatial_upsample[0]:
            raise InputError(
                "videovae: expected no encoder downsampling at the last level and no decoder upsampling at the first"
            )
        if self.temporal_length % self.time_factor != (1 if self.is_causal else 0):
            form = f"{self.time_factor} k + 1" if self.is_causal else f"{self.time_factor} k"
            raise InputError(f"videovae: temporal_length {self.temporal_length}, expected {form}")
        if self.first_padding_mode not in ("zero", "same"):
            raise InputError(f"videovae: first_padding_mode {self.first_padding_mode!r}, expected 'zero' or 'same'")

    @property
    def time_factor(self) -> int:
        return 2 ** sum("Time" in name for name in self.encoder_spatial_downsample)

    @property
    def space_factor(self) -> int:
        return 2 ** sum(name != "" for name in self.encoder_spatial_downsample)

    @property
    def channels(self) -> int:
        return self.embed_dim if self.use_quant_layer else self.z_channels


# ---------------------------------------------------------------------------------------------------------------------
# Layers, named as checkpoints name them


def _per_frame(module, x: torch.Tensor) -> torch.Tensor:
    """Applies an image module to every frame of [B, C, T, H, W]."""
    y = module(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(y, "(b t) c h w -> b c t h w", b=len(x))


class Conv2d(nn.Conv2d):
    def __init__(self, cin: int, cout: int, kernel: int = 3, *, padding: int = 0, causal: bool = False):
        super().__init__(cin, cout, kernel, padding=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _per_frame(super().forward, x)


class PaddedConv3D(nn.Module):
    """A 3D convolution that repeats the first (and, when not causal, the last) frame so that time keeps its length."""

    def __init__(
        self, cin: int, cout: int, kernel=3, *, stride: int | tuple[int, int, int] = 1, padding: int = 0, causal: bool
    ):
        super().__init__()
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        self.conv = nn.Conv3d(cin, cout, kernel, stride=stride, padding=(0, padding, padding))
        reach = kernel[0] - 1
        self.pad = (0, 0, 0, 0, reach, 0) if causal else (0, 0, 0, 0, reach // 2, reach // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, self.pad, mode="replicate"))


class _ResnetBlock(nn.Module):
    def __init__(self, cin: int, cout: int, dropout: float, conv):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, cin, eps=1e-6)
        self.conv1 = conv(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, cout, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = conv(cin, cout, 1)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class ResnetBlock2D(_ResnetBlock):
    """Frames apart: also the group norm takes the statistics of one frame."""

    def __init__(self, cin: int, cout: int, *, dropout: float, causal: bool):
        super().__init__(cin, cout, dropout, nn.Conv2d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _per_frame(self.block, x)


class ResnetBlock3D(_ResnetBlock):
    def __init__(self, cin: int, cout: int, *, dropout: float, causal: bool):
        super().__init__(cin, cout, dropout, lambda *args, **kwargs: PaddedConv3D(*args, causal=causal, **kwargs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class AttnBlock3D(nn.Module):
    """Single-head attention among the positions of a frame; the norm alone looks over all frames."""

    def __init__(self, channels: int, *, causal: bool):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (self._conv(channels, causal) for _ in range(4))

    def _conv(self, channels: int, causal: bool) -> nn.Module:
        return PaddedConv3D(channels, channels, 1, causal=causal)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).movedim(1, -1) for conv in (self.q, self.k, self.v))  # [B, T, H, W, C], or one frame less T
        out = F.scaled_dot_product_attention(*(y.flatten(-3, -2) for y in (q, k, v))).view(q.shape)
        return x + self.proj_out(out.movedim(-1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x)


class AttnBlock(AttnBlock3D):
    """The same with image convolutions and norms, frame by frame."""

    def _conv(self, channels: int, causal: bool) -> nn.Module:
        return nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _per_frame(self.attend, x)


class Downsample(nn.Module):
    def __init__(self, channels: int, *, causal: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _per_frame(self.conv, F.pad(x, (0, 1, 0, 1)))


class SpatialDownsample2x(nn.Module):
    def __init__(self, channels: int, *, causal: bool):
        super().__init__()
        self.conv = PaddedConv3D(channels, channels, (1, 3, 3), stride=(1, 2, 2), causal=causal)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Spatial2xTime2x3DDownsample(nn.Module):
    def __init__(self, channels: int, *, causal: bool):
        super().__init__()
        self.conv = PaddedConv3D(channels, channels, 3, stride=2, causal=causal)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int, *, causal: bool, first: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _per_frame(self.conv, F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))


class SpatialUpsample2x(nn.Module):
    def __init__(self, channels: int, *, causal: bool, first: bool):
        super().__init__()
        self.conv = PaddedConv3D(channels, channels, (1, 3, 3), padding=1, causal=causal)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))


class Spatial2xTime2x3DUpsample(nn.Module):
    """Doubles all three axes. Causal: the first frame stays one. A lone frame is doubled by a learned convolution."""

    def __init__(self, channels: int, *, causal: bool, first: bool):
        super().__init__()
        self.conv = PaddedConv3D(channels, channels, 3, padding=1, causal=causal)
        self.causal = causal
        if first and not causal:
            self.temporal_up_conv = nn.ConvTranspose3d(channels, channels, (2, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.causal:
            parts = [(x[:, :, :1], (1, 2, 2)), (x[:, :, 1:], (2, 2, 2))]
        elif x.shape[2] == 1:
            parts = [(self.temporal_up_conv(x), (1, 2, 2))]
        else:
            parts = [(x, (2, 2, 2))]
        grown = [F.interpolate(y, scale_factor=scale, mode="trilinear") for y, scale in parts if y.shape[2]]
        return self.conv(torch.cat(grown, dim=2))


_LAYERS = {
    layer.__name__: layer
    for layer in (Conv2d, PaddedConv3D, ResnetBlock2D, ResnetBlock3D, AttnBlock, AttnBlock3D, Downsample)
    + (SpatialDownsample2x, Spatial2xTime2x3DDownsample, Upsample, SpatialUpsample2x, Spatial2xTime2x3DUpsample)
}


def _layer(name: str):
    if name not in _LAYERS:
        raise InputError(f"videovae: unknown layer {name!r}, known are {', '.join(_LAYERS)}")
    return _LAYERS[name]


# ---------------------------------------------------------------------------------------------------------------------
# Network


class _Half(nn.Module):
    """What encoder and decoder share."""

    mid: Any  # modules whose parts bear the names of DFoT's weights
    norm_out: nn.Module
    conv_out: nn.Module

    def _build_mid(self, channels: int, resnet: str, attention: str, config: VideoVAEConfig) -> None:
        causal = config.is_causal
        self.mid = nn.Module()
        self.mid.block_1 = _layer(resnet)(channels, channels, dropout=config.dropout, causal=causal)
        self.mid.attn_1 = _layer(attention)(channels, causal=causal)
        self.mid.block_2 = _layer(resnet)(channels, channels, dropout=config.dropout, causal=causal)

    def _build_level(self, cin: int, cout: int, count: int, resnet: str, attention: str | None, config) -> Any:
        causal = config.is_causal
        level: Any = nn.Module()
        level.block, level.attn = nn.ModuleList(), nn.ModuleList()
        for i in range(count):
            level.block.append(_layer(resnet)(cout if i else cin, cout, dropout=config.dropout, causal=causal))
            if attention:
                level.attn.append(_layer(attention)(cout, causal=causal))
        return level

    def _run_mid(self, x: torch.Tensor) -> torch.Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    @staticmethod
    def _run_level(level: Any, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(level.block):
            x = block(x)
            if len(level.attn):
                x = level.attn[i](x)
        return x

    def _run_out(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(x)))


class Encoder(_Half):
    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        causal, base = config.is_causal, config.hidden_size
        self.conv_in = _layer(config.encoder_conv_in)(3, base, 3, padding=1, causal=causal)
        self.down = nn.ModuleList()
        channels, size = base, config.resolution
        for level, mult in enumerate(config.hidden_size_mult):
            attention = config.encoder_attention if size in config.attn_resolutions else None
            resnet = config.encoder_resnet_blocks[level]
            down = self._build_level(channels, base * mult, config.num_res_blocks, resnet, attention, config)
            channels = base * mult
            if name := config.encoder_spatial_downsample[level]:
                down.downsample = _layer(name)(channels, causal=causal)
                size //= 2
            self.down.append(down)
        self._build_mid(channels, config.encoder_mid_resnet, config.encoder_attention, config)
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        out = 2 * config.z_channels if config.double_z else config.z_channels
        self.conv_out = _layer(config.encoder_conv_out)(channels, out, 3, padding=1, causal=causal)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        level: Any
        for level in self.down:
            x = self._run_level(level, x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self._run_out(self._run_mid(x))


class Decoder(_Half):
    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        causal, base, levels = config.is_causal, config.hidden_size, len(config.hidden_size_mult)
        channels = base * config.hidden_size_mult[-1]
        self.conv_in = _layer(config.decoder_conv_in)(config.z_channels, channels, 3, padding=1, causal=causal)
        self._build_mid(channels, config.decoder_mid_resnet, config.decoder_attention, config)
        self.up = nn.ModuleList()
        size = config.resolution // 2 ** (levels - 1)
        for level in reversed(range(levels)):
            attention = config.decoder_attention if size in config.attn_resolutions else None
            resnet, width = config.decoder_resnet_blocks[level], base * config.hidden_size_mult[level]
            up = self._build_level(channels, width, config.num_res_blocks + 1, resnet, attention, config)
            channels = width
            if name := config.decoder_spatial_upsample[level]:
                up.upsample = _layer(name)(channels, causal=causal, first=level == levels - 1)
                size *= 2
            self.up.insert(0, up)
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = _layer(config.decoder_conv_out)(channels, 3, 3, padding=1, causal=causal)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = self._run_mid(self.conv_in(z))
        parts: Any = reversed(self.up)
        for level in parts:
            z = self._run_level(level, z)
            if hasattr(level, "upsample"):
                z = level.upsample(z)
        return self._run_out(z)


class VideoVAE(nn.Module):
    """Encoder and decoder for one chunk: `moments` [B, 3, t, H, W] -> [B, 2 C, t', h, w], `decode` back from
    [B, C, t', h, w]."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_layer:
            conv, causal, z, c = _layer(config.q_conv), config.is_causal, config.z_channels, config.embed_dim
            self.quant_conv = conv(2 * z, 2 * c, 1, causal=causal)
            self.post_quant_conv = conv(c, z, 1, causal=causal)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encoder(x)
        return self.quant_conv(h) if self.config.use_quant_layer else h

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z) if self.config.use_quant_layer else z)


class VideoVAETokenizer(nn.Module):
    """A frozen VideoVAE behind the tokenizer interface, with per-channel normalisation (z - mean) / std.

    A non-causal model sees chunks of `temporal_length` frames alone. In front of a clip of k chunks and one frame more,
    temporal_length - 1 frames are added (zeros, mid-grey, or copies of the first frame, as the model was trained), so
    frame 0 is a chunk of its own: 17 frames give 5 latents, and frames 1-4 decide latent 1. A causal model takes a
    whole clip.

    `encode` gives the means of the posterior, `draw` values drawn from it, as DFoT's training takes them. The
    statistics of Kinetics-600 are DFoT's. Whether they were taken of draws or of means is not published with them;
    means vary a little less, by the posterior's own variance. Which of them a network was trained on is recorded with
    it and with encoded clips.

    Args:
        model: the network.
        mean, std: of each latent channel. None takes those of Kinetics-600, which fit the released 16-channel model.
        chunks: chunks that go through the network at once; bounds the memory.
    """

    model: VideoVAE
    mean: torch.Tensor
    std: torch.Tensor
    compression: tuple[int, int, int]

    def __init__(self, model: VideoVAE, mean=None, std=None, *, chunks: int = 32):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.config, self.channels, self.chunks = model.config, model.config.channels, chunks
        self.compression = (self.config.time_factor, self.config.space_factor, self.config.space_factor)
        mean, std = mean or K600_MEAN, std or K600_STD
        if not len(mean) == len(std) == self.channels:
            raise InputError(f"videovae: {len(mean)} means and {len(std)} deviations, expected {self.channels} of each")
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a clip's latents; ValueError when it cannot be encoded."""
        length, (t, s, _) = self.config.temporal_length, self.compression
        step = t if self.config.is_causal else length
        fits = frames >= 1 and (frames - 1) % step == 0 and not (self.config.is_causal and frames > length)
        if not fits or height < 1 or width < 1 or height % s or width % s:
            most = f", at most {length}," if self.config.is_causal else ""
            raise ValueError(
                f"videovae: a clip of {frames} x {height} x {width}: expected 1 + a multiple of {step} frames{most} and"
                f" sides that {s} divides"
            )
        chunks = (frames - 1) // step + 1
        return chunks * (step // t), height // s, width // s, self.channels

    def num_frames(self, latent_frames: int) -> int:
        """Video frames that so many latent frames decode to."""
        step = 1 if self.config.is_causal else self.config.temporal_length // self.compression[0]
        if latent_frames % step:
            raise ValueError(f"videovae: {latent_frames} latent frames, expected a multiple of {step}")
        return (latent_frames // step - 1) * step * self.compression[0] + 1

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> latents fp32 [B, T, H/s, W/s, C], mean 0 and variance 1 per channel."""
        mean, _ = self._posterior(video)
        return (mean - self.mean) / self.std

    @torch.no_grad()
    def draw(self, video: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """As `encode`, but mean + exp(log variance / 2) * noise, the log variance clamped to [-30, 20].

        Args:
            seeds: int64 [B], each of a clip's noise: it does not depend on the other clips of the batch, nor on the
                device.
        """
        mean, log_variance = self._posterior(video)
        if not log_variance.shape[-1]:
            raise InputError("videovae: a model with double_z=False has no posterior to draw from")
        noises = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds.tolist()]
        deviation = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
        return (mean + deviation * torch.stack(noises).to(mean.device) - self.mean) / self.std

    def _posterior(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the latents, fp32 [B, T, H/s, W/s, C] each, before they are normalised."""
        batch, frames, _, height, width = video.shape
        self.latent_shape(frames, height, width)
        x = rearrange(video, "b f c h w -> b c f h w").to(next(self.model.parameters()).dtype)
        if not self.config.is_causal:
            length = self.config.temporal_length
            first = torch.zeros_like(x[:, :, :1]) if self.config.first_padding_mode == "zero" else x[:, :, :1]
            x = torch.cat([first.expand(-1, -1, length - 1, -1, -1), x], dim=2)
            x = rearrange(x, "b c (chunks f) h w -> (b chunks) c f h w", f=length)
        moments = torch.cat([self.model.moments(part) for part in x.split(self.chunks)])
        moments = rearrange(moments, "(b chunks) c t h w -> b (chunks t) h w c", b=batch).float()
        return moments[..., : self.channels], moments[..., self.channels :]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, T, H, W, C] -> video fp32 [B, F, 3, H s, W s], about in [-1, 1], not clamped."""
        batch, T, _, _, channels = latents.shape
        if channels != self.channels:
            raise ValueError(f"videovae: latents {list(latents.shape)}: expected {self.channels} channels")
        frames = self.num_frames(T)
        z = (latents * self.std + self.mean).to(next(self.model.parameters()).dtype)
        per_chunk = T if self.config.is_causal else self.config.temporal_length // self.compression[0]
        z = rearrange(z, "b (chunks t) h w c -> (b chunks) c t h w", t=per_chunk)
        x = torch.cat([self.model.decode(part) for part in z.split(self.chunks)])
        x = rearrange(x, "(b chunks) c f h w -> b (chunks f) c h w", b=batch)
        return x[:, x.shape[1] - frames :].float()

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` reads back without any pickle."""
        folder = Path(folder)
        with atomic_path(folder / "model.safetensors") as temporary:
            save_file(self.model.state_dict(), temporary)
        values = {"tokenizer": "videovae", "model_cfg": asdict(self.config)}
        values |= {"mean": self.mean.tolist(), "std": self.std.tolist()}
        with atomic_path(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(values, indent=1))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, trust_pickle: bool = False) -> VideoVAETokenizer:
        """Reads a folder that `save` wrote, or a released checkpoint.

        A checkpoint is a torch file with `model_cfg` and either `optimizer_states[0]["ema"]`, a list of EMA weights in
        the order of the network's parameters, or `state_dict` with names that start with "vae.". The released files
        hold pickled objects besides tensors and are read only with `trust_pickle`.
        """
        path = Path(path)
        if path.is_dir():
            values = read_json(path / "config.json")
            if values.get("tokenizer") != "videovae":
                raise InputError(
                    f"{path / 'config.json'}: tokenizer is {values.get('tokenizer')!r}, expected 'videovae'"
                )
            with configured_by(path / "config.json"):
                model = VideoVAE(VideoVAEConfig.from_dict(values["model_cfg"]))
                tokenizer = cls(model, values["mean"], values["std"])
            load_state(model, load_safetensors(path / "model.safetensors"), path / "model.safetensors")
            return tokenizer
        checkpoint = load_torch(path, trust_pickle=trust_pickle)
        if not isinstance(checkpoint, dict) or "model_cfg" not in checkpoint:
            raise InputError(f"{path}: has no 'model_cfg', expected a checkpoint of DFoT's VideoVAE")
        with configured_by(path):
            model = VideoVAE(VideoVAEConfig.from_dict(_plain(checkpoint["model_cfg"])))
        states = checkpoint.get("optimizer_states") or []
        if states and "ema" in states[0]:
            names, ema = [name for name, _ in model.named_parameters()], states[0]["ema"]
            if len(names) != len(ema):
                raise InputError(f"{path}: holds {len(ema)} EMA weights, expected {len(names)}")
            state = dict(zip(names, ema, strict=True))
        else:
            state = checkpoint.get("state_dict", {})
            state = {key.removeprefix("vae."): value for key, value in state.items() if key.startswith("vae.")}
        load_state(model, state, path)
        return cls(model)


def _plain(config) -> dict:
    """A configuration object (a dict, or OmegaConf's DictConfig) as plain values."""
    return {
        str(key): list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else value
        for key, value in config.items()
    }
