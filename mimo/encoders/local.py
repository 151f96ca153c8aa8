"""Networks of the package transformers, out of local folders. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mimo.errors import InputError
from mimo.tokenizers.weights import configured_by


def network_class(kind: str, who: str) -> Any:
    """transformers' class of that name; InputError where transformers is not installed, or too old to have it. who:
    needs it."""
    try:
        import transformers

        return getattr(transformers, kind)
    except (ImportError, AttributeError):
        raise InputError(f"{who} needs the package transformers: pip install transformers") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers lists every tensor of a head that is left on disk; `read_folder` tells what is missing."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def read_folder(source: str | Path, kind: str, *, who: str, what: str) -> Any:
    """The network in a folder with config.json and weights, as transformers saves it, in evaluation mode and frozen.
    What a whole checkpoint has besides (a decoder, a classifier, a text tower) stays on disk.

    Args:
        kind: a class of transformers. who: needs it. what: the network's name, in words.

    Raises: InputError for a folder that is not there, or holds no whole network of that kind.
    """
    source = Path(source)
    if not (source / "config.json").is_file():
        raise InputError(f"{source}: no such folder with a config.json, expected {what} as transformers saves it")
    network = network_class(kind, who)
    with configured_by(source), _quiet():
        try:
            model, found = network.from_pretrained(source, local_files_only=True, output_loading_info=True)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{source}: {' '.join(str(error).split())[:200]}") from None
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{source}: not weights of {what}: {len(missing)} missing, first {missing[0]!r}")
    return model.eval().requires_grad_(False)
