"""The deep-compression autoencoder (Chen et al. 2025) as FAR has it: every frame alone, 32 channels, 8 to 32x
smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import nn

from mimo.errors import InputError
from mimo.tokenizers.weights import configured_by, load_safetensors, load_state, load_torch, read_json

# FAR's factor to about unit variance; it belongs to the 32x UCF-101 model and is what FAR's 8x and 16x files name too.
FAR_SCALE = 0.2889


def far_config(compression: int, channels: int = 32, width: int = 128) -> dict:
    """FAR's architecture for 8x, 16x or 32x, as keyword arguments of diffusers.AutoencoderDC. `width` scales it."""
    levels = {8: 4, 16: 5, 32: 6}.get(compression)
    if levels is None:
        raise InputError(f"dcae: compression {compression}, expected 8, 16 or 32")
    blocks = tuple(width * factor for factor in (1, 2, 4, 4, 8, 8)[:levels])
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (levels - 3)
    return {
        "latent_channels": channels,
        "attention_head_dim": 32,
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_block_out_channels": blocks,
        "decoder_block_out_channels": blocks,
        "encoder_layers_per_block": (0, 4, 8, 2, 2, 2)[:levels],
        "decoder_layers_per_block": (0, 5, 10, 2, 2, 2)[:levels],
        "encoder_qkv_multiscales": ((),) * levels,
        "decoder_qkv_multiscales": ((),) * levels,
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * (levels - 3),
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * (levels - 3),
        "scaling_factor": FAR_SCALE,
    }


def autoencoder_class():
    """diffusers.AutoencoderDC; InputError where diffusers is not installed."""
    try:
        from diffusers import AutoencoderDC
    except ImportError:
        raise InputError("the tokenizer 'dcae' needs the package diffusers: pip install diffusers") from None
    return AutoencoderDC


class DCAETokenizer(nn.Module):
    """A frozen AutoencoderDC behind the tokenizer interface: latents are its outputs times `scale`.

    Args:
        model: a diffusers.AutoencoderDC.
        scale: None takes the model's own scaling_factor.
        frames: frames that go through the network at once; bounds the memory.
    """

    model: Any  # a diffusers.AutoencoderDC, which has no types
    scale: float
    channels: int
    compression: tuple[int, int, int]

    def __init__(self, model: Any, scale: float | None = None, *, frames: int = 64):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.scale = model.config.scaling_factor if scale is None else scale
        # An empty first level means that the first convolution itself halves the picture.
        self.factor = 2 ** (len(model.config.encoder_block_out_channels) - 1)
        self.compression, self.channels, self.frames = (
            (1, self.factor, self.factor),
            model.config.latent_channels,
            frames,
        )

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a clip's latents; ValueError when it cannot be encoded."""
        f = self.factor
        if frames < 1 or height < 1 or width < 1 or height % f or width % f:
            raise ValueError(f"dcae: a clip of {frames} x {height} x {width}: expected sides that {f} divides")
        return frames, height // f, width // f, self.channels

    def num_frames(self, latent_frames: int) -> int:
        """Video frames that so many latent frames decode to."""
        return latent_frames

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> latents fp32 [B, F, H/f, W/f, C]."""
        batch, frames, _, height, width = video.shape
        self.latent_shape(frames, height, width)
        x = rearrange(video, "b f c h w -> (b f) c h w").to(self.model.dtype)
        z = torch.cat([self.model.encode(part).latent for part in x.split(self.frames)])
        return rearrange(z, "(b f) c h w -> b f h w c", b=batch).float() * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, T, H, W, C] -> video fp32 [B, T, 3, H f, W f], about in [-1, 1], not clamped."""
        if latents.shape[-1] != self.channels:
            raise ValueError(f"dcae: latents {list(latents.shape)}: expected {self.channels} channels")
        z = rearrange(latents / self.scale, "b f h w c -> (b f) c h w").to(self.model.dtype)
        x = torch.cat([self.model.decode(part).sample for part in z.split(self.frames)])
        return rearrange(x, "(b f) c h w -> b f c h w", b=len(latents)).float()

    def save(self, folder: str | Path) -> None:
        """Writes diffusers' own layout, config.json and diffusion_pytorch_model.safetensors."""
        self.model.register_to_config(scaling_factor=self.scale)
        self.model.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, compression: int = 32) -> DCAETokenizer:
        """Reads a model.

        Args:
            source: a folder in diffusers' layout, a hub id "owner/name" (unless there is a folder "owner", where a file
                is meant and nothing is asked for), or a state dict (.safetensors, .pth) as FAR publishes them, whose
                architecture is FAR's for `compression`. Pickled objects are never loaded.
        """
        path = Path(source)
        if path.is_dir():
            config = read_json(path / "config.json")
            if config.get("_class_name") != "AutoencoderDC":
                raise InputError(
                    f"{path / 'config.json'}: is of class {config.get('_class_name')!r}, expected 'AutoencoderDC'"
                )
            with configured_by(path / "config.json"):
                model = autoencoder_class()(**{key: value for key, value in config.items() if not key.startswith("_")})
            weights = path / "diffusion_pytorch_model.safetensors"
            load_state(model, load_safetensors(weights), weights)
        elif path.suffix in (".safetensors", ".pth", ".pt", ".ckpt"):
            model = autoencoder_class()(**far_config(compression))
            load_state(model, load_safetensors(path) if path.suffix == ".safetensors" else load_torch(path), path)
        elif str(source).count("/") == 1 and not path.exists() and not path.parent.exists():
            model = _from_hub(str(source))
        else:
            raise InputError(f"{source}: no folder in diffusers' layout, no state dict and no hub id 'owner/name'")
        return cls(model)


def _from_hub(name: str) -> nn.Module:
    try:
        return autoencoder_class().from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read from the hub: {str(error).splitlines()[0]}") from None
