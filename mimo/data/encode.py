"""`mimo encode`: a dataset through a tokenizer into latent shards (see mimo.data.latents), once for many trainings.

Clip `index` of pass p is `dataset.sample(index, seed of p)`. Shard s holds a fixed range of clips and passes, so
several processes share the work (process r takes shards r, r + R, ...), a process that was stopped skips its whole
shards, and encoding again gives the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mimo import records
from mimo.config import Encoding
from mimo.data.errors import DataError, OutOfRange, UnreadableVideo
from mimo.data.latents import FORMAT, LatentShards, sha256
from mimo.data.loader import default_workers, report
from mimo.data.protocols import VideoDataset
from mimo.data.video import to_float
from mimo.encoders import Encoder
from mimo.errors import InputError
from mimo.folders import atomic_path
from mimo.tokenizers.protocols import Tokenizer, VariationalTokenizer, require_posterior
from mimo.tokenizers.weights import checksum

log = logging.getLogger("mimo.encode")

_END = 1 << 16  # bytes of a source file that are looked at, at its start and at its end
# What a process that was killed leaves: our temporary shard, safetensors' own, and those of the other files.
_TEMPORARY = re.compile(
    r"\.shard-\d+\.\d+\.tmp\.safetensors|\.tmp[A-Za-z0-9]{6}|\.(?:plan|index|files)\.json\.\d+\.tmp"
)
_LEFT_FOR = 60  # seconds after which nobody is writing an index any more
Likeness = tuple[int | None, str]  # of a source file: see `_likeness`
Networks = tuple[Tokenizer, Encoder | None]  # what makes latents, and what makes features where they are asked for
_ARRAYS = ("latents", "features")  # of a shard, what networks made
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class _Drawn:
    """Clip `index` of pass `turn`: its sample, or what is wrong with it.

    Args:
        noise_seed: of the latents, where they are drawn from a distribution.
        shortened: {file: what of it is used}, of the damaged videos met so far.
    """

    index: int
    turn: int
    noise_seed: int
    sample: dict[str, np.ndarray] | None
    failure: UnreadableVideo | None = None
    shortened: Mapping[str, str] = field(default_factory=dict)


class _Walk(Dataset):
    """Map from a position to _Drawn. Positions run through the clips, pass after pass."""

    def __init__(self, dataset: VideoDataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, position: int) -> _Drawn:
        turn, index = divmod(position, len(self.dataset))
        seed, noise_seed = (
            int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
            for entropy in ((self.seed, turn), (self.seed, turn, index))
        )
        sample = failure = None
        try:
            sample = self.dataset.sample(index, seed)
        except UnreadableVideo as error:  # handed over: what is raised in a worker reaches the user as a traceback
            failure = error
        return _Drawn(index, turn, noise_seed >> 1, sample, failure, dict(getattr(self.dataset, "shortened", {})))


def write_shards(
    dataset: VideoDataset,
    tokenizer: Tokenizer,
    out: str | Path,
    config: Encoding,
    *,
    tokenizer_name: str,
    encoder: Encoder | None = None,
    encoder_name: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Path:
    """Writes the shards of this process, then index.json if all shards are there, and prints which; returns `out`.

    Args:
        dataset: any of mimo.data with videos.
        tokenizer: any of mimo.tokenizers.
        tokenizer_name: recorded, with the dataset and the settings; `out` must have been begun with the same.
        encoder, encoder_name: any of mimo.encoders, whose features are stored beside the latents; None stores none.
        rank, world_size: this process among those that share the work.

    Raises: DataError when `out` was begun with other settings or another dataset, or when no clip can be read.
    """
    out = Path(out)
    require_posterior(tokenizer, tokenizer_name, config.posterior)
    plan = _plan(dataset, tokenizer, config, tokenizer_name) | _plan_features(dataset, encoder, encoder_name)
    _begin(out, plan, dataset)
    total = len(dataset) * config.passes
    ranges = [range(first, min(first + config.shard_clips, total)) for first in range(0, total, config.shard_clips)]
    todo = [s for s in range(rank, len(ranges), world_size) if not _is_whole(shard_file(out, s), plan, ranges[s])]
    for file in filter(Path.exists, (shard_file(out, s) for s in todo)):
        log.warning("%s: is damaged, and made anew", file)
    if todo:  # what was finished once is not whole any more
        (out / "index.json").unlink(missing_ok=True)
    tokenizer, encoder = tokenizer.to(device), None if encoder is None else encoder.to(device)
    began, share = time.monotonic(), f" of process {rank}" if world_size > 1 else ""
    with tqdm(total=sum(len(ranges[s]) for s in todo), unit="clip", desc="encode", disable=None) as bar:
        networks = tokenizer, encoder
        encoded = _encoded_shards(dataset, networks, config, plan, [ranges[s] for s in todo], device, bar)
        for number, (s, rows) in enumerate(zip(todo, encoded, strict=True), 1):
            _write_shard(shard_file(out, s), rows, plan, ranges[s])
            eta = tqdm.format_interval((time.monotonic() - began) / number * (len(todo) - number))
            bar.write(f"shard {number}/{len(todo)}{share}  {len(rows)} of {len(ranges[s])} clips  ETA {eta}")
    files = [shard_file(out, s) for s in range(len(ranges))]
    # Whoever comes last reads all shards again; the others see that some are not there yet.
    if all(file.exists() for file in files) and all(map(_is_whole, files, itertools.repeat(plan), ranges)):
        _finish(out, plan, len(ranges))
        verify(out, dataset, tokenizer, encoder, device=device)
        if todo or rank == 0:  # of those that find all of it done, one says so
            shards = LatentShards(out)
            skipped = f", {total - len(shards)} of {total} could not be used" if len(shards) < total else ""
            print(f"wrote and verified {shards!r}{skipped}")
    else:
        print(f"process {rank} of {world_size} has written its part of {out}, the others have not finished")
    return out


def _plan(dataset: VideoDataset, tokenizer: Tokenizer, config: Encoding, tokenizer_name: str) -> dict:
    """What decides the shards' bytes, besides the source files."""
    shape = dataset.num_frames, dataset.height, dataset.width
    return {
        "format": FORMAT,
        "dataset": repr(dataset),
        "settings": dataset.settings(),
        "clips": len(dataset),
        "tokenizer": tokenizer_name,
        "tokenizer_sha256": checksum(tokenizer),
        "compression": list(tokenizer.compression),
        "clip_shape": list(shape),
        "latent_shape": list(tokenizer.latent_shape(*shape)),
        "num_classes": dataset.num_classes,
        "num_actions": dataset.num_actions,
        "passes": config.passes,
        "shard_clips": config.shard_clips,
        "dtype": config.dtype,
        "seed": config.seed,
    } | ({} if config.posterior == "mean" else {"posterior": config.posterior})  # shards of before know no such choice


