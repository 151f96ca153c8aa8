"""What a checkpoint of a training run says: typed, or refused by every command that reads it, in one line."""

import json
import shutil
from pathlib import Path

import pytest

from mimo import records
from mimo.cli import main
from mimo.errors import InputError
from mimo.run_state import read_run_state

OLD = Path(__file__).parent / "format_2" / "checkpoints" / "step_00000003"


def changed(tmp_path: Path, *keys: str, value: object) -> Path:
    """A checkpoint with one value of its state changed, or taken away, and a checksum that fits."""
    folder = Path(shutil.copytree(OLD, tmp_path / "run" / "checkpoints" / OLD.name))
    state = inner = json.loads((folder / "state.json").read_text())
    for key in keys[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    (folder / "state.json").write_text(records.sealed(state))
    return folder


CASES = [
    (["configs"], [], "configs is a list of 0, expected an object"),
    (["configs"], KeyError, "configs is missing"),
    (["ema_updates"], "3", 'ema_updates is "3", expected a whole number'),
    (["configs", "model"], KeyError, "configs.model is missing"),
    (["configs", "model", "depth"], "1", 'depth is "1", expected a whole number'),
    (["configs", "model", "depth"], 10**400, "depth is a number of 401 digits, expected a whole number"),
    (["configs", "model", "mask_offsets"], [[0]], "mask_offsets[0] is a list of 1, expected a whole number"),
    (["configs", "model", "compression"], [1, "8", 8], 'compression[1] is "8", expected a whole number'),
    (["configs", "model", "heads"], 3, "heads=3"),
    (["configs", "model", "dept"], 1, '["dept"] is unknown, expected one of recipe, depth'),
    (["configs", "train", "betas"], 0.9, "betas is 0.9, expected a list of 2 values"),
    (["configs", "train", "interval"], {}, "interval is an object of 0, expected a whole number or a list of 2 values"),
    (["configs", "sample", "window"], "all", 'window is "all", expected a whole number or null'),
    (["configs", "tokenizer"], "dct", 'configs.tokenizer is "dct", expected an object'),
    (["configs", "tokenizer", "weights"], 3, "configs.tokenizer.weights is 3, expected text or null"),
    (["configs", "told"], {"data": ["shapes"]}, 'configs.told["data"] is a list of 1, expected'),
]


@pytest.mark.parametrize(("keys", "value", "words"), CASES)
def test_what_does_not_fit_is_named(tmp_path, keys, value, words):
    folder = changed(tmp_path, *keys, value=value)
    with pytest.raises(InputError) as caught:
        read_run_state(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("keys", "value", "words"), CASES[::5])
def test_commands_refuse_it_in_one_line(tmp_path, capsys, keys, value, words):
    run = changed(tmp_path, *keys, value=value).parent.parent
    for command in (["train", "--out", run, "--resume"], ["sample", "--checkpoint", run, "--out", tmp_path / "out"]):
        assert main([str(word) for word in command]) == 2
        err = capsys.readouterr().err.splitlines()
        assert words in err[-1] and err[-1].startswith("error: ")


def test_a_tokenizer_without_weights_is_none_that_has_some(tmp_path, capsys):
    run = changed(tmp_path, "configs", "tokenizer", "weights", value=KeyError).parent.parent
    assert main(["train", "--out", str(run), "--resume", "--data", "shapes", "--steps", "3", "--device", "cpu"]) == 0
    assert "nothing to do: step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"layout": 5}, "the layout that it was told: it is 5, expected text or null"),
        ({"annotation": True}, "the annotation that it was told: it is true, expected text or null"),
        ({"keep_every": "x"}, 'the keep_every that it was told: it is "x", expected a whole number or null'),
        ({"device": "tpu"}, 'the device that it was told: it is "tpu", expected "auto" or "cpu" or "cuda"'),
    ],
)
def test_what_a_run_was_told_has_types(tmp_path, capsys, told, words):
    run = changed(tmp_path, "configs", "told", value={"preset": "mimo-tiny", "data": "shapes"} | told).parent.parent
    assert main(["train", "--out", str(run), "--resume"]) == 2
    assert words in capsys.readouterr().err


def test_a_network_that_does_not_fit_its_tokenizer_is_refused(tmp_path, capsys):
    run = changed(tmp_path, "configs", "model", "video_frames", value=17).parent.parent
    assert main(["sample", "--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "frames=8: expected 17" in err[-1] and str(run) in err[-1]
