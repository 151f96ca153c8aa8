"""Presets hold the paper's Table 10; bad values are refused by name."""

import json
import subprocess
import sys

import pytest

from mimo.config import PRESETS, MiMoConfig, SampleConfig, TrainConfig

B, XL = (12, 768, 12, 64), (28, 1152, 16, 72)
K600, UCF, MINECRAFT = (5, 16, 16, 16), (16, 8, 8, 32), (300, 8, 8, 32)
NETWORKS = {  # (depth, D, heads, head dim), (T, H, W, C), l, parameterization, classes, actions
    "mimo-b-k600": (B, K600, 9, "v", 0, 0),
    "mimo-xl-k600": (XL, K600, 23, "v", 0, 0),
    "mimo-xl-ucf101": (XL, UCF, 23, "flow", 101, 0),
    "mimo-xl-ucf101-uncond": (XL, UCF, 23, "flow", 0, 0),
    "mimo-b-minecraft": (B, MINECRAFT, 9, "flow", 0, 4),
}
TRAINING = {  # batch, learning rate, EMA
    "mimo-b-k600": (256, 8e-4, 0.999),
    "mimo-xl-k600": (256, 8e-4, 0.9999),
    "mimo-xl-ucf101": (128, 4e-4, 0.9999),
    "mimo-xl-ucf101-uncond": (128, 4e-4, 0.9999),
    "mimo-b-minecraft": (128, 4e-4, 0.999),
}
SAMPLING = {  # sampler, steps, history guidance, class guidance
    "mimo-b-k600": ("ddim", 50, 1.05, 1.0),
    "mimo-xl-k600": ("ddim", 50, 1.05, 1.0),
    "mimo-xl-ucf101": ("euler", 50, 1.0, 2.0),
    "mimo-xl-ucf101-uncond": ("euler", 50, 1.0, 1.0),
    "mimo-b-minecraft": ("euler", 50, 1.0, 1.5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_presets_hold_the_published_values(name):
    config = MiMoConfig.from_preset(name)
    size, shape, layer, parameterization, classes, actions = NETWORKS[name]
    assert (config.depth, config.dim, config.heads, config.head_dim) == size
    assert config.latent_shape == shape and config.tokens == shape[1] * shape[2]
    assert (config.decoder_layer, config.decoder_depth, config.parameterization) == (layer, 4, parameterization)
    assert (config.num_classes, config.num_actions) == (classes, actions)
    assert (config.mask_ratio, config.mask_weight, config.mask_offsets) == ((0.25, 0.5), 0.5, (0, 1))
    assert (config.rope_theta, config.separate_ln, config.label_dropout) == (100.0, True, 0.1)
    k600 = parameterization == "v"
    assert (config.min_snr_gamma, config.min_snr_decay) == ((5.0, 0.96) if k600 else (None, None))
    assert config.history_dropout == (0.1 if k600 else 0.0)

    training = TrainConfig.from_preset(name)
    assert (training.batch_size, training.lr, training.ema_decay) == TRAINING[name]
    assert (training.betas, training.weight_decay, training.grad_clip) == ((0.9, 0.99), 0.001, 1.0)
    assert (training.warmup, training.lr_end, training.precision) == (10_000, 1e-5, "bf16")

    sampling = SampleConfig.from_preset(name)
    assert (sampling.sampler, sampling.steps, sampling.history_guidance, sampling.class_guidance) == SAMPLING[name]
    assert sampling.num_frames == config.frames
    assert (sampling.sampler == "ddim") == (config.parameterization == "v")


def test_videos_fit_their_latents():
    shapes = {name: MiMoConfig.from_preset(name).video_shape for name in PRESETS}
    assert shapes["mimo-xl-k600"] == (17, 128, 128)
    assert shapes["mimo-xl-ucf101"] == (16, 256, 256)
    assert shapes["mimo-b-minecraft"] == (300, 128, 128)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", [MiMoConfig, TrainConfig, SampleConfig])
def test_every_preset_survives_json(kind, name):
    config = kind.from_preset(name)
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_names_are_refused_with_the_known_ones():
    for kind in (MiMoConfig, TrainConfig, SampleConfig):
        with pytest.raises(ValueError, match="'mimo-m'.*mimo-b-k600.*mimo-tiny"):
            kind.from_preset("mimo-m")
        with pytest.raises(ValueError, match=f"{kind.__name__}.*'stepz'"):
            kind.from_dict({"stepz": 1})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (MiMoConfig, {"heads": 7}, "heads=7.*768"),
        (MiMoConfig, {"heads": 64}, "heads=64"),
        (MiMoConfig, {"depth": 0}, "depth=0"),
        (MiMoConfig, {"depth": 2.5}, "depth=2.5.*whole"),
        (MiMoConfig, {"separate_ln": "yes"}, "separate_ln='yes'"),
        (MiMoConfig, {"decoder_layer": 13}, "decoder_layer=13.*12"),
        (MiMoConfig, {"decoder_layer": 0}, "decoder_layer=0"),
        (MiMoConfig, {"positions": "sincos"}, "positions='sincos'.*'rope', 'learned'"),
        (MiMoConfig, {"mask_offsets": (0, 3)}, r"mask_offsets=\(0, 3\)"),
        (MiMoConfig, {"mask_offsets": (1, 1)}, r"mask_offsets=\(1, 1\)"),
        (MiMoConfig, {"mask_offsets": ()}, r"mask_offsets=\(\)"),
        (MiMoConfig, {"mask_offsets": (1,), "frames": 1}, r"mask_offsets=\(1,\)"),
        (MiMoConfig, {"mask_ratio": (0.5, 0.25)}, "mask_ratio"),
        (MiMoConfig, {"mask_ratio": (0.0, 0.0)}, "mask_ratio"),
        (MiMoConfig, {"mask_ratio": (0.0, 0.5), "interleaved": True}, "mask_ratio"),
        (MiMoConfig, {"mask_round": 256}, "mask_round=256"),
        (MiMoConfig, {"mask_weight": 0.0, "interleaved": True}, "interleaved=True"),
        (MiMoConfig, {"history_dropout": 1.5}, "history_dropout=1.5"),
        (MiMoConfig, {"min_snr_decay": 0.96}, "min_snr_decay=0.96"),
        (MiMoConfig, {"parameterization": "flow", "min_snr_gamma": 5.0}, "min_snr_gamma=5.0"),
        (MiMoConfig, {"compression": (8, 8)}, "compression"),
        (TrainConfig, {"batch_size": 10, "accumulate": 3}, "accumulate=3.*10"),
        (TrainConfig, {"lr": -1.0}, "lr=-1.0"),
        (TrainConfig, {"ema_decay": 1.0}, "ema_decay=1.0"),
        (TrainConfig, {"precision": "fp16"}, "precision='fp16'"),
        (TrainConfig, {"betas": (0.9, 1.0)}, "betas"),
        (SampleConfig, {"steps": 0}, "steps=0"),
        (SampleConfig, {"context_frames": 5}, "context_frames=5.*5"),
        (SampleConfig, {"sampler": "heun"}, "sampler='heun'"),
        (SampleConfig, {"window": 0}, "window=0: expected 1 or more"),
        (SampleConfig, {"sink": -1}, "sink=-1"),
        (SampleConfig, {"temperature": (1.0, -0.5)}, "temperature=.*zero or more"),
        (SampleConfig, {"history_noise": (0.1,)}, "history_noise=.*two numbers"),
    ],
)
def test_bad_values_are_one_line_with_the_value(kind, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        kind(**changes)
    assert "\n" not in str(error.value)


def test_reading_a_config_needs_no_torch():
    code = "import sys, mimo; mimo.MiMoConfig.from_preset('mimo-tiny'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
