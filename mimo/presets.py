"""The presets: what the papers say, as the fields of mimo.config that differ from their defaults.

`python -m mimo.preset_table` prints them as the table of docs/presets.md. A preset has one name in all three tables.
Sources: MiMo's Tables 10 and 12, and FAR's Tables 1 and 8 where MiMo's experiment follows FAR without saying more.
"""

from __future__ import annotations

from typing import Any

B = {"depth": 12, "dim": 768, "heads": 12, "decoder_layer": 9}
XL = {"depth": 28, "dim": 1152, "heads": 16, "decoder_layer": 23}

K600 = {"frames": 5, "height": 16, "width": 16, "channels": 16, "compression": (4, 8, 8), "video_frames": 17} | {
    "parameterization": "v",
    "min_snr_gamma": 5.0,
    "min_snr_decay": 0.96,
    "history_dropout": 0.1,
}
UCF101 = {"frames": 16, "height": 8, "width": 8, "channels": 32, "compression": (1, 32, 32), "video_frames": 16} | {
    "parameterization": "flow"
}
MINECRAFT = UCF101 | {"frames": 300, "compression": (1, 16, 16), "video_frames": 300, "num_actions": 4}
DMLAB = MINECRAFT | {"compression": (1, 8, 8)}
# 24 of the 192 numbers of an 8x8 patch: a little blurred, and little enough to be learnt by a CPU in minutes. A frame
# has 36 tokens, and a small shape covers one or two: masks as large as the papers' would often hide it altogether.
TINY = {"depth": 4, "dim": 96, "heads": 4, "decoder_depth": 1, "decoder_layer": 3, "parameterization": "flow"} | {
    "frames": 8,
    "height": 6,
    "width": 6,
    "channels": 24,
    "compression": (1, 8, 8),
    "video_frames": 8,
    "mask_ratio": (0.1, 0.25),
}

# App. E: the baselines are MiMo's network and hyper-parameters with another training strategy.
UNMASKED = {"mask_ratio": (0.0, 0.0), "mask_weight": 0.0}
ACDIT = UNMASKED | {"recipe": "acdit"}
ONE_COPY = UNMASKED | {"separate_ln": False}  # there are no clean frames to have norms of their own
DFOT = ONE_COPY | {"recipe": "dfot"}
FAR = ONE_COPY | {"recipe": "far", "clean_context": 0.1}
VIDEO_DIT = ONE_COPY | {"recipe": "video_dit"}
FAR_LONG = FAR | {"recipe": "far_long", "coarse_stride": 4, "fine_frames": 16}  # FAR's Table 8
# Sec. 3.2 and Table 3: ACDiT and MiMo, aligned with VideoMAE-L behind layer 4 at weight 0.5.
REPA = {"repa_weight": 0.5, "repa_layer": 4, "repa_frames": "both", "repa_encoder": "videomae", "repa_channels": 1024}
REPA_HISTORY, REPA_FUTURE = REPA | {"repa_frames": "history"}, REPA | {"repa_frames": "future"}
# An encoder without weights, in the middle of a shallow network.
REPA_TINY = REPA | {"repa_layer": 2, "repa_encoder": "hog", "repa_channels": 28, "repa_hidden": 128}
# FAR's own experiments: sizes of its Table 1; positions are those of its published code.
FAR_POSITIONS = {"rope_theta": 10_000.0, "rope_split": (16, 24, 24)}
FAR_B = {"depth": 12, "dim": 768, "heads": 12} | FAR_POSITIONS
FAR_M = {"depth": 12, "dim": 1024, "heads": 16} | FAR_POSITIONS
FAR_L = {"depth": 24, "dim": 1024, "heads": 16} | FAR_POSITIONS
FAR_XL = {"depth": 28, "dim": 1152, "heads": 18} | FAR_POSITIONS

# VideoMAR's Sec. 5.1; what it does not say is decided in mimo.recipes.videomar. Latents are those of Cosmos-Tokenizer.
TOKEN_HEAD = {"parameterization": "epsilon", "mask_weight": 0.0, "mask_ratio": (0.7, 1.0), "decoder_layer": 1}
VIDEOMAR = (
    TOKEN_HEAD
    | {"recipe": "videomar", "depth": 36, "dim": 1536, "heads": 16, "rope_theta": 10_000.0}
    | {
        "token_depth": 3,
        "token_width": 1280,
        "channels": 16,
        "frames": 7,
        "cross_attention": True,
        "text_dim": 1536,
    }
)
VIDEOMAR_256 = {"height": 32, "width": 32, "compression": (4, 8, 8), "video_frames": 25}
VIDEOMAR_480 = {"height": 30, "width": 48, "compression": (8, 16, 16), "video_frames": 49}
VIDEOMAR_TINY = TOKEN_HEAD | {"recipe": "videomar", "token_depth": 2, "token_width": 96}

