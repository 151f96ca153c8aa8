"""`mimo export`: the options; mimo.pretrained does the work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mimo.cli.options import require_folder
from mimo.errors import InputError


@dataclass
class Export:
    """Write the network of a run as one folder to share: config.json, model.safetensors and a model card.

    `mimo sample --checkpoint OUT` and `MiMo.from_pretrained` read it.

    Args:
        source: a run folder (its newest checkpoint) or one of its checkpoints/step_* folders.
        out: the folder; a model card that is there stays.
        weights: the averaged weights, or those of the last step.
        overwrite: replace a network that is there.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    weights: Literal["ema", "model"] = "ema"
    overwrite: bool = False

    def run(self) -> None:
        from mimo import checkpoint, pretrained
        from mimo.run_state import find_run

        require_folder(self.out)
        if pretrained.is_export(self.out) and not self.overwrite:
            raise InputError(f"{self.out} holds a network: --overwrite replaces it")
        folder, state = find_run(self.source, self.weights)
        tensors = checkpoint.read_tensors(folder, self.weights, state)
        pretrained.write(self.out, tensors, state["configs"], step=state["step"], weights=self.weights)
        print(f"{self.out}: step {state['step']} of {self.source}, weights {self.weights!r}")
