"""The presets as Markdown tables, a line each and in the rows of the papers' tables:
`python -m mimo.preset_table > docs/presets.md`."""

from __future__ import annotations

import torch

from mimo.config import PRESETS, MiMoConfig, SampleConfig, TrainConfig
from mimo.network.network import TRAINING_ONLY, MiMo
from mimo.stages import parse_stages

HEADING = """# Presets

What `--preset NAME` stands for, in the rows of MiMo's Table 10. Sources: MiMo's Tables 10 and 12, FAR's Tables 1 and 8,
VideoMAR's Sec. 5.1.
Made by `python -m mimo.preset_table`; a test compares it with the presets and the presets with the papers.
"""


PARAMETERIZATIONS = {"v": "v-prediction", "flow": "rectified flow", "epsilon": "noise prediction per token"}
SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "ddpm": "DDPM"}


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
    told = {"classes": model.num_classes, "actions": model.num_actions, "wide text features": model.text_dim}
    stages = parse_stages(train.stages)
    masks = f", {sample.mask_steps} mask steps" if model.token_depth else ""
    alignment = f"{model.repa_frames}, layer {model.repa_layer}, weight {model.repa_weight:g}, {model.repa_encoder}"
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
        "Parameterization": PARAMETERIZATIONS[model.parameterization],
        "Weighting": weight,
        "Sampler": f"{SAMPLERS[sample.sampler]}, {sample.steps} steps" + masks,
        "Token head": f"{model.token_depth} x {model.token_width}" if model.token_depth else "none",
        "Guidance": ", ".join(f"{kind} {w:g}" for kind, w in guidance.items() if w != 1) or "none",
        "Context, frames": f"{sample.context_frames}, {sample.num_frames}",
        "Training steps": f"{train.steps:,}",
        "Stages before": ", ".join(f"{s.frames} x {s.height} x {s.width} until {s.until:,}" for s in stages) or "none",
        "Batch size": str(train.batch_size),
        "AdamW betas": "{:g}, {:g}".format(*train.betas),
        "Weight decay": f"{train.weight_decay:g}",
        "Learning rate": f"{train.lr:g}",
        "Warm-up steps": f"{train.warmup:,}",
        "LR schedule": f"cosine to {train.lr_end:g}" if train.lr_schedule == "cosine" else "constant",
        "Gradient clipping": f"{train.grad_clip:g}",
        "Clean frames": f"{model.clean_context:g}" if model.clean_context else "none",
        "Coarse frames": (
            f"{model.coarse_stride} x {model.coarse_stride} tokens in one, before the latest {model.fine_frames} frames"
            if model.coarse_stride
            else "none"
        ),
        "History dropped": f"{model.history_dropout:g}" if model.history_dropout else "none",
        "lambda": f"{model.mask_weight:g}" if decodes else "none",
        "Mask ratios": "{:g} to {:g}".format(*model.mask_ratio) if model.mask_ratio[1] else "none",
        "REPA": alignment if model.repa_weight else "none",
        "EMA decay": f"{train.ema_decay:g}",
    }


ALL = """## All of them

Parameters are those of sampling, and behind the plus those that training adds.

"""
FAMILIES = ("mimo", "acdit", "dfot", "far", "video-dit", "repa", "magi", "videomar")


def table() -> str:
    """The page: all presets, then per family a table with the rows of the papers' tables and a column per preset."""
    page = [HEADING, ALL + short_table()]
    for family in FAMILIES:
        names = [name for name in PRESETS if name.startswith(family + "-")]
        columns = [rows(name) for name in names]
        lines = [["", *(f"`{name}`" for name in names)], ["---"] * (1 + len(names))]
        lines += [[row, *(says[row] for says in columns)] for row in columns[0]]
        page.append(f"## {family}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(page)


SHORT = {"Depth x width": "{Depth} x {Embed dim}", "Heads": "{Heads}", "Latent T x H x W x C": "{Latent shape}"} | {
    "Objective": "{Parameterization}",
    "Sampler": "{Sampler}",
    "Guidance": "{Guidance}",
}


def short_table() -> str:
    """A line per preset, with the parameters that sampling needs and those that training adds (decoder, projection)."""
    lines = [["Preset", *SHORT, "Parameters"], ["---"] * (2 + len(SHORT))]
    for name in PRESETS:
        says = rows(name)
        with torch.device("meta"):
            network = MiMo(MiMoConfig.from_preset(name))
        added = sum(p.numel() for name, p in network.named_parameters() if name.split(".")[0] in TRAINING_ONLY)
        sampled = sum(p.numel() for p in network.parameters()) - added
        counts = f"{sampled / 1e6:.1f} M" + (f" + {added / 1e6:.1f} M" if added else "")
        told = "" if says["Conditions"] == "none" else f" ({says['Conditions']})"
        lines.append([f"`{name}`{told}", *(form.format(**says) for form in SHORT.values()), counts])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(table(), end="")
