"""Losses that make an autoencoder's pictures sharp: LPIPS on given weights, and a patch discriminator."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mimo.errors import InputError
from mimo.tokenizers.weights import load_safetensors, load_torch

_VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018) on VGG-16.

        d(x, y) = sum_l mean_hw w_l . (f_l(x) - f_l(y))^2

    f_l is the last feature map of block l, each position at unit length.

    Args:
        vgg: torchvision's VGG-16 state dict (features.0.weight, ...).
        linear: the published weights of the linear layers (lin0.model.1.weight, ...).
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, vgg: str | Path, linear: str | Path):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in _VGG16:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.ends = [
            i for i, layer in enumerate(layers) if i + 1 == len(layers) or isinstance(layers[i + 1], nn.MaxPool2d)
        ]
        self._take(vgg, {f"features.{k}": v for k, v in self.features.state_dict().items()})
        widths = (64, 128, 256, 512, 512)
        for block, width in enumerate(widths):
            self.register_buffer(f"linear{block}", torch.empty(1, width, 1, 1))
        self._take(linear, {f"lin{block}.model.1.weight": getattr(self, f"linear{block}") for block in range(5)})
        self.register_buffer("shift", torch.tensor((-0.030, -0.088, -0.188)).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor((0.458, 0.448, 0.450)).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @staticmethod
    def _take(path: str | Path, targets: dict[str, torch.Tensor]) -> None:
        path = Path(path)
        state = load_safetensors(path) if path.suffix == ".safetensors" else load_torch(path)
        for name, target in targets.items():
            if name not in state or state[name].shape != target.shape:
                found = list(state[name].shape) if name in state else "absent"
                raise InputError(f"{path}: {name!r} is {found}, expected {list(target.shape)}")
            target.data.copy_(state[name])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x, y [N, 3, H, W] in [-1, 1], sides of 16 or more -> mean distance, a scalar."""
        h = (torch.cat([x, y]) - self.shift) / self.scale
        distance = torch.zeros((), device=x.device)
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.ends:
                f, g = F.normalize(h, dim=1, eps=1e-10).chunk(2)
                weight = getattr(self, f"linear{self.ends.index(i)}")
                distance = distance + ((f - g).square() * weight).sum(1).mean()
        return distance


def patch_discriminator(width: int = 64) -> nn.Sequential:
    """pix2pix's discriminator: [N, 3, H, W] -> one score per 70 x 70 patch."""
    layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for level, stride in enumerate((2, 2, 1)):
        cin, cout = width * 2**level, width * 2 ** (level + 1)
        layers += [
            nn.Conv2d(cin, cout, 4, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.LeakyReLU(0.2),
        ]
    model = nn.Sequential(*layers, nn.Conv2d(width * 8, 1, 4, padding=1))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return model


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """|d reconstruction / d last| / |d adversarial / d last|, at most 1e4 (VQGAN, Eq. 7): the two pull equally hard."""
    (r,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (g,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (r.norm() / (g.norm() + 1e-4)).clamp(0, 1e4).detach()
