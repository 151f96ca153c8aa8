"""Training in stages of other frames and sizes: resumed inside of any, sampled, begun from another run's weights."""

import pytest
import torch

from mimo import MiMoConfig, checkpoint
from mimo.config import SampleConfig, TrainConfig
from mimo.data import ShapesDataset
from mimo.errors import InputError
from mimo.sampling.loading import load
from mimo.tokenizers import DCTTokenizer
from mimo.training.loop import train
from mimo.training.trainer import Trainer

from .test_videomar import FRAMES, SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


TOKENIZED = SMALL | {
    "width": 2,
    "channels": 12,
    "compression": (1, 2, 2),
    "video_frames": FRAMES,
    "depth": 1,
    "dim": 16,
}
OPTIMISATION = {"batch_size": 4, "steps": 6, "lr": 1e-2, "lr_schedule": "constant", "warmup": 0, "precision": "fp32"}
OPTIMISATION |= {"workers": 0, "log_every": 2, "save_every": 100, "preview_every": 0}
STAGES = ("2:2x2x4", "4:3x4x2")  # fewer frames of another size, then more; the network's own are 4 of 4 x 4


def shapes(frames: int, height: int, width: int) -> ShapesDataset:
    return ShapesDataset(num_frames=frames, height=height, width=width, length=20)


def trainer_of(stages=STAGES, init=None, **options) -> Trainer:
    training = TrainConfig(**OPTIMISATION | {"stages": stages} | options)
    datasets = [shapes(*map(int, stage.split(":")[1].split("x"))) for stage in stages]
    sampling = SampleConfig(sampler="ddpm", steps=2, mask_steps=2, context_frames=1, num_frames=FRAMES)
    return Trainer(MiMoConfig(**TOKENIZED), training, sampling, shapes(FRAMES, 4, 4), stages=datasets, init=init)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = {f"ema.{name}": t.clone() for name, t in trainer.ema.tensors.items()}
    return tensors | {name: t.clone() for name, t in trainer.model.state_dict().items()} | {
        name: t.clone() for name, t in checkpoint.optimizer_tensors(trainer.optimizer, trainer.model).items()
    }  # fmt: skip


def test_a_run_resumed_inside_any_stage_is_bitwise_undisturbed_training(tmp_path, monkeypatch):
    seen, encode = [], DCTTokenizer.encode
    monkeypatch.setattr(
        DCTTokenizer, "encode", lambda self, video: (seen.append(tuple(video.shape[1:])), encode(self, video))[1]
    )
    straight = trainer_of()
    train(straight)
    assert seen == [(2, 3, 2, 4)] * 2 + [(3, 3, 4, 2)] * 2 + [(FRAMES, 3, 4, 4)] * 2
    for before in (1, 2, 3, 5):  # inside a stage, where one ends, inside the next, and behind all of them
        first = trainer_of()
        first.start_data()
        for _ in range(before):
            first.train_step()
        second = trainer_of()
        second.load(first.save(tmp_path / str(before)))
        seen.clear()
        train(second)
        assert len(seen) == 6 - before and seen[-1] == (FRAMES, 3, 4, 4)
        one, other = state_of(straight), state_of(second)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), before


def test_a_checkpoint_of_a_stage_is_sampled_in_its_shape(tmp_path):
    trainer = trainer_of()
    trainer.start_data()
    for step, shape in ((1, (2, 1, 2, 12)), (3, (3, 2, 1, 12)), (6, (FRAMES, 2, 2, 12))):
        while trainer.step < step:
            trainer.train_step()
        trainer.save(tmp_path / str(step))
        loaded = load(tmp_path / str(step))
        assert loaded.model.config.latent_shape == shape == trainer.shape.latent_shape


def test_a_second_phase_begins_with_the_weights_of_the_first(tmp_path):
    """Another resolution and tokenizer, the same weights; and what has no such weights is refused."""
    first = trainer_of(())
    first.start_data()
    first.train_step()
    folder = first.save(tmp_path / "run")
    wider = MiMoConfig(**TOKENIZED | {"width": 3, "compression": (1, 4, 2)})
    given = TrainConfig(**OPTIMISATION), SampleConfig(sampler="ddpm", num_frames=FRAMES), shapes(FRAMES, 8, 6)
    for source in (tmp_path / "run", folder):
        second = Trainer(wider, *given, init=source)
        for name, tensor in second.model.state_dict().items():
            assert torch.equal(tensor, first.ema.tensors[name]) and torch.equal(tensor, second.ema.tensors[name])
        assert second.step == 0
    train(second)
    with pytest.raises(InputError, match="token_width|shape|head"):
        Trainer(MiMoConfig(**TOKENIZED | {"token_width": 8}), *given[:2], shapes(FRAMES, 4, 4), init=folder)
    with pytest.raises(InputError, match="does not exist"):
        trainer_of((), init=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (("4:2x2",), "stages='4:2x2': expected UNTIL:FRAMESxHEIGHTxWIDTH, as 20000:5x256x256"),
        (("0:2x2x2",), "stages='0:2x2x2': expected UNTIL:FRAMESxHEIGHTxWIDTH"),
        (("4:2x2x2", "4:3x4x4"), "stages='4:3x4x4': expected to end behind the stage before, '4:2x2x2'"),
        (("4:2x3x2",), "stages='4:2x3x2': dct: a clip of 2 x 3 x 2: expected .* height a multiple of 2"),
    ],
)
def test_bad_stages_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(stages)
