"""Judges: frozen networks, out of local files, that videos are compared by. None is fetched.

    I3D         features of a clip      FVD      TorchScript, as StyleGAN-V, Latte, FAR and DFoT read it
    VJEPA2      features of a clip      VMMD     a folder of transformers
    Inception   features of a frame     FID      TorchScript, as StyleGAN2-ADA and StyleGAN3 read it
    CLIP        features of a frame     CMMD     a folder of transformers
    LPIPS       a distance of frames    LPIPS    AlexNet of torchvision; torchmetrics brings what weighs its layers

Where the released file is TorchScript, it holds the network's own resizing and scaling, and needs no other package:
torchvision's and torch-fidelity's Inception would need theirs. TorchScript runs no Python.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo.data import to_float
from mimo.encoders.local import read_folder
from mimo.errors import InputError, reason
from mimo.evaluation.features import WEIGHT_FREE
from mimo.evaluation.metrics import Features
from mimo.tokenizers.weights import checksum, load_state, load_torch

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of colours in [0, 1]
CLIP_COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIPS_AT_ONCE, FRAMES_AT_ONCE = 8, 64


@dataclass(frozen=True)
class Weights:
    """What has to be had for a judge. what: file or folder, and its layout. place: where it is published."""

    what: str
    place: str


WEIGHTS = {
    "i3d": Weights(
        "i3d_torchscript.pt, I3D trained on Kinetics-400, as TorchScript",
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt",
    ),
    "inception": Weights(
        "inception-2015-12-05.pt, FID's Inception v3, as TorchScript",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    ),
    "alexnet": Weights(
        "alexnet-owt-7be5be79.pth, torchvision's AlexNet, a state dict",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    ),
    "vjepa2": Weights(
        "a folder with config.json and model.safetensors of V-JEPA 2, as transformers saves it",
        "https://huggingface.co/facebook/vjepa2-vitl-fpc64-256",
    ),
    "clip": Weights(
        "a folder with config.json and model.safetensors of CLIP, as transformers saves it",
        "https://huggingface.co/openai/clip-vit-large-patch14-336",
    ),
}


def _scripted(path: Path, what: str, device: torch.device) -> torch.jit.ScriptModule:
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected {what}")
    try:
        with warnings.catch_warnings():  # that TorchScript is old: so are the judges that are released
            warnings.simplefilter("ignore")
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path}: is not {what}: {_words(error)}") from None


def _words(error: Exception) -> str:
    """What TorchScript says: the last line of its report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


class _Scripted:
    """What two networks in TorchScript share."""

    needs_weights = True
    name: str

    def __init__(self, path: str | Path, device: torch.device):
        self.path, self.device = Path(path), device
        self.module = _scripted(self.path, WEIGHTS[self.name].what, device)
        self.sha256 = checksum(self.module)

    def _features(self, x: Tensor, **options: bool) -> Tensor:
        """[B, ...] -> fp32 [B, D] on the host."""
        try:
            made = self.module(x.to(self.device), **options)
            fits = made.ndim == 2 and len(made) == len(x)
        except (RuntimeError, AttributeError) as error:
            raise InputError(f"{self.path}: takes no input of {list(x.shape)}: {_words(error)}") from None
        if not fits:
            found = list(made.shape)
            raise InputError(f"{self.path}: gives {found} for input of {list(x.shape)}, expected [{len(x)}, features]")
        return made.float().cpu()


class I3D(_Scripted):
    """The 400 values before I3D's softmax, averaged over time: [B, F, H, W, 3] -> [B, 400]. The network brings frames
    to 224 x 224 itself, bilinearly, and wants about 10 frames or more."""

    name, of_frames = "i3d", False

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        parts = [to_float(part).transpose(1, 2) for part in video.split(CLIPS_AT_ONCE)]  # [B, 3, F, H, W] in [-1, 1]
        return torch.cat([self._features(part, rescale=False, resize=True, return_features=True) for part in parts])


class Inception(_Scripted):
    """The 2048 values of Inception's last pooling, of every frame: [B, F, H, W, 3] -> [B, F, 2048]. The network brings
    frames to 299 x 299 itself, as TensorFlow does."""

    name, of_frames = "inception", True

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        frames = video.flatten(0, 1).movedim(-1, 1)  # uint8 [B F, 3, H, W]
        made = torch.cat([self._features(part, return_features=True) for part in frames.split(FRAMES_AT_ONCE)])
        return made.unflatten(0, video.shape[:2])


