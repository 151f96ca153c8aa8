"""Damaged files before every reader: what is read is what was written, or an older whole one with the reason said, or
the refusal is one line that names the file. Nothing else is raised, and nothing else is believed.

Files that carry no checksum, as logs, annotations and npz from elsewhere do, may say other things when they are
damaged; they are read or refused.
"""

import contextlib
import functools
import io
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from mimo import MiMo, MiMoConfig, checkpoint, records
from mimo.cli import main
from mimo.config import Encoding, SampleConfig
from mimo.data import LatentShards, NpzTrajectories, open_dataset
from mimo.data.encode import write_shards
from mimo.data.errors import UnreadableVideo
from mimo.errors import InputError
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving, load_frames, load_run
from mimo.tokenizers import build_tokenizer
from mimo.tokenizers.videovae import VideoVAE, VideoVAEConfig, VideoVAETokenizer
from mimo.training.log import RunLog, read_log

from .damage import at_random, change_json, put, require_one_line
from .registry import fuzzer

OLD_RUN = Path(__file__).parents[1] / "mimo" / "format_2"


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What is logged in this block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("mimo")
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".made-by-mimo")


def as_bytes(tensors: dict) -> dict:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def damaged_copies(
    whole: Path, victims: list[Path], draw: random.Random, cases: int, check: Callable[[Path, list[str]], None]
) -> int:
    """Copies a folder, damages one or two of its files, and calls check(copy, what was done); says what was done when
    it raises. victims: relative to `whole`."""
    contents = [(whole / victim).read_bytes() for victim in victims]
    with folder() as place:
        for case in range(cases):
            copy = Path(shutil.copytree(whole, place / f"{case}"))
            done = []
            for number in draw.sample(range(len(victims)), min(len(victims), draw.choice([1, 1, 1, 2]))):
                what, data = at_random(contents[number], contents, draw)
                put(copy / victims[number], data)
                done.append(f"{victims[number]}: {what}")
            try:
                check(copy, done)
            except Exception as error:
                raise AssertionError(f"after {'; '.join(done)}: {error!r}") from error
            shutil.rmtree(copy)
    return cases


def write_run(run: Path) -> dict[int, tuple]:
    """Three checkpoints, and what is in each."""
    written = {}
    for step in (10, 20, 30):
        draw = torch.Generator().manual_seed(step)
        tensors = {"model": {"w": torch.randn(5, 3, generator=draw), "n": torch.tensor(step)}}
        tensors |= {"ema": {"w": torch.randn(5, 3, generator=draw).bfloat16()}}
        state = {"configs": {"model": {"depth": step, "ratio": [0.1, 0.5]}}, "ema_updates": step}
        checkpoint.save(run, step, tensors, state)
        written[step] = {part: as_bytes(named) for part, named in tensors.items()}, state
    return written


@fuzzer("checkpoint files", ci_seeds=2)
def checkpoint_files(seed: int) -> int:
    with folder() as whole:
        written = write_run(whole)

        def check(run: Path, done: list[str]) -> None:
            try:
                found, passed_over = checkpoint.find(run)
            except InputError as error:
                raise AssertionError("two files at most are damaged, of three checkpoints one is whole") from error
            state = checkpoint.read_state(found)
            tensors, told = written[state["step"]]
            assert {part: as_bytes(checkpoint.read_tensors(found, part, state)) for part in tensors} == tensors
            assert all(state[key] == told[key] for key in told)
            assert len(passed_over) == (30 - state["step"]) // 10
            for reason, step in zip(passed_over, (30, 20)):
                require_one_line(InputError(reason), f"step_{step:08d}")
                assert any(f"step_{step:08d}" in what for what in done)

        victims = [file.relative_to(whole) for file in files_of(whole)]
        return damaged_copies(whole, victims, random.Random(seed), 60, check)