def _plan_features(dataset: VideoDataset, encoder: Encoder | None, name: str | None) -> dict:
    """The part of the plan that features add; shards without them know nothing of encoders."""
    if encoder is None:
        return {}
    shape = *encoder.grid(dataset.num_frames, dataset.height, dataset.width), encoder.channels
    return {"encoder": name, "encoder_sha256": checksum(cast(nn.Module, encoder)), "features_shape": list(shape)}


def _encoded_shards(
    dataset, networks: Networks, config: Encoding, plan: Mapping, ranges: list[range], device, bar: tqdm
) -> Iterator[list]:
    """The rows of each range of the walk, one after the other. Clips that cannot be used are named and left out."""
    batches = [
        [*covered[i : i + config.batch_size]] for covered in ranges for i in range(0, len(covered), config.batch_size)
    ]
    walk, generator, workers = _Walk(dataset, config.seed), torch.Generator(), config.workers
    if workers is None:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = default_workers(dataset, gpu=torch.device(device).type == "cuda", processes=sharing)
    loader = DataLoader(walk, batch_sampler=batches, collate_fn=list, num_workers=workers, generator=generator)
    reported: set[str] = set()
    decoded = iter(loader)
    for covered in ranges:
        rows, done = [], 0
        while done < len(covered):
            batch = next(decoded)
            done += len(batch)
            for clip in batch:
                if isinstance(clip.failure, OutOfRange):
                    raise DataError(str(clip.failure))
                report(reported, [(clip.failure.path, clip.failure.why)] if clip.failure else [], clip.shortened)
            rows += _encode_batch(batch, networks, device, plan)
            bar.update(len(batch))
        yield rows


