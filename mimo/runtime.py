"""What a network runs with, training or sampling: device, memory, precision, tokenizer, and latents of a batch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.data import to_float
from mimo.encoders import Encoder, build_encoder
from mimo.network.cross import Text
from mimo.tokenizers import build_tokenizer
from mimo.tokenizers.protocols import Tokenizer, VariationalTokenizer


def best_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def memory_of(device: torch.device) -> int:
    """Bytes that a process can get: what is free on a GPU, all of a host's memory or what its control group allows."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            bounds.append(int(file.read_text()))
    return min(bounds)


def config_tokenizer(config: MiMoConfig, weights: str | Path | None = None, *, trust_pickle: bool = False) -> Tokenizer:
    """The tokenizer of a network; ValueError when its latents are not what the network expects.

    Args:
        weights, trust_pickle: as `build_tokenizer` takes them; "dct" and "lapped" have none.
    """
    tokenizer = build_tokenizer(
        config.tokenizer,
        compression=config.compression,
        channels=config.channels,
        weights=weights,
        trust_pickle=trust_pickle,
    )
    shape = tokenizer.latent_shape(*config.video_shape)
    if shape != config.latent_shape:
        expected = zip(("frames", "height", "width", "channels"), config.latent_shape, shape, strict=True)
        wrong = [f"{name}={value}: expected {made}" for name, value, made in expected if value != made]
        raise ValueError(
            f"{', '.join(wrong)}, as the tokenizer {config.tokenizer!r} makes of clips of "
            f"video_frames={config.video_frames} frames, {config.video_shape[1]} x {config.video_shape[2]} pixels"
        )
    if config.num_actions and tokenizer.num_frames(config.frames) != config.frames:
        raise ValueError(
            f"num_actions={config.num_actions}: expected a tokenizer with one latent frame per video frame"
        )
    return tokenizer


def config_encoder(config: MiMoConfig, weights: str | Path | None = None) -> Encoder | None:
    """The encoder that a network is aligned with; None for one that is not. ValueError when it cannot encode the clips,
    or has not the channels that the network expects."""
    if config.repa_weight == 0:
        if weights is not None:
            raise ValueError(f"encoder_weights={weights}: expected none, as nothing is aligned (repa_weight=0)")
        return None
    encoder = build_encoder(config.repa_encoder, channels=config.repa_channels, weights=weights)
    encoder.grid(*config.video_shape)
    return encoder


def recorded_tokenizer(configs: dict[str, Any]) -> dict[str, str | None]:
    """Path of the tokenizer's weights (None: it has none) and its checksum in a checkpoint; one of before they were
    recorded has no checksum, which is that of no tokenizer."""
    return {"weights": None, "sha256": None} | configs.get("tokenizer", {})


def recorded_encoder(configs: dict[str, Any]) -> dict[str, str | None]:
    """The same of the encoder that a network is aligned with; a checkpoint of a network that is not has neither."""
    return {"weights": None, "sha256": None} | configs.get("encoder", {})


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 arithmetic over fp32 weights, or nothing for "fp32"; "fp8" is bf16 around what `use_float8` sets."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32")


def to_latents(
    batch: dict[str, Tensor], tokenizer: Tokenizer, config: MiMoConfig, device: torch.device, posterior: str = "mean"
) -> tuple[Tensor, dict[str, Any]]:
    """A batch of the loader -> latents [B, T, H, W, C] and what the network is conditioned on, all on the device.

    posterior: "mean", or "sample" for latents drawn with the batch's `noise_seed`.
    """
    if "latents" in batch:
        latents = batch["latents"].to(device, non_blocking=True)
    else:
        with torch.no_grad():
            video = to_float(batch["video"].to(device, non_blocking=True))
            if posterior == "sample":
                assert isinstance(tokenizer, VariationalTokenizer)  # see `require_posterior`
                latents = tokenizer.draw(video, batch["noise_seed"])
            else:
                latents = tokenizer.encode(video)
    labels = batch["label"].to(device) if config.num_classes else None
    actions = batch["actions"].to(device) if config.num_actions else None
    intervals = batch["interval"].to(device) if config.max_interval else None
    conditions: dict[str, Any] = {"labels": labels, "actions": actions, "intervals": intervals}
    if config.text_dim:
        text = Text.padded(batch["text"])  # on the host, where its lengths are wanted
        conditions["text"] = text._replace(features=text.features.to(device, non_blocking=True))
    return latents, conditions


def to_features(batch: dict[str, Tensor], encoder: Encoder | None, device: torch.device) -> Tensor | None:
    """What the encoder makes of the clips of a batch, or has made when they were encoded: [B, T', H', W', E] on the
    device; None for neither."""
    if "features" in batch:
        return batch["features"].to(device, non_blocking=True)
    return None if encoder is None else encoder.encode(to_float(batch["video"].to(device, non_blocking=True)))
