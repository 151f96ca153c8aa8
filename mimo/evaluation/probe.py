"""`mimo probe`: what networks know of clean history. Linear probes, CKNNA, a map of the features, and attention maps.

    OUT/probe.json .csv .md       per network and measure the best layer, and how sure the figure is
    OUT/layers.json .csv .md      the same of every layer
    OUT/linear_probe.png, cknna.png
    OUT/map-NAME.png .csv         pooled features in two dimensions
    OUT/attention-NAME-I.png      what the centre of clip I's last frame attends to
    OUT/cache/                    features and answers, see mimo.evaluation.history_features

Equal networks, clips and options give equal bytes; a run that was stopped goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mimo.data.protocols import VideoDataset
from mimo.encoders import Encoder
from mimo.errors import InputError, user_input
from mimo.evaluation import probe_pictures as pictures
from mimo.evaluation.attention_maps import centre_query_weights, drawn_heads, shown_layers
from mimo.evaluation.cknna import (
    DEFINITIONS,
    GROUPS,
    Neighbours,
    interval_from_neighbours,
    jackknife_groups,
    nearest,
)
from mimo.evaluation.history_features import (
    Chosen,
    Features,
    batch_of_history,
    digest_of,
    kept,
    network_checksum,
    of_encoder,
    of_network,
    stacked,
)
from mimo.evaluation.linear_probe import ProbeConfig, linear_probe
from mimo.evaluation.maps import Projection, project
from mimo.evaluation.metrics import bootstrap_interval
from mimo.evaluation.representation import history_layers
from mimo.evaluation.tables import as_csv, write_tables
from mimo.folders import atomic_path
from mimo.runtime import autocast
from mimo.sampling.loading import Loaded

Measure = Literal["probe", "cknna", "map", "attention"]
MEASURES: tuple[Measure, ...] = ("probe", "cknna", "map", "attention")
SHOWN = ("network", "measure", "of", "layer", "value", "low", "high", "chance", "n")
HEADS = 4  # that attention maps show


@dataclass(frozen=True)
class ProbeRequest:
    """What is measured.

    Args:
        measures: of "probe", "cknna", "map" and "attention".
        layers: those to measure; none named: all that history has.
        neighbours: k of CKNNA.
        projection: "umap" or "pca".
        attention_clips: how many clips are drawn with attention over them.
        train_clips, test_clips: at most so many.
        classifier: how linear probes are trained.
        batch_size: of clips that run through a network together.
        seed: of everything that is drawn.
    """

    measures: tuple[Measure, ...] = MEASURES
    layers: tuple[int, ...] = ()
    neighbours: int = 10
    projection: Projection = "pca"
    attention_clips: int = 2
    train_clips: int = 4096
    test_clips: int = 1024
    classifier: ProbeConfig = field(default_factory=ProbeConfig)
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("neighbours", "attention_clips", "train_clips", "test_clips", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected 0 or more")
        if not self.measures:
            raise ValueError(f"measures=(): expected some of {', '.join(MEASURES)}")


@dataclass(frozen=True)
class Source:
    """A network that is probed.

    Args:
        name: in tables and files.
        load: reads it.
        clips: opens the clips it is probed with: to train classifiers on, and to test with (None: a quarter of the
            first, drawn from the seed, is set aside).
    """

    name: str
    load: Callable[[], Loaded]
    clips: Callable[[Loaded], tuple[VideoDataset, VideoDataset | None]]


def probe(
    sources: Sequence[Source], out: Path, request: ProbeRequest, encoder: Encoder | None = None, encoder_name: str = ""
) -> list[dict[str, Any]]:
    """Measure every network and write OUT; returns the rows of its table.

    Args:
        encoder: what CKNNA compares with.

    Raises InputError for clips without anything known of them, too few clips, and layers that there are not.
    """
    rows: list[dict[str, Any]] = []
    for source in sources:
        loaded = source.load()
        print(f"{source.name}: {loaded.folder}, {loaded.model.config.recipe}")
        rows += _Probing(source, loaded, out, request, encoder, encoder_name).run()
    best = best_layers(rows)
    about = {"request": asdict(request), "reference": encoder_name or None}
    if rows:
        notes = _notes(request, encoder_name, rows)
        write_tables(out, "layers", rows, about=about, shown=SHOWN, notes=notes)
        for path in write_tables(out, "probe", best, about=about, shown=SHOWN, notes=notes):
            print(path)
        for path in pictures.curves(out, rows):
            print(path)
        print((out / "probe.md").read_text(), end="")
    return best


def best_layers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per network, measure and what it is of, the row with the greatest value; of equals that of the first layer."""
    best: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = row["network"], row["measure"], row["of"]
        if key not in best or (row["value"] or -1) > (best[key]["value"] or -1):
            best[key] = row
    return [*best.values()]