@fuzzer("log files", ci_seeds=1)
def log_files(seed: int) -> int:
    rows = [{"step": step, "diffusion": 1 / step, "skipped": 0, "lr": 1e-3} for step in range(2, 40, 2)]
    with folder() as whole:
        (whole / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def check(run: Path, done: list[str]) -> None:
            before = (run / "log.jsonl").read_bytes() if (run / "log.jsonl").exists() else None
            try:
                readable = read_log(run)
            except InputError as error:
                require_one_line(error, "log.jsonl")
                readable = None
            with contextlib.redirect_stdout(io.StringIO()) as out:
                RunLog(run, 100, start=50, device=torch.device("cpu")).__exit__()
            kept = read_log(run)
            if readable is None:
                assert (run / "log.damaged-1.jsonl").read_bytes() == before and "log.damaged-1.jsonl" in out.getvalue()
            else:
                assert kept == [row for row in readable if row["step"] <= 50] and not out.getvalue()

        return damaged_copies(whole, [Path("log.jsonl")], random.Random(seed), 60, check)


@fuzzer("run states", ci_seeds=1)
def run_states(seed: int) -> int:
    """state.json of a training run says something else, under a checksum that fits: refused by every command, or
    done."""
    draw, cases = random.Random(seed), 25
    source = next((OLD_RUN / "checkpoints").iterdir())
    data = (source / "state.json").read_bytes()
    with folder() as place:
        for case in range(cases):
            run = place / str(case)
            step = Path(shutil.copytree(source, run / "checkpoints" / source.name))
            changed = change_json(data, draw)
            with contextlib.suppress(ValueError, AttributeError, TypeError):  # no object, which carries no checksum
                changed = records.sealed(json.loads(changed)).encode()
            (step / "state.json").write_bytes(changed)
            resume = ["train", "--out", str(run), "--resume", "--data", "shapes", "--steps", "3", "--device", "cpu"]
            sample = ["sample", "--checkpoint", str(run), "--context-frames", "2", "--out", str(run / "out")]
            for command in (resume, sample):
                said = io.StringIO()
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                    status = main(command)
                assert status in (0, 2), f"{command}: status {status}"
                lines = said.getvalue().splitlines()
                assert status == 0 or (lines[-1].startswith("error: ") and "Traceback" not in said.getvalue()), lines
    return cases


@functools.lru_cache
def sampler() -> Sampler:
    torch.manual_seed(0)
    network = {"depth": 1, "dim": 16, "heads": 1, "frames": 4, "height": 1, "width": 2, "channels": 2}
    network |= {"mask_weight": 0.0, "parameterization": "flow", "decoder_layer": 1}
    config = SampleConfig(sampler="euler", steps=1, num_frames=8, window=2)
    return Sampler(MiMo(MiMoConfig(**network)).eval(), config)


def stream(saving: Saving | None):
    return sampler().stream(None, 8, generator=torch.Generator().manual_seed(0), saving=saving)


@fuzzer("unfinished videos", ci_seeds=1)
def unfinished_videos(seed: int) -> int:
    expected = list(stream(None))
    with folder() as whole:
        begun = stream(Saving(whole, every=2))
        for _ in range(6):
            next(begun)
        begun.close()
        identity = sampler().identity({})

        def check(run: Path, done: list[str]) -> None:
            with heard() as said:
                try:
                    saved = load_run(run, identity)
                except InputError as error:
                    require_one_line(error, "step_00000002", "step_00000004", "step_00000006")
                    return  # frames that both states need
            assert bool(said) == (saved.progress.done < 6), said
            assert all(map(torch.equal, load_frames(run, saved.progress), expected[: saved.progress.done]))
            rest = list(sampler().resume(Saving(run, every=3)))
            assert len(rest) == 8 - saved.progress.done and all(map(torch.equal, rest, expected[saved.progress.done :]))

        victims = [file.relative_to(whole) for file in files_of(whole)]
        return damaged_copies(whole, victims, random.Random(seed), 25, check)


def write_clips(place: Path) -> None:
    draw = np.random.default_rng(0)
    place.mkdir()
    for clip in range(5):
        video = draw.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
        np.savez(place / f"{clip}.npz", video=video, actions=draw.integers(0, 3, 3))


def encode(clips: Path, out: Path) -> None:
    dataset = NpzTrajectories(clips, num_frames=3, height=4, width=4, num_actions=3)
    tokenizer = build_tokenizer("dct", compression=(1, 2, 2), channels=4)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        write_shards(dataset, tokenizer, out, Encoding(shard_clips=3, batch_size=2, workers=0), tokenizer_name="dct")


@fuzzer("latent shards", ci_seeds=1)
def latent_shards(seed: int) -> int:
    """Read for training: the clips that were written, or a refusal. Encoded again: the folder that was, or a
    refusal."""

    def samples(latents: Path) -> list[dict]:
        clips = LatentShards(latents, num_actions=3)
        clips.check_readable()
        every = [clips.sample(number, 0) for number in range(len(clips))]
        return [as_bytes({name: torch.from_numpy(x) for name, x in sample.items()}) for sample in every]

    def says(data: bytes) -> dict:
        """What is left without the checksum, which may be lost: folders of before have none."""
        return {name: value for name, value in json.loads(data).items() if name != records.CHECKSUM}

    with folder() as place:
        write_clips(place / "clips")
        encode(place / "clips", place / "latents")
        whole = place / "latents"
        expected, contents = samples(whole), {file.name: file.read_bytes() for file in files_of(whole)}

        def check(latents: Path, done: list[str]) -> None:
            try:
                assert samples(latents) == expected
            except InputError as error:
                require_one_line(error, str(latents))
            try:
                encode(place / "clips", latents)
            except InputError as error:
                require_one_line(error, str(latents))
            else:
                found = {file.name: file.read_bytes() for file in files_of(latents)}
                assert found.keys() == contents.keys()
                for name, data in contents.items():
                    assert found[name] == data or (name.endswith(".json") and says(found[name]) == says(data))

        victims = [file.relative_to(whole) for file in files_of(whole)]
        return damaged_copies(whole, victims, random.Random(seed), 40, check)


@fuzzer("annotations", ci_seeds=1)
def annotations(seed: int) -> int:
    with folder() as whole:
        write_clips(whole / "clips")
        entries = [{"video_path": f"clips/{clip}.npz", "label": clip % 3, "frames": 3} for clip in range(5)]
        (whole / "annotation.json").write_text(json.dumps(entries, indent=1))

        def check(place: Path, done: list[str]) -> None:
            options = {"num_frames": 3, "height": 4, "width": 4, "annotation": place / "annotation.json"}
            try:
                dataset = open_dataset(place, **options)
                for index in range(len(dataset)):
                    assert dataset.sample(index, 0)["video"].shape == (3, 4, 4, 3)
            except InputError as error:
                require_one_line(error, str(place))

        return damaged_copies(whole, [Path("annotation.json")], random.Random(seed), 100, check)


@fuzzer("npz files", ci_seeds=1)
def npz_files(seed: int) -> int:
    with folder() as whole:
        write_clips(whole / "clips")

        def check(place: Path, done: list[str]) -> None:
            dataset = NpzTrajectories(place / "clips", num_frames=3, height=4, width=4, num_actions=3)
            unreadable = 0
            for index in range(len(dataset)):
                try:
                    sample = dataset.sample(index, 0)
                except UnreadableVideo as error:
                    require_one_line(error, dataset.name(index))
                    unreadable += 1
                else:
                    assert sample["video"].shape == (3, 4, 4, 3) and sample["actions"].shape == (3,)
            assert unreadable <= len(done)

        victims = [Path("clips") / f"{clip}.npz" for clip in (0, 1)]
        return damaged_copies(whole, victims, random.Random(seed), 60, check)


@fuzzer("tokenizer configurations", ci_seeds=1)
def tokenizer_configurations(seed: int) -> int:
    """config.json of a tokenizer with a value of another type, a key missing, renamed or added: refused, or a
    tokenizer."""
    draw, cases = random.Random(seed), 12
    values = (
        None,
        True,
        0,
        -1,
        1.5,
        3,
        "",
        "x",
        [],
        {},
        [[]],
        {"a": 1},
        [1, "2"],
    )  # and nothing large: it would be built
    with folder() as place:
        small = {"hidden_size": 32, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1, "attn_resolutions": ()}
        model = VideoVAE(VideoVAEConfig.kinetics600(**small, z_channels=2, embed_dim=2))
        VideoVAETokenizer(model, [0.0, 0.0], [1.0, 1.0]).save(place / "whole")
        data = (place / "whole" / "config.json").read_bytes()
        for _ in range(cases):
            changed = change_json(data, draw, values=values)
            (place / "whole" / "config.json").write_bytes(changed)
            try:
                VideoVAETokenizer.from_pretrained(place / "whole")
            except InputError as error:
                require_one_line(error, str(place), "videovae")
            except Exception as error:
                raise AssertionError(f"{changed!r}: {error!r}") from error
    return cases
