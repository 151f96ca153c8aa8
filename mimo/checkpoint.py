"""Checkpoints that are either whole or not there.

    RUN/checkpoints/step_00001234/
        model/  ema/  optimizer/    shard-00001-model-00001-of-00001.safetensors, ...: what rank 0, 1, ... wrote; never
                                    pickles
        state.json                  format, step, configurations, random seed, the size and SHA-256 of every other file,
                                    and its own checksum

The shards are those of torch.distributed.checkpoint's safetensors storage: a header says which part of which tensor
follows, so that any number of processes reads what any other number wrote, each the parts it needs.

A checkpoint is written into a hidden folder beside its place, flushed to disk, and renamed: the rename is the moment
it exists. A process killed at any other moment leaves a hidden folder, which nobody reads and the next training run
deletes.

A checkpoint is whole when its state fits its checksum and the name of its folder, and every file that it lists its own
checksum; no other file is read. Whoever asks for the newest one gets the newest whole one, and why others were passed
over.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from mimo import folders, records
from mimo.errors import InputError
from mimo.folders import NotOurs
from mimo.records import flush
from mimo.training.distributed import World, local

log = logging.getLogger("mimo.checkpoint")

FORMAT = 3  # 2 had no checksum of state.json; 1 had one file per part and knew no shards
# All that lies in a step folder, and in a folder with checkpoints; see mimo.folders.
STEP_FILES = ("state.json", "*/shard-?????-model-?????-of-?????.safetensors")
RUN_FILES = tuple(
    f"checkpoints/{step}/{name}" for step in ("step_*", ".unfinished-*", "superseded-*") for name in STEP_FILES
)
_STEP = re.compile(r"step_(\d{8,})")
_SHARD = re.compile(r"\w+/shard-[\w-]+\.safetensors")
_UNFINISHED = ".unfinished-"
_SUPERSEDED = "superseded-"


@dataclass
class _File:
    bytes: int
    sha256: str


@dataclass
class _State:
    """What every state.json has; whoever saves adds keys of its own."""

    format: Literal[2, 3]
    step: int
    files: dict[str, _File]
    OTHER_KEYS: ClassVar[bool] = True


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def save(
    run: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    *,
    keep_last: int = 3,
    keep_every: int | None = None,
    world: World | None = None,
) -> Path:
    """Write one checkpoint atomically, then delete old ones.

    The run is at `step`: checkpoints of later steps, which it has passed over because they are damaged, or which
    another run left in its folder, make way for it: they are kept as superseded-step_..., which nobody reads.

    tensors: part ("model", "ema", ...) -> named tensors.  state: JSON-serialisable; format, step and files are added
        here.
    keep_last: how many of the newest checkpoints stay; keep_every: those whose step is a multiple of it stay for good.
    world: ranks that all make this call. Each writes the shards it holds, and its share of what all hold.

    Raises: InputError, on every rank, for a tensor that is not finite and when the file system refuses, as a full one
        does. What was written by then is deleted.
    """
    world = world or World()
    final = step_folder(run, step)
    made: Path | None = None
    with world.together():
        _require_finite(tensors, final)
    with world.together(), _writing(final):
        if world.leads:
            final.parent.mkdir(parents=True, exist_ok=True)
            made = _free(final, final.name)
            made.mkdir()
    temporary = world.gather(made)[0]
    assert temporary is not None  # the first rank has made it
    try:
        _write(temporary, final, step, tensors, state, world)
    except InputError:
        if world.leads:
            _delete(temporary)
        raise
    with world.together(), _writing(final):
        if world.leads:
            _replace(final, temporary)
            _put_aside(run, step)
            for path in (final.parent, run):
                flush(path)
            _delete_old(run, keep_last, keep_every)
    return final


def _write(
    temporary: Path, final: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], world: World
) -> None:
    """All of a checkpoint into its temporary folder, flushed to disk."""
    with world.together(), _writing(final), _alone_is_intended():  # when one rank fails in here, all do
        for part, named in tensors.items():
            writer = HuggingFaceStorageWriter(str(temporary / part), save_distributed=True)  # flushes what it writes
            dcp.save({name: t.detach() for name, t in named.items()}, storage_writer=writer, no_dist=world.size == 1)
    written = sorted(temporary.glob(f"*/shard-{world.rank + 1:05d}-*.safetensors"))
    ours = {
        file.relative_to(temporary).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in written
    }
    files = {name: entry for part in world.gather(ours) for name, entry in part.items()}
    with world.together(), _writing(final):
        if world.leads:
            record = {**state, "format": FORMAT, "step": step, "files": files}
            (temporary / "state.json").write_text(records.sealed(record))
            for path in (temporary / "state.json", *(temporary / part for part in tensors), temporary):
                flush(path)


def step_folders(run: Path) -> list[Path]:
    """Every step folder of a run, whole or not, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=_step_of)


