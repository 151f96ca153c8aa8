"""Checkpoints: round trip, atomic, selective, and every kind of damage named."""

import hashlib
import json
import pickle
import resource

import pytest
import torch
from torch import nn

from mimo import checkpoint, records
from mimo.errors import InputError

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def save(run, step, *, value=0.0, **options):
    tensors = {"model": {"weight": torch.full((4, 3), value), "bias": torch.arange(4.0)}}
    return checkpoint.save(run, step, tensors, {"config": {"model": {"depth": 2}}}, **options)


def test_tensors_and_state_come_back_unchanged(tmp_path):
    folder = save(tmp_path, 7, value=0.1)
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    state = checkpoint.read_state(folder)
    assert state["step"] == 7 and state["config"] == {"model": {"depth": 2}}
    tensors = checkpoint.read_tensors(folder, "model", state)
    assert torch.equal(tensors["weight"], torch.full((4, 3), 0.1)) and torch.equal(tensors["bias"], torch.arange(4.0))
    assert [path.name for path in folder.parent.iterdir()] == ["step_00000007"]


def test_optimizer_state_round_trip_continues_identically(tmp_path):
    def make():
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def step(module, optimizer, seed):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    straight, straight_optimizer = make()
    for seed in range(4):
        step(straight, straight_optimizer, seed)

    first, first_optimizer = make()
    for seed in range(2):
        step(first, first_optimizer, seed)
    tensors = {"model": first.state_dict(), "optimizer": checkpoint.optimizer_tensors(first_optimizer, first)}
    folder = checkpoint.save(tmp_path, 2, tensors, {})
    state = checkpoint.read_state(folder)
    second, second_optimizer = make()
    checkpoint.load_module(second, checkpoint.read_tensors(folder, "model", state), folder)
    loaded = checkpoint.read_tensors(folder, "optimizer", state)
    checkpoint.load_optimizer(second_optimizer, second, loaded, folder)
    for seed in range(2, 4):
        step(second, second_optimizer, seed)
    assert torch.equal(straight.weight, second.weight) and torch.equal(straight.bias, second.bias)


