"""Latent shards: clips that went through a tokenizer once, for training without decoding.

    OUT/plan.json                  format, and what is encoded with what
    OUT/index.json                 the same, and every shard with its size and SHA-256
    OUT/files.json                 name and size of every source file, and the SHA-256 of its first and last 64 KiB, to
                                   notice that a dataset has changed (and not that it was copied)
    OUT/shard-00000.safetensors    latents [n, T, H, W, C], index int64 [n] (the clip), pass int64 [n], and label,
                                   actions or interval where the clips have them; features [n, T', H', W', E] where
                                   an encoder's were asked for

index.json is written last: without it the folder is not finished.
"""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from mimo import records
from mimo.data.errors import DataError, UnreadableVideo
from mimo.data.local import local_file, require_inside
from mimo.errors import reason

FORMAT = "mimo-latents-2"


def is_latents(path: Path) -> bool:
    """Whether a folder holds latent shards, finished or not."""
    return (path / "plan.json").is_file()


@dataclass
class Shard:
    """A shard file, as index.json has it."""

    name: str
    clips: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"shard-\d{5,}\.safetensors", self.name):
            raise ValueError(f"name {self.name!r}, expected shard-00000.safetensors or the like")
        if not 0 <= self.clips < 2**31 or self.bytes < 0:
            raise ValueError(f"{self.clips} clips in {self.bytes} bytes, expected no less than zero")


@dataclass
class Index:
    """index.json; without `shards` it is plan.json."""

    format: Literal[
        "mimo-latents-2"
    ]  # 1 knew neither which definition of the DCT it held nor what its source files held
    dataset: str
    settings: dict[str, Any]
    clips: int
    tokenizer: str
    tokenizer_sha256: str
    compression: tuple[int, int, int]
    clip_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int, int]
    num_classes: int | None
    num_actions: int | None
    passes: int
    shard_clips: int
    dtype: Literal["fp16", "bf16", "fp32"]
    seed: int
    shards: list[Shard]
    posterior: Literal["mean", "sample"] = "mean"
    encoder: str | None = None  # of the features, if there are any; and their shape in a clip
    encoder_sha256: str | None = None
    features_shape: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("clip_shape", "latent_shape", "compression"):
            if not all(0 < size < 2**31 for size in getattr(self, name)):
                raise ValueError(f"{name} {list(getattr(self, name))}, expected sizes of at least 1")
        if len({self.encoder is None, self.encoder_sha256 is None, self.features_shape is None}) > 1:
            raise ValueError("encoder, encoder_sha256 and features_shape: expected all or none of them")
        if not all(0 < size < 2**31 for size in self.features_shape or ()):
            raise ValueError(f"features_shape {list(self.features_shape or ())}, expected sizes of at least 1")
        for name in ("num_classes", "num_actions"):
            if not 0 <= (getattr(self, name) or 0) < 2**31:
                raise ValueError(f"{name} {getattr(self, name)}, expected a number of values, or null")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}, expected zero or more")


