"""Presets hold the paper's Table 10; bad values are refused by name."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mimo import preset_table
from mimo.config import PRESETS, MiMoConfig, SampleConfig, TokenizerTraining, TrainConfig

B, XL = (12, 768, 12, 64), (28, 1152, 16, 72)
K600, UCF, MINECRAFT = (5, 16, 16, 16), (16, 8, 8, 32), (300, 8, 8, 32)
NETWORKS = {  # (depth, D, heads, head dim), (T, H, W, C), l, parameterization, classes, actions
    "mimo-b-k600": (B, K600, 9, "v", 0, 0),
    "mimo-b-k600-l12": (B, K600, 12, "v", 0, 0),
    "mimo-xl-k600": (XL, K600, 23, "v", 0, 0),
    "mimo-xl-ucf101": (XL, UCF, 23, "flow", 101, 0),
    "mimo-xl-ucf101-uncond": (XL, UCF, 23, "flow", 0, 0),
    "mimo-b-minecraft": (B, MINECRAFT, 9, "flow", 0, 4),
}
TRAINING = {  # steps, batch, learning rate, schedule, EMA: MiMo's Table 10; Minecraft: its Table 12 and FAR's Table 8
    "mimo-b-k600": (100_000, 256, 8e-4, "cosine", 0.999),
    "mimo-b-k600-l12": (100_000, 256, 8e-4, "cosine", 0.999),
    "mimo-xl-k600": (360_000, 256, 8e-4, "cosine", 0.999),
    "mimo-xl-ucf101": (180_000, 128, 4e-4, "cosine", 0.9999),
    "mimo-xl-ucf101-uncond": (180_000, 128, 4e-4, "cosine", 0.9999),
    "mimo-b-minecraft": (100_000, 32, 1e-4, "constant", 0.999),
}
SAMPLING = {  # sampler, steps, history guidance, class guidance
    "mimo-b-k600": ("ddim", 50, 1.05, 1.0),
    "mimo-b-k600-l12": ("ddim", 50, 1.05, 1.0),
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
    assert config.qk_norm and config.positions == "rope"
    k600 = parameterization == "v"
    assert (config.min_snr_gamma, config.min_snr_decay) == ((5.0, 0.96) if k600 else (None, None))
    assert config.history_dropout == (0.1 if k600 else 0.0)

    training = TrainConfig.from_preset(name)
    found = training.steps, training.batch_size, training.lr, training.lr_schedule, training.ema_decay
    assert found == TRAINING[name]
    assert (training.betas, training.weight_decay, training.grad_clip) == ((0.9, 0.99), 0.001, 1.0)
    assert (training.warmup, training.lr_end, training.precision) == (10_000, 1e-5, "bf16")

    sampling = SampleConfig.from_preset(name)
    assert (sampling.sampler, sampling.steps, sampling.history_guidance, sampling.class_guidance) == SAMPLING[name]
    assert sampling.num_frames == config.frames
    assert (sampling.sampler == "ddim") == (config.parameterization == "v")


# Table 10 of the MiMo paper, column by column, in its own words.
TABLE_10 = {
    "Input shape": ("17 x 128 x 128", "17 x 128 x 128", "16 x 256 x 256", "16 x 256 x 256"),
    "Latent shape": ("5 x 16 x 16", "5 x 16 x 16", "16 x 8 x 8", "16 x 8 x 8"),
    "Depth": ("12", "28", "28", "28"),
    "Embed dim": ("768", "1152", "1152", "1152"),
    "Heads": ("12 ", "16 ", "16 ", "16 "),
    "RoPE": ("theta 100",) * 4,
    "Decoder depth": ("4",) * 4,
    "l": ("9", "23", "23", "23"),
    "Parameterization": ("v-prediction", "v-prediction", "rectified flow", "rectified flow"),
    "Weighting": ("fused min-SNR, gamma 5, rho 0.96", "fused min-SNR, gamma 5, rho 0.96", "none", "none"),
    "Sampler": ("DDIM, 50 steps", "DDIM, 50 steps", "Euler, 50 steps", "Euler, 50 steps"),
    "Guidance": ("history 1.05", "history 1.05", "class 2", "none"),
    "Training steps": ("100,000", "360,000", "180,000", "180,000"),
    "Batch size": ("256", "256", "128", "128"),
    "Learning rate": ("0.0008", "0.0008", "0.0004", "0.0004"),
    "Warm-up steps": ("10,000",) * 4,
    "LR schedule": ("cosine to 1e-05",) * 4,
    "Weight decay": ("0.001",) * 4,
    "AdamW betas": ("0.9, 0.99",) * 4,
    "Gradient clipping": ("1",) * 4,
    "lambda": ("0.5",) * 4,
    "Mask ratios": ("0.25 to 0.5",) * 4,
    "EMA decay": ("0.999", "0.999", "0.9999", "0.9999"),
}


# FAR's Tables 1 and 8 (UCF-101), in the table's words; what they do not say is left out.
TABLE_8 = {
    "Input shape": "16 x 256 x 256",
    "Latent shape": "16 x 8 x 8",
    "Parameterization": "rectified flow",
    "Batch size": "32",
    "Learning rate": "0.0001",
    "LR schedule": "constant",
    "Warm-up steps": "0",
    "Training steps": "400,000",
    "Clean frames": "0.1",
}
TABLE_8_LONG = TABLE_8 | {  # Minecraft and DMLab
    "Warm-up steps": "10,000",
    "Training steps": "1,000,000",
    "Context, frames": "144, 300",
    "Conditions": "4 actions",
    "Guidance": "action 1.5",
    "Coarse frames": "4 x 4 tokens in one, before the latest 16 frames",
    "Recipe": "far_long",
}
LONG = {  # pixels, latents; layers, width, heads: FAR-B-Long of Table 5 (a), FAR-M-Long of Table 5 (b)
    "far-long-b-dmlab": ("300 x 64 x 64", "300 x 8 x 8 x 32", "12", "768", "12 "),
    "far-long-m-minecraft": ("300 x 128 x 128", "300 x 8 x 8 x 32", "12", "1024", "16 "),
}
TABLE_1 = {"far-l-ucf101": ("24", "1024", "16 "), "far-xl-ucf101": ("28", "1152", "18 ")}  # layers, width, heads
BASELINES = {  # MiMo's App. E: another strategy, the rest is that of the preset named
    "acdit-b-k600": "mimo-b-k600",
    "acdit-xl-k600": "mimo-xl-k600",
    "acdit-xl-ucf101": "mimo-xl-ucf101",
    "acdit-xl-ucf101-uncond": "mimo-xl-ucf101-uncond",
    "acdit-b-minecraft": "mimo-b-minecraft",
    "dfot-b-k600": "mimo-b-k600",
    "far-b-k600": "mimo-b-k600",
    "far-xl-k600": "mimo-xl-k600",
    "far-b-minecraft": "mimo-b-minecraft",
}
REPA = {  # Table 3: the preset without alignment, and the frames that are aligned
    "repa-b-k600": ("acdit-b-k600", "both"),
    "repa-history-b-k600": ("acdit-b-k600", "history"),
    "repa-future-b-k600": ("acdit-b-k600", "future"),
    "mimo-repa-b-k600": ("mimo-b-k600-l12", "both"),
}
STRATEGY = {"Recipe", "Decoder depth", "l", "lambda", "Mask ratios", "Clean frames"}


def says() -> dict[str, dict[str, str]]:
    """The committed tables of the families: preset -> row -> words."""
    page, found, names = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(), {}, []
    for line in page.partition("## mimo\n")[2].splitlines():
        if line.startswith("| "):
            row, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            if row == "":
                names = [cell.strip("`") for cell in cells]
                found |= {name: {} for name in names}
            elif row != "---":
                for name, cell in zip(names, cells, strict=True):
                    found[name][row] = cell
    return found


def test_the_table_of_presets_is_generated():
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text()
    assert page == preset_table.table(), "run: python -m mimo.preset_table > docs/presets.md"
    assert sorted(says()) == sorted(PRESETS)
    assert all(page.count(f"\n| `{name}`") == 1 for name in PRESETS)


def test_the_table_of_presets_is_mimos_table_10():
    columns = ("mimo-b-k600", "mimo-xl-k600", "mimo-xl-ucf101", "mimo-xl-ucf101-uncond")
    for row, values in TABLE_10.items():
        for name, value in zip(columns, values, strict=True):
            assert says()[name][row].startswith(value), (name, row)
    assert says()["mimo-b-minecraft"]["Training steps"] == "100,000"  # Table 12
    assert says()["mimo-b-minecraft"]["Context, frames"] == "144, 300"


@pytest.mark.parametrize("name", TABLE_1)
def test_the_table_of_presets_is_fars_tables_1_and_8(name):
    for preset, guidance in ((name, "class 2"), (f"{name}-uncond", "none")):
        found = says()[preset]
        assert all(found[row].startswith(value) for row, value in TABLE_8.items()), preset
        assert (found["Depth"], found["Embed dim"], found["Heads"][:3]) == TABLE_1[name]
        assert found["Recipe"] == "far" and found["Guidance"] == guidance
    for row, value in (("Batch size", "32"), ("Learning rate", "0.0001"), ("LR schedule", "constant")):
        assert says()["mimo-b-minecraft"][row] == value
    assert says()["mimo-b-minecraft"]["Warm-up steps"] == "10,000"


@pytest.mark.parametrize("name", LONG)
def test_the_table_of_presets_is_fars_tables_1_5_and_8_for_long_video(name):
    found = says()[name]
    own = dict(zip(("Input shape", "Latent shape", "Depth", "Embed dim", "Heads"), LONG[name], strict=True))
    for row, value in (TABLE_8_LONG | own).items():
        assert found[row].startswith(value), row


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_mimos_network_with_another_strategy(name):
    ours, theirs = says()[BASELINES[name]], says()[name]
    assert {row for row in ours if ours[row] != theirs[row]} <= STRATEGY
    assert theirs["Recipe"] == name.split("-")[0] and theirs["lambda"] == "none"
    assert theirs["Clean frames"] == ("0.1" if name.startswith("far") else "none")


@pytest.mark.parametrize("name", REPA)
def test_repa_is_another_loss_and_nothing_else(name):
    base, frames = REPA[name]
    assert says()[name] == says()[base] | {"REPA": f"{frames}, layer 4, weight 0.5, videomae"}
    assert MiMoConfig.from_preset(name).repa_channels == 1024  # VideoMAE-L's
    assert {row["REPA"] for preset, row in says().items() if "repa" not in preset} == {"none"}


def test_videos_fit_their_latents():
    shapes = {name: MiMoConfig.from_preset(name).video_shape for name in PRESETS}
    assert shapes["mimo-xl-k600"] == (17, 128, 128)
    assert shapes["mimo-xl-ucf101"] == (16, 256, 256)
    assert shapes["mimo-b-minecraft"] == (300, 128, 128)


@pytest.mark.parametrize(("head_dim", "split"), [(128, (42, 44, 42)), (32, (10, 12, 10)), (64, None), (72, None)])
def test_a_network_of_before_rope_split_keeps_its_channels(head_dim, split):
    """Where one pair is spare it was y's, and is t's now: a checkpoint that says nothing was trained with the
    former."""
    config = MiMoConfig(dim=2 * head_dim, heads=2, depth=2, decoder_layer=1)
    values = config.to_dict()
    assert MiMoConfig.from_dict(values) == config
    before = {name: value for name, value in values.items() if name not in ("rope_split", "qk_norm")}
    assert MiMoConfig.from_dict(before) == replace(config, rope_split=split)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", [MiMoConfig, TrainConfig, SampleConfig])
def test_every_preset_survives_json(kind, name):
    config = kind.from_preset(name)
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_names_are_refused_with_the_known_ones():
    for kind in (MiMoConfig, TrainConfig, SampleConfig):
        with pytest.raises(ValueError, match="'mimo-m'.*mimo-b-k600.*mimo-tiny"):
            kind.from_preset("mimo-m")
        with pytest.raises(ValueError, match=f'{kind.__name__}: \\["stepz"\\] is unknown'):
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
        (MiMoConfig, {"positions": "fixed"}, "positions='fixed'.*'rope', 'sincos', 'learned'"),
        (MiMoConfig, {"rope_split": (16, 24, 23)}, r"rope_split=\(16, 24, 23\).*64"),
        (MiMoConfig, {"rope_split": (32, 32)}, r"rope_split=\(32, 32\).*three even numbers"),
        (MiMoConfig, {"rope_split": (16, 24, 32)}, r"rope_split=\(16, 24, 32\).*the sum 64"),
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
        (MiMoConfig, {"repa_weight": -0.5}, "repa_weight=-0.5: expected zero or more"),
        (MiMoConfig, {"repa_weight": 0.5, "repa_layer": 13}, "repa_layer=13: expected 1..depth=12"),
        (MiMoConfig, {"repa_frames": "all"}, "repa_frames='all': expected one of 'history', 'future', 'both'"),
        (MiMoConfig, {"min_snr_decay": 0.96}, "min_snr_decay=0.96"),
        (MiMoConfig, {"parameterization": "flow", "min_snr_gamma": 5.0}, "min_snr_gamma=5.0"),
        (MiMoConfig, {"compression": (8, 8)}, "compression"),
        (TrainConfig, {"batch_size": 10, "accumulate": 3}, "accumulate=3.*10"),
        (TrainConfig, {"lr": -1.0}, "lr=-1.0"),
        (TrainConfig, {"lr_schedule": "linear"}, "lr_schedule='linear'.*'cosine', 'constant'"),
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


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused_by_name(value):
    for kind in (MiMoConfig, TrainConfig, SampleConfig, TokenizerTraining):
        for field in fields(kind):
            default = getattr(kind(), field.name)
            numbers = default if isinstance(default, tuple) else (default,)
            if numbers and isinstance(numbers[0], float):
                wrong = (*default[:-1], value) if isinstance(default, tuple) else value
                with pytest.raises(ValueError, match=rf"{field.name}=.*(inf|nan).*: expected (a )?finite number"):
                    kind(**{field.name: wrong})
    with pytest.raises(ValueError, match="min_snr_gamma=.*finite"):
        MiMoConfig(min_snr_gamma=value)
