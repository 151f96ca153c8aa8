"""Features of many clips, made once: files that are named after all that decides them, so that a run that was stopped
goes on, and another one with the same network and clips begins with them.

    OUT/cache/KEY-00003.safetensors     clips 3 * CHUNK .. 4 * CHUNK - 1 of the request; KEY is a checksum
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.data import UnreadableVideo, to_float
from mimo.data.encode import source_files
from mimo.data.factors import FACTORS, FactorClips, mirrored
from mimo.data.protocols import VideoDataset
from mimo.encoders import Encoder
from mimo.errors import InputError
from mimo.evaluation.representation import history_batch, pooled_history
from mimo.folders import atomic_path
from mimo.runtime import autocast
from mimo.sampling.loading import Loaded
from mimo.tokenizers.weights import checksum

CHUNK = 512  # clips per file


class Features(NamedTuple):
    """Of the clips that could be read: features fp32 [n, L, D]; labels int64 [n, factors]; index int64 [n], their
    numbers in the dataset."""

    features: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls


@dataclass(frozen=True)
class Chosen:
    """Clips of a dataset: numbers `indices`, each as `dataset.sample(index, seed)` gives it, or its mirror image."""

    dataset: VideoDataset
    indices: tuple[int, ...]
    seed: int
    mirrored: bool = False

    def factors(self) -> dict[str, int | None]:
        """What is known of every clip: name -> number of classes, None where only the clips say it."""
        if isinstance(self.dataset, FactorClips):
            return {name: len(classes) for name, classes in FACTORS.items()}
        return {"class": self.dataset.num_classes} if self.dataset.has_labels else {}

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """`video`, `labels` in the order of `factors`, and whatever else the dataset gives."""
        sample = dict(self.dataset.sample(index, self.seed))
        if isinstance(self.dataset, FactorClips):
            labels = mirrored(sample["factors"]) if self.mirrored else sample["factors"]
        else:
            labels = np.array([sample["label"]] if self.dataset.has_labels else [], np.int64)
        video = sample["video"][:, :, ::-1] if self.mirrored else sample["video"]
        return sample | {"labels": labels, "video": np.ascontiguousarray(video)}

    def batches(self, indices: Sequence[int], size: int) -> Iterator[dict[str, np.ndarray]]:
        """The clips that can be read, `size` at a time, stacked; also their `index`."""
        pending: list[dict[str, np.ndarray]] = []
        for index in indices:
            try:
                pending.append(self.sample(index) | {"index": np.int64(index)})
            except UnreadableVideo as error:
                print(f"skipped {error}")
            if len(pending) == size:
                yield stacked(pending)
                pending = []
        if pending:
            yield stacked(pending)

    @cached_property
    def described(self) -> dict[str, Any]:
        """What decides which pixels these are. A few clips are looked at: made ones follow from this version's code."""
        looked = hashlib.sha256()
        for index in dict.fromkeys((*self.indices[:2], *self.indices[-1:])):
            try:
                looked.update(self.sample(index)["video"].tobytes())
            except UnreadableVideo:
                looked.update(b"unreadable")
        files = source_files(self.dataset)
        shape = self.dataset.num_frames, self.dataset.height, self.dataset.width
        return {
            "kind": type(self.dataset).__name__,
            "settings": self.dataset.settings(),
            "files": digest_of(files),
            "shape": shape,
            "indices": digest_of(self.indices),
            "seed": self.seed,
            "mirrored": self.mirrored,
            "looked": looked.hexdigest(),
        }


def stacked(samples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def of_network(
    loaded: Loaded, chosen: Chosen, layers: Sequence[int], out: Path, *, batch_size: int, network: str
) -> Features:
    """Pooled hidden states of clean history behind `layers`. network: the checksum of its weights, see
    `network_checksum`."""
    config, device = loaded.model.config, next(loaded.model.parameters()).device
    precision = loaded.train_config.precision
    described = {
        "what": "history",
        "network": network,
        "layers": list(layers),
        "precision": precision,
        "device": device.type,
        "batch_size": batch_size,
        "clips": chosen.described,
    }
    require_conditions(config, chosen.dataset)

    def compute(batch: dict[str, np.ndarray]) -> Tensor:
        with autocast(device, precision):
            return pooled_history(loaded.model, batch_of_history(loaded, batch), layers)

    return _of_all(compute, chosen, out, digest_of(described), batch_size)


def of_encoder(
    encoder: Encoder, chosen: Chosen, out: Path, *, batch_size: int, device: torch.device, name: str
) -> Features:
    """What a frozen video encoder makes of the clips, the mean over its grid, as one layer."""
    described = {
        "what": name,
        "encoder": checksum(encoder),
        "device": device.type,
        "batch_size": batch_size,
        "clips": chosen.described,
    }

    def compute(batch: dict[str, np.ndarray]) -> Tensor:
        video = to_float(torch.from_numpy(batch["video"]).to(device))
        return encoder.encode(video).float().flatten(1, 3).mean(1, keepdim=True)

    return _of_all(compute, chosen, out, digest_of(described), batch_size)


def batch_of_history(loaded: Loaded, batch: dict[str, np.ndarray]):
    """A batch of clips as a network's history."""
    config, device = loaded.model.config, next(loaded.model.parameters()).device
    with torch.no_grad():
        latents = loaded.tokenizer.encode(to_float(torch.from_numpy(batch["video"]).to(device)))
    actions = intervals = None
    if config.num_actions:
        actions = torch.from_numpy(batch["actions"]).to(device)
    if config.max_interval:
        intervals = torch.full((len(latents),), shortest_interval(loaded), device=device)
    return history_batch(loaded.model, latents, actions=actions, intervals=intervals)


def shortest_interval(loaded: Loaded) -> int:
    """The distance of frames that clips are read with."""
    interval = loaded.train_config.interval
    return interval if isinstance(interval, int) else interval[0]


def require_conditions(config: MiMoConfig, dataset: VideoDataset) -> None:
    if config.num_actions and not dataset.has_actions:
        raise InputError(f"{dataset!r}: its clips have no actions, which this network was trained with")


def network_checksum(loaded: Loaded) -> str:
    """Of what decides the hidden states of clips: weights, tokenizer and configuration."""
    return digest_of([checksum(loaded.model), checksum(loaded.tokenizer), loaded.model.config.to_dict()])


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def kept(path: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a file that bears this key; else what `make` makes, put there."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        pass  # not there, or not whole: it is made anew
    tensors = {name: tensor.contiguous().cpu() for name, tensor in make().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"key": key})
    return tensors


def _of_all(
    compute: Callable[[dict[str, np.ndarray]], Tensor], chosen: Chosen, out: Path, key: str, batch_size: int
) -> Features:
    parts = []
    for number, start in enumerate(range(0, len(chosen.indices), CHUNK)):
        indices = chosen.indices[start : start + CHUNK]

        def make(indices: Sequence[int] = indices) -> dict[str, Tensor]:
            found: dict[str, list[Tensor]] = {"features": [], "labels": [], "index": []}
            for batch in chosen.batches(indices, batch_size):
                found["features"].append(compute(batch).float().cpu())
                for name in ("labels", "index"):
                    found[name].append(torch.from_numpy(batch[name]))
            return {name: torch.cat(tensors) for name, tensors in found.items() if tensors}

        part = kept(out / "cache" / f"{key[:16]}-{number:05}.safetensors", key, make)
        if part:
            parts.append(part)
    if not parts:
        raise InputError(f"{chosen.dataset!r}: none of the {len(chosen.indices)} clips that were chosen can be read")
    return Features(*(torch.cat([part[name] for part in parts]) for name in Features._fields))
