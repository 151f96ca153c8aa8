"""Only what was written by us is deleted; a link is never followed; whatever else is there stops the cleaning."""

import os

import pytest

from mimo import folders
from mimo.errors import InputError
from mimo.folders import MARKER, NotOurs

KNOWN = ("state.json", "*/shard-*.safetensors")


def make(tmp_path):
    folder = tmp_path / "unfinished"
    folders.claim(folder, KNOWN)
    (folder / "run").mkdir()
    (folder / "state.json").write_text("{}")
    (folder / "run" / "shard-1.safetensors").write_bytes(b"x")
    return folder


def test_a_folder_of_ours_is_deleted_with_all_that_is_known(tmp_path):
    folder = make(tmp_path)
    assert folders.is_ours(folder)
    folders.claim(folder, KNOWN)  # again: it is ours already
    folders.remove(folder, KNOWN)
    assert not folder.exists() and tmp_path.exists()
    folders.remove(folder, KNOWN)  # nothing there is no fault


@pytest.mark.parametrize(
    "stranger",
    ["notes.txt", "run/notes.txt", "run/shard-1.safetensors/x", "deep/run/shard-1.safetensors"],
)
def test_anything_unknown_stops_the_cleaning_and_is_named(tmp_path, stranger):
    folder = make(tmp_path)
    path = folder / stranger
    if path.parent.is_file():  # a folder where a file is expected
        path.parent.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(NotOurs) as caught:
        folders.remove(folder, KNOWN)
    assert sorted(folder.rglob("*")) == before
    assert str(caught.value.path) in str(caught.value) and "\n" not in str(caught.value)
    assert path == caught.value.path or caught.value.path in path.parents


def test_no_link_is_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "shard-1.safetensors").write_bytes(b"x")
    folder = make(tmp_path)
    for name, target in (("other", mine), ("run/shard-2.safetensors", mine / "shard-1.safetensors"), ("run/a", "/")):
        (folder / name).symlink_to(target)
        with pytest.raises(NotOurs, match="is a link"):
            folders.remove(folder, KNOWN)
        (folder / name).unlink()
    os.mkfifo(folder / "run" / "shard-3.safetensors")
    with pytest.raises(NotOurs, match="is no plain file"):
        folders.remove(folder, KNOWN)
    assert (mine / "shard-1.safetensors").exists() and (folder / "run" / "shard-1.safetensors").exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path, dangling):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" if dangling else make(tmp_path))
    for act in (folders.claim, folders.remove, folders.remove_known):
        with pytest.raises(NotOurs, match="link"):
            act(tmp_path / "link", KNOWN)
    assert dangling or (tmp_path / "unfinished" / "state.json").exists()


def test_a_folder_with_other_things_is_not_claimed(tmp_path):
    folder = tmp_path / "unfinished"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt was not written by mimo"):
        folders.claim(folder, KNOWN)
    with pytest.raises(NotOurs, match=f"has no {MARKER}"):
        folders.remove(folder, KNOWN)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_folder_from_before_there_were_markers_is_claimed(tmp_path):
    folder = make(tmp_path)
    (folder / MARKER).unlink()
    folders.claim(folder, KNOWN)
    folders.remove(folder, KNOWN)
    assert not folder.exists()


def test_a_cleaning_that_was_killed_can_be_repeated(tmp_path, monkeypatch):
    folder = make(tmp_path)
    unlink, calls = type(folder).unlink, []

    def once(path, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(path)
        unlink(path, **options)

    monkeypatch.setattr(type(folder), "unlink", once)
    with pytest.raises(KeyboardInterrupt):
        folders.remove(folder, KNOWN)
    monkeypatch.undo()
    assert folders.is_ours(folder)
    folders.remove(folder, KNOWN)
    assert not folder.exists()
