"""Previews: what the averaged weights predict of a few clips in the middle of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mimo.data import batches, to_uint8, write_video
from mimo.network.network import MiMo
from mimo.sampling.sampler import Sampler
from mimo.sampling.videos import MIN_SIDE, generate
from mimo.training.trainer import Trainer


class Preview:
    """Predicts (or, without context frames, generates) a few clips with the averaged weights, truth on the left.

    Raises ValueError at once, not in the middle of a run, for a sample_config that does not fit the network.
    """

    def __init__(self, trainer: Trainer, out: Path, clips: int = 2):
        self.out = out
        self.config = replace(trainer.sample_config, num_frames=trainer.model_config.frames)
        Sampler(trainer.model, self.config)
        self.batch_size = clips

    def __call__(self, trainer: Trainer) -> list[Path]:
        """All ranks have to call it; the first one predicts and writes."""
        averaged = trainer.averaged()
        with trainer.world.together():
            return self._write(trainer, averaged) if averaged is not None else []

    def _write(self, trainer: Trainer, averaged: MiMo) -> list[Path]:
        # Another seed, so that the clips are cut differently than in training.
        batch = next(batches(trainer.clips, self.batch_size, seed=trainer.config.seed + 1))
        clips = batch["latents"] if "latents" in batch else batch["video"]
        frames = trainer.shape.frames  # of the stage that training is in
        config = replace(self.config, num_frames=frames, context_frames=min(self.config.context_frames, frames - 1))
        videos = generate(
            Sampler(averaged, config),
            tokenizer=trainer.tokenizer,
            context=clips if config.context_frames else None,
            labels=batch["label"] if trainer.model_config.num_classes else None,
            actions=batch["actions"] if trainer.model_config.num_actions else None,
            intervals=batch["interval"] if trainer.model_config.max_interval else None,
            text=batch["text"] if trainer.model_config.text_dim else None,
            count=len(clips),
            seed=trainer.config.seed,
            precision=trainer.config.precision,
        )
        truth = to_uint8(trainer.tokenizer.decode(clips.to(trainer.device))).cpu() if "latents" in batch else clips
        pairs = torch.cat([truth, videos], dim=3)  # side by side: [B, F, H, 2 W, 3]
        stacked = torch.cat(list(pairs), dim=1).numpy()
        return [write_video(self.out / f"step_{trainer.step:08d}.mp4", stacked, min_side=MIN_SIDE)]