def test_keeps_the_newest_and_every_mth(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert [folder.name[-1] for folder in checkpoint.step_folders(tmp_path)] == ["3", "6", "7", "8"]
    assert checkpoint.delete_unfinished(tmp_path) == []


def test_unfinished_folder_is_ignored_and_deleted(tmp_path):
    whole = save(tmp_path, 1)
    leftover = whole.parent / ".unfinished-step_00000002"
    (leftover / "model").mkdir(parents=True)
    (leftover / "model" / SHARD).write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == (whole, [])
    assert checkpoint.find(tmp_path) == (whole, [])
    assert checkpoint.delete_unfinished(tmp_path) == [leftover]
    assert not leftover.exists() and whole.exists()


def test_damaged_newest_is_passed_over_with_its_reason(tmp_path):
    whole, newest = save(tmp_path, 1), save(tmp_path, 2)
    file = newest / "model" / SHARD
    file.write_bytes(file.read_bytes()[:-5])
    folder, reasons = checkpoint.latest(tmp_path)
    assert folder == whole
    assert len(reasons) == 1 and "truncated" in reasons[0] and "step_00000002" in reasons[0]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    folder = save(tmp_path, 1, value=1.0)
    (folder / "state.json").unlink()
    assert checkpoint.latest(tmp_path)[0] is None
    assert save(tmp_path, 1, value=2.0) == folder
    tensors = checkpoint.read_tensors(folder, "model", checkpoint.read_state(folder))
    assert tensors["weight"][0, 0] == 2.0


@pytest.mark.parametrize("limit", [200, 1000])
def test_a_file_system_that_refuses_is_named_and_the_checkpoint_before_stays(tmp_path, limit):
    """Files may grow to `limit` bytes: in the first case the tensors do not fit, in the second state.json does not."""
    whole, state = save(tmp_path, 1), {"config": "x" * 2000}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError, match="step_00000002 cannot be written: File too large"):
            checkpoint.save(tmp_path, 2, {"model": {"weight": torch.zeros(4, 3)}}, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.latest(tmp_path) == (whole, [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [whole.name], "nothing takes room"
    assert checkpoint.delete_unfinished(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_checkpoint(tmp_path, value):
    whole = save(tmp_path, 1)
    tensors = {"model": {"weight": torch.ones(3)}, "ema": {"weight": torch.tensor([1.0, value, 1.0])}}
    with pytest.raises(InputError, match="step_00000002 is not written: ema weight is not finite"):
        checkpoint.save(tmp_path, 2, tensors, {})
    assert checkpoint.latest(tmp_path) == (whole, []) and not (tmp_path / "checkpoints" / "step_00000002").exists()


def test_checkpoints_of_later_steps_make_way(tmp_path):
    """They are another run's, or damaged: the newest is that of the run that saves."""
    for step in (3, 5, 7):
        save(tmp_path, step)
    for step in (4, 6, 4):
        assert save(tmp_path, step, keep_last=1) == checkpoint.latest(tmp_path)[0]
        assert [checkpoint.read_state(folder)["step"] for folder in checkpoint.step_folders(tmp_path)] == [step]
    names = ["superseded-step_00000005", "superseded-step_00000006", "superseded-step_00000007", "step_00000004"]
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == set(names)
    for folder in names[:3]:  # nothing of another run is lost
        assert checkpoint.read_state(tmp_path / "checkpoints" / folder)["step"] == int(folder[-1])
    save(tmp_path, 5)
    save(tmp_path, 4)
    assert (tmp_path / "checkpoints" / "superseded-step_00000005-2").is_dir()


def tell(folder, **changes):
    """Change state.json with a checksum that fits."""
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(records.sealed(state | changes))


def make_old(folder):
    """state.json as it was before it had a checksum."""
    state = json.loads((folder / "state.json").read_text())
    del state[records.CHECKSUM]
    (folder / "state.json").write_text(json.dumps(state | {"format": 2}))


def flip(file, place=-1):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def damage_missing_state(folder):
    (folder / "state.json").unlink()


def damage_broken_state(folder):
    (folder / "state.json").write_text('{"format": 1, "st')


def damage_missing_file(folder):
    (folder / "model" / SHARD).unlink()


def damage_short_data(folder):
    file = folder / "model" / SHARD
    file.write_bytes(file.read_bytes()[:-1])


def damage_short_header(folder):
    file = folder / "model" / SHARD
    file.write_bytes(file.read_bytes()[:20])


def damage_empty(folder):
    (folder / "model" / SHARD).write_bytes(b"")


def damage_text(folder):
    (folder / "model" / SHARD).write_bytes(b"not tensors at all, just a text file")


def damage_format(folder):
    tell(folder, format=99)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_missing_state, "state.json is missing"),
        (damage_broken_state, "state.json: is damaged, not JSON"),
        (damage_missing_file, "is missing"),
        (damage_short_data, "is truncated"),
        (damage_short_header, "is truncated: 20 bytes, its header alone takes"),
        (damage_empty, "is truncated: 0 bytes, its header alone takes 8 or more"),
        (damage_text, "not a safetensors file"),
        (damage_format, "format 99; this version reads format 3, and 2"),
    ],
)
def test_each_damage_has_its_own_message(tmp_path, damage, words):
    folder = save(tmp_path, 1)
    damage(folder)
    for path in (folder, tmp_path):
        with pytest.raises(InputError, match=words) as caught:
            checkpoint.find(path)
        assert "\n" not in str(caught.value) and "step_00000001" in str(caught.value)


class Bomb:
    """Unpickling this creates a file: the proof that a pickle was loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("how", ["torch", "torch-legacy", "pickle"])
def test_a_pickle_is_named_and_never_loaded(tmp_path, how):
    folder = save(tmp_path, 1)
    file, trap = folder / "model" / SHARD, tmp_path / "trap"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Bomb(str(trap))))
    else:
        torch.save({"weight": Bomb(str(trap))}, file, _use_new_zipfile_serialization=how == "torch")
    for path in (folder, tmp_path, file):
        with pytest.raises(InputError, match="is a pickle"):
            checkpoint.find(path)
    assert not trap.exists()


def test_flipped_bits_are_found_by_the_checksum(tmp_path):
    folder = save(tmp_path, 1)
    flip(folder / "model" / SHARD)
    with pytest.raises(InputError, match="checksum of model/shard-00001"):
        checkpoint.read_tensors(folder, "model", checkpoint.read_state(folder))
    with pytest.raises(InputError, match="has no whole checkpoint: .*checksum of model/shard-00001"):
        checkpoint.find(tmp_path)


def test_a_flipped_bit_falls_back_as_a_cut_does(tmp_path):
    whole, newest = save(tmp_path, 1), save(tmp_path, 2)
    flip(newest / "model" / SHARD)
    for found in (checkpoint.latest, checkpoint.find):
        folder, reasons = found(tmp_path)
        assert folder == whole
        assert len(reasons) == 1 and "checksum of model/shard" in reasons[0] and "step_00000002" in reasons[0]
    assert checkpoint.find(tmp_path, parts=["ema"]) == (newest, [])  # what is not read is not compared
    with pytest.raises(InputError, match=f"is damaged: .*; {tmp_path} in its place takes the newest whole one"):
        checkpoint.find(newest)


def test_a_state_of_another_step_than_its_folder_is_refused(tmp_path):
    whole = save(tmp_path, 1)
    moved = whole.rename(whole.with_name("step_00000002"))
    with pytest.raises(InputError, match="is of step 1, expected that of the folder's name"):
        checkpoint.find(moved)
    assert checkpoint.latest(tmp_path)[0] is None
    make_old(moved)
    with pytest.raises(InputError, match="is of step 1, expected that of the folder's name"):
        checkpoint.find(moved)
    best = moved.rename(tmp_path / "best")  # a name that says nothing of a step
    tell(best, format=3)
    assert checkpoint.find(best) == (best, [])


def test_every_changed_byte_of_a_state_is_refused_or_without_effect(tmp_path):
    folder = save(tmp_path, 1)
    file, expected = folder / "state.json", checkpoint.read_state(folder)
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bits in (1, 0x20):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
            try:
                assert checkpoint.read_state(folder) == expected
            except InputError as error:
                assert "step_00000001" in str(error) and "\n" not in str(error)


def test_a_state_without_checksum_is_of_an_old_version_or_refused(tmp_path, caplog):
    folder = save(tmp_path, 1)
    make_old(folder)
    assert checkpoint.find(tmp_path) == (folder, [])
    assert [record.message.partition(": ")[2] for record in caplog.records if record.name == "mimo.checkpoint"] == [
        "state.json has no checksum, as an older version wrote it: it is believed as it is"
    ]
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 3}))
    with pytest.raises(InputError, match="has no sha256_of_the_rest"):
        checkpoint.find(folder)


def test_only_files_that_the_state_lists_are_loaded(tmp_path):
    folder, other = save(tmp_path / "a", 1, value=1.0), save(tmp_path / "b", 1, value=2.0)
    for name in ("zzz.safetensors", "shard-00009-model-00001-of-00001.safetensors"):
        (folder / "model" / name).write_bytes((other / "model" / SHARD).read_bytes())
    assert checkpoint.read_tensors(folder, "model", checkpoint.read_state(folder))["weight"][0, 0] == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": {"../other/shard-1.safetensors": {"bytes": 1, "sha256": ""}}}, "expected PART/shard-"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "expected PART/shard-"),
        ({"files": []}, "files is a list of 0, expected an object"),
        ({"files": {"model/x": 3}}, r'files\["model/x"\] is 3, expected an object'),
        ({"step": "1"}, 'step is "1", expected a whole number'),
        ({"step": 2**70}, "expected a whole number"),
        ({"format": "3"}, 'format is "3", expected 2 or 3'),
        ({"format": True}, "format is true, expected 2 or 3"),
    ],
)
def test_a_state_with_other_types_is_refused(tmp_path, changes, words):
    folder = save(tmp_path, 1)
    tell(folder, **changes)
    with pytest.raises(InputError, match=words) as caught:
        checkpoint.find(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, '{"a":' * 100_000, "\0" * 50])
def test_a_state_that_is_no_object_is_refused(tmp_path, text):
    folder = save(tmp_path, 1)
    (folder / "state.json").write_text(text)
    with pytest.raises(InputError, match="state.json") as caught:
        checkpoint.find(folder)
    assert "\n" not in str(caught.value)


def test_tensors_that_torch_cannot_make_are_refused(tmp_path):
    """A file that is not what torch writes, under a state that has its checksum."""
    folder = save(tmp_path, 1)
    file = folder / "model" / SHARD
    header = b'{"__metadata__":{"DCP_SHARDING_INFO":"{}"},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    size, sha256 = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
    tell(folder, files={f"model/{SHARD}": {"bytes": size, "sha256": sha256}})
    with pytest.raises(InputError, match="model cannot be read as tensors: KeyError"):
        checkpoint.read_tensors(folder, "model", checkpoint.read_state(folder))
    header = b"[" * 100_000
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="not a safetensors file"):
        checkpoint.find(folder)


def test_old_checkpoints_with_a_stranger_in_them_are_kept_and_named(tmp_path, caplog):
    first = save(tmp_path, 1)
    (first / "notes.txt").write_text("the good one")
    for step in (2, 3):
        save(tmp_path, step, keep_last=1)
    assert [folder.name[-1] for folder in checkpoint.step_folders(tmp_path)] == ["1", "3"]
    assert f"{first / 'notes.txt'} was not written by mimo" in caplog.text
    assert checkpoint.read_state(first)["step"] == 1


def test_leftovers_with_a_stranger_in_them_are_kept_and_do_not_stop_a_save(tmp_path, caplog):
    leftover = tmp_path / "checkpoints" / ".unfinished-step_00000001"
    leftover.mkdir(parents=True)
    (leftover / "thesis.txt").write_text("mine")
    linked = tmp_path / "checkpoints" / ".unfinished-step_00000002"
    linked.symlink_to(tmp_path / "elsewhere")
    assert checkpoint.delete_unfinished(tmp_path) == []
    assert "thesis.txt was not written by mimo" in caplog.text and "is a link" in caplog.text
    for step in (1, 2):
        assert checkpoint.find(save(tmp_path, step))
    assert (leftover / "thesis.txt").read_text() == "mine" and linked.is_symlink()


def test_a_damaged_checkpoint_with_a_stranger_in_it_makes_way(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "state.json").unlink()
    (folder / "thesis.txt").write_text("mine")
    assert checkpoint.find(save(tmp_path, 1)) == (folder, [])
    aside = folder.with_name(".unfinished-before-step_00000001")
    assert (aside / "thesis.txt").read_text() == "mine" and checkpoint.delete_unfinished(tmp_path) == []


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)
    folder = save(tmp_path, 1)
    with pytest.raises(InputError, match="is a file"):
        checkpoint.find(folder / "model" / SHARD)


def test_tensors_that_do_not_fit_the_model_are_named(tmp_path):
    module = nn.Linear(3, 4)
    good = {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}
    with pytest.raises(InputError, match="bias is missing"):
        checkpoint.load_module(module, {"weight": good["weight"]}, tmp_path)
    with pytest.raises(InputError, match="gain is unknown"):
        checkpoint.load_module(module, good | {"gain": torch.zeros(1)}, tmp_path)
    with pytest.raises(InputError, match=r"weight has shape \[3, 4\], expected \[4, 3\]"):
        checkpoint.load_module(module, good | {"weight": torch.zeros(3, 4)}, tmp_path)
    optimizer = torch.optim.AdamW(module.parameters())
    with pytest.raises(InputError, match=r"weight:exp_avg has shape \[2\], expected \[4, 3\]"):
        checkpoint.load_optimizer(optimizer, module, {"weight:exp_avg": torch.zeros(2)}, tmp_path)


def test_differing_config_fields_are_named_with_both_values(tmp_path):
    saved = {"model": {"depth": 2, "ratio": [0.25, 0.5]}, "train": {"lr": 0.1, "steps": 10}}
    same = {"model": {"depth": 2, "ratio": (0.25, 0.5)}, "train": {"lr": 0.1, "steps": 20}}
    checkpoint.require_same_config(saved, same, tmp_path, may_differ=frozenset({"train.steps"}))
    other = {"model": {"depth": 3, "ratio": (0.25, 0.5), "new": True}, "train": {"lr": 0.1, "steps": 10}}
    with pytest.raises(InputError) as caught:
        checkpoint.require_same_config(saved, other, tmp_path)
    message = str(caught.value)
    assert "model.depth is 2 there and 3 here" in message and "model.new is absent there and True here" in message
    assert "train." not in message and "model.ratio" not in message
