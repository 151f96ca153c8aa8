"""Judges on random weights in the layouts that are released, each against an independent way to its values."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mimo.errors import InputError
from mimo.evaluation.judges import SCORES, WEIGHTS, open_judges
from mimo.evaluation.metrics import Features

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:Warning")  # how released judges are made


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class I3DLayout(nn.Module):
    """What the released I3D takes and gives, with random weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 400, (2, 3, 3))

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        if resize:
            size = [x.size(2), 8, 8]
            x = torch.nn.functional.interpolate(x, size=size, mode="trilinear", align_corners=False)
        if rescale:
            x = 2 * x / 255 - 1
        x = self.conv(x).mean([2, 3, 4])
        return x if return_features else x.softmax(1)


class InceptionLayout(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2048)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = self.linear(img.float().mean([2, 3]) / 128 - 1)
        return x if return_features else x[:, :1008]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    i3d, inception = I3DLayout(), InceptionLayout()
    torch.jit.script(i3d).save(str(folder / "i3d.pt"))
    torch.jit.script(inception).save(str(folder / "inception.pt"))
    alexnet = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )
    state = {f"features.{name}": value for name, value in alexnet.state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, folder / "alexnet.pth")
    return folder, i3d, inception, alexnet


def test_i3d_sees_clips_in_its_own_scale(weights):
    folder, i3d, *_ = weights
    judge = open_judges(("fvd",), {"i3d": folder / "i3d.pt"}, CPU)["i3d"]
    assert isinstance(judge, Features) and judge.needs_weights and not judge.of_frames
    video = clips(9, 4, 10, 12)  # more than it takes at once
    with torch.no_grad():
        x = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        expected = i3d(x, resize=True, return_features=True)
    torch.testing.assert_close(judge(video), expected, atol=1e-5, rtol=1e-5)
    again = open_judges(("fvd",), {"i3d": folder / "i3d.pt"}, CPU)["i3d"]
    assert len(judge.sha256) == 64 and judge.sha256 == again.sha256
    with pytest.raises(InputError, match=r"i3d.pt: takes no input of \[1, 3, 1, 10, 12\]: "):
        judge(video[:1, :1])  # its filters are longer than the clip


def test_inception_sees_every_frame(weights):
    folder, _, inception, _ = weights
    judge = open_judges(("fid",), {"inception": folder / "inception.pt"}, CPU)["inception"]
    video = clips(2, 40, 6, 8)
    made = judge(video)
    assert made.shape == (2, 40, 2048) and judge.of_frames
    with torch.no_grad():
        expected = inception(video[1, 39:].movedim(-1, 1), return_features=True)[0]
    torch.testing.assert_close(made[1, 39], expected)


def test_lpips_is_that_of_torchmetrics(weights, monkeypatch):
    """torchmetrics has the network for machines with torchvision: here it is given the same AlexNet."""
    from torchmetrics.functional.image import lpips

    folder, _, _, alexnet = weights
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: alexnet)
    theirs = lpips._LPIPS(pretrained=True, net="alex")
    judge = open_judges(("lpips",), {"alexnet": folder / "alexnet.pth"}, CPU)["alexnet"]
    video, truth = clips(2, 35, 36, 40), clips(2, 35, 36, 40, seed=1)
    made = judge(video, truth)
    assert made.shape == (2, 35) and (made > 0).all()
    with torch.no_grad():
        x, y = (z.flatten(0, 1).movedim(-1, 1).float() / 127.5 - 1 for z in (video, truth))
        expected = theirs(x, y).view(2, 35).double()
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-4)
    assert (judge(video, video) == 0).all()
    with pytest.raises(ValueError, match=r"lpips: frames of \[31, 40\]: expected at least 32 x 32"):
        judge(video[:, :, :31], truth[:, :, :31])


def test_vjepa2_is_the_mean_of_its_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1.0}
    predictor = {"pred_hidden_size": 12, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1}
    config = transformers.VJEPA2Config(crop_size=32, patch_size=16, frames_per_clip=4, **size, **predictor)
    torch.manual_seed(0)
    transformers.VJEPA2Model(config).save_pretrained(tmp_path)
    judge = open_judges(("vmmd",), {"vjepa2": tmp_path}, CPU)["vjepa2"]
    model = transformers.VJEPA2Model.from_pretrained(tmp_path).eval()
    video = clips(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (video.movedim(-1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        hidden = model(pixel_values_videos=torch.cat([x, x[:, -1:]], 1), skip_predictor=True).last_hidden_state
    assert hidden.shape == (2, 2 * 2 * 2, 24)  # three frames are four: tubes of two
    torch.testing.assert_close(judge(video), hidden.mean(1), atol=1e-5, rtol=1e-5)


def test_clip_gives_frames_length_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=8, **size)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    judge = open_judges(("cmmd",), {"clip": tmp_path}, CPU)["clip"]
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    video = clips(2, 3, 48, 40)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    x = F.interpolate(video.flatten(0, 1).movedim(-1, 1).float() / 255, (32, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = F.normalize(model(pixel_values=(x - mean) / std).image_embeds, dim=1).unflatten(0, (2, 3))
    made = judge(video)
    assert judge.of_frames and made.norm(dim=2).allclose(torch.ones(2, 3))
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", [name for name, score in SCORES.items() if score.judge in WEIGHTS])
def test_weights_that_are_missing_are_said_where_to_get(score):
    judge = SCORES[score].judge
    with pytest.raises(InputError) as error:
        open_judges((score,), {}, CPU)
    words = str(error.value)
    assert words.startswith(f"the score {score} needs --{judge}: {WEIGHTS[judge].what}; get it from https://")
    assert "fd-dct" in words and "\n" not in words


def test_weights_of_another_layout_are_refused(weights, tmp_path, monkeypatch):
    folder, *_ = weights
    (tmp_path / "text.pt").write_text("no network")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")

    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
            return x

    torch.jit.script(Wrong()).save(str(tmp_path / "wrong.pt"))
    for score, judge, name, message in (
        ("fvd", "i3d", "none.pt", r"none\.pt: no such file, expected i3d_torchscript\.pt, I3D trained on"),
        ("fvd", "i3d", "text.pt", r"text\.pt: is not i3d_torchscript\.pt"),
        ("lpips", "alexnet", "none.pth", "none.pth: No such file"),
        ("lpips", "alexnet", "other.pth", r"other\.pth: not weights of this ModuleList: 9 missing"),
        ("lpips", "alexnet", "list.pth", r"list\.pth: holds no state dict"),
        ("vmmd", "vjepa2", "none", r"no such folder with a config\.json, expected V-JEPA 2"),
    ):
        with pytest.raises(InputError, match=message) as error:
            open_judges((score,), {judge: tmp_path / name}, CPU)
        assert "\n" not in str(error.value)
    judge = open_judges(("fvd",), {"i3d": tmp_path / "wrong.pt"}, CPU)["i3d"]
    with pytest.raises(InputError, match=r"wrong\.pt: gives \[2, 3, 4, 8, 8\] for input of .*expected \[2, features\]"):
        judge(clips(2, 4, 8, 8))
    with pytest.raises(InputError, match="unknown score 'fvdd': known scores are psnr, ssim"):
        open_judges(("fvdd",), {}, CPU)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="the judge 'clip' needs the package transformers: pip install transformers"):
        open_judges(("cmmd",), {"clip": tmp_path}, CPU)
    assert math.isfinite(float(open_judges(("fvd",), {"i3d": folder / "i3d.pt"}, CPU)["i3d"](clips(1, 4, 8, 8)).sum()))
