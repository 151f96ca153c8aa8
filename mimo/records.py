"""JSON files, read as typed records or refused in one line: the file, the place in it, what is there, what was
expected.

    @dataclass
    class Shard:
        name: str
        clips: int
        label: int | None = None              # a field with a default may be missing

    @dataclass
    class Index:
        format: Literal["mimo-latents-2"]
        shards: list[Shard]

    records.write(folder / "index.json", asdict(index))               # atomic, flushed, with a checksum of itself
    index = records.read(folder / "index.json", Index)                # InputError unless it is one

    index.json: shards[3].clips is "64", expected a whole number

Kinds: dataclasses, list, dict[str, X], tuple, Literal, unions, bool, int (of 64 bits), float, str, None and Any. A
key that a dataclass does not know is refused, as one that was renamed would otherwise take its default; where others
may add keys of their own, the dataclass says `OTHER_KEYS: ClassVar[bool] = True`. What `__post_init__` raises as
ValueError is refused alike.

Written over dataclasses and not with a schema library: it is a page, the configurations are dataclasses already, keys
that stand twice and checksums have to be seen below the schema, and what reads checkpoints asks for no package more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mimo.errors import InputError

T = TypeVar("T")
_ABSENT = object()
CHECKSUM = "sha256_of_the_rest"  # the key under which an object carries its own checksum
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


class _Mismatch(Exception):
    """place: of a value in the file. why: what it is and what was expected."""

    def __init__(self, place: str, why: str):
        self.place, self.why = place, why


def read(file: Path, kind: type[T], *, error: type[InputError] = InputError, checksum: bool = False) -> T:
    """A JSON file as a `kind`. A checksum that it carries is compared, and left out of what is returned.

    Args:
        checksum: it has to carry one.
        error: what is raised.

    Raises: `error` when the file is missing, is no JSON, does not fit its checksum or is not of this kind.
    """
    try:
        data = file.read_bytes()
    except OSError as failure:
        raise error(f"{file}: {failure.strerror}") from None
    return convert(parse(data, file, error=error, checksum=checksum), kind, file, error=error)


def parse(data: bytes, source: Path | str, *, error: type[InputError] = InputError, checksum: bool = False) -> Any:
    """What JSON text in UTF-8 says, its checksum compared and left out. source: named when it is refused."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
        recorded = value.pop(CHECKSUM, _ABSENT) if isinstance(value, dict) else _ABSENT
        found = "" if recorded is _ABSENT else digest(value)
    except RecursionError:
        raise error(f"{source}: is damaged: nested too deeply") from None
    except ValueError as failure:
        raise error(f"{source}: is damaged, not JSON: {' '.join(str(failure).split())[:200]}") from None
    if recorded is not _ABSENT:
        if recorded != found:
            written = recorded[:12] if isinstance(recorded, str) else _shown(recorded)
            raise error(f"{source}: is damaged: its checksum is {found[:12]}..., {written!r} was written")
    elif checksum:
        raise error(f"{source}: is damaged: it has no {CHECKSUM}")
    return value


def convert(value: Any, kind: type[T], source: Path | str, *, error: type[InputError] = InputError) -> T:
    """A value that JSON gave as a `kind`. source: named when it is refused."""
    try:
        return _convert(value, kind, "")
    except _Mismatch as mismatch:
        raise error(f"{source}: {mismatch.place.lstrip('.') or 'it'} {mismatch.why}") from None


def digest(value: dict[str, Any]) -> str:
    """SHA-256 of what an object says, however it is laid out in a file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> str:
    """JSON text of an object with its checksum."""
    rest = json.loads(json.dumps({name: item for name, item in value.items() if name != CHECKSUM}))  # no tuples
    return json.dumps(rest | {CHECKSUM: digest(rest)}, indent=1)


def write(file: Path, value: Mapping[str, Any]) -> None:
    """An object with its checksum into a JSON file: whole or not at all, also when the power fails."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(sealed(value))
        flush(temporary)
        temporary.replace(file)
        flush(file.parent)
    except OSError as failure:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {file}: {failure.strerror}") from None


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _convert(value: Any, kind: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, place)
    if origin is Literal:
        _require(any(value == choice and type(value) is type(choice) for choice in arguments), value, kind, place)
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        return _record(value, kind, place)
    if origin is dict or kind is dict:
        _require(isinstance(value, dict), value, kind, place)
        item = arguments[1] if arguments else Any
        return {name: _convert(inner, item, f"{place}[{_shown(name)}]") for name, inner in value.items()}
    if origin in (list, tuple) or kind in (list, tuple):
        _require(isinstance(value, (list, tuple)), value, kind, place)  # a tuple is of Python, JSON has none
        many = (origin or kind) is list or not arguments or arguments[-1] is Ellipsis
        items = [arguments[0] if arguments else Any] * len(value) if many else arguments
        _require(len(items) == len(value), value, kind, place)
        made = [_convert(inner, item, f"{place}[{n}]") for n, (inner, item) in enumerate(zip(value, items))]
        return made if (origin or kind) is list else tuple(made)
    _require(_is_plain(value, kind), value, kind, place)
    return value


def _is_plain(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    if kind is str and isinstance(value, str):
        try:
            return b"\0" not in os.fsencode(value)  # it may be a path, which is not always UTF-8
        except UnicodeEncodeError:
            return False
    return type(value) is kind


def _one_of(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    deepest = None
    for kind in kinds:
        try:
            return _convert(value, kind, place)
        except _Mismatch as mismatch:  # the one that fits furthest says what is wrong
            if deepest is None or len(mismatch.place) > len(deepest.place):
                deepest = mismatch
    if deepest is not None and deepest.place != place:
        raise deepest
    _require(False, value, Union[kinds], place)  # noqa: UP007 (made from what it holds)


@cache  # a list may hold a million records
def _fields(kind: type) -> tuple[dict[str, Any], dict[str, Field]]:
    return get_type_hints(kind), {field.name: field for field in fields(kind) if field.init}


def _record(value: Any, kind: type, place: str) -> Any:
    _require(isinstance(value, dict), value, kind, place)
    hints, known = _fields(kind)
    unknown = [] if getattr(kind, "OTHER_KEYS", False) else sorted(value.keys() - known.keys())
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            there = f" and {_shown(unknown[0])} is unknown" if unknown else ""
            raise _Mismatch(f"{place}.{name}", f"is missing{there}")
    if unknown:
        raise _Mismatch(f"{place}[{_shown(unknown[0])}]", f"is unknown, expected one of {', '.join(known)}")
    made = {name: _convert(value[name], hints[name], f"{place}.{name}") for name in known if name in value}
    try:
        return kind(**made)
    except ValueError as failure:
        raise _Mismatch(place, f"is refused: {' '.join(str(failure).split())}") from None


def _require(condition: bool, value: Any, kind: Any, place: str) -> None:
    if not condition:
        raise _Mismatch(place, f"is {_shown(value)}, expected {_name(kind)}")


def _name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_name, arguments))
    if origin is Literal:
        return " or ".join(map(_shown, arguments))
    if (origin or kind) in (list, tuple):
        size = f"{len(arguments)} values" if origin is tuple and arguments[-1] is not Ellipsis else "values"
        return f"a list of {size}"
    return _NAMES.get(kind, "an object")


def _shown(value: Any) -> str:
    """A value as JSON would have it, cut to what fits in a line. Containers are not walked: they may be deep."""
    if isinstance(value, (dict, list, tuple)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a number of {math.ceil(value.bit_length() * math.log10(2))} digits"
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