def verify(
    path: str | Path, dataset=None, tokenizer=None, encoder=None, *, clips: int = 2, device: torch.device | str = "cpu"
) -> int:
    """Reads every shard back and returns the number of clips.

    Checks sizes, checksums, shapes and that all latents and features are finite; with `dataset`, that its files are
    those that were encoded; with `tokenizer` (and `encoder`) too, that `clips` clips encoded anew give what is stored.
    Raises DataError at the first fault.
    """
    path = Path(path)
    shards = LatentShards(path, allow_outside=True)
    index = shards.index
    if dataset is not None:
        _compare_files(path, dataset)
    places = []
    for number, shard in enumerate(shards.index.shards):
        try:
            shards.require_checksum(number)
            opened = shards.open_shard(number)
            stored = [opened.get_tensor(key) for key in _ARRAYS if key in opened.keys()]  # noqa: SIM118 (no mapping)
        except UnreadableVideo as error:
            raise DataError(str(error)) from None
        for array in stored:
            if not torch.isfinite(array).all():
                clip = (~torch.isfinite(array.flatten(1)).all(1)).nonzero()[0].item()
                raise DataError(f"{shards.files[number]}: clip {clip} is not finite")
        places += [(shards.files[number], row) for row in range(shard.clips)]
    if dataset is not None and tokenizer is not None:
        chosen = np.random.default_rng(index.seed).permutation(len(places))[:clips]
        for file, row in (places[i] for i in chosen):
            _compare_clip(file, row, _Walk(dataset, index.seed), (tokenizer, encoder), device, asdict(index))
    return len(places)


def shard_file(out: Path, number: int) -> Path:
    return out / f"shard-{number:05d}.safetensors"


def _begin(out: Path, plan: dict, dataset) -> None:
    """Writes plan.json and files.json, or compares with those of the run that is continued."""
    there = [path.name for path in out.iterdir()] if out.exists() else []
    if (out / "plan.json").exists():
        begun = records.read(out / "plan.json", dict[str, Any], error=DataError)
        wanted = json.loads(json.dumps(plan))
        for key in wanted | begun:
            if begun.get(key) != wanted.get(key) or key not in wanted:
                then, now = (repr(some.get(key)) for some in (begun, wanted))
                raise DataError(f"{out}: was begun with {key} {then}, not {now}: take another --out")
        _compare_files(out, dataset)
        return
    # files.json and names with a dot are of another process that is just beginning too, or was killed doing so.
    if any(name != "files.json" and name[0] != "." for name in there):
        raise DataError(f"{out}: is not empty and was not begun by mimo encode")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    for name, content in (("files.json", source_files(dataset)), ("plan.json", plan)):
        records.write(out / name, content)


def source_files(dataset: VideoDataset) -> dict[str, Likeness]:
    files = dataset.sources()
    with ThreadPoolExecutor(8) as readers:  # datasets lie on file systems that take long to answer
        return dict(zip(map(str, files), readers.map(_likeness, files), strict=True))


def _likeness(file: Path) -> Likeness:
    """[size, SHA-256 of the first and the last 64 KiB]: a copy has the same. An encoded video has its tables in one of
    them, so that another one differs there, be it as long. A file that cannot be read, as a clip may be, has none."""
    try:
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(_END))
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _END))
            digest.update(stream.read())
    except OSError as error:
        return None, error.strerror or str(error)
    return size, digest.hexdigest()


def _compare_files(out: Path, dataset) -> None:
    then = records.read(out / "files.json", dict[str, Likeness], error=DataError)
    now = source_files(dataset)
    changed = [name for name in then | now if then.get(name) != now.get(name)]
    if changed:
        what = [_describe(some.get(changed[0])) for some in (then, now)]
        raise DataError(
            f"{out}: the dataset has changed since it was encoded: {len(changed)} of {len(then)} files, first"
            f" {changed[0]}: {what[0]} then, {what[1]} now"
        )


def _describe(likeness: Likeness | None) -> str:
    if likeness is None:
        return "absent"
    size, digest = likeness
    return f"unreadable ({digest})" if size is None else f"{size} bytes (SHA-256 of its ends {digest[:8]}...)"


