"""Reading weights that others have saved, without running their code."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mimo import records
from mimo.errors import InputError


class Weighed(Protocol):
    """What has weights: a tokenizer, an encoder, any nn.Module."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterable[tuple[str, torch.Tensor]]: ...


def checksum(tokenizer: Weighed) -> str:
    """SHA-256 of what decides a tokenizer's latents, or an encoder's features, besides its architecture: parameters,
    buffers and the factor `scale`, however and wherever they are stored. Of one that is computed it is that of its
    `definition`, a text, as the last bits of what is computed differ from machine to machine."""
    definition: str | None = getattr(tokenizer, "definition", None)
    if definition is not None:
        return hashlib.sha256(definition.encode()).hexdigest()
    digest = hashlib.sha256(repr(getattr(tokenizer, "scale", None)).encode())
    for name, value in sorted([*tokenizer.named_parameters(), *tokenizer.named_buffers()]):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    return records.read(path, dict[str, Any])


@contextmanager
def configured_by(source: Path) -> Iterator[None]:
    """Around the making of a network out of a configuration that a file holds: what it is no configuration of is said
    in one line."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        words = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: is no configuration of this network: {type(error).__name__}: {words}") from None


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None


def load_torch(path: Path, *, trust_pickle: bool = False):
    """What torch.save wrote. A file that needs more than tensors and plain containers can run any code when it is
    loaded, so it is refused unless `trust_pickle`."""
    if not path.is_file():
        raise InputError(f"{path}: No such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path}: its pickled objects need the module {error.name!r}, which is not installed"
        ) from None
    except pickle.UnpicklingError as error:
        if not trust_pickle and "weights_only" in str(error):
            raise InputError(
                f"{path}: holds pickled objects, which can run any code when loaded: pass trust_pickle=True"
                " (--trust-pickle) if you trust its source"
            ) from None
        raise InputError(f"{path}: not a whole torch file") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a whole torch file: {str(error).splitlines()[0]}") from None


def load_state(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Loads every parameter and buffer; InputError names the first that is missing, left over or of another shape."""
    own = model.state_dict()
    missing, extra = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or extra:
        parts = [
            f"{len(keys)} {what}, first {keys[0]!r}"
            for keys, what in ((missing, "missing"), (extra, "unknown"))
            if keys
        ]
        raise InputError(f"{path}: not weights of this {type(model).__name__}: {'; '.join(parts)}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise InputError(f"{path}: {key!r} is {list(value.shape)}, expected {list(own[key].shape)}")
    model.load_state_dict(state)
