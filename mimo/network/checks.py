"""What a network refuses of a batch, each in one line that names what was expected."""

from collections.abc import Sequence

from torch import Tensor

from mimo.config import MiMoConfig
from mimo.network.frames import FrameBatch
from mimo.network.packed import Packed

Tap = tuple[int, str]  # after this many layers, the rows of "clean" or of "noisy" (all other) frames


def check_frames(config: MiMoConfig, frames: int) -> None:
    if config.positions == "learned" and frames > config.frames:
        raise ValueError(f"{frames} frames: learned positions end at {config.frames}")


def check_batch(config: MiMoConfig, batch: FrameBatch) -> None:
    """Refuses what does not fit, by name."""
    frames, predicts_tokens = batch.frames.frames, config.token_depth > 0
    expected = [len(frames), config.tokens, config.token_channels]
    if list(batch.latents.shape) != expected:
        raise ValueError(f"latents are {list(batch.latents.shape)}: expected {expected}, [frames, tokens, channels]")
    known = {"clean", "masked" if predicts_tokens else "noisy"} | ({"coarse"} if config.coarse_stride else set())
    if unknown := {frame.kind for frame in frames} - known:
        embeds = " and ".join(map(repr, sorted(known)))
        raise ValueError(f"frames are {', '.join(sorted(unknown))}: this network embeds {embeds} ones")
    expected = config.coarse_tokens, config.coarse_stride
    for frame in frames:
        if frame.kind == "coarse" and (frame.tokens, frame.stride) != expected:
            raise ValueError(
                f"a coarse frame has {frame.tokens} tokens, stride {frame.stride}: expected {expected[0]}, stride "
                f"{expected[1]}"
            )
    check_frames(config, 1 + max((frame.time for frame in frames), default=-1))
    modulated = sum(frame.kind in ("noisy", "coarse") for frame in frames)
    found = 0 if batch.timestep is None else batch.timestep.numel()
    if found != modulated:
        raise ValueError(f"timestep has {found} numbers: expected {modulated}, one per frame that is not clean")
    check_recent(config, batch.recent, sum(frame.kind == "noisy" for frame in frames))
    rows = sum(frame.tokens for frame in frames)
    if (batch.masked is None) == predicts_tokens:
        raise ValueError("masked rows: expected them with a token head (token_depth > 0), and only then")
    if batch.masked is not None and batch.masked.shape != (rows,):
        raise ValueError(f"masked is {list(batch.masked.shape)}: expected [{rows}], one per row")
    if batch.tokens is None:
        whole = all(frame.tokens == config.tokens or frame.kind == "coarse" for frame in frames)
        if not whole:
            raise ValueError(f"tokens=None: expected whole frames, of {config.tokens} tokens each")
    elif batch.tokens.shape != (rows,):
        raise ValueError(f"tokens are {list(batch.tokens.shape)}: expected [{rows}], one per row")


def check_recent(config: MiMoConfig, recent: Tensor | None, frames: int) -> None:
    """recent: what `frames` noisy frames are told of those right before them."""
    expected = [frames, config.tokens, config.recent_frames * config.token_channels] if config.recent_frames else None
    found = None if recent is None else list(recent.shape)
    if found != expected:
        raise ValueError(f"recent is {found}: expected {expected} with recent_frames={config.recent_frames}")


def check_taps(config: MiMoConfig, packed: Packed, taps: Sequence[Tap], decodes: bool, *, last_reads: bool) -> None:
    """last_reads: clean rows go through the whole last block."""
    present = {"clean": packed.clean, "noisy": packed.predicted}
    for layer, kind in taps:
        if kind not in present or not 1 <= layer <= config.depth:
            raise ValueError(f"tap {(layer, kind)}: expected (1..{config.depth}, 'clean' or 'noisy')")
        if present[kind] is None:
            raise ValueError(f"tap {(layer, kind)}: the batch has no {kind} frames")
        if layer == config.depth and kind == "clean" and not last_reads:
            raise ValueError(
                f"tap {(layer, kind)}: clean rows end in the last block, as its second norm has no weights for "
                f"them unless training reads there (decoder_layer={config.decoder_layer})"
            )
        if layer == config.depth and kind == "clean" and packed.sizes is not None:
            raise ValueError(f"tap {(layer, kind)}: expected a batch without coarse frames, which end there")
    if packed.predicted is None and not taps and not decodes:
        raise ValueError("clean frames alone: expected masked ones and a decoder, or taps; nothing else is computed")