def latest(
    run: Path, *, parts: Iterable[str] | None = None, world: World | None = None
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run (None if there is none), and why each newer one was passed over.

    parts: those that will be read, whose checksums are compared; None: all.
    world: ranks that all make this call, share the comparing and get the same answer.
    """
    world = world or World()
    passed_over: list[str] = []
    for folder in reversed(world.gather(step_folders(run))[0]):
        faults = [fault for fault in world.gather(_fault(folder, parts, world)) if fault]
        if not faults:
            if world.leads:
                _say_what_is_unchecked(folder)
            return folder, passed_over
        passed_over.append(faults[0])
    return None, passed_over


def delete_unfinished(run: Path) -> list[Path]:
    """Delete what an interrupted save left behind. Only the process that owns the run may call this."""
    leftovers = sorted((run / "checkpoints").glob(f"{_UNFINISHED}*"))
    return [folder for folder in leftovers if _delete(folder)]


def find(path: Path, *, parts: Iterable[str] | None = None) -> tuple[Path, list[str]]:
    """The step folder meant by a path: itself, or the newest whole one of a run; and notes on those passed over.

    parts: those that will be read, whose checksums are compared; None: all.
    """
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist")
    if path.is_file():
        check_tensor_file(path)
        raise InputError(f"checkpoint {path} is a file; expected a run folder or one of its checkpoints/step_* folders")
    if (path / "state.json").exists() or _STEP.fullmatch(path.name):
        if fault := _fault(path, parts, World()):
            run = path.parent.parent
            others = path.parent.name == "checkpoints" and len(step_folders(run)) > 1
            raise InputError(f"{fault}; {run} in its place takes the newest whole one" if others else fault)
        _say_what_is_unchecked(path)
        return path, []
    folder, passed_over = latest(path, parts=parts)
    if folder is None:
        raise InputError(
            f"{path} has no whole checkpoint: {passed_over[0]}"
            if passed_over
            else f"{path} holds no checkpoint (no checkpoints/step_* folder)"
        )
    return folder, passed_over


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, once it fits its checksum and its folder, and every file it lists is there, is
    safetensors and has its recorded size."""
    source = f"checkpoint {folder}: state.json"
    try:
        data = (folder / "state.json").read_bytes()
    except FileNotFoundError:
        raise InputError(f"checkpoint {folder} is incomplete: state.json is missing") from None
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from None
    state = records.parse(data, source)
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is int and version not in (2, FORMAT):
        raise InputError(f"checkpoint {folder} has format {version}; this version reads format {FORMAT}, and 2")
    core = records.convert(state, _State, source)
    if version == FORMAT:
        records.parse(data, source, checksum=True)
    if _STEP.fullmatch(folder.name) and folder.name != step_folder(folder, core.step).name:
        raise InputError(f"{source} is of step {core.step}, expected that of the folder's name")
    for name, recorded in core.files.items():
        if not _SHARD.fullmatch(name):
            raise InputError(f"{source} lists {name!r}, expected PART/shard-....safetensors")
        check_tensor_file(folder / name)
        size = (folder / name).stat().st_size
        if size != recorded.bytes:
            raise InputError(f"checkpoint {folder}: {name} has {size} bytes, {recorded.bytes} were written")
    return state


def read_tensors(
    folder: Path,
    part: str,
    state: dict[str, Any],
    *,
    skip: Collection[str] = (),
    like: Mapping[str, Tensor] | None = None,
    world: World | None = None,
) -> dict[str, Tensor]:
    """The named tensors of one part, after comparing the checksums of its files with those in `state`.

    skip: names that stay on disk.
    like: what a name, or what precedes its last colon, is found under here and is sharded comes back sharded alike; all
        else comes back whole.
    world: ranks that all make this call and share the checking.
    """
    if not (folder / part).is_dir():
        parts = {name.partition("/")[0] for name in state["files"]}
        raise InputError(f"checkpoint {folder} has no {part}; it holds {', '.join(sorted(parts))}")
    _compare_checksums(folder, (part,), state, world or World())
    reader = _Reader(folder, [name for name in state["files"] if name.startswith(f"{part}/")])
    tensors = {}
    with _alone_is_intended(), _understanding(folder, part):  # nobody needs the others in order to read
        for name, saved in reader.read_metadata().state_dict_metadata.items():
            if name in skip:
                continue
            if sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(saved.size):
                raise ValueError(f"the shards do not hold all of {name}")
            model = (like or {}).get(name, (like or {}).get(name.rpartition(":")[0]))
            if isinstance(model, DTensor) and model.shape == saved.size:
                tensors[name] = torch.zeros_like(model, dtype=saved.properties.dtype)
            else:
                tensors[name] = torch.empty(saved.size, dtype=saved.properties.dtype)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def load_module(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy named tensors into a module; every name and shape must agree."""
    load_tensors(module.state_dict(), tensors, source)


@torch.no_grad()
def load_tensors(into: dict[str, Tensor], tensors: dict[str, Tensor], source: Path) -> None:
    """Copy named tensors into others; every name and shape must agree."""
    _require_match({name: tuple(tensor.shape) for name, tensor in into.items()}, tensors, source)
    for name, tensor in into.items():
        tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Optimizer state by parameter name: "blocks.0.mlp.0.weight:exp_avg" -> tensor. Hyper-parameters are not in it."""
    return {
        f"{name}:{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor], source: Path
) -> None:
    """The inverse of `optimizer_tensors`, for an optimizer just made over the parameters of `module`, in their
    order."""
    parameters = dict(module.named_parameters())
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(":")
        if name not in parameters:
            raise InputError(f"checkpoint {source}: optimizer state for {name}, which the model does not have")
        if tensor.ndim and tensor.shape != parameters[name].shape:
            expected = list(parameters[name].shape)
            raise InputError(f"checkpoint {source}: {full_name} has shape {list(tensor.shape)}, expected {expected}")
        state.setdefault(numbers[name], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def require_same_config(
    saved: dict[str, Any], wanted: dict[str, Any], source: Path, *, may_differ: frozenset[str] = frozenset()
) -> None:
    """Raise naming every field in which two nested configurations differ, with both values. may_differ: dotted
    names."""
    there, here = (_flatten(json.loads(json.dumps(config))) for config in (saved, wanted))  # JSON has no tuples
    differing = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys())
        if name not in may_differ and there.get(name) != here.get(name)
    ]
    if differing:
        raise InputError(f"checkpoint {source} was made with another configuration: {'; '.join(differing)}")


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": repr(value)}
    return flat


def _require_match(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], source: Path) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is unknown to the model" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"checkpoint {source} does not fit the model: {'; '.join(problems[:3])}{more}")


