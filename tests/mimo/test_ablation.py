"""Ablations: variants resolve into networks, cells continue where they were, and verdicts say what is known."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mimo.ablation import results, run
from mimo.ablation.plan import Cell
from mimo.ablation.results import Found, judge
from mimo.ablation.variants import ABLATIONS, VARIANTS, Claim
from mimo.ablation.verdict import student_quantile, verdict
from mimo.cli import main
from mimo.config import MiMoConfig, TrainConfig
from mimo.costs import gflop_until, of_training
from mimo.data import write_video
from mimo.network.network import MiMo
from mimo.recipes.acdit import acdit

TINY = (
    "--model.depth 2 --model.dim 16 --model.heads 2 --model.decoder-depth 1 --model.decoder-layer 1 --model.frames 3 "
    "--model.height 2 --model.width 2 --model.channels 12 --model.compression 1 8 8 --model.video-frames 3 "
    "--model.mask-ratio 0.25 0.5 --train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 "
    "--sample.steps 1 --sample.context-frames 1 --sample.num-frames 3 --clips 4 --probe-train 16 --probe-test 8 "
    "--steps 2 --every 1 --device cpu --data factors"
).split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mimo.ablation.probes.STEPS", 5)
        yield
    torch.set_num_threads(threads)


def ablate(out: Path, *more: str, name: str = "figure-1") -> int:
    chosen = () if "--variants" in more else ("--variants", "mimo", "acdit")
    seeds = () if "--seeds" in more else ("--seeds", "0", "1")
    return main(["ablate", name, "--preset", "mimo-tiny", "--out", str(out), *TINY, *chosen, *seeds, *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An ablation of two variants and two seeds that nothing has stopped."""
    out = tmp_path_factory.mktemp("ablation") / "whole"
    assert ablate(out) == 0
    return out


def written(out: Path) -> dict[str, bytes]:
    """The tables."""
    return {path.name: path.read_bytes() for path in (out / "figure-1").iterdir() if path.suffix != ".png"}


@pytest.fixture
def no_plots(monkeypatch):
    """They take longer than the cells of these networks."""
    for name in ("plot_metric", "plot_horizon"):
        monkeypatch.setattr(f"mimo.ablation.report.{name}", lambda *arguments: None)


def test_results_of_an_ablation(whole):
    names = {path.name for path in (whole / "figure-1").iterdir()}
    assert {"results.csv", "summary.md", "verdicts.json", "psnr.png", "horizon.png", "probe_shape.png"} <= names
    rows = json.loads((whole / "figure-1" / "results.json").read_text())
    assert [(row["variant"], row["seed"], row["step"]) for row in rows["rows"]] == [
        (variant, seed, step) for variant in ("mimo", "acdit") for seed in (0, 1) for step in (1, 2)
    ]
    cell = json.loads(Cell("mimo", 1).measured(whole, 2).read_text())
    assert np.array(cell["psnr"]).shape == (4, 2) and list(cell["probe"]["texture"]) == ["1"]
    row = next(row for row in rows["rows"] if (row["variant"], row["seed"], row["step"]) == ("mimo", 1, 2))
    assert row["psnr"] == pytest.approx(np.mean(cell["psnr"])) and row["frechet"] == cell["frechet"]
    said = json.loads((whole / "figure-1" / "verdicts.json").read_text())["rows"]
    assert {(row["by"], row["at"]) for row in said if row["source"] == "Fig. 1"} == {
        (by, at) for by in ("psnr", "frechet") for at in ("equal steps", "equal compute")
    }
    assert all(row["seeds"] == 2 and row["clips"] == (1 if row["by"] == "frechet" else row["clips"]) for row in said)