@torch.no_grad()
def _encode_batch(
    clips: list[_Drawn], networks: Networks, device: torch.device | str, plan: Mapping
) -> list[dict[str, torch.Tensor]]:
    """The rows of a shard, of those clips that have a sample."""
    tokenizer, encoder = networks
    drawn = [(clip, clip.sample) for clip in clips if clip.sample is not None]
    if not drawn:
        return []
    video = to_float(torch.stack([torch.from_numpy(sample["video"]) for _, sample in drawn]).to(device))
    if plan.get("posterior") == "sample" and isinstance(tokenizer, VariationalTokenizer):
        latents = tokenizer.draw(video, torch.tensor([clip.noise_seed for clip, _ in drawn]))
    else:
        latents = tokenizer.encode(video)
    arrays = {"latents": latents} | ({} if encoder is None else {"features": encoder.encode(video)})
    arrays = {key: array.to(_DTYPES[plan["dtype"]]).cpu() for key, array in arrays.items()}
    rows = []
    for number, (clip, sample) in enumerate(drawn):
        row = {key: array[number] for key, array in arrays.items()}
        for key, array in row.items():
            if not torch.isfinite(array).all():
                raise DataError(f"clip {clip.index}, pass {clip.turn}: its {key} are not finite in {plan['dtype']}")
        row |= {"index": torch.tensor(clip.index), "pass": torch.tensor(clip.turn)}
        row |= {key: torch.as_tensor(value) for key, value in sample.items() if key != "video"}
        rows.append(row)
    return rows


def _write_shard(file: Path, rows: list[dict[str, torch.Tensor]], plan: dict, covered: range) -> None:
    if rows:
        tensors = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    else:
        tensors = {"latents": torch.empty(0, *plan["latent_shape"], dtype=_DTYPES[plan["dtype"]])}
    with atomic_path(file) as temporary:
        try:
            save_file(tensors, temporary, _stamp(plan, covered, tensors))
        except SafetensorError as error:  # a full disk, for one
            raise OSError(str(error)) from None
        records.flush(temporary)
        shutil.copymode(file.with_name("plan.json"), temporary)  # safetensors lets nobody else read what it writes


def _is_whole(file: Path, plan: dict, covered: range) -> bool:
    """Whether a shard is there, of this plan and range, and holds what its digest says."""
    if not file.exists():
        return False
    try:
        with safe_open(file, framework="pt") as shard:
            metadata = shard.metadata() or {}
            tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError:
        return False
    return metadata == _stamp(plan, covered, tensors)


def _stamp(plan: dict, covered: range, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """What a shard says about itself: of which plan and which range of the walk it is, and a digest of its tensors.

    It is one entry, because safetensors writes several in an order that changes from run to run.
    """
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    stamp = {"plan": digest, "covered": [covered.start, covered.stop], "digest": _digest(tensors)}
    return {"mimo": json.dumps(stamp)}


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _finish(out: Path, plan: dict, shards: int) -> None:
    entries = []
    for number in range(shards):
        file = shard_file(out, number)
        with safe_open(file, framework="pt") as shard:
            clips = shard.get_slice("latents").get_shape()[0]
        entries.append({"name": file.name, "clips": clips, "bytes": file.stat().st_size, "sha256": sha256(file)})
    if not sum(entry["clips"] for entry in entries):
        raise DataError(f"{plan['dataset']}: none of its {plan['clips']} clips could be encoded")
    records.write(out / "index.json", plan | {"shards": entries})
    for left in out.iterdir():
        if _TEMPORARY.fullmatch(left.name) and left.is_file() and not left.is_symlink():
            with suppress(
                FileNotFoundError
            ):  # another process that comes last deletes them too, or has written its index
                if not left.name.startswith(".index") or time.time() - left.stat().st_mtime > _LEFT_FOR:
                    left.unlink()


def _compare_clip(file: Path, row: int, walk: _Walk, networks: Networks, device, plan: Mapping) -> None:
    stored = {key: value[row] for key, value in load_file(file).items()}
    index, turn = int(stored["index"]), int(stored["pass"])
    clip = walk[turn * len(walk.dataset) + index]
    if clip.failure is not None:
        raise DataError(
            f"{file}: clip {row} came from {clip.failure.path}, which cannot be read any more: {clip.failure.why}"
        )
    (fresh,) = _encode_batch([clip], networks, device, plan)
    for key in fresh.keys() & set(_ARRAYS):
        z, again = stored[key].float(), fresh[key].float()
        error = ((z - again).square().mean() / again.square().mean().clamp_min(1e-12)).sqrt().item()
        if error > 0.02:  # batch size and device change the last bits, another network or clip changes everything
            what = f"clip {row} differs" if key == "latents" else f"{key} of clip {row} differ"
            raise DataError(f"{file}: {what} from clip {index} encoded anew by {error:.1%} (relative RMS)")
