"""Training runs that take a second: what tests and the ranks that they start share."""

import torch

from mimo import checkpoint
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import ShapesDataset
from mimo.recipes.base import LossParts
from mimo.training.distributed import whole
from mimo.training.trainer import Trainer

NETWORK = {
    **{"depth": 2, "dim": 16, "heads": 2, "decoder_depth": 1, "decoder_layer": 1},
    **{"frames": 3, "height": 2, "width": 2, "channels": 12, "compression": (1, 2, 2), "video_frames": 3},
    **{"parameterization": "flow", "history_dropout": 0.2, "num_classes": 3},
}
FAR_LONG = {
    **{"recipe": "far_long", "mask_weight": 0.0, "mask_ratio": (0.0, 0.0), "separate_ln": False},
    **{"clean_context": 0.1, "coarse_stride": 2, "fine_frames": 2},
}
OPTIMISATION = {
    **{"batch_size": 8, "steps": 4, "lr": 1e-2, "warmup": 2, "precision": "fp32", "ema_decay": 0.9},
    **{"workers": 0, "log_every": 1, "save_every": 100, "preview_every": 0},
}


class LabelledShapes(ShapesDataset):
    """Shapes with classes; clip 0 is of class `odd`."""

    def __init__(self, *args, odd=0, **options):
        super().__init__(*args, **options)
        self.odd = odd

    def sample(self, index, seed):
        return super().sample(index, seed) | {"label": torch.tensor(index % 3 if index else self.odd).numpy()}


def make_trainer(model=None, odd=0, **options):
    config = MiMoConfig(**NETWORK | (model or {}))
    frames, height, width = config.video_shape
    dataset = LabelledShapes(num_frames=frames, height=height, width=width, length=20, odd=odd)
    sample, training = SampleConfig(sampler="euler", steps=2, context_frames=1, num_frames=3), OPTIMISATION | options
    shapes = [map(int, stage.split(":")[1].split("x")) for stage in training.get("stages", ())]
    stages = [LabelledShapes(num_frames=f, height=h, width=w, length=20, odd=odd) for f, h, w in shapes]
    return Trainer(config, TrainConfig(**training), sample, dataset, stages=stages)


def whole_state(trainer):
    """Every tensor of a trainer, whole."""
    tensors = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in trainer.ema.tensors.items()}
    tensors |= checkpoint.optimizer_tensors(trainer.optimizer, trainer.model)
    return {name: whole(tensor).detach().clone() for name, tensor in tensors.items()}


class NanAt:
    """The recipe, with a gradient that is not a number at some steps (on one rank alone if told)."""

    def __init__(self, trainer, steps, rank=None):
        self.recipe, self.steps = trainer.recipe, steps
        self.here = rank is None or trainer.world.rank == rank

    def loss(self, *args, step, **options):
        parts = self.recipe.loss(*args, step=step, **options)
        return LossParts(parts.total * float("nan"), *parts[1:]) if self.here and step in self.steps else parts


# What has another loss, network or batch.
ALIGNED = {"repa_weight": 0.5, "repa_layer": 1, "repa_encoder": "hog", "repa_channels": 28, "repa_hidden": 8} | {
    "compression": (1, 4, 4)
}
MASKED = {
    "recipe": "magi",
    "attention": "factorized",
    "positions": "sincos",
    "learned_places": True,
    "qk_norm": False,
} | {
    **{"parameterization": "epsilon", "token_depth": 1, "token_width": 16, "noise_levels": 3, "history_dropout": 0.0},
    **{"mask_weight": 0.0, "mask_ratio": (0.5, 0.9), "cross_attention": True},
}
RAGGED = {"recipe": "videomar", "parameterization": "epsilon", "token_depth": 1, "token_width": 16} | {
    **{"history_dropout": 0.0, "mask_weight": 0.0, "mask_ratio": (0.5, 0.9), "cross_attention": True},
}
UNMASKED = {"mask_weight": 0.0, "mask_ratio": (0.0, 0.0)}
ONE_COPY = UNMASKED | {"separate_ln": False}
VARIANTS = {
    "plain": ({}, {}),
    "interleaved": ({"interleaved": True}, {}),
    "unmasked": ({"positions": "learned", "separate_ln": False}, {"unmasked_steps": 2}),
    "aligned": (ALIGNED, {}),
    "magi": (MASKED, {}),
    "videomar": (RAGGED, {"stages": ("2:2x4x2",)}),
    "far_long": (FAR_LONG, {}),
    "acdit": (UNMASKED | {"recipe": "acdit"}, {}),
    "dfot": (ONE_COPY | {"recipe": "dfot"}, {}),
    "far": (ONE_COPY | {"recipe": "far", "clean_context": 0.1}, {}),
    "video_dit": (ONE_COPY | {"recipe": "video_dit", "history_dropout": 0.0}, {}),
}
SAME_NETWORK = ("interleaved", "acdit", "dfot", "far", "video_dit")  # as "plain": sharded alike
