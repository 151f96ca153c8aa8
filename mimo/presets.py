"""The presets: what the papers say, as the fields of mimo.config that differ from their defaults.

`python -m mimo.preset_table` prints them as the table of docs/presets.md. A preset has one name in all three tables.
Sources: MiMo's Tables 10 and 12, and FAR's Tables 1 and 8 where MiMo's experiment follows FAR without saying more.
"""

from __future__ import annotations

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

NETWORK = {
    "mimo-b-k600": B | K600,
    "mimo-b-k600-l12": B | K600 | {"decoder_layer": 12},  # what Tables 3 to 9 compare with: 36.601 is l = 12
    "mimo-xl-k600": XL | K600,
    "mimo-xl-ucf101": XL | UCF101 | {"num_classes": 101},
    "mimo-xl-ucf101-uncond": XL | UCF101,
    "mimo-b-minecraft": B | MINECRAFT,
    "mimo-tiny": TINY,
}

K600_TRAINING = {"batch_size": 256, "lr": 8e-4, "ema_decay": 0.999}
UCF101_TRAINING = {"batch_size": 128, "steps": 180_000, "lr": 4e-4, "ema_decay": 0.9999, "interval": 3, "flip": True}
# Table 12 gives the steps and nothing else, and follows FAR's experiment: batch, rate and schedule are those of FAR's
# Table 8, the rest (AdamW, weight decay, clipping, EMA of the B network) is MiMo's Table 10.
MINECRAFT_TRAINING = {"batch_size": 32, "steps": 100_000, "lr": 1e-4, "lr_schedule": "constant", "ema_decay": 0.999}
TINY_TRAINING = {"batch_size": 4, "steps": 1000, "lr": 5e-3, "warmup": 30, "ema_decay": 0.99, "precision": "fp32"} | {
    "log_every": 20,
    "save_every": 100,
    "preview_every": 100,
}

TRAINING = {
    "mimo-b-k600": K600_TRAINING | {"steps": 100_000},
    "mimo-b-k600-l12": K600_TRAINING | {"steps": 100_000},
    "mimo-xl-k600": K600_TRAINING | {"steps": 360_000},
    "mimo-xl-ucf101": UCF101_TRAINING,
    "mimo-xl-ucf101-uncond": UCF101_TRAINING,
    "mimo-b-minecraft": MINECRAFT_TRAINING,
    "mimo-tiny": TINY_TRAINING,
}

K600_SAMPLING = {"sampler": "ddim", "steps": 50, "history_guidance": 1.05, "context_frames": 2, "num_frames": 5}
UCF101_SAMPLING = {"sampler": "euler", "steps": 50, "num_frames": 16}
MINECRAFT_SAMPLING = UCF101_SAMPLING | {"class_guidance": 1.5, "context_frames": 144, "num_frames": 300}
TINY_SAMPLING = {"sampler": "euler", "steps": 4, "context_frames": 3, "num_frames": 8}

SAMPLING = {
    "mimo-b-k600": K600_SAMPLING,
    "mimo-b-k600-l12": K600_SAMPLING,
    "mimo-xl-k600": K600_SAMPLING,
    "mimo-xl-ucf101": UCF101_SAMPLING | {"class_guidance": 2.0},
    "mimo-xl-ucf101-uncond": UCF101_SAMPLING,
    "mimo-b-minecraft": MINECRAFT_SAMPLING,
    "mimo-tiny": TINY_SAMPLING,
}
