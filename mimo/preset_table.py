"""The presets as a Markdown table, in the rows of the papers' tables: `python -m mimo.preset_table > docs/presets.md`."""

from __future__ import annotations

from mimo.config import PRESETS, MiMoConfig, SampleConfig, TrainConfig

HEADING = """# Presets

What `--preset NAME` stands for, in the rows of MiMo's Table 10. Sources: MiMo's Tables 10 and 12, FAR's Tables 1 and 8.
Made by `python -m mimo.preset_table`; a test compares it with the presets and the presets with the papers.
"""


def rows(name: str) -> dict[str, str]:
    """What a preset says, by row of the table."""
    model, train, sample = (kind.from_preset(name) for kind in (MiMoConfig, TrainConfig, SampleConfig))
    decodes = model.mask_weight > 0
    weight = "none"
    if model.min_snr_gamma is not None:
        fused = "" if model.min_snr_decay is None else f", rho {model.min_snr_decay:g}"
        weight = f"{'fused ' if fused else ''}min-SNR, gamma {model.min_snr_gamma:g}{fused}"
    guidance = {"history": sample.history_guidance, "class": sample.class_guidance}
    if model.num_actions:
        guidance["action"] = guidance.pop("class")
    told = {"classes": model.num_classes, "actions": model.num_actions}
    rope = f"theta {model.rope_theta:g}, {' '.join(map(str, model.rope_split or ['a third each']))}"
    return {
        "Recipe": model.recipe,
        "Input shape": " x ".join(map(str, model.video_shape)),
        "Conditions": ", ".join(f"{count} {what}" for what, count in told.items() if count) or "none",
        "Compression": " x ".join(map(str, model.compression)),
        "Latent shape": " x ".join(map(str, model.latent_shape)),
        "Depth": str(model.depth),
        "Embed dim": str(model.dim),
        "Heads": f"{model.heads} of {model.head_dim}",
        "RoPE": rope if model.positions == "rope" else model.positions,
        "Decoder depth": str(model.decoder_depth) if decodes else "none",
        "l": str(model.decoder_layer) if decodes else "none",
        "Parameterization": {"v": "v-prediction", "flow": "rectified flow"}[model.parameterization],
        "Weighting": weight,
        "Sampler": f"{ {'ddim': 'DDIM', 'euler': 'Euler'}[sample.sampler] }, {sample.steps} steps",
        "Guidance": ", ".join(f"{kind} {w:g}" for kind, w in guidance.items() if w != 1) or "none",
        "Context, frames": f"{sample.context_frames}, {sample.num_frames}",
        "Training steps": f"{train.steps:,}",
        "Batch size": str(train.batch_size),
        "AdamW betas": "{:g}, {:g}".format(*train.betas),
        "Weight decay": f"{train.weight_decay:g}",
        "Learning rate": f"{train.lr:g}",
        "Warm-up steps": f"{train.warmup:,}",
        "LR schedule": f"cosine to {train.lr_end:g}" if train.lr_schedule == "cosine" else "constant",
        "Gradient clipping": f"{train.grad_clip:g}",
        "Clean frames": f"{model.clean_context:g}" if model.clean_context else "none",
        "History dropped": f"{model.history_dropout:g}" if model.history_dropout else "none",
        "lambda": f"{model.mask_weight:g}" if decodes else "none",
        "Mask ratios": "{:g} to {:g}".format(*model.mask_ratio) if model.mask_ratio[1] else "none",
        "EMA decay": f"{train.ema_decay:g}",
    }


FAMILIES = ("mimo", "acdit", "dfot", "far", "video-dit")


def table() -> str:
    """The page: per family a table with the rows of the papers' tables and a column per preset."""
    page = [HEADING]
    for family in FAMILIES:
        names = [name for name in PRESETS if name.startswith(family + "-")]
        columns = [rows(name) for name in names]
        lines = [["", *(f"`{name}`" for name in names)], ["---"] * (1 + len(names))]
        lines += [[row, *(says[row] for says in columns)] for row in columns[0]]
        page.append(f"## {family}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(page)


if __name__ == "__main__":
    print(table(), end="")