# MAGI's Sec. 4, 5.1 and App. A; what it does not say, or the text has lost, is decided in mimo.recipes.magi. The
# latents are those of OmniTokenizer's 3D VAE (K600), of Stable Diffusion 1.4 and of Cosmos (UCF-101), of 256 x 256
# pixels.
MAGI = (
    TOKEN_HEAD
    | {"recipe": "magi", "attention": "factorized", "depth": 40, "dim": 1280, "heads": 16, "qk_norm": False}
    | {"positions": "sincos", "learned_places": True, "patch": 2, "token_depth": 3, "token_width": 1024}
    | {"max_interval": 25, "noise_levels": 10, "max_noise": 0.7, "height": 32, "width": 32}
)
MAGI_3D = {"frames": 5, "compression": (4, 8, 8), "video_frames": 17}
MAGI_2D = {"frames": 16, "compression": (1, 8, 8), "video_frames": 16, "channels": 4}
MAGI_TINY = TOKEN_HEAD | {
    "recipe": "magi",
    "attention": "factorized",
    "qk_norm": False,
    "positions": "sincos",
    "learned_places": True,
    "token_depth": 2,
    "token_width": 96,
    "noise_levels": 4,
    "max_noise": 0.3,
}

K600_TRAINING = {"batch_size": 256, "lr": 8e-4, "ema_decay": 0.999}
K600_B_TRAINING, K600_XL_TRAINING = K600_TRAINING | {"steps": 100_000}, K600_TRAINING | {"steps": 360_000}
UCF101_TRAINING = {"batch_size": 128, "steps": 180_000, "lr": 4e-4, "ema_decay": 0.9999, "interval": 3, "flip": True}
# Table 12 gives the steps and nothing else, and follows FAR's experiment: batch, rate and schedule are those of FAR's
# Table 8, the rest (AdamW, weight decay, clipping, EMA of the B network) is MiMo's Table 10.
MINECRAFT_TRAINING = {"batch_size": 32, "steps": 100_000, "lr": 1e-4, "lr_schedule": "constant", "ema_decay": 0.999}
# FAR's Table 8; AdamW's constants and the EMA are those of its published code.
FAR_TRAINING = {"batch_size": 32, "steps": 400_000, "lr": 1e-4, "lr_schedule": "constant", "warmup": 0} | {
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "ema_decay": 0.9999,
    "interval": 3,
    "flip": True,
}
FAR_ABLATION_TRAINING = FAR_TRAINING | {"steps": 200_000}  # its App. 7.1: half of the steps
FAR_LONG_TRAINING = FAR_TRAINING | {"steps": 1_000_000, "warmup": 10_000, "interval": 1, "flip": False}
TINY_TRAINING = {"batch_size": 4, "steps": 700, "lr": 5e-3, "warmup": 30, "ema_decay": 0.99, "precision": "fp32"} | {
    "log_every": 20,
    "save_every": 100,
    "preview_every": 100,
}

# Steps, batch, warm-up and how long a stage takes are not said; EMA, clipping and the constant rate are those of MAR's
# published code.
VIDEOMAR_TRAINING = {"batch_size": 256, "steps": 300_000, "lr": 1e-4, "lr_schedule": "constant"} | {
    "betas": (0.9, 0.95),
    "weight_decay": 0.02,
    "grad_clip": 3.0,
    "ema_decay": 0.9999,
}

