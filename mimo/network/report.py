"""What a network consists of."""

from typing import Any

from mimo.network.network import TRAINING_ONLY, MiMo


def parameter_report(model: MiMo) -> str:
    """A table of parameter counts by part; decoder and projection are needed in training only."""
    parts: dict[str, list[Any]] = {
        "embedding": [model.embed, model.embed_coarse, model.positions, model.places],
        "conditioning": [model.time, model.classes, model.actions, model.intervals, model.noise, model.text_norm],
        "attention": [module for block in model.blocks for module in (block.attention, block.cross)],
        "MLP": [block.mlp for block in model.blocks],
        "norms and modulation": [
            norm for block in model.blocks for norm in (block.norm1, block.norm_cross, block.norm2)
        ],
        "head": [model.norm, model.head],
        "decoder": [model.decoder],
        "projection": [model.projection],
    }
    counts: dict[str, int] = {
        name: sum(p.numel() for m in modules if m is not None for p in m.parameters())
        for name, modules in parts.items()
    }
    if model.mask_token is not None:
        counts["embedding"] += model.mask_token.numel()
    if model.null_text is not None:
        counts["conditioning"] += model.null_text.numel()
    total = sum(counts.values())
    counts |= {"total": total, "total when sampling": total - sum(counts[name] for name in TRAINING_ONLY)}
    return "\n".join(f"{name:<22}{count:>15,}" for name, count in counts.items())
