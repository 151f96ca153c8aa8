"""Which values shards hold: means or draws of the posterior, and none that are not finite."""

import json

import pytest
import torch

from mimo.config import Encoding
from mimo.data import DataError, LatentShards, ShapesDataset
from mimo.data.encode import verify
from mimo.errors import InputError
from mimo.tokenizers import build_tokenizer
from mimo.tokenizers.weights import checksum

from .test_encode import SHAPE, run


@pytest.fixture
def tokenizer():
    return build_tokenizer("dct", compression=(1, 8, 8), channels=24)


class Gaussian(torch.nn.Module):
    """A tokenizer whose posterior has mean 0 and deviation 1."""

    compression, channels = (1, 8, 8), 2

    def latent_shape(self, frames, height, width):
        return frames, 2, 2, 2

    def num_frames(self, latent_frames):
        return latent_frames

    def encode(self, video):
        return torch.zeros(len(video), 3, 2, 2, 2)

    def draw(self, video, seeds):
        return torch.stack(
            [torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(s)) for s in seeds.tolist()]
        )

    def decode(self, latents):
        raise NotImplementedError


def test_latents_drawn_from_the_posterior_are_recorded_as_such(tmp_path, tokenizer):
    dataset, cut = ShapesDataset(**SHAPE, length=5), {"interval": 1, "flip": False}
    names, drawn = {}, {}
    for batch_size in (2, 3):
        config = Encoding(passes=2, batch_size=batch_size, workers=0, posterior="sample")
        out = names[batch_size] = run(dataset, Gaussian(), tmp_path / str(batch_size), config)
        drawn[batch_size] = torch.stack(
            [torch.from_numpy(LatentShards(out).sample(i, 0)["latents"]) for i in range(10)]
        )
    assert torch.equal(drawn[2], drawn[3]), "a clip's noise is its own"
    assert drawn[2].flatten(1).unique(dim=0).shape[0] == 10 and 0.8 < drawn[2].std() < 1.2
    shards, sha256 = LatentShards(names[2]), checksum(Gaussian())
    assert shards.index.posterior == "sample" and verify(names[2], dataset, Gaussian(), clips=10) == 10
    shards.require_made_by("dct", Gaussian(), sha256, **cut, posterior="sample")
    with pytest.raises(DataError, match="was encoded with posterior 'sample', training has 'mean'"):
        shards.require_made_by("dct", Gaussian(), sha256, **cut)
    with pytest.raises(InputError, match="posterior='sample': expected 'mean', as the tokenizer 'dct' gives no dist"):
        run(dataset, tokenizer, tmp_path / "dct", Encoding(posterior="sample"))
    plan = json.loads((run(dataset, tokenizer, tmp_path / "means") / "plan.json").read_text())
    assert "posterior" not in plan, "shards of older versions are those of the means"


def test_latents_that_overflow_are_refused(tmp_path):
    class Huge(torch.nn.Module):
        compression = (1, 8, 8)

        def latent_shape(self, frames, height, width):
            return frames, 1, 1, 1

        def encode(self, video):
            return torch.full((len(video), 3, 1, 1, 1), 1e6)

    with pytest.raises(DataError, match="clip 0, pass 0: its latents are not finite in fp16"):
        run(ShapesDataset(**SHAPE, length=2), Huge(), tmp_path / "out")