def test_a_stopped_ablation_continues_to_the_same_bytes(whole, no_plots, tmp_path, monkeypatch, capsys):
    """Stopped by a signal in the second cell's training, and killed in its measurements."""
    steps, measured, out = [], [], tmp_path / "stopped"
    step, real_measure = run.Trainer.train_step, run.measure

    def stopped_at_the_third(trainer, *arguments):
        step(trainer, *arguments)
        steps.append(trainer.step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def killed_at_the_fourth(*arguments):
        measured.append(arguments)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real_measure(*arguments)

    monkeypatch.setattr(run.Trainer, "train_step", stopped_at_the_third)
    assert ablate(out) == 0
    assert "stopped: the same command continues" in capsys.readouterr().out and steps == [1, 2, 1]
    monkeypatch.setattr(run, "measure", killed_at_the_fourth)
    assert ablate(out) == 130 and steps == [1, 2, 1, 2]
    monkeypatch.setattr(run, "measure", real_measure)
    assert ablate(out) == 0 and steps == [1, 2] * 4  # no step of no cell twice
    assert ablate(out) == 0 and steps == [1, 2] * 4
    ours, theirs = written(out), written(whole)
    assert ours.keys() == theirs.keys() and [n for n in ours if ours[n] != theirs[n]] == []


def test_several_cells_at_once_find_the_same(whole, no_plots, tmp_path, monkeypatch, capsys):
    """Forked here, where torch is there already; a user's are spawned."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(run.multiprocessing, "get_context", lambda kind: context)
    out = tmp_path / "jobs"
    assert ablate(out, "--jobs", "3") == 0
    ours, theirs = written(out), written(whole)
    assert [n for n in ours if ours[n] != theirs[n]] == [] and ours.keys() == theirs.keys()
    assert "step 2/2" in (Cell("acdit", 1).folder(out) / "output.txt").read_text()
    shutil.rmtree(Cell("mimo", 0).folder(out) / "measured")
    damaged = next((Cell("mimo", 0).folder(out) / "checkpoints" / "step_00000001" / "ema").iterdir())
    damaged.write_bytes(b"")
    capsys.readouterr()
    assert ablate(out, "--jobs", "2") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: mimo, seed 0: {Cell('mimo', 0).folder(out)}") and error.count("\n") == 1


def test_ablations_and_seeds_share_a_folder_and_its_cells(whole, no_plots, tmp_path, monkeypatch, capsys):
    out, trained = shutil.copytree(whole, tmp_path / "more"), []
    train = run.train
    monkeypatch.setattr(run, "train", lambda trainer, to, **rest: trained.append(to) or train(trainer, to, **rest))
    assert ablate(out, "--variants", "acdit", "mimo-current", "--seeds", "0", name="table-4") == 0
    assert [path.relative_to(out).as_posix() for path in trained] == ["cells/mimo-current/seed-0"]
    assert (out / "table-4" / "summary.md").exists() and written(out) == written(whole)
    capsys.readouterr()
    assert ablate(out, "--train.lr", "1e-4") == 2
    assert "was begun with train.lr=0.005, not 0.0001" in capsys.readouterr().err


def test_a_cell_is_a_run_that_mimo_train_continues(whole, tmp_path):
    cell = shutil.copytree(Cell("mimo", 0).folder(whole), tmp_path / "run")
    assert main(["train", "--resume", "--out", str(cell), "--steps", "3"]) == 0
    assert json.loads((cell / "log.jsonl").read_text().splitlines()[-1])["step"] == 3


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_of_the_paper_resolve(name):
    """Every variant is a network that can be built, differs from the others, and is named in claims and figures."""
    ablation = ABLATIONS[name]
    model, train, sample = ablation.base()
    configs = {variant: VARIANTS[variant].configs(variant, model, train) for variant in ablation.variants}
    assert len({json.dumps([c.to_dict() for c in pair]) for pair in configs.values()}) == len(configs)
    named = {variant for claim in ablation.claims for variant in (claim.better, claim.worse)}
    assert named | ablation.paper.keys() <= configs.keys()
    for config, _ in configs.values():
        with torch.device("meta"):
            MiMo(config)
    # The order of the paper's figures is what its tables are said to claim.
    for claim in ablation.claims:
        if claim.by != "representation" and {claim.better, claim.worse} <= ablation.paper.keys():
            assert ablation.paper[claim.better] < ablation.paper[claim.worse]


def test_variants_are_the_papers():
    model, train, _ = ABLATIONS["table-5"].base()
    layers = [VARIANTS[v].configs(v, model, train)[0].decoder_layer for v in ABLATIONS["table-5"].variants[1:]]
    assert layers == [12, 11, 10, 9]
    assert VARIANTS["acdit"].configs("acdit", model, train)[0] == acdit(model)
    far = VARIANTS["far"].configs("far", model, train)[0]
    assert far == MiMoConfig.from_preset("far-b-k600").__class__(**far.to_dict())
    assert far.to_dict() | {"decoder_layer": 9} == MiMoConfig.from_preset("far-b-k600").to_dict()
    aligned = VARIANTS["repa-future"].configs("repa-future", model, train)[0]
    assert aligned.to_dict() | {"decoder_layer": 9} == MiMoConfig.from_preset("repa-future-b-k600").to_dict()


def test_operations_are_those_that_benchmarks_count(capsys):
    """A last phase without masks costs as ACDiT's steps do."""
    words = "ablate table-8 --preset mimo-tiny --plan --out unmade --data shapes --variants mimo acdit --seeds 0 1"
    assert main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split("|")[1].strip(): float(line.split("|")[3]) for line in lines[2:4]}
    assert not Path("unmade").exists() and lines[4].startswith("4 cells, ")
    tiny, train = MiMoConfig.from_preset("mimo-tiny"), replace(TrainConfig.from_preset("mimo-tiny"), steps=30)
    phased = replace(train, unmasked_steps=10)
    masked, unmasked = (gflop_until(config, train, 1) for config in (tiny, acdit(tiny)))
    found = of_training(acdit(tiny))
    assert unmasked == pytest.approx(train.batch_size * (found["matmul_gflop"] + found["attention_gflop"]))
    assert gflop_until(tiny, phased, 20) == pytest.approx(20 * masked)
    assert gflop_until(tiny, phased, 25) == pytest.approx(20 * masked + 5 * unmasked)
    assert shown == pytest.approx({"mimo": masked, "acdit": unmasked}, rel=1e-3)
    alternating = gflop_until(replace(tiny, interleaved=True), train, 1)
    assert unmasked / 2 < alternating < masked