def _coloured(frames: Tensor, side: int, mode: str, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """uint8 [N, H, W, 3] -> fp32 [N, 3, side, side], whole frames resized with antialiasing and normalised."""
    x = frames.movedim(-1, 1).float() / 255
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode=mode, antialias=True, align_corners=False)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in colours)
    return (x - mean) / std


class VJEPA2:
    """The mean over all tokens that V-JEPA 2's encoder makes of a clip (Assran et al. 2025): [B, F, H, W, 3] -> [B, E].

    All frames are shown, the last one twice where their number is odd; whole frames are brought to the network's size,
    bilinearly. MiMo (App. H.1) takes CMMD with these features and says no more: they are compared as they come out of
    the encoder's last norm, not brought to length 1.
    """

    name, needs_weights, of_frames = "vjepa2", True, False

    def __init__(self, path: str | Path, device: torch.device):
        what = "V-JEPA 2"
        self.model: Any = read_folder(path, "VJEPA2Model", who="the judge 'vjepa2'", what=what).to(device)
        self.device, self.sha256 = device, checksum(self.model)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        config = self.model.config
        tube, made = config.tubelet_size, []
        for part in video.split(CLIPS_AT_ONCE):
            x = _coloured(part.flatten(0, 1).to(self.device), config.crop_size, "bilinear", IMAGENET)
            x = x.unflatten(0, part.shape[:2])
            x = torch.cat([x, x[:, -1:].expand(-1, -x.shape[1] % tube, -1, -1, -1)], dim=1)
            hidden = self.model(pixel_values_videos=x, skip_predictor=True).last_hidden_state  # [B, tokens, E]
            made.append(hidden.float().mean(1).cpu())
        return torch.cat(made)