# Epochs of 480,000 and 13,320 clips, in steps. The rates are lost; these are MAR's rule, 1e-4 for 256 clips. Betas,
# clipping and the constant rate are MAR's too.
MAGI_TRAINING = {"lr_schedule": "constant", "betas": (0.9, 0.95), "weight_decay": 0.02, "grad_clip": 3.0} | {
    "ema_decay": 0.9999,
    "interval": (1, 25),
}
MAGI_K600_TRAINING = MAGI_TRAINING | {"batch_size": 256, "steps": 150 * 480_000 // 256, "lr": 1e-4}
MAGI_UCF101_TRAINING = MAGI_TRAINING | {"batch_size": 128, "steps": 1400 * 13_320 // 128, "lr": 5e-5}

SHORT_TO_LONG = {"stages": ("100000:5x256x256", "200000:13x256x256")}

K600_SAMPLING = {"sampler": "ddim", "steps": 50, "history_guidance": 1.05, "context_frames": 2, "num_frames": 5}
UCF101_SAMPLING = {"sampler": "euler", "steps": 50, "num_frames": 16}
UCF101_CLASS_SAMPLING = UCF101_SAMPLING | {"class_guidance": 2.0}
MINECRAFT_SAMPLING = UCF101_SAMPLING | {"class_guidance": 1.5, "context_frames": 144, "num_frames": 300}
TINY_SAMPLING = {"sampler": "euler", "steps": 4, "context_frames": 3, "num_frames": 8}
VIDEOMAR_SAMPLING = {"sampler": "ddpm", "steps": 100, "mask_steps": 64, "class_guidance": 3.0} | {
    "token_temperature": (1.0, 0.9),
    "context_frames": 1,
    "num_frames": 7,
}
MAGI_SAMPLING = {"sampler": "ddpm", "steps": 100, "mask_steps": 64, "interpolate": True}
MAGI_K600_SAMPLING = MAGI_SAMPLING | {"context_frames": 2, "num_frames": 5}
VIDEOMAR_TINY_SAMPLING = TINY_SAMPLING | {
    "sampler": "ddpm",
    "steps": 20,
    "mask_steps": 8,
    "token_temperature": (1.0, 0.9),
}

MAGI_TINY_SAMPLING = TINY_SAMPLING | {"sampler": "ddpm", "steps": 20, "mask_steps": 8, "interpolate": True}

CLASSES = {"num_classes": 101}
PRESETS: dict[str, tuple[dict[str, Any], ...]] = {  # name: network, training, sampling
    "mimo-b-k600": (B | K600, K600_B_TRAINING, K600_SAMPLING),
    # What Tables 3 to 9 compare with: 36.601 is l = 12.
    "mimo-b-k600-l12": (B | K600 | {"decoder_layer": 12}, K600_B_TRAINING, K600_SAMPLING),
    # Table 3's MiMo + REPA-Both, 34.133.
    "mimo-repa-b-k600": (B | K600 | {"decoder_layer": 12} | REPA, K600_B_TRAINING, K600_SAMPLING),
    "mimo-xl-k600": (XL | K600, K600_XL_TRAINING, K600_SAMPLING),
    "mimo-xl-ucf101": (XL | UCF101 | CLASSES, UCF101_TRAINING, UCF101_CLASS_SAMPLING),
    "mimo-xl-ucf101-uncond": (XL | UCF101, UCF101_TRAINING, UCF101_SAMPLING),
    "mimo-b-minecraft": (B | MINECRAFT, MINECRAFT_TRAINING, MINECRAFT_SAMPLING),
    "mimo-tiny": (TINY, TINY_TRAINING, TINY_SAMPLING),
    "acdit-b-k600": (B | K600 | ACDIT, K600_B_TRAINING, K600_SAMPLING),
    "acdit-xl-k600": (XL | K600 | ACDIT, K600_XL_TRAINING, K600_SAMPLING),
    "acdit-xl-ucf101": (XL | UCF101 | CLASSES | ACDIT, UCF101_TRAINING, UCF101_CLASS_SAMPLING),
    "acdit-xl-ucf101-uncond": (XL | UCF101 | ACDIT, UCF101_TRAINING, UCF101_SAMPLING),
    "acdit-b-minecraft": (B | MINECRAFT | ACDIT, MINECRAFT_TRAINING, MINECRAFT_SAMPLING),
    "acdit-tiny": (TINY | ACDIT, TINY_TRAINING, TINY_SAMPLING),
    "dfot-b-k600": (B | K600 | DFOT, K600_B_TRAINING, K600_SAMPLING),
    "dfot-tiny": (TINY | DFOT, TINY_TRAINING, TINY_SAMPLING),
    "far-b-k600": (B | K600 | FAR, K600_B_TRAINING, K600_SAMPLING),
    "far-xl-k600": (XL | K600 | FAR, K600_XL_TRAINING, K600_SAMPLING),
    "far-b-minecraft": (B | MINECRAFT | FAR, MINECRAFT_TRAINING, MINECRAFT_SAMPLING),
    "far-tiny": (TINY | FAR, TINY_TRAINING, TINY_SAMPLING),
    # ACDiT with REPA.
    "repa-b-k600": (B | K600 | ACDIT | REPA, K600_B_TRAINING, K600_SAMPLING),
    "repa-history-b-k600": (B | K600 | ACDIT | REPA_HISTORY, K600_B_TRAINING, K600_SAMPLING),
    "repa-future-b-k600": (B | K600 | ACDIT | REPA_FUTURE, K600_B_TRAINING, K600_SAMPLING),
    "repa-tiny": (TINY | ACDIT | REPA_TINY, TINY_TRAINING, TINY_SAMPLING),
    # FAR's own.
    "far-b-ucf101-uncond": (FAR_B | UCF101 | FAR, FAR_ABLATION_TRAINING, UCF101_SAMPLING),
    "far-l-ucf101": (FAR_L | UCF101 | CLASSES | FAR, FAR_TRAINING, UCF101_CLASS_SAMPLING),
    "far-l-ucf101-uncond": (FAR_L | UCF101 | FAR, FAR_TRAINING, UCF101_SAMPLING),
    "far-xl-ucf101": (FAR_XL | UCF101 | CLASSES | FAR, FAR_TRAINING, UCF101_CLASS_SAMPLING),
    "far-xl-ucf101-uncond": (FAR_XL | UCF101 | FAR, FAR_TRAINING, UCF101_SAMPLING),
    # Table 5; its other protocol is sampled with --context-frames 36.
    "far-long-b-dmlab": (FAR_B | DMLAB | FAR_LONG, FAR_LONG_TRAINING, MINECRAFT_SAMPLING),
    "far-long-m-minecraft": (FAR_M | MINECRAFT | FAR_LONG, FAR_LONG_TRAINING, MINECRAFT_SAMPLING),
    # 3 x 3 patches of 6 x 6 tokens: 4 tokens per coarse frame, as there.
    "far-long-tiny": (TINY | FAR_LONG | {"coarse_stride": 3, "fine_frames": 4}, TINY_TRAINING, TINY_SAMPLING),
    # Its Fig. 5, which does not say the size: B, beside far-b-ucf101-uncond.
    "video-dit-b-ucf101-uncond": (FAR_B | UCF101 | VIDEO_DIT, FAR_ABLATION_TRAINING, UCF101_SAMPLING),
    "video-dit-tiny": (TINY | VIDEO_DIT, TINY_TRAINING, TINY_SAMPLING | {"context_frames": 0}),
    "magi-xl-k600": (MAGI | MAGI_3D | {"channels": 8}, MAGI_K600_TRAINING, MAGI_K600_SAMPLING),
    "magi-xl-ucf101-uncond": (MAGI | MAGI_2D, MAGI_UCF101_TRAINING, MAGI_SAMPLING | {"num_frames": 16}),
    "magi-xl-ucf101-uncond-mtf": (
        MAGI | MAGI_2D | {"teacher_forcing": "masked"},
        MAGI_UCF101_TRAINING,
        MAGI_SAMPLING | {"num_frames": 16},
    ),
    "magi-xl-ucf101-uncond-3d": (
        MAGI | MAGI_3D | {"channels": 16},
        MAGI_UCF101_TRAINING,
        MAGI_SAMPLING | {"num_frames": 5},
    ),
    "magi-tiny": (TINY | MAGI_TINY, TINY_TRAINING | {"lr": 2e-3}, MAGI_TINY_SAMPLING),
    "videomar-256": (VIDEOMAR | VIDEOMAR_256, VIDEOMAR_TRAINING | SHORT_TO_LONG, VIDEOMAR_SAMPLING),
    "videomar-480": (VIDEOMAR | VIDEOMAR_480, VIDEOMAR_TRAINING, VIDEOMAR_SAMPLING),
    "videomar-tiny": (TINY | VIDEOMAR_TINY, TINY_TRAINING | {"lr": 2e-3}, VIDEOMAR_TINY_SAMPLING),
}
NETWORK: dict[str, dict[str, Any]]
TRAINING: dict[str, dict[str, Any]]
SAMPLING: dict[str, dict[str, Any]]
NETWORK, TRAINING, SAMPLING = ({name: parts[i] for name, parts in PRESETS.items()} for i in range(3))
TINY_SYSTEMS = tuple(name.removesuffix("-tiny") for name in PRESETS if name.endswith("-tiny"))  # for `mimo demo`