def check_tensor_file(file: Path) -> None:
    """Look at the first bytes only: a pickle is named as one and never loaded, a file shorter than its header says is
    truncated."""
    if not file.is_file():
        raise InputError(f"checkpoint file {file} is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
            raise InputError(
                f"{file} is a pickle (torch.save) file; only safetensors files are read, a pickle can run code"
            )
        header_bytes = int.from_bytes(start, "little")
        if size >= 8 and header_bytes > 100_000_000:  # the format's own limit
            raise InputError(f"{file} is not a safetensors file: it starts with {start!r}")
        header = stream.read(header_bytes)
    if len(start) < 8 or len(header) < header_bytes:
        header_takes = 8 + header_bytes if len(start) == 8 else "8 or more"
        raise InputError(f"{file} is truncated: {size} bytes, its header alone takes {header_takes}")
    try:
        entries = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise InputError(f"{file} is not a safetensors file: its header is not the expected JSON") from None
    if size < 8 + header_bytes + end:
        raise InputError(f"{file} is truncated: {size} bytes, its header promises {8 + header_bytes + end}")


def _fault(folder: Path, parts: Iterable[str] | None, world: World) -> str | None:
    """Why a checkpoint is not whole, as far as this rank looks at it."""
    try:
        _compare_checksums(folder, parts, read_state(folder), world)
    except InputError as error:
        return str(error)
    return None


def _compare_checksums(folder: Path, parts: Iterable[str] | None, state: dict[str, Any], world: World) -> None:
    """Raises InputError for the first file, among this rank's share of these parts, that is not the one written."""
    wanted = None if parts is None else set(parts)
    names = sorted(name for name in state["files"] if wanted is None or name.partition("/")[0] in wanted)
    for name in names[world.rank :: world.size]:
        if sha256(folder / name) != state["files"][name]["sha256"]:
            raise InputError(f"checkpoint {folder} is damaged: the checksum of {name} is not the recorded one")


def _require_finite(tensors: dict[str, dict[str, Tensor]], place: Path) -> None:
    """Nothing good can follow from a checkpoint with NaN or infinity in it, and it would take the place of a good
    one."""
    for part, named in tensors.items():
        for name, tensor in zip(named, local(named.values()), strict=True):
            if not tensor.isfinite().all():
                raise InputError(f"checkpoint {place} is not written: {part} {name} is not finite")


def _say_what_is_unchecked(folder: Path) -> None:
    if read_state(folder)["format"] == 2:
        log.warning("%s: state.json has no checksum, as an older version wrote it: it is believed as it is", folder)


def _free(final: Path, name: str) -> Path:
    """A hidden name beside `final` that nothing has. What an earlier save left there is deleted."""
    for number in itertools.count():
        path = final.with_name(f"{_UNFINISHED}{name}{f'-{number}' if number else ''}")
        if not (path.is_symlink() or path.exists()) or _delete(path):
            return path
    raise AssertionError("numbers do not end")


def _replace(final: Path, temporary: Path) -> None:
    """Give a finished checkpoint its place. What stands there, as a damaged one does, makes way."""
    if final.is_symlink() or final.exists():
        aside = final.rename(_free(final, f"before-{final.name}"))
        temporary.rename(final)
        _delete(aside)
    else:
        temporary.rename(final)


def _put_aside(run: Path, step: int) -> None:
    """Checkpoints of later steps than `step` no longer count as the newest. Nothing is lost: they may be all that is
    left of another run, or what somebody can repair."""
    for folder in step_folders(run):
        if _step_of(folder) > step:
            names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            free = (folder.with_name(f"{_SUPERSEDED}{folder.name}{name}") for name in names)
            aside = next(path for path in free if not os.path.lexists(path))
            folder.rename(aside)
            log.warning("%s is of a later step than this run: it is kept as %s", folder, aside.name)


def _delete_old(run: Path, keep_last: int, keep_every: int | None) -> None:
    """All but the newest checkpoints of a run."""
    doomed = [
        folder for folder in step_folders(run)[:-keep_last] if not (keep_every and _step_of(folder) % keep_every == 0)
    ]
    for folder in doomed:
        try:
            list(folders.ours(folder, STEP_FILES))
        except NotOurs as stranger:
            log.warning("%s", stranger)
        else:
            # Renamed first, so that a kill in the middle of the deletion does not leave a damaged checkpoint.
            _delete(folder.rename(_free(folder, folder.name)))


def _delete(folder: Path) -> bool:
    """Delete what a save left, unless something else is in it, which is said."""
    try:
        folders.remove_known(folder, STEP_FILES)
    except NotOurs as stranger:
        log.warning("%s", stranger)
        return False
    return True


class _Listed(FileSystem):
    """The file system with nothing in it but some files."""

    def __init__(self, files: list[str]):
        self.files = files

    def ls(self, path: object) -> list[str]:
        return self.files


class _Reader(HuggingFaceStorageReader):
    """Reads no file of a part but those that the state lists: torch's own takes every one that it finds."""

    def __init__(self, folder: Path, names: list[str]):
        self.listed = sorted(str(folder / name) for name in names)
        super().__init__(str(folder))
        self.fs = _Listed(self.listed)

    def read_metadata(self) -> Any:
        metadata = super().read_metadata()
        others = {info.relative_path for info in metadata.storage_data.values()} - set(self.listed)
        assert not others, f"torch has read {others}"
        return metadata


@contextmanager
def _understanding(folder: Path, part: str) -> Iterator[None]:
    """What torch and safetensors cannot make tensors of is said in one line. It fits its checksum: it was written
    so."""
    try:
        yield
    except (torch.OutOfMemoryError, AssertionError):
        raise
    except (
        *(SafetensorError, CheckpointException, OSError, RuntimeError, RecursionError),
        *(ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError),
    ) as error:
        words = " ".join(repr(error).split())[:200]
        raise InputError(f"checkpoint {folder}: {part} cannot be read as tensors: {words}") from None


@contextmanager
def _alone_is_intended() -> Iterator[None]:
    """Without the warning that torch.distributed.checkpoint runs in one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """What the file system refuses in this block is said in one line."""
    try:
        yield
    except (OSError, CheckpointException) as failure:
        errors: list[BaseException] = [failure]
        if isinstance(failure, CheckpointException):  # of all ranks
            errors = [error for error, _ in failure.failures.values()]
        refusals = [error for error in errors if isinstance(error, OSError)]
        if len(refusals) < len(errors):
            raise
        raise InputError(f"checkpoint {place} cannot be written: {refusals[0].strerror or refusals[0]}") from None


def _step_of(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    assert match is not None, folder  # one of `step_folders`
    return int(match[1])


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