class CLIP:
    """CLIP's embedding of every frame, of length 1, as CMMD has it (Jayasumana et al. 2024): [B, F, H, W, 3] ->
    [B, F, E]. Whole frames are brought to the network's size, bicubically."""

    name, needs_weights, of_frames = "clip", True, True

    def __init__(self, path: str | Path, device: torch.device):
        kind = "CLIPVisionModelWithProjection"
        self.model: Any = read_folder(path, kind, who="the judge 'clip'", what="CLIP").to(device)
        self.device, self.sha256 = device, checksum(self.model)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        made = []
        for part in video.flatten(0, 1).split(FRAMES_AT_ONCE):
            x = _coloured(part.to(self.device), self.model.config.image_size, "bicubic", CLIP_COLOURS)
            made.append(F.normalize(self.model(pixel_values=x).image_embeds.float(), dim=1).cpu())
        return torch.cat(made).unflatten(0, video.shape[:2])


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018), version 0.1 with AlexNet, of frames at their size.

        d(x, y) = sum over layers l of mean over positions of w_l . (x_l / |x_l| - y_l / |y_l|)^2

    x_l are the activations behind the l-th of five rectifiers, w_l >= 0 was learnt from people's judgements.
    torchmetrics has the same network, for machines with torchvision, which fetches AlexNet; this one reads the file.

    Args:
        path: torchvision's AlexNet.
    """

    name, needs_weights = "alexnet", True
    channels = (64, 192, 384, 256, 256)
    shift: Tensor
    scale: Tensor

    def __init__(self, path: str | Path, device: torch.device):
        super().__init__()
        c = self.channels
        self.features = nn.ModuleList(
            [
                nn.Conv2d(3, c[0], 11, stride=4, padding=2),
                nn.Conv2d(c[0], c[1], 5, padding=2),
                *(nn.Conv2d(ins, outs, 3, padding=1) for ins, outs in zip(c[1:], c[2:])),
            ]
        )
        self.layers = nn.ParameterList([torch.zeros(1, width, 1, 1) for width in c])
        # Of colours in [-1, 1], as LPIPS has them: ImageNet's, rounded.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self._load(Path(path))
        self.to(device).eval().requires_grad_(False)
        self.device, self.sha256 = device, checksum(self)

    def _load(self, path: Path) -> None:
        import torchmetrics

        state = load_torch(path)
        if not isinstance(state, dict):
            raise InputError(f"{path}: holds no state dict, expected {WEIGHTS['alexnet'].what}")
        # torchvision counts the layers between the convolutions too; its classifier is not needed.
        numbers = {0: 0, 3: 1, 6: 2, 8: 3, 10: 4}
        own = {
            f"{ours}.{kind}": state[f"features.{theirs}.{kind}"]
            for theirs, ours in numbers.items()
            for kind in ("weight", "bias")
            if f"features.{theirs}.{kind}" in state
        }
        load_state(self.features, own, path)
        heads = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
        learnt = load_torch(heads)
        load_state(self.layers, {str(n): learnt[f"lin{n}.model.1.weight"] for n in range(len(self.channels))}, heads)

    def _activations(self, frames: Tensor) -> list[Tensor]:
        """[N, 3, H, W] in [-1, 1] -> per layer [N, C, H', W'], each position of length 1."""
        x, made = (frames - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            x = layer(F.max_pool2d(x, 3, stride=2) if number in (1, 2) else x).relu()
            made.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return made

    @torch.no_grad()
    def forward(self, video: Tensor, truth: Tensor) -> Tensor:
        """uint8 [..., F, H, W, 3] twice -> fp64 [..., F]; ValueError for frames that AlexNet is too large for."""
        if min(video.shape[-3:-1]) < 32:
            raise ValueError(f"lpips: frames of {list(video.shape[-3:-1])}: expected at least 32 x 32")
        values = []
        flat = [x.flatten(0, -4).split(FRAMES_AT_ONCE) for x in (video, truth)]
        for x, y in zip(*flat, strict=True):
            ours, theirs = (self._activations(to_float(z.to(self.device))) for z in (x, y))
            layers = zip(ours, theirs, self.layers, strict=True)
            parts = [((a - b).square() * weight).sum(1).mean((1, 2)) for a, b, weight in layers]
            values.append(torch.stack(parts).sum(0).double().cpu())
        return torch.cat(values).reshape(video.shape[:-3])


Judge = Features | LPIPS
JUDGES: dict[str, Any] = {kind.name: kind for kind in (I3D, Inception, VJEPA2, CLIP, LPIPS)}


@dataclass(frozen=True)
class Score:
    """A column of a table.

    Args:
        title: as papers write it.
        judge: what measures: a name in JUDGES or WEIGHT_FREE; None: pixels alone.
        distance: of two sets; None: of each video from its truth, frame by frame.
        higher: whether more is better.
    """

    title: str
    judge: str | None = None
    distance: Literal["frechet", "mmd"] | None = None
    higher: bool = False


SCORES = {
    "psnr": Score("PSNR", higher=True),
    "ssim": Score("SSIM", higher=True),
    "lpips": Score("LPIPS", "alexnet"),
    "fvd": Score("FVD", "i3d", "frechet"),
    "fid": Score("FID", "inception", "frechet"),
    "vmmd": Score("VMMD", "vjepa2", "mmd"),
    "cmmd": Score("CMMD", "clip", "mmd"),
    "fd-dct": Score("FD(DCT)", "dct", "frechet"),
    "fd-random": Score("FD(random)", "random", "frechet"),
}
UNWEIGHTED = tuple(name for name, score in SCORES.items() if score.judge is None or score.judge in WEIGHT_FREE)


def open_judges(scores: tuple[str, ...], paths: dict[str, Path | None], device: torch.device) -> dict[str, Any]:
    """The judges that the scores need, by name.

    Args:
        paths: of the weights, by judge; what no score needs is not read.

    Raises: InputError for unknown scores, weights that are not given (with the place to get them and the layout that
        is expected), and weights that cannot be read.
    """
    opened: dict[str, Any] = {}
    for name in scores:
        if name not in SCORES:
            raise InputError(f"unknown score {name!r}: known scores are {', '.join(SCORES)}")
        judge = SCORES[name].judge
        if judge in WEIGHT_FREE:
            opened[judge] = WEIGHT_FREE[judge]()
        elif judge is not None and judge not in opened:
            path = paths.get(judge)
            if path is None:
                w = WEIGHTS[judge]
                raise InputError(
                    f"the score {name} needs --{judge}: {w.what}; get it from {w.place}, or name --scores that need "
                    f"none: {' '.join(UNWEIGHTED)}"
                )
            try:
                opened[judge] = JUDGES[judge](path, device)
            except OSError as error:
                raise InputError(f"--{judge} {path}: {reason(error)}") from None
    return opened


def judge_checksum(judge: Any) -> str:
    """What decides its values: SHA-256 of its weights, or of the definition of what has none."""
    return judge.sha256 if judge.needs_weights else checksum(judge)
