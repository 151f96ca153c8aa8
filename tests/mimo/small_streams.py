"""Videos that take moments, frame by frame: what tests and the processes that they kill share."""

import torch

from mimo import MiMo, MiMoConfig
from mimo.config import SampleConfig
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving

TOKENS, CHANNELS, FRAMES = 8, 5, 9


def network(seed: int = 0, **options) -> MiMo:
    torch.manual_seed(seed)
    base = {"depth": 2, "dim": 32, "heads": 2, "frames": 6, "height": 2, "width": 4, "channels": CHANNELS}
    base |= {"mask_weight": 0.0, "parameterization": "flow", "decoder_layer": 1, "num_classes": 3, "num_actions": 4}
    model = MiMo(MiMoConfig(**base | options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def config(**options) -> SampleConfig:
    base = {"sampler": "euler", "steps": 2, "num_frames": 6, "history_guidance": 1.5, "class_guidance": 2.0}
    return SampleConfig(**base | options)


def start(sampler: Sampler, saving: Saving | None = None, seed: int = 1):
    """Ragged contexts, two trajectories each, labels and actions."""
    given = [torch.randn(n, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(n)) for n in (3, 1)]
    actions = torch.arange(2 * FRAMES).view(2, FRAMES) % 4
    told = {"labels": torch.tensor([0, 2]), "actions": actions, "generator": torch.Generator().manual_seed(seed)}
    return sampler.stream(given, FRAMES, trajectories=2, saving=saving, **told)