BASE = np.random.default_rng(3).normal(size=(3, 40))


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        (1 + 0.1 * BASE, "holds"),
        (-1 + 0.1 * BASE, "does not"),
        (BASE, "undecided"),
        (np.array([[2.0] * 40, [1.9] * 40, [-1.5] * 40]), "undecided"),  # one seed of three against it
        (np.array([[5.0, 5.1, 4.9, 5.0]]), "undecided"),  # one seed says nothing of others
        (np.full((3, 4), 0.0), "undecided"),  # equal
        (np.full((3, 1), 0.5), "holds"),
    ],
)
def test_verdicts(differences, outcome):
    found = verdict(differences)
    assert found.outcome == outcome and found.mean == pytest.approx(differences.mean())
    assert verdict(differences) == found  # the same draws
    assert (found.seeds, found.clips) == differences.shape and str(found).startswith(f"{outcome}: ")
    assert found.seeds_for == (differences.mean(1) > 0).sum()


def test_the_interval_of_one_factor_is_students():
    """Of seeds alone the bootstrap's variance is s^2 / S, and the interval that of a t test with S - 1 degrees."""
    values = np.array([[0.3], [1.1], [0.4], [0.9]])
    half = 3.1824463 * values.std(ddof=1) / 2
    found = verdict(values)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.03)
    assert verdict(values, level=0.5).low > found.low
    for freedom, probability, quantile in [(1, 0.975, 12.7062), (2, 0.975, 4.30265), (10, 0.95, 1.812461)]:
        assert student_quantile(probability, freedom) == pytest.approx(quantile, rel=1e-5)


