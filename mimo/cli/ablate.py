"""`mimo ablate`: the options; mimo.ablation does the work."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from mimo.ablation.variants import ABLATIONS, VARIANTS, Ablation, find
from mimo.cli.options import Clips, Device, changed, clip_options, find_device, require_folder
from mimo.cli.parser import HELP, given
from mimo.config import PRESETS, MiMoConfig, SampleConfig, TrainConfig
from mimo.errors import InputError

NAMES = tyro.conf.arg(metavar="{" + ",".join(ABLATIONS) + "}")


@dataclass(kw_only=True)
class Ablate(Clips):
    """Train variants that differ in one thing, several seeds each, measure them and say which claims hold.

    The same command continues an ablation that was stopped; more seeds, and other ablations over the same base, go into
    the same folder and share its cells. Tables, plots and verdicts are in OUT/NAME.

    Args:
        name: what is ablated, after the tables and figures of MiMo's paper.
        out: the folder.
        preset: the base, instead of the ablation's own.
        variants: these alone; others of mimo.ablation.variants can be named too.
        seeds: of weights, clips and noise; variants of one seed meet the same clips.
        steps: the same as --train.steps.
        every: steps between measurements; without it a quarter of all steps.
        clips: held-out clips that are continued.
        probe_train: clips whose history features linear probes learn from; 0 leaves the probes out.
        probe_test: held-out clips that the probes are asked about.
        measure_batch: clips at once in measurements.
        test_data: held-out clips, if they are not a part of --data.
        test_split: a subfolder of --data (or --test-data) whose clips are held out.
        level: of the verdicts' intervals.
        jobs: cells at once, each in a process of its own.
        plan: say what would be trained and what it costs, and train nothing.
        tokenizer_weights: what the tokenizer reads; "dct" has none.
        encoder_weights: the folder that REPA's encoder reads; "hog" has none.
        device: where to train.
        model: the network and its objective, under what variants change.
        train: the optimisation, likewise.
        sample: how held-out clips are continued.
    """

    name: Annotated[tyro.conf.Positional[str], NAMES]
    out: Path
    preset: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")]
    model: MiMoConfig
    train: TrainConfig
    sample: SampleConfig
    variants: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    every: int | None = None
    clips: int = 96
    probe_train: int = 1200
    probe_test: int = 480
    measure_batch: int = 32
    test_data: str | None = None
    test_split: str | None = None
    level: float = 0.95
    jobs: int = 1
    plan: bool = False
    tokenizer_weights: Path | None = None
    encoder_weights: Path | None = None
    device: Device = "auto"

    @classmethod
    def defaults(cls, arguments: list[str]) -> "Ablate":
        """Those of the ablation, which is the first word, or of --preset."""
        asks = bool(set(HELP) & set(arguments))
        name = next(iter(arguments), "")
        if name.startswith("-") or not name:
            if not asks:
                raise InputError(f"mimo ablate: the ablation comes first: expected one of {', '.join(ABLATIONS)}")
            name = next(iter(ABLATIONS))
        ablation, preset = find(name), given("preset", arguments)
        if preset is None:
            model, train, sample = ablation.base()
        elif preset not in PRESETS:
            raise InputError(f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)}")
        else:
            model, train, sample = (kind.from_preset(preset) for kind in (MiMoConfig, TrainConfig, SampleConfig))
        return cls(
            name=tyro.MISSING if asks else name,
            data=ablation.data or tyro.MISSING,
            out=tyro.MISSING,
            preset=preset or ablation.preset,
            model=model,
            train=train,
            sample=sample,
            **ablation.measuring,
        )

    def run(self) -> None:
        import os

        from mimo.ablation.plan import cells
        from mimo.ablation.report import write
        from mimo.ablation.run import run_cells

        ablation, chosen = find(self.name), self._variants(find(self.name))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("mimo ablate: expected one process, which starts --jobs of its own, and not torchrun")
        for option, value in (("jobs", self.jobs), ("every", self.every), ("seeds", len(self.seeds))):
            if value is not None and value < 1:
                raise InputError(f"--{option} {value}: expected at least 1")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"--seeds {' '.join(map(str, self.seeds))}: expected different numbers of 0 or more")
        if not 0 < self.level < 1:
            raise InputError(f"--level {self.level}: expected a number between 0 and 1")
        if self.model.recipe != "mimo":
            raise InputError(f"--model.recipe {self.model.recipe}: expected a base of MiMo, which variants change")
        require_folder(self.out)
        made = self._plan()
        listed = cells(chosen, list(self.seeds))
        for cell in listed[: len(chosen)]:  # what cannot be built is said before anything is trained
            made.configs(cell)
        if self.plan:
            print(self._costs(made, chosen, len(self.seeds)))
            return
        made.claim_folder()

        def report(plots: bool = False) -> str:
            return write(made, self.name, ablation, chosen, list(self.seeds), self.level, plots=plots)

        done = run_cells(made, listed, self.jobs, report)
        print(report(plots=True))
        print(f"{self.out / self.name}" if done else f"stopped: the same command continues {self.out}")

    def _variants(self, ablation: Ablation) -> tuple[str, ...]:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise InputError(f"--variants {unknown[0]}: expected some of {', '.join(VARIANTS)}")
        return tuple(dict.fromkeys(self.variants)) or ablation.variants

    def _plan(self):
        """The mimo.ablation.plan.Plan of what was asked for."""
        from mimo.ablation.plan import Measuring, Plan
        from mimo.cli.train import Train
        from mimo.runtime import best_device

        config = self.model
        train = self.train if self.steps is None else changed(self.train, steps=self.steps)
        every = self.every or max(1, train.steps // 4)
        measuring = Measuring(every, self.clips, self.probe_train, self.probe_test, self.measure_batch)
        options = clip_options(config) | {"interval": train.interval}
        train_set = self.open(encoded=True, **options | {"flip": train.flip})
        test_set = self._held_out(options)
        told = {field.name: getattr(self, field.name) for field in fields(Clips)} | {"preset": self.preset}
        told |= {"keep_every": measuring.every, "device": self.device, "ignore_labels": config.num_classes == 0}
        others = {field.name: field.default for field in fields(Train) if field.name in Train.told_names()}
        told = {name: str(v) if isinstance(v, Path) else v for name, v in (others | told).items()}
        weights = {"tokenizer_weights": self.tokenizer_weights, "encoder_weights": self.encoder_weights}
        device = (find_device(self.device) or best_device()).type
        base = self.preset, config, train, self.sample
        return Plan(self.out, *base, measuring, train_set, test_set, told, weights, device)

    def _held_out(self, options: dict):
        """Clips that training does not see: procedural ones have a split, or seeds, for them."""
        from mimo.data.datasets import made

        how = {field.name: getattr(self, field.name) for field in fields(Clips)} | {"random_crop": False}
        how["data"] = self.data if self.test_data is None else self.test_data
        if self.test_split is not None:
            how["split"] = self.test_split
        elif made(how["data"]) == "factors":
            how["split"] = "test"
        elif self.test_data is None and not made(self.data):
            raise InputError("--test-split is missing: expected a subfolder of --data, or other clips as --test-data")
        return Clips(**how).open(**options)

    @staticmethod
    def _costs(plan, variants: tuple[str, ...], seeds: int) -> str:
        """What --plan prints."""
        from mimo.ablation.plan import Cell
        from mimo.costs import gflop_until
        from mimo.evaluation.tables import as_markdown

        rows = []
        for variant in variants:
            model, train = plan.configs(Cell(variant, 0))
            total = gflop_until(model, train, train.steps)
            row = {"variant": variant, "steps": train.steps, "GFLOP per step": total / train.steps}
            rows.append(row | {"GFLOP of a run": total, "GFLOP of all seeds": total * seeds})
        columns = [*rows[0]]
        whole = sum(row["GFLOP of all seeds"] for row in rows)
        return f"{as_markdown(rows, columns)}\n{len(rows) * seeds} cells, {whole:.4g} GFLOP of training, counted"
