"""Damage of every class of byte positions in every file of a checkpoint, of an unfinished video and of latent shards:
refused with file and reason, passed over for an older one with the reason said, or without effect. Never something
else instead."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mimo import MiMo, MiMoConfig, checkpoint
from mimo.config import Encoding, SampleConfig
from mimo.data import LatentShards, NpzTrajectories
from mimo.data.encode import write_shards
from mimo.errors import InputError
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving, load_frames, load_run
from mimo.tokenizers import build_tokenizer

from ..fuzz.damage import every_class, put, require_one_line


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def as_bytes(tensors: dict) -> dict:
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def check_every_damage(file: Path, read, *names: str) -> tuple[int, int]:
    """read() gives what is read and whether something was said. Returns how much was refused and how much had no
    effect."""
    whole, (expected, said) = file.read_bytes(), read()
    assert not said
    refused = harmless = 0
    for what, data in every_class(file):
        put(file, data)
        try:
            found, said = read()
        except InputError as error:
            require_one_line(error, *names)
            refused += 1
        else:
            if not said:
                assert found == expected, f"{file}: {what} is believed"
                harmless += 1
            else:
                assert any(name in said for name in names), f"{said!r} names none of {names}"
                refused += 1
        finally:
            file.write_bytes(whole)
    assert read() == (expected, None)
    assert refused > 10 * harmless
    return refused, harmless


def test_every_file_of_a_checkpoint(tmp_path):
    for step in (1, 2):
        tensors = {"model": {"weight": torch.full((3, 2), float(step)), "bias": torch.arange(3)}}
        tensors["ema"] = {"weight": torch.full((3, 2), step + 0.5, dtype=torch.bfloat16)}
        state = {"configs": {"model": {"depth": 2, "ratio": [0.1, 0.25]}, "data": "clips"}, "ema_updates": step}
        checkpoint.save(tmp_path, step, tensors, state)
    older = tmp_path / "checkpoints" / "step_00000001"

    def read():
        folder, passed_over = checkpoint.find(tmp_path)
        state = checkpoint.read_state(folder)
        found = {part: as_bytes(checkpoint.read_tensors(folder, part, state)) for part in ("model", "ema")}
        assert bool(passed_over) == (folder == older)
        assert found["model"]["weight"][2] == torch.full((3, 2), float(state["step"])).numpy().tobytes()
        return (state, found), passed_over[0] if passed_over else None

    files = files_of(tmp_path / "checkpoints" / "step_00000002")
    assert {file.suffix for file in files} == {".json", ".safetensors"} and len(files) == 3
    for file in files:
        check_every_damage(file, read, "step_00000002")


def test_every_file_of_an_unfinished_video(tmp_path, caplog):
    torch.manual_seed(0)
    network = {"depth": 1, "dim": 16, "heads": 1, "frames": 4, "height": 1, "width": 2, "channels": 2}
    network |= {"mask_weight": 0.0, "parameterization": "flow", "decoder_layer": 1}
    sampling = SampleConfig(sampler="euler", steps=1, num_frames=5, window=2)
    sampler, saving = Sampler(MiMo(MiMoConfig(**network)).eval(), sampling), Saving(tmp_path, every=2)
    stream = sampler.stream(None, 5, generator=torch.Generator().manual_seed(0), saving=saving)
    for _ in range(4):
        next(stream)
    stream.close()
    identity = sampler.identity(saving.request)

    def read():
        caplog.clear()
        saved = load_run(tmp_path, identity)
        frames = {str(number): frame for number, frame in enumerate(load_frames(tmp_path, saved.progress))}
        said = [record.message for record in caplog.records if record.name == "mimo.sample"]
        assert bool(said) == (saved.progress.done == 2)
        return (saved.progress, saved.key, as_bytes(saved.tensors), as_bytes(frames)), said[0] if said else None

    files = [*files_of(tmp_path / "checkpoints" / "step_00000004"), *files_of(tmp_path / "frames")]
    assert len(files) == 6
    for file in files:
        check_every_damage(file, read, "step_00000002", "step_00000004")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The folder of two shards with five clips, and what is needed to encode them again."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "clips").mkdir()
    draw = np.random.default_rng(0)
    for clip in range(5):
        video = draw.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
        np.savez(folder / "clips" / f"{clip}.npz", video=video, actions=draw.integers(0, 3, 3))
    dataset = NpzTrajectories(folder / "clips", num_frames=3, height=4, width=4, num_actions=3)
    tokenizer = build_tokenizer("dct", compression=(1, 2, 2), channels=4)
    config = Encoding(shard_clips=3, batch_size=2, workers=0)
    write_shards(dataset, tokenizer, folder / "latents", config, tokenizer_name="dct")
    return folder / "latents", dataset, tokenizer, config


def test_every_file_of_latent_shards(shards, capsys, caplog):
    """Read for training, and begun anew: what is damaged is refused or made again, and the folder is as it was."""
    folder, dataset, tokenizer, config = shards

    def read():
        clips = LatentShards(folder, num_actions=3)
        clips.check_readable()
        samples = [as_bytes({k: torch.from_numpy(v) for k, v in clips.sample(n, 0).items()}) for n in range(len(clips))]
        return samples, None

    def again():
        write_shards(dataset, tokenizer, folder, config, tokenizer_name="dct")
        return {file.name: file.read_bytes() for file in files_of(folder)}, None

    whole = again()[0]
    assert sorted(whole) == ["files.json", "index.json", "plan.json", *(f"shard-0000{n}.safetensors" for n in (0, 1))]
    for file in files_of(folder):
        if file.name in ("index.json", "shard-00000.safetensors"):
            check_every_damage(file, read, "index.json", "shard-00000.safetensors", str(folder))
        for what, data in every_class(file):
            put(file, data)
            caplog.clear()
            try:
                made = again()[0]
            except InputError as error:
                require_one_line(error, file.name, str(folder))
                assert file.suffix == ".json", f"{file.name}: {what} is not made anew"
            else:
                said = [record.message for record in caplog.records if record.name == "mimo.encode"]
                assert said == (
                    [f"{file}: is damaged, and made anew"] if file.suffix != ".json" and data is not None else []
                )
                assert made.keys() == whole.keys()
                differing = [name for name in made if made[name] != whole[name]]
                assert (
                    not differing or differing == [file.name] and _says_the_same(made[file.name], whole[file.name])
                ), f"{file.name}: {what} is believed"
            for name, content in whole.items():
                (folder / name).write_bytes(content)
    capsys.readouterr()


def _says_the_same(one: bytes, other: bytes) -> bool:
    return json.loads(one) == json.loads(other)