def test_verdicts_at_equal_steps_and_at_equal_compute():
    """The better one per step needs twice the operations, and is no better for the same."""
    values = {("mimo", "psnr"): np.array([10.0, 20.0]), ("acdit", "psnr"): np.array([10.5, 19.0])}
    values |= {("mimo", "frechet"): np.array([9.0, 5.0]), ("acdit", "frechet"): np.array([9.0, 6.0])}
    noise = 0.01 * BASE[:, None, :4]
    found = Found(
        [0, 1, 2],
        [1, 2],
        {key: each[None, :, None] + (noise if key[0] == "mimo" else 0) for key, each in values.items()},
        {"mimo": np.array([10.0, 20.0]), "acdit": np.array([5.0, 10.0])},
        {},
        {},
    )
    claims = [Claim("mimo", "acdit", "generation", "here"), Claim("mimo", "acdit", "cost", "here")]
    judged = {(each.metric, each.at): each for each in judge(found, claims, 0.95)}
    outcomes = {key: each.verdict.outcome for key, each in judged.items() if each.verdict}
    assert outcomes == {
        ("psnr", "equal steps"): "holds",
        ("psnr", "equal compute"): "does not",  # 10 against 19 dB
        ("frechet", "equal steps"): "holds",
        ("frechet", "equal compute"): "does not",
    }
    assert judged["psnr", "equal compute"].verdict.mean == pytest.approx(-9, abs=0.01)
    assert judged["frechet", "equal steps"].verdict.mean == pytest.approx(1, abs=0.01)  # less is better
    assert not judged["operations", "a step"].holds and "2 of its operations" in judged["operations", "a step"].says
    assert results._at(found.values["acdit", "psnr"], found.gflop["acdit"], 7.5)[0, 0] == pytest.approx(14.75)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["table-99"], "unknown ablation 'table-99': expected one of table-1, "),
        (["--seeds", "0"], "the ablation comes first"),
        (["table-4", "--preset", "huge"], "unknown preset 'huge'"),
        (["table-4", "--data", "shapes", "--variants", "mimo", "other"], "--variants other: expected some of mimo, "),
        (["table-4", "--data", "shapes", "--seeds", "1", "1"], "--seeds 1 1: expected different numbers"),
        (["table-4", "--data", "shapes", "--level", "1.5"], "--level 1.5: expected"),
        (["table-4", "--data", "shapes", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["table-4", "--data", "shapes", "--clips", "1"], "--clips 1: expected at least 2"),
        (["table-4", "--data", "shapes", "--probe-test", "0"], "expected 0 together with"),
        (["table-4", "--data", "shapes", "--steps", "0"], "--steps 0: expected more than zero"),
        (["table-4", "--preset", "mimo-tiny", "--data", "shapes", "--model.frames", "1"], "mask_offsets"),
        (["figure-1", "--preset", "acdit-tiny", "--data", "shapes"], "--model.recipe acdit: expected a base of MiMo"),
        (["table-4", "--data", "shapes", "--measure-batch", "0"], "--measure-batch 0: expected at least 1"),
        (["table-4", "--data", "CLIPS"], "--test-split is missing: expected a subfolder of --data"),
        (["table-1", "--preset", "mimo-tiny", "--data", "shapes", "--steps", "1"], "encoder"),
        (["table-4", "--data", "shapes", "--out", "FULL"], "holds something else than an ablation"),
    ],
)
def test_bad_input_is_one_line(words, complaint, tmp_path, capsys):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "other").write_text("")
    (tmp_path / "CLIPS").mkdir()
    write_video(tmp_path / "CLIPS" / "a.mp4", np.zeros((20, 64, 64, 3), np.uint8), fps=5)
    words = [str(tmp_path / word) if word in ("FULL", "CLIPS") else word for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert main(["ablate", *words, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error
