"""JSON as typed records: what fits comes back, what does not is refused with file, place and expectation."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from mimo import records
from mimo.data.errors import DataError
from mimo.errors import InputError


@dataclass
class Shard:
    name: str
    clips: int
    scale: float = 1.0
    label: int | None = None


@dataclass
class Index:
    format: Literal["a-1", "a-2"]
    shards: list[Shard]
    shape: tuple[int, int] = (1, 1)
    interval: int | tuple[int, int] = 1
    entries: dict[str, list[int]] = field(default_factory=dict)
    flip: bool = False
    rest: Any = None


@dataclass
class Entry:
    video_path: str
    label: int = 0
    OTHER_KEYS: ClassVar[bool] = True

    def __post_init__(self):
        if self.label < 0:
            raise ValueError(f"label={self.label}: expected zero or more")


WHOLE = {"format": "a-1", "shards": [{"name": "x", "clips": 3}]}


def read(tmp_path: Path, value: Any, kind=Index, **options):
    file = tmp_path / "index.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return records.read(file, kind, **options)


def test_what_fits_comes_back(tmp_path):
    more = {"shape": [2, 3], "interval": [1, 4], "entries": {"f": [1, 2]}, "flip": True, "rest": {"any": [None]}}
    index = read(tmp_path, WHOLE | more)
    shards = [Shard("x", 3)]
    assert index == Index("a-1", shards, (2, 3), (1, 4), {"f": [1, 2]}, True, {"any": [None]})
    assert read(tmp_path, WHOLE).interval == 1
    assert read(tmp_path, {"video_path": "v", "frames": 7}, Entry) == Entry("v")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "a-3"}, 'format is "a-3", expected "a-1" or "a-2"'),
        ({"shards": None}, "shards is null, expected a list of values"),
        ({"shards": [{"name": "x", "clips": "3"}]}, 'shards[0].clips is "3", expected a whole number'),
        ({"shards": [{"name": "x", "clips": 3.0}]}, "shards[0].clips is 3.0, expected a whole number"),
        ({"shards": [{"name": "x", "clips": True}]}, "shards[0].clips is true, expected a whole number"),
        ({"shards": [{"name": "x", "clips": 2**70}]}, "expected a whole number"),
        ({"shards": [{"name": "x", "clips": 10**3000}]}, "is a number of 3001 digits, expected a whole number"),
        ({"shards": [{"name": "x", "clip": 3}]}, 'shards[0].clips is missing and "clip" is unknown'),
        ({"shards": [{"name": "x", "clips": 3, "lable": 1}]}, 'shards[0]["lable"] is unknown, expected one of name,'),
        ({"shards": [{"name": "x", "clips": 3, "label": "y"}]}, 'label is "y", expected a whole number or null'),
        ({"shards": [{"name": "a\0b", "clips": 3}]}, "expected text"),
        ({"shards": [{"name": "\ud800", "clips": 3}]}, "expected text"),
        ({"shards": [[]]}, "shards[0] is a list of 0, expected an object"),
        ({"shape": [1]}, "shape is a list of 1, expected a list of 2 values"),
        ({"interval": [1, "2"]}, 'interval[1] is "2", expected a whole number'),
        ({"interval": None}, "interval is null, expected a whole number or a list of 2 values"),
        ({"entries": {"f": [1, None]}}, 'entries["f"][1] is null'),
        ({"flip": 1}, "flip is 1, expected true or false"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    with pytest.raises(InputError) as caught:
        read(tmp_path, WHOLE | change)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'index.json'}: ") and words in message
    assert "\n" not in message and len(message) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "nul", "[1, 2", "[]", "3", '{"format": "a-1", "format": "a-2"}', "\ufeff{}"),
        *("[" * 100_000, '{"shards":' * 100_000, "[" * 100_000 + "]" * 100_000, "9" * 5000),
    ],
)
def test_text_that_is_no_such_object_is_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"index\.json: ") as caught:
        read(tmp_path, text, error=DataError)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path):
    (tmp_path / "index.json").write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(InputError, match="not JSON"):
        records.read(tmp_path / "index.json", Index)
    with pytest.raises(InputError, match="No such file"):
        records.read(tmp_path / "nothing.json", Index)
    with pytest.raises(InputError, match="Is a directory"):
        records.read(tmp_path, Index)


def test_what_the_record_itself_refuses_has_its_place(tmp_path):
    with pytest.raises(InputError, match=r"index\.json: \[1\] is refused: label=-1: expected zero or more"):
        read(tmp_path, [{"video_path": "v"}, {"video_path": "w", "label": -1}], list[Entry])


def test_what_is_written_carries_its_checksum(tmp_path):
    file = tmp_path / "index.json"
    records.write(file, WHOLE | {"shape": (2, 3)})
    assert records.read(file, Index, checksum=True) == Index("a-1", [Shard("x", 3)], (2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    file.write_text(json.dumps(json.loads(file.read_text())))  # laid out otherwise, it says the same
    assert records.read(file, Index, checksum=True).shape == (2, 3)
    with pytest.raises(InputError, match="has no sha256_of_the_rest"):
        read(tmp_path, WHOLE, checksum=True)


def test_every_changed_byte_is_refused_or_without_effect(tmp_path):
    file = tmp_path / "index.json"
    records.write(file, WHOLE | {"shape": (2, 3), "entries": {"f": [10, 2]}})
    whole, expected = file.read_bytes(), records.read(file, Index)
    refused = 0
    for place in range(len(whole)):
        for flip in (1, 4, 0x20, 0x80):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                assert records.read(file, Index) == expected
            except InputError as error:
                assert "index.json" in str(error)
                refused += 1
        file.write_bytes(whole[:place])
        with pytest.raises(InputError):
            records.read(file, Index)
    assert refused > 3 * len(whole)


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path):
    file = tmp_path / "index.json"
    records.write(file, WHOLE)
    before = file.read_bytes()
    with pytest.raises(InputError, match="cannot write"):
        records.write(tmp_path / "nowhere" / "index.json", WHOLE)
    with pytest.raises(TypeError):
        records.write(file, {"x": object()})
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("depth", range(200, 1200, 50))
def test_depth_at_the_limit_is_refused_or_read(tmp_path, depth):
    """Reading goes as deep as Python lets it, and so does the checksum, which is taken a few calls further down."""
    nested = "[" * depth + "]" * depth
    with pytest.raises(InputError, match="is damaged"):
        read(tmp_path, f'{{"format": "a-1", "rest": {nested}, "{records.CHECKSUM}": "x"}}')
