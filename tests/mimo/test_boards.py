"""--log wandb, with a package that plays wandb's part and, where it is installed, with wandb itself, offline."""

import importlib
import json
import sys

import pytest
import torch

from mimo.cli import main
from mimo.errors import InputError
from mimo.training import boards
from mimo.training.log import RunLog, read_log

STAND_IN = """
calls, unreachable, broken = [], False, set()
class Settings:
    finish_timeout = 0
    def __init__(self, **options): vars(self).update(options)
class Run:
    url = None
    def __init__(self): self.step = 0
    def log(self, values, step):
        if "log" in broken: raise ConnectionError("the pipe is gone")
        assert step >= self.step
        self.step = step
        calls.append(("log", step, values))
    def finish(self):
        if "finish" in broken: raise TimeoutError
        calls.append(("finish",))
def init(**told):
    calls.append(("init", told))
    if unreachable and told.get("mode") != unreachable: raise RuntimeError("no route to wandb\\nwhile retrying")
    return Run()
"""
TINY = (
    "--model.depth 1 --model.dim 16 --model.heads 2 --model.height 2 --model.width 2 --model.frames 3"
    " --model.video-frames 3 --model.decoder-layer 1 --model.channels 4 --train.batch-size 2 --train.workers 0"
    " --train.log-every 1 --train.preview-every 0"
).split()


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb")
    sys.modules.pop("wandb", None)


def train(out, *more):
    words = ["train", "--preset", "mimo-tiny", "--data", "shapes", "--out", out, *TINY, *more]
    return main([str(word) for word in words])


def test_a_run_is_logged_and_goes_on_in_the_same_one(wandb, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--log", "wandb", "--steps", 2) == 0
    (_, told), *logged = wandb.calls
    assert told["dir"] == str(run) and told["name"] == "run" and "mode" not in told
    assert told["config"]["model"]["depth"] == 1 and told["config"]["train"]["steps"] == 2
    assert (told["settings"].console, told["settings"].finish_timeout) == ("off", boards.PATIENCE)
    rows = [{name: value for name, value in row.items() if name != "step"} for row in read_log(run)]
    assert logged == [("log", 1, rows[0]), ("log", 2, rows[1]), ("finish",)]
    assert list((run / "tensorboard").glob("events.*"))

    wandb.calls.clear()
    assert main(["train", "--out", str(run), "--resume", "--steps", "3"]) == 0  # as it was told
    (_, again), *logged = wandb.calls
    assert again["id"] == told["id"] and again["resume"] == "allow"
    assert [call[:2] for call in logged] == [("log", 3), ("finish",)]
    wandb.calls.clear()
    assert main(["train", "--out", str(run), "--resume", "--steps", "4", "--log", "tensorboard"]) == 0
    assert not wandb.calls and "log wandb -> tensorboard: no step is made otherwise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("unreachable", "broken", "says", "kept"),
    [
        ("offline", set(), "no route to wandb; the records stay in", ["init", "init", "log", "log", "finish"]),
        ("nowhere", set(), "no route to wandb; nothing more of this run is logged there", ["init", "init"]),
        (False, {"log"}, "the pipe is gone; nothing more of this run is logged there", ["init"]),
        (False, {"finish"}, "TimeoutError; nothing more of this run is logged there", ["init", "log", "log"]),
    ],
)
def test_what_fails_there_stops_no_run(wandb, tmp_path, capsys, unreachable, broken, says, kept):
    wandb.unreachable, wandb.broken = unreachable, broken
    with RunLog(tmp_path, 2, start=0, device=torch.device("cpu"), wandb={}) as log:
        for step in (1, 2):
            log.write(step, {"diffusion": 1.0, "mask": 0.0, "grad_norm": 1.0, "skipped": 0}, 10, 0.1, 0.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wandb: ")]
    assert says in lines[-1] and len(lines) == (2 if unreachable == "nowhere" else 1)
    assert [call[0] for call in wandb.calls] == kept
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]


def test_steps_that_are_there_are_not_logged_again(wandb, tmp_path):
    board = boards.WandbRun(tmp_path, {}, print)
    board._run.step = 5  # what a resumed run of wandb says
    for step in (4, 5, 6):
        board.write(step, {"step": step, "diffusion": 1.0})
    assert wandb.calls[1:] == [("log", 5, {"diffusion": 1.0}), ("log", 6, {"diffusion": 1.0})]


def test_a_damaged_memory_begins_another_run(wandb, tmp_path):
    said = []
    boards.WandbRun(tmp_path, {}, said.append)
    (tmp_path / "wandb.json").write_text("{")
    boards.WandbRun(tmp_path, {}, said.append)
    ids = [call[1]["id"] for call in wandb.calls]
    assert ids[0] != ids[1] and len(said) == 1 and "wandb.json" in said[0]
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == ids[1]


def test_without_the_package_it_is_said_before_anything_is_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb").mkdir()  # the files of another run, which are no package
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)])
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="^--log wandb needs the package wandb: pip install wandb$"):
        boards.require_wandb()
    monkeypatch.setattr(boards, "find_spec", lambda name: None)
    assert train(tmp_path / "run", "--log", "wandb") == 2
    assert capsys.readouterr().err == "error: --log wandb needs the package wandb: pip install wandb\n"
    assert not (tmp_path / "run").exists()


def test_wandb_itself_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    assert train(run, "--log", "wandb", "--steps", 2) == 0
    assert main(["train", "--out", str(run), "--resume", "--steps", "3"]) == 0
    known = json.loads((run / "wandb.json").read_text())["id"]
    files = list((run / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(files) == 2 and all(file.stat().st_size for file in files)
