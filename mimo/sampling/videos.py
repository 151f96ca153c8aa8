"""From tokens to videos: the frames that a sampler makes, decoded, and the files they are written to."""

from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mimo.data import to_float, to_uint8
from mimo.runtime import autocast, config_tokenizer
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving

MIN_SIDE = 128  # small videos are written magnified until their shorter side has this many pixels


@torch.no_grad()
def generate(
    sampler: Sampler,
    *,
    tokenizer: nn.Module | None = None,
    context: Tensor | None = None,
    labels: Tensor | None = None,
    actions: Tensor | None = None,
    intervals: Tensor | None = None,
    count: int = 1,
    seed: int = 0,
    precision: Literal["bf16", "fp32", "fp8"] = "fp32",
    progress: bool = False,
    saving: Saving | None = None,
    resume: bool = False,
) -> Tensor:
    """Videos of the sampler's config.num_frames latent frames, uint8 [B, F, H, W, 3] on the CPU.

    Args:
        tokenizer: of the network; None makes the one that config_tokenizer gives without weights.
        context: uint8 [B, F, H, W, 3]; its first config.context_frames latent frames are continued, and kept as they
            are. Or latents fp32 [B, T, H, W, C], which come back decoded. None generates from nothing.
        labels: int64 [B].
        actions: int64 [B, config.num_frames].
        intervals: int64 [B], for a network that is told them.
        count: B where there is no context.
        seed: of the noise: the same seed, on the same device, gives the same videos.
        precision: see `autocast`; a network trained in fp8 is sampled in bf16.
        saving: where the run saves itself; with `resume`, where the run lies that is continued.
    """
    model, config = sampler.model, sampler.config
    device = next(model.parameters()).device
    tokenizer = (tokenizer or config_tokenizer(model.config)).to(device)
    latents = None
    if context is not None:
        if context.is_floating_point():
            latents = context[:, : config.context_frames].to(device)
        else:
            context = context[:, : tokenizer.num_frames(config.context_frames)]
            latents = tokenizer.encode(to_float(context.to(device)))
        latents, count = latents.flatten(2, 3), len(context)  # [B, T, N, C]
    generator = torch.Generator(device).manual_seed(seed)
    given = {"labels": labels, "actions": actions, "intervals": intervals}
    conditions = {name: None if value is None else value.to(device) for name, value in given.items()}
    with autocast(device, precision):
        if resume:
            frames = sampler.resume(saving)
        else:
            batch = None if latents is not None else count
            options = {"batch": batch, "generator": generator, "saving": saving}
            frames = sampler.stream(latents, config.num_frames, **options, **conditions)
        # The bar counts frames; tqdm's disable=None shows it on a terminal only.
        new = config.num_frames - (0 if latents is None else latents.shape[1])
        bar = {"total": new, "initial": frames.progress.done, "unit": "frame", "desc": "sampling", "leave": False}
        made = list(tqdm(frames, **bar, disable=None if progress else True))
    if resume:
        made = [frame.to(device) for frame in frames.saved()]
    latents = torch.cat([*([] if latents is None else [latents]), torch.stack(made, dim=1)], dim=1)
    c = model.config
    video = to_uint8(tokenizer.decode(latents.float().unflatten(2, (c.height, c.width)))).cpu()
    if context is not None and not context.is_floating_point():
        video[:, : context.shape[1]] = context  # not what the tokenizer made of it
    return video
