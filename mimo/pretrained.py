"""Networks to share: a folder with one configuration, one safetensors file and a model card, local or on the hub.

    OUT/
        config.json           format, the network, and for `mimo sample` how it was trained and which tokenizer it
                              speaks; the SHA-256 of the weights, and its own checksum
        model.safetensors     every tensor of the network, under its name
        README.md             the model card, to be written on

`MiMo.save_pretrained` and `MiMo.from_pretrained` write and read it; `mimo export` makes one of a training run, with the
averaged weights. Nothing is pickled, names and shapes have to fit, and each file is there whole or not at all. The
mixin of huggingface_hub would fall back to pickles, load what fits and leave out the rest; here only its download is
used, and only for a name that is no path.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor
from typing_extensions import Self

from mimo import checkpoint, records
from mimo.config import MiMoConfig
from mimo.errors import InputError, reason
from mimo.folders import atomic_path

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


@dataclass
class Exported:
    """What config.json says.

    configs: "model", a MiMoConfig; of a training run also "train" and "sample", and "tokenizer", its record in the
        checkpoint. step, weights: of the run that it was exported from.
    """

    configs: dict[str, Any]
    sha256: str  # of the weights
    step: int | None = None
    weights: str | None = None
    format: Literal["mimo-network-1"] = "mimo-network-1"
    library_name: str = "mimo"  # by which the hub tells whose a model is
    tags: list[str] = field(default_factory=lambda: ["video-generation", "mimo"])


def write(
    folder: Path, tensors: dict[str, Tensor], configs: dict[str, Any], *, step: int | None = None, weights: str = ""
) -> Path:
    """Write a network. A card that is there stays: somebody may have written on it.

    Args:
        tensors: by name, as `state_dict` has them. configs, step, weights: see `Exported`.

    Raises: InputError when it cannot be written. The configuration comes last: without it there is no network.
    """
    folder = Path(folder)
    config = folder / CONFIG
    if config.is_file():
        try:
            config.unlink()  # it would describe other weights from here on
        except OSError as error:
            raise InputError(f"cannot replace {config}: {error.strerror}") from None
    with atomic_path(folder / WEIGHTS) as path:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(whole, path, metadata={"format": "pt"})
        records.flush(path)
        digest = checkpoint.sha256(path)
    record = Exported(configs, digest, step, weights or None)
    if not (folder / CARD).exists():
        with atomic_path(folder / CARD) as path:
            path.write_text(card(record, sum(tensor.numel() for tensor in tensors.values())))
    records.write(config, asdict(record))
    return folder


def find(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a network: a path, or what a name of the form USER/NAME has on the Hugging Face hub.

    Raises: InputError when there is no such folder, and for a name that the hub does not give.
    """
    folder = Path(name)
    parts = folder.parts
    if folder.exists() or len(parts) != 2 or folder.is_absolute() or "." in parts[0] or Path(parts[0]).exists():
        return folder
    import huggingface_hub

    try:
        wanted = [CONFIG, WEIGHTS, CARD]
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # no connection, no such name, no right to it: all of the hub's are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} is no folder here, and the Hugging Face hub does not give it: {reason}") from None


def is_export(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read_config(folder: Path) -> Exported:
    """Raises InputError unless the folder holds a whole network whose weights are those that were written."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {name} is missing; expected a folder that `mimo export` has written")
    record = records.read(folder / CONFIG, Exported, checksum=True)
    if "model" not in record.configs:
        raise InputError(f"{folder / CONFIG}: configs has no model")
    checkpoint.check_tensor_file(folder / WEIGHTS)
    if (found := checkpoint.sha256(folder / WEIGHTS)) != record.sha256:
        raise InputError(
            f"{folder / WEIGHTS} is damaged: its checksum is {found[:12]}..., {record.sha256[:12]}... was written"
        )
    return record


def read_tensors(folder: Path, *, skip: Collection[str] = ()) -> dict[str, Tensor]:
    """The weights by name. skip: names that stay on disk."""
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name not in skip}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read as tensors: {reason(error)}") from None


class Pretrained:
    """What a network gets by it: `save_pretrained` and `from_pretrained`."""

    config: MiMoConfig

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the network into a folder: config.json, model.safetensors, and README.md unless there is one.

        Raises: InputError when it cannot be written.
        """
        return write(Path(folder), dict(self.state_dict()), {"model": self.config.to_dict()})  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, backend: str = "auto") -> Self:
        """The network that `save_pretrained` or `mimo export` has written, in eval mode.

        Args:
            name: a folder, or USER/NAME on the Hugging Face hub, if there is no such folder.
            revision: of the hub's: a branch, a tag or a commit.
            backend: of the network, as in its constructor.

        Raises: InputError naming the file, what is in it and what was expected.
        """
        folder = find(name, revision=revision)
        record = read_config(folder)
        try:
            model = cls(MiMoConfig.from_dict(record.configs["model"]), backend)  # type: ignore[call-arg]
        except ValueError as error:
            raise InputError(f"{folder / CONFIG} does not fit this version: {' '.join(str(error).split())}") from None
        checkpoint.load_tensors(model.state_dict(), read_tensors(folder), folder)  # type: ignore[attr-defined]
        return model.eval()  # type: ignore[attr-defined]


def card(record: Exported, parameters: int) -> str:
    """The model card: what it is, what it was trained on and how to sample it. YAML in front is the hub's."""
    config, train = record.configs["model"], record.configs.get("train")
    trained = "- it was not said how it was trained"
    if train is not None:
        trained = f"- trained for {record.step} steps on: {record.configs.get('data', 'data that was not recorded')}"
    size = "{frames} x {height} x {width} latents of {channels} channels".format(**config)
    return "\n".join(
        [
            "---",
            "library_name: mimo",
            "pipeline_tag: image-to-video",
            "tags: [video-generation, mimo]",
            "---",
            "",
            f"# {config['recipe']}, {parameters / 1e6:.1f} M parameters",
            "",
            "An autoregressive video diffusion transformer, trained with `mimo` (masked history modelling).",
            "",
            f"- {size}, tokenizer `{config['tokenizer']}`",
            f"- depth {config['depth']}, width {config['dim']}, {config['heads']} heads",
            trained,
            *([f"- weights: {record.weights}"] if record.weights else []),
            "",
            "```python",
            "from mimo import MiMo",
            "",
            'model = MiMo.from_pretrained("THIS FOLDER OR ITS NAME ON THE HUB")',
            "```",
            "",
            "`mimo sample --checkpoint THIS_FOLDER --out samples` draws videos.",
            "",
        ]
    )