def held_out(dataset: VideoDataset, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the clips in two parts, three quarters and one, each in the order of evaluation."""
    order = dataset.evaluation_order()
    test = set(random.Random(seed).sample(order, len(order) // 4))
    return [index for index in order if index not in test], [index for index in order if index in test]


class _Probing:
    """One network."""

    def __init__(
        self, source: Source, loaded: Loaded, out: Path, request: ProbeRequest, encoder: Encoder | None, reference: str
    ) -> None:
        self.name, self.loaded, self.out, self.request = source.name, loaded, out, request
        self.encoder, self.reference = encoder, reference
        self.device = next(loaded.model.parameters()).device
        self.layers = _layers(loaded, request.layers)
        self.network = network_checksum(loaded)
        train, test = source.clips(loaded)
        if test is None:
            parts = held_out(train, request.seed)
            test = train
        else:
            parts = train.evaluation_order(), test.evaluation_order()
        chosen = [part[:count] for part, count in zip(parts, (request.train_clips, request.test_clips))]
        self.train = Chosen(train, tuple(chosen[0]), request.seed)
        self.test = Chosen(test, tuple(chosen[1]), request.seed)
        self.common: dict[str, Any] = {
            "network": self.name,
            "recipe": loaded.model.config.recipe,
            "checkpoint": str(loaded.folder),
        }
        self._require()

    def _require(self) -> None:
        request = self.request
        if not self.test.indices:
            raise InputError(f"{self.test.dataset!r}: expected clips to test with, there are none")
        if "probe" in request.measures:
            if not self.train.factors():
                raise InputError(
                    f"{self.train.dataset!r}: its clips have no labels, which linear probes are to read: expected "
                    "--folder-labels, an --annotation with labels, --data factors, or --measures without probe"
                )
            if self.train.factors().keys() != self.test.factors().keys():
                raise InputError(f"{self.test.dataset!r}: its clips have other labels than {self.train.dataset!r}")
            if len(self.train.indices) < 2:
                raise InputError(f"{self.train.dataset!r}: expected at least 2 clips to train linear probes on")
        if "cknna" in request.measures:
            self._require_neighbours(len(self.test.indices))

    def _require_neighbours(self, clips: int) -> None:
        k, left = self.request.neighbours, clips - -(-clips // GROUPS)
        if left < max(k + 1, 4):
            raise InputError(
                f"--neighbours {k}: expected more than {max(k, 3)} clips when a tenth of them is left out, "
                f"{self.test.dataset!r} gives {clips}"
            )

    def run(self) -> list[dict[str, Any]]:
        request = self.request
        rows: list[dict[str, Any]] = []
        if {"probe", "cknna", "map"} & {*request.measures}:
            tested = self.features(self.test)
            if "probe" in request.measures:
                rows += self.linear_probes(tested)
            if "cknna" in request.measures:
                rows += self.alignment(tested)
            if "map" in request.measures:
                self.map(tested, rows)
        if "attention" in request.measures:
            self.attention()
        return rows

    def features(self, chosen: Chosen) -> Features:
        return of_network(
            self.loaded,
            chosen,
            self.layers,
            self.out,
            batch_size=self.request.batch_size,
            network=self.network,
        )

    def linear_probes(self, tested: Features) -> list[dict[str, Any]]:
        request, factors = self.request, self.train.factors()
        views = [
            self.features(Chosen(self.train.dataset, self.train.indices, request.seed, flip)) for flip in (False, True)
        ]
        everything = [*views, tested]
        least = [int(max(part.labels[:, i].max() for part in everything)) + 1 for i in range(len(factors))]
        classes = [known or seen for known, seen in zip(factors.values(), least)]
        labels, truth = torch.stack([view.labels for view in views]).to(self.device), tested.labels.to(self.device)
        rows = []
        for place, layer in enumerate(self.layers):
            right = []
            for seed in range(request.classifier.seeds):
                x = torch.stack([view.features[:, place] for view in views]).to(self.device)
                given = x, labels, tested.features[:, place].to(self.device), truth, classes, request.classifier
                right.append(self._answers(layer, seed, partial(linear_probe, *given, seed=seed)))
            share = torch.stack(right).double().mean(0)  # [M, factors]
            for column, name in enumerate(factors):
                counts = tested.labels[:, column].bincount()
                low, high = bootstrap_interval(share[:, column], None, request.seed)
                row: dict[str, Any] = {"measure": "linear probe", "of": name, "layer": layer}
                row |= {"value": float(share[:, column].mean()), "low": low, "high": high}
                row |= {"chance": float(counts.max() / counts.sum()), "n": len(tested.labels)}
                row |= {"trained_on": labels.shape[1], "classes": classes[column], "seeds": len(right)}
                rows.append(self.common | row)
        return rows

    def _answers(self, layer: int, seed: int, answer: Callable[[], Tensor]) -> Tensor:
        """Which test clips a classifier gets right, bool [M, factors]; kept, as training on many clips takes long."""
        described = {
            "what": "linear probe",
            "network": self.network,
            "layer": layer,
            "seed": seed,
            "classifier": asdict(self.request.classifier) | {"seeds": None},  # one of several is what it is alone
            "train": self.train.described,
            "test": self.test.described,
            "batch_size": self.request.batch_size,
            "precision": self.loaded.train_config.precision,
            "device": self.device.type,
        }
        key = digest_of(described)
        return kept(self.out / "cache" / f"{key[:16]}-answers.safetensors", key, lambda: {"right": answer()})["right"]

    def alignment(self, tested: Features) -> list[dict[str, Any]]:
        assert self.encoder is not None  # the command line sees to it
        request = self.request
        shape = self.test.dataset.num_frames, self.test.dataset.height, self.test.dataset.width
        user_input(self.encoder.grid, *shape)
        of_reference = of_encoder(
            self.encoder,
            self.test,
            self.out,
            batch_size=request.batch_size,
            device=self.device,
            name=self.reference,
        )
        count = len(tested.index)
        self._require_neighbours(count)
        groups = jackknife_groups(count, request.seed)

        def neighbours(features: Tensor) -> list[Neighbours]:
            return nearest(features.to(self.device), request.neighbours, [group.to(self.device) for group in groups])

        reference, rows = neighbours(of_reference.features[:, 0]), []
        for place, layer in enumerate(self.layers):
            own = neighbours(tested.features[:, place])
            for definition in DEFINITIONS:
                value, low, high = (
                    None if number != number else number
                    for number in interval_from_neighbours(own, reference, definition)
                )
                row: dict[str, Any] = {"measure": f"CKNNA ({definition})", "of": self.reference, "layer": layer}
                row |= {"value": value, "low": low, "high": high, "n": count, "neighbours": request.neighbours}
                rows.append(self.common | row)
        return rows

    def map(self, tested: Features, rows: Sequence[dict[str, Any]]) -> None:
        """Features of the layer with the greatest CKNNA or, without, of the last layer, in two dimensions."""
        aligned = [row for row in best_layers(rows) if row["measure"] == f"CKNNA ({DEFINITIONS[0]})"]
        layer = aligned[0]["layer"] if aligned else self.layers[-1]
        places = project(tested.features[:, self.layers.index(layer)], self.request.projection, self.request.seed)
        names = [*self.test.factors()]
        cells = [
            {"clip": int(index), "x": float(x), "y": float(y)} | dict(zip(names, labels))
            for index, (x, y), labels in zip(tested.index, places.tolist(), tested.labels.tolist())
        ]
        path = self.out / f"map-{self.name}.csv"
        with atomic_path(path) as temporary:
            temporary.write_text(as_csv(cells, [*cells[0]]), newline="")
        title = f"{self.name}: {self.request.projection.upper()} of layer {layer}, {len(places)} clips"
        print(pictures.scatter(path.with_suffix(".png"), title, places, tested.labels, names))

    def attention(self) -> None:
        model, config = self.loaded.model, self.loaded.model.config
        if config.attention != "joint":
            print(
                f"{self.name}: no attention maps, as its attention is {config.attention}: no layer sees all of a clip"
            )
            return
        layers, heads = shown_layers(self.layers), drawn_heads(config.heads, HEADS, self.request.seed)
        shown = 0
        for index in self.test.indices:
            if shown == self.request.attention_clips:
                break
            for batch in self.test.batches([index], 1):  # none if it cannot be read
                with autocast(self.device, self.loaded.train_config.precision):
                    given = batch_of_history(self.loaded, stacked([{k: v[0] for k, v in batch.items()}]))
                    weights = centre_query_weights(model, given, layers, heads)
                path = self.out / f"attention-{self.name}-{index}.png"
                print(pictures.attention(path, batch["video"][0], weights, heads, config))
                shown += 1


def _layers(loaded: Loaded, asked: tuple[int, ...]) -> tuple[int, ...]:
    there = history_layers(loaded.model)
    if missing := [layer for layer in asked if layer not in there]:
        raise InputError(
            f"--layers {missing[0]}: expected some of {there[0]}..{there[-1]}, the layers behind which "
            f"{loaded.folder} has hidden states of history"
        )
    return tuple(dict.fromkeys(asked)) or there


def _notes(request: ProbeRequest, reference: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    found = {row["measure"] for row in rows}
    if "linear probe" in found:
        notes.append(
            f"Linear probe: top-1 accuracy, mean of {request.classifier.seeds} classifiers; the interval is a 95% "
            "bootstrap over test clips. chance: the share of the largest class."
        )
    if len(found) > 1 or "linear probe" not in found:
        notes.append(
            f"CKNNA with {request.neighbours} neighbours against {reference!r}: (paper) Eqs. 28-31, (public) the code "
            "that published figures are usually made with; the interval is a jackknife over tenths of the clips."
        )
        if reference == "hog":
            notes.append("hog has no weights: these figures compare networks here, and with no published one.")
    return [*notes, "The layer is the one with the greatest value; layers.csv has all of them."]
