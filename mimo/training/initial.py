"""Training that begins with another network's weights: a second phase on other clips or with another tokenizer."""

from __future__ import annotations

from pathlib import Path

from mimo import checkpoint, pretrained
from mimo.network.network import MiMo
from mimo.run_state import find_run


def begin_with(model: MiMo, source: Path) -> None:
    """Gives a network the averaged weights of a run (of its newest whole checkpoint), a checkpoint or an exported
    network. Raises InputError when there is none, or its weights have other names or shapes."""
    if pretrained.is_export(source):
        pretrained.read_config(source)  # its weights are those that were written
        folder, tensors = source, pretrained.read_tensors(source)
    else:
        folder, state = find_run(source, "ema")
        tensors = checkpoint.read_tensors(folder, "ema", state)
    checkpoint.load_module(model, {name: tensor.float() for name, tensor in tensors.items()}, folder)
