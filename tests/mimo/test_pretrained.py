"""Networks to share: what `mimo export` writes, who reads it, and what is refused."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch

from mimo import MiMo, MiMoConfig, records
from mimo.cli import main
from mimo.errors import InputError
from mimo.training.initial import begin_with

TINY = (
    "--model.depth 1 --model.dim 16 --model.heads 2 --model.decoder-depth 1 --model.decoder-layer 1 --model.frames 3 "
    "--model.height 2 --model.width 2 --model.channels 12 --model.compression 1 2 2 --model.video-frames 3 "
    "--train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 --train.preview-every 0 "
    "--sample.steps 2 --sample.context-frames 1 --sample.num-frames 3"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["--preset", "mimo-tiny", "--data", "shapes", "--out", str(folder), *TINY, "--steps", "2"]
    assert main(["train", *words]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run):
    folder = run.parent / "network"
    assert main(["export", str(run), str(folder)]) == 0
    return folder


def samples(checkpoint: Path, out: Path, *words: str) -> bytes:
    given = ["--frames", "3", "--format", "npz", *words]
    assert main(["sample", "--checkpoint", str(checkpoint), "--out", str(out), *given]) == 0
    return (out / "sample.npz").read_bytes()


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_an_exported_run_samples_what_the_run_samples(run, tmp_path, weights):
    words = ["--weights", weights]
    assert main(["export", str(run), str(tmp_path / "network"), *words]) == 0
    assert {path.name for path in (tmp_path / "network").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    made = samples(tmp_path / "network", tmp_path / "theirs", *words)
    assert made == samples(run, tmp_path / "ours", *words)


def test_networks_are_read_as_they_were_written(tmp_path):
    config = MiMoConfig.from_preset("mimo-tiny")
    model = MiMo(config)
    model.save_pretrained(tmp_path / "a")
    again = MiMo.from_pretrained(tmp_path / "a", backend="reference")
    assert again.config == config and again.backend == "reference" and not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (tmp_path / "a" / "README.md").write_text("my words")
    again.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == "my words"


def test_the_card_says_what_it_is(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mimo\n")
    assert "trained for 2 steps on: " in card and "depth 1, width 16, 2 heads" in card and "weights: ema" in card


def test_a_name_is_asked_of_the_hub_and_a_path_never(exported, tmp_path, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        if name == "some/other":
            raise OSError("404: no\nsuch")
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert MiMo.from_pretrained("some/name", revision="v1").config.depth == 1
    assert asked == [("some/name", "v1", ["config.json", "model.safetensors", "README.md"])]
    with pytest.raises(InputError, match="some/other is no folder here, and the .* hub does not give it: 404: no such"):
        MiMo.from_pretrained("some/other")
    (tmp_path / "runs").mkdir()
    for path in ("runs/network", "./a", "/a/b", "a", "a/b/c", "../a"):
        with pytest.raises(InputError, match="config.json is missing"):
            MiMo.from_pretrained(path)
    assert len(asked) == 2


def change(folder: Path, target: Path, **configs) -> Path:
    """A copy of an exported network, with other configurations under a checksum that fits."""
    target.mkdir()
    for name in ("model.safetensors", "README.md"):
        (target / name).write_bytes((folder / name).read_bytes())
    record = json.loads((folder / "config.json").read_text())
    record["configs"] = {name: value for name, value in (record["configs"] | configs).items() if value is not None}
    (target / "config.json").write_text(records.sealed(record))
    return target


def test_what_is_no_network_is_refused_in_one_line(exported, tmp_path, capsys):
    def refuses(folder, words, sampled=True):
        with pytest.raises(InputError, match=words):
            MiMo.from_pretrained(folder)
        if sampled:
            assert main(["sample", "--checkpoint", str(folder), "--out", str(tmp_path / "out")]) == 2
            captured = capsys.readouterr().err
            assert captured.count("\n") == 1

    refuses(change(exported, tmp_path / "a", model={"depth": "x"}), "does not fit this version")
    refuses(change(exported, tmp_path / "b", model=None), "configs has no model")
    flipped = change(exported, tmp_path / "c")
    data = bytearray((flipped / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (flipped / "model.safetensors").write_bytes(data)
    refuses(flipped, "model.safetensors is damaged: its checksum is")
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        begin_with(MiMo.from_pretrained(exported), flipped)
    edited = change(exported, tmp_path / "d")
    (edited / "config.json").write_text((edited / "config.json").read_text().replace('"depth": 1', '"depth": 2'))
    refuses(edited, "config.json: is damaged: its checksum is")
    config = json.loads((exported / "config.json").read_text())["configs"]["model"]
    refuses(change(exported, tmp_path / "e", model=config | {"depth": 2}), "does not fit the model: .* is missing")
    pickled = change(exported, tmp_path / "f")
    torch.save({}, pickled / "model.safetensors")
    refuses(pickled, "is a pickle")


def test_bad_words_are_one_line(run, exported, tmp_path, capsys):
    MiMo.from_pretrained(exported).save_pretrained(tmp_path / "bare")
    for words, message in (
        (["export", str(run), str(exported)], "holds a network: --overwrite replaces it"),
        (["export", str(tmp_path / "none"), str(tmp_path / "x")], "does not exist"),
        (["sample", "--checkpoint", str(exported), "--weights", "model"], "holds the weights 'ema' alone"),
        (
            ["sample", "--checkpoint", str(tmp_path / "bare")],
            "has no train; expected a folder that `mimo export`",
        ),
    ):
        words = words if words[0] == "export" else [*words, "--out", str(tmp_path / "out")]
        capsys.readouterr()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["export", str(run), str(exported), "--overwrite"]) == 0
