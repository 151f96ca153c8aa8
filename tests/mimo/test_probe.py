"""`mimo probe`: its tables and pictures, that it goes on and repeats itself, and what it refuses."""

import csv
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from mimo.cli import main
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import FACTORS, FactorClips
from mimo.evaluation import history_features, maps, probe
from mimo.evaluation.history_features import Chosen, kept
from mimo.evaluation.probe import best_layers, held_out
from mimo.presets import NETWORK, TRAINING
from mimo.training.trainer import Trainer

SMALL = {"dim": 32, "heads": 2, "depth": 3, "decoder_layer": 2, "height": 2, "width": 2, "frames": 3, "video_frames": 3}
QUICK = ("--train-clips", 24, "--test-clips", 20, "--neighbours", 3, "--epochs", 1, "--seeds", 2, "--projection", "pca")
QUICK = (*QUICK, "--attention-clips", 1, "--batch-size", 12, "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two networks that have not learnt anything yet."""
    folder = tmp_path_factory.mktemp("runs")
    for system in ("mimo", "far"):
        config = MiMoConfig(**NETWORK[f"{system}-tiny"] | SMALL)
        train = TrainConfig(**TRAINING["mimo-tiny"] | {"steps": 1, "preview_every": 0})
        sample = SampleConfig(sampler="euler", steps=2, num_frames=3, context_frames=1)
        clips = FactorClips(num_frames=3, height=16, width=16)
        Trainer(config, train, sample, clips, device=torch.device("cpu")).save(folder / system)
    return folder


def run(capsys, *words) -> str:
    """What a command prints, which has to end well."""
    assert main([str(word) for word in ("probe", *words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    """The one line that it says instead."""
    assert main([str(word) for word in ("probe", *words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def results(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_two_networks_are_measured_twice_alike_and_a_stopped_run_goes_on(runs, tmp_path, capsys, monkeypatch):
    both = "--checkpoint", runs / "mimo", runs / "far", "--data", "factors", *QUICK
    said = run(capsys, *both, "--out", tmp_path / "first")
    found = results(tmp_path / "first")
    rows = json.loads(found["layers.json"])["rows"]
    assert {row["network"] for row in rows} == {"mimo", "far"}
    for network, layers in (("mimo", [1, 2]), ("far", [1, 2, 3])):
        mine = [row for row in rows if row["network"] == network]
        for of in FACTORS:
            probes = [row for row in mine if row["measure"] == "linear probe" and row["of"] == of]
            assert [row["layer"] for row in probes] == layers
            assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in probes)
            assert all((row["n"], row["trained_on"], row["seeds"]) == (20, 24, 2) for row in probes)
        aligned = [row for row in mine if row["measure"] == "CKNNA (paper)"]
        assert [row["layer"] for row in aligned] == layers and all(row["low"] < row["value"] for row in aligned)
    best = json.loads(found["probe.json"])["rows"]
    assert best == best_layers(rows) and len(best) == 2 * (len(FACTORS) + 2)
    assert f"| far | linear probe | {[*FACTORS][0]} |" in said and "compare networks here" in said
    assert {"probe.csv", "probe.md", "linear_probe.png", "cknna.png", "map-mimo.png", "map-far.png"} <= set(found)
    places = [*csv.DictReader((tmp_path / "first" / "map-far.csv").open())]
    assert len(places) == 20 and set(places[0]) == {"clip", "x", "y", *FACTORS}
    with Image.open(tmp_path / "first" / "attention-far-0.png") as sheet:
        assert sheet.width > 3 * 96 and sheet.height > (1 + 3 * 2) * 96  # frames, then layers times heads

    # Stopped after its features were made, with half an answer on disk: it goes on, and the result is the same.
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(probe, "linear_probe", stop)
        assert main([str(word) for word in ("probe", *both, "--out", tmp_path / "second")]) == 130
    answers = sorted((tmp_path / "first" / "cache").glob("*-answers.safetensors"))
    (tmp_path / "second" / "cache" / answers[0].name).write_bytes(answers[0].read_bytes()[:50])
    run(capsys, *both, "--out", tmp_path / "second")
    assert results(tmp_path / "second") == found
    # And a third time nothing is computed.
    with monkeypatch.context() as patch:
        for name in ("pooled_history", "to_float"):
            patch.setattr(history_features, name, stop)
        patch.setattr(probe, "linear_probe", stop)
        words = ("--measures", "probe", "--out", tmp_path / "second")
        run(capsys, *both, *words)


def test_labelled_files_of_which_a_quarter_is_set_aside(runs, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for number in range(10):
            video = np.clip(level + rng.normal(0, 20, (3, 16, 16, 3)), 0, 255).astype(np.uint8)
            np.savez(tmp_path / "clips" / name / f"{number}.npz", video=video)
    (tmp_path / "clips" / "dark" / "9.npz").write_bytes(b"no video")
    words = "--checkpoint", runs / "mimo", "--data", tmp_path / "clips", "--folder-labels", *QUICK
    said = run(capsys, *words, "--out", tmp_path / "out", "--measures", "probe", "--layers", 1, "--epochs", 60)
    (row,) = json.loads((tmp_path / "out" / "layers.json").read_text())["rows"]
    assert row["of"] == "class" and row["classes"] == 2 and row["n"] + row["trained_on"] == 19
    assert "skipped" in said and "9.npz" in said
    assert row["value"] > 0.8, "dark and light are told apart"


def test_clips_without_labels_can_be_compared(runs, tmp_path, capsys):
    words = "--checkpoint", runs / "mimo", "--data", "shapes", *QUICK, "--measures", "cknna", "map"
    run(capsys, *words, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "layers.json").read_text())["rows"]
    assert {row["measure"] for row in rows} == {"CKNNA (paper)", "CKNNA (public)"}
    assert not (tmp_path / "out" / "linear_probe.png").exists() and (tmp_path / "out" / "map-mimo.png").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--layers", 3), "--layers 3: expected some of 1..2, the layers behind which"),
        (("--neighbours", 20), "--neighbours 20: expected more than 20 clips when a tenth of them is left out"),
        (("--test-clips", 3), "--neighbours 3: expected more than 3 clips"),
        (("--data", "shapes"), "ShapesDataset(10000 procedural clips): its clips have no labels"),
        (("--names", "a", "b"), "--names: 2 for 1 checkpoints: expected one for each"),
        (("--seeds", 0), "--seeds 0: expected at least 1"),
        (("--train-clips", 0), "--train-clips 0: expected at least 1"),
        (("--encoder-weights", "folder"), "the encoder 'hog' has no weights"),
        (("--reference", "videomae"), "the encoder 'videomae' needs weights (--encoder-weights)"),
        (("--test-split", "val"), "split='val': expected one of train, test"),
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--measures", "all"), "mimo probe: "),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, capsys, words, expected):
    given = {"--checkpoint": [runs / "mimo"], "--data": ["factors"], "--out": [tmp_path / "out"]}
    options = dict(zip(QUICK[::2], ([value] for value in QUICK[1::2])))
    options |= given | {words[0]: words[1:]}
    assert expected in refused(capsys, *(word for name, values in options.items() for word in (name, *values)))
    assert not (tmp_path / "out" / "probe.json").exists()


def test_two_checkpoints_of_one_name(runs, tmp_path, capsys):
    said = refused(capsys, "--checkpoint", runs / "far", runs / "far", "--data", "factors", "--out", tmp_path / "out")
    assert said == "two checkpoints are called 'far': expected --names that tell them apart"


def test_a_mirrored_clip_has_the_labels_of_what_is_seen():
    clips = FactorClips(num_frames=2, height=16, width=16)
    plain, turned = (Chosen(clips, (0, 1, 2), 0, flip).sample(2) for flip in (False, True))
    assert np.array_equal(turned["video"], plain["video"][:, :, ::-1])
    place = [*FACTORS].index("direction")
    assert turned["labels"][place] == (4 - plain["labels"][place]) % 8


def test_features_are_not_those_of_other_clips_or_of_another_network(runs, tmp_path):
    """What a file is called after changes with what decides its content."""
    clips = FactorClips(num_frames=2, height=16, width=16)
    test = FactorClips(num_frames=2, height=16, width=16, split="test")
    several = [Chosen(clips, (0, 1), 0), Chosen(clips, (0, 2), 0), Chosen(clips, (0, 1), 1), Chosen(test, (0, 1), 0)]
    several.append(Chosen(clips, (0, 1), 0, mirrored=True))
    described = [json.dumps(chosen.described) for chosen in several]
    assert len(set(described)) == 5 and json.dumps(Chosen(clips, (0, 1), 0).described) == described[0]
    made = []

    def make():
        made.append(1)
        return {"x": torch.ones(2)}

    for key in ("a", "a", "b", "a"):
        assert torch.equal(kept(tmp_path / "file.safetensors", key, make)["x"], torch.ones(2))
    assert len(made) == 3, "of another key nothing is taken"


def test_a_quarter_is_set_aside():
    clips = FactorClips(num_frames=2, height=16, width=16, length=40)
    train, test = held_out(clips, seed=0)
    assert len(test) == 10 and sorted(train + test) == [*range(40)] and test == sorted(test)
    assert held_out(clips, seed=0) == (train, test) != held_out(clips, seed=1)


def test_the_map_of_pca_has_the_greatest_variances(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 9, 1, 4, 1, 1.0]) + 3
    places = maps.project(x, "pca", 0)
    values, vectors = torch.linalg.eigh(x.T.cov())
    for column, vector in ((0, vectors[:, -1]), (1, vectors[:, -2])):
        expected = (x - x.mean(0)) @ vector
        assert torch.allclose(places[:, column].abs(), expected.abs())
    monkeypatch.setattr(maps, "find_spec", lambda name: None)
    assert maps.default_projection() == "pca"
    with pytest.raises(ValueError, match=r"umap-learn is not installed: pip install 'mimo-kernels\[umap\]'$"):
        maps.project(x, "umap", 0)
    with pytest.raises(ValueError, match="^a map of 2 clips: expected at least 3$"):
        maps.project(x[:2], "pca", 0)


@pytest.mark.skipif(find_spec("umap") is None, reason="needs umap-learn")
def test_the_map_of_umap_keeps_groups_apart_and_repeats_itself():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator)
    x[:30, 0] += 40
    places = maps.project(x, "umap", 0)
    assert torch.equal(places, maps.project(x, "umap", 0))
    centres = places[:30].mean(0), places[30:].mean(0)
    spread = (places[:30] - centres[0]).norm(dim=1).max()
    assert (centres[0] - centres[1]).norm() > spread