def read_index(path: Path) -> Index:
    """OUT/index.json; DataError when the encoding was not finished or the file is damaged."""
    file = path / "index.json"
    if not file.exists():
        raise DataError(f"{path}: encoding is not finished (no index.json): run mimo encode again")
    try:
        value = records.parse(file.read_bytes(), file, error=DataError)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    if isinstance(value, dict) and isinstance(found := value.get("format"), str) and found != FORMAT:
        raise DataError(f"{file}: format {found[:60]!r}, this version reads {FORMAT!r}: run mimo encode anew")
    return records.convert(value, Index, file, error=DataError)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class LatentShards:
    """Encoded clips. `sample` gives `latents` fp32 [T, H, W, C] in place of `video`, and after `read_features` also
    `features` fp32 [T', H', W', E]; its seed changes nothing.

    Shards are memory-mapped, so a sample reads only itself. A shard of another size than recorded, or missing, is
    reported by name when it is opened and its clips count as unreadable; `check_readable` looks at all of them.

    Args:
        path: a folder that `mimo encode` wrote.
        clip_shape: (frames, height, width) in pixels that the clips must have had; None takes any.
        num_classes, num_actions: labels and actions must be below, which `check_readable` looks at; None takes what was
            encoded.
        use_labels, use_actions: False leaves them out.
        allow_outside: shards may be links that lead out of the folder.
    """

    decodes = False

    def __init__(
        self,
        path: str | Path,
        *,
        clip_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        num_actions: int | None = None,
        use_labels: bool = True,
        use_actions: bool = True,
        allow_outside: bool = False,
    ):
        self.path = Path(path)
        self.index = read_index(self.path)
        self.files = [self.path / shard.name for shard in self.index.shards]
        if not allow_outside:
            require_inside(self.files, [self.path], self.path / "index.json")
        found = self.index.clip_shape
        if clip_shape is not None and clip_shape != found:
            shapes = [" x ".join(map(str, shape)) for shape in (found, clip_shape)]
            raise DataError(f"{self.path}: holds clips of {shapes[0]}, expected {shapes[1]}")
        self.num_frames, self.height, self.width = found
        self.latent_shape = self.index.latent_shape
        self.num_classes = num_classes or self.index.num_classes
        self.num_actions = num_actions or self.index.num_actions
        self.keys = [key for key, used in (("label", use_labels), ("actions", use_actions), ("interval", True)) if used]
        self.arrays = ["latents"]
        self._ends = np.cumsum([shard.clips for shard in self.index.shards])
        self._open: dict[int, safe_open] = {}
        if not len(self):
            raise DataError(f"{self.path}: holds no clip")

    @property
    def has_labels(self) -> bool:
        return "label" in self._held

    @property
    def has_actions(self) -> bool:
        return "actions" in self._held

    @cached_property
    def _held(self) -> set[str]:
        """Those of `keys` that the first shard with a clip has: all have the same."""
        first = next(number for number, shard in enumerate(self.index.shards) if shard.clips)
        return set(self.keys) & set(self.open_shard(first).keys())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        number, row = self._place(index)
        return f"{self.files[number]} clip {row}"

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number - 1] if number else 0)

    def sample(self, index: int, seed: int) -> dict[str, np.ndarray]:
        number, row = self._place(index)
        shard = self.open_shard(number)
        sample = {key: shard.get_slice(key)[row].float().numpy() for key in self.arrays}
        if not all(np.isfinite(array).all() for array in sample.values()):
            why = f"clip {row} is not finite (mimo data check --decode-all looks at every shard)"
            raise UnreadableVideo(self.files[number], why)
        for key in self.keys:
            if key in shard.keys():  # noqa: SIM118 (an open shard is not a mapping)
                sample[key] = shard.get_slice(key)[row].numpy()
        return sample

    def open_shard(self, number: int) -> safe_open:
        """The open file of a shard; UnreadableVideo when it is missing, cut short or not safetensors."""
        if number not in self._open:
            written, file = self.index.shards[number].bytes, self.files[number]
            try:
                size = local_file(file)[1].st_size
                if size != written:
                    raise UnreadableVideo(file, f"has {size} bytes, {written} were written")
                shard = safe_open(file, framework="pt").__enter__()
                self._require_tensors(number, {key: shard.get_slice(key).get_shape() for key in shard.keys()})
            except (OSError, SafetensorError) as error:
                raise UnreadableVideo(file, reason(error)) from None
            self._open[number] = shard
        return self._open[number]

    def _require_tensors(self, number: int, shapes: dict[str, list[int]]) -> None:
        """Raises UnreadableVideo unless a shard's tensors have the shapes that the index says."""
        clips = self.index.shards[number].clips
        expected = {"latents": [clips, *self.latent_shape]}
        if self.index.features_shape is not None and clips:
            expected["features"] = [clips, *self.index.features_shape]
        expected |= {key: [clips] for key in ("label", "interval") if key in shapes}
        expected |= {"actions": [clips, self.num_frames]} if "actions" in shapes else {}
        for key, shape in expected.items():
            if shapes.get(key) != shape:
                raise UnreadableVideo(self.files[number], f"{key} are {shapes.get(key)}, expected {shape}")

    def require_checksum(self, number: int) -> None:
        """Raises UnreadableVideo unless a shard is, byte for byte, what was written."""
        shard, file = self.index.shards[number], self.files[number]
        size = local_file(file)[1].st_size
        try:
            if size != shard.bytes:
                raise UnreadableVideo(file, f"has {size} bytes, {shard.bytes} were written")
            if sha256(file) != shard.sha256:
                raise UnreadableVideo(file, "its checksum is not the one that was recorded")
        except OSError as error:
            raise UnreadableVideo(file, error.strerror or str(error)) from None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # open files stay in their process

    def require_made_by(
        self,
        name: str,
        tokenizer,
        checksum: str,
        *,
        interval: int | tuple[int, int],
        flip: bool,
        posterior: str = "mean",
    ) -> None:
        """Raises DataError unless these are the latents that training would make of its clips itself.

        Args:
            name, tokenizer, checksum: the tokenizer of the network, and what `tokenizers.weights.checksum` says of it.
            interval, flip: how training would cut a clip; procedural clips know neither.
            posterior: "mean" or "sample", which latents training would take.
        """
        here: dict[str, Any] = {"tokenizer": name, "compression": list(tokenizer.compression)}
        here |= {"latent_shape": list(tokenizer.latent_shape(self.num_frames, self.height, self.width))}
        here |= {"tokenizer_sha256": checksum, "posterior": posterior}
        there = {key: list(value) if isinstance(value := getattr(self.index, key), tuple) else value for key in here}
        low_high = [interval, interval] if isinstance(interval, int) else list(interval)
        cut: dict[str, Any] = {"interval": low_high, "dynamic": not isinstance(interval, int), "flip": flip}
        for key in cut.keys() & self.index.settings.keys():
            here[key], there[key] = cut[key], self.index.settings[key]
        differing = [f"{key} {there[key]!r}, training has {here[key]!r}" for key in here if here[key] != there[key]]
        if differing:
            raise DataError(f"{self.path}: was encoded with {'; '.join(differing)}")

    def read_features(self, encoder: str, channels: int) -> str:
        """From now on samples hold the features of this encoder; returns its checksum.

        Raises DataError unless they were encoded, by an encoder of this name and with so many channels.
        """
        index = self.index
        if index.encoder is None or index.encoder_sha256 is None or index.features_shape is None:
            raise DataError(
                f"{self.path}: holds no features of an encoder: expected latents that mimo encode wrote with "
                f"--model.repa-weight and --model.repa-encoder {encoder}"
            )
        found, expected = (index.encoder, index.features_shape[-1]), (encoder, channels)
        if found != expected:
            words = [f"features of the encoder {name!r} with {count} channels" for name, count in (found, expected)]
            raise DataError(f"{self.path}: holds {words[0]}, expected {words[1]}")
        if "features" not in self.arrays:
            self.arrays.append("features")
        return index.encoder_sha256

    def check_readable(self) -> None:
        """Raises DataError naming the first shard that is missing, cut short or changed, or clip whose label or action
        is too high. All of it is read, once."""
        with ThreadPoolExecutor(8) as readers:
            faults = readers.map(self._fault, range(len(self._ends)))
            if (fault := next(filter(None, faults), None)) is not None:
                raise DataError(f"{fault}: run mimo encode again, which makes only this shard anew")
        for number in range(len(self._ends)):
            try:
                shard = self.open_shard(number)
            except UnreadableVideo as error:
                raise DataError(f"{error}: run mimo encode again, which makes only this shard anew") from None
            for key, count in (("label", self.num_classes), ("actions", self.num_actions)):
                if count is None or key not in shard.keys():  # noqa: SIM118
                    continue
                values = shard.get_tensor(key).flatten(1 if key == "actions" else 0).numpy()
                outside = np.argwhere((values < 0) | (values >= count))
                if len(outside):
                    name, first = self.files[number], tuple(outside[0])
                    raise DataError(f"{name}: clip {first[0]} has {key} {values[first]}, expected 0..{count - 1}")

    def _fault(self, number: int) -> UnreadableVideo | None:
        try:
            self.require_checksum(number)
        except UnreadableVideo as error:
            return error
        return None

    def evaluation_order(self) -> list[int]:
        return list(range(len(self)))

    def __repr__(self) -> str:
        return f"LatentShards({self.path}: {len(self)} clips of {' x '.join(map(str, self.latent_shape))})"
