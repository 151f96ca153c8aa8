"""`mimo probe`: the options; mimo.evaluation.probe does the work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mimo.cli.options import Clips, Device, clip_options, find_device, require_folder
from mimo.errors import InputError, user_input


@dataclass(kw_only=True)
class Probe(Clips):
    """Measure what networks know of clean history: linear probes, CKNNA, maps of features and of attention.

    Of every layer, for every checkpoint. --data factors gives clips of which shape, texture, speed, direction,
    occlusion and number are known. Run it again to continue one that was stopped.

    Args:
        checkpoint: run folders (their newest checkpoints), checkpoints/step_* folders or exported networks.
        out: folder for tables, pictures and features.
        names: what tables call the checkpoints; otherwise the names of their folders.
        measures: "probe" trains linear classifiers, "cknna" compares with --reference, "map" draws the features in two
            dimensions, "attention" what the centre of the last frame attends to.
        layers: those to measure; otherwise all behind which history has hidden states.
        test_data: clips to test with, as --data; without it, --test-split and --test-annotation, those of "factors" are
            its test split, and of other data a quarter is set aside.
        test_split: the --split of these clips.
        test_annotation: the --annotation of these clips.
        train_clips: at most so many clips train the classifiers.
        test_clips: at most so many clips are tested, compared and drawn.
        reference: the encoder that CKNNA compares with; "hog" has no weights and compares with no published figure.
        encoder_weights: the folder that --reference reads.
        neighbours: k of CKNNA.
        projection: how "map" comes to two dimensions; without it UMAP where umap-learn is installed, else PCA.
        attention_clips: how many clips are drawn with attention.
        epochs: of the classifiers.
        seeds: how many classifiers are trained, for the mean of their accuracies.
        batch_size: clips that run through a network together.
        seed: of what is drawn: clips set aside, cuts, heads.
        weights: the averaged weights, or those of the last step.
        tokenizer_weights: where the tokenizer's weights lie, if not where they lay when the model was trained.
        trust_pickle: read tokenizer weights that hold pickled objects, which can run any code.
        device: "auto" takes a GPU if there is one.
    """

    checkpoint: tuple[Path, ...]
    out: Path
    names: tuple[str, ...] = ()
    measures: tuple[Literal["probe", "cknna", "map", "attention"], ...] = ("probe", "cknna", "map", "attention")
    layers: tuple[int, ...] = ()
    test_data: str | None = None
    test_split: str | None = None
    test_annotation: Path | None = None
    train_clips: int = 4096
    test_clips: int = 1024
    reference: Literal["hog", "videomae"] = "hog"
    encoder_weights: Path | None = None
    neighbours: int = 10
    projection: Literal["umap", "pca"] | None = None
    attention_clips: int = 2
    epochs: int = 10
    seeds: int = 3
    batch_size: int = 32
    seed: int = 0
    weights: Literal["ema", "model"] = "ema"
    tokenizer_weights: Path | None = None
    trust_pickle: bool = False
    device: Device = "auto"

    def run(self) -> None:
        from mimo.encoders import build_encoder
        from mimo.evaluation.linear_probe import ProbeConfig
        from mimo.evaluation.maps import default_projection
        from mimo.evaluation.probe import ProbeRequest, Source, probe
        from mimo.runtime import best_device
        from mimo.sampling.loading import load

        require_folder(self.out)
        device = find_device(self.device) or best_device()
        names = self._names()
        if self.projection is None and "map" in self.measures and default_projection() == "pca":
            print("maps are drawn by PCA: UMAP wants umap-learn, pip install 'mimo-kernels[umap]'")
        classifier = self._asked(ProbeConfig, epochs=self.epochs, seeds=self.seeds)
        request = self._asked(
            ProbeRequest,
            measures=self.measures,
            layers=self.layers,
            neighbours=self.neighbours,
            projection=self.projection or default_projection(),
            attention_clips=self.attention_clips,
            train_clips=self.train_clips,
            test_clips=self.test_clips,
            classifier=classifier,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        encoder = None
        if "cknna" in self.measures:
            encoder = user_input(build_encoder, self.reference, weights=self.encoder_weights).to(device)
        options: dict[str, Any] = {
            "weights": self.weights,
            "tokenizer_weights": self.tokenizer_weights,
            "trust_pickle": self.trust_pickle,
            "device": device,
        }
        sources = [
            Source(name, partial(load, path, **options), self.clips)
            for name, path in zip(names, self.checkpoint, strict=True)
        ]
        user_input(probe, sources, self.out, request, encoder, self.reference)

    def _names(self) -> Sequence[str]:
        names = self.names or [path.resolve().name for path in self.checkpoint]
        if len(names) != len(self.checkpoint):
            raise InputError(f"--names: {len(names)} for {len(self.checkpoint)} checkpoints: expected one for each")
        if doubled := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two checkpoints are called {doubled[0]!r}: expected --names that tell them apart")
        if unfit := [name for name in names if not name or "/" in name]:
            raise InputError(f"--names {unfit[0]!r}: expected words that a file can be called by")
        return names

    @staticmethod
    def _asked(kind: type, **options):
        """A record of options: what is wrong with one is said of --option."""
        try:
            return kind(**options)
        except ValueError as error:
            name, _, rest = str(error).partition("=")
            raise InputError(f"--{name.replace('_', '-')} {rest}") from None

    def clips(self, loaded):
        """The clips for a network: those to train classifiers on, and those to test with, or None."""
        from mimo.evaluation.history_features import shortest_interval

        config = loaded.model.config
        options = clip_options(config) | {"num_classes": None, "text": None, "interval": shortest_interval(loaded)}
        if not config.num_actions:
            options["use_actions"] = False
        train = self.open(**options)
        test: dict[str, Any] = {"data": self.test_data, "split": self.test_split, "annotation": self.test_annotation}
        test = {name: value for name, value in test.items() if value is not None}
        if not test and self.data == "factors" and self.split is None:
            test = {"split": "test"}
        return train, replace(self, **test).open(**options) if test else None
