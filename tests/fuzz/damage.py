"""Damage to files: every class of byte positions once, and at random. Whoever reads a damaged file has to refuse it
in one line that names it, to pass it over for an older one and say so, or to read what was written."""

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

from mimo.errors import InputError

PICKLE = b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07unsafe!\x94."
DEEP = b"[" * 100_000


def every_class(file: Path) -> Iterator[tuple[str, bytes | None]]:
    """One damage (what it is, the file's new bytes or None for no file) per class of positions.

    A class in JSON is a line and a kind of character in it; in safetensors one of the eight bytes of the header's
    length, a byte of the header, and the ends of every tensor; in other files 64 places.
    """
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        places = _safetensors_places(data)
    elif file.suffix in (".json", ".jsonl"):
        places = _text_places(data)
    else:
        places = sorted({len(data) * n // 64 for n in range(64)})
    for place in places:
        bits = 0x20 if _kind(data[place]).startswith("ascii") else 0x01  # another letter or digit, where there is one
        flipped = data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]
        yield f"byte {place} of {len(data)} ^ {bits:#x}", flipped
    for end in sorted({len(data) * n // 16 for n in range(16)} | {1, 7, 8, 9, len(data) - 1}):
        yield f"cut to {end} of {len(data)} bytes", data[:end]
    yield "a byte more", data + b"\0"
    yield "zeros", bytes(len(data))
    yield "a pickle", PICKLE
    yield "nested deeply", DEEP
    yield "a header nested deeply", len(DEEP).to_bytes(8, "little") + DEEP
    yield "gone", None


def _text_places(data: bytes) -> list[int]:
    places, start = [], 0
    for line in data.splitlines(keepends=True):
        kinds = {_kind(byte): start + place for place, byte in enumerate(line)}
        places += sorted(kinds.values())
        start += len(line)
    return places


def _kind(byte: int) -> str:
    for name in ("digits", "ascii_lowercase", "ascii_uppercase", "whitespace"):
        if chr(byte) in getattr(string, name):
            return name
    return chr(byte)


def _safetensors_places(data: bytes) -> list[int]:
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    ends = {begin + end for name, entry in header.items() if name != "__metadata__" for end in entry["data_offsets"]}
    places = {*range(8), *range(8, begin, 9), *ends, *(end - 1 for end in ends)}
    return sorted(place for place in places if place < len(data))


def at_random(data: bytes, others: list[bytes], draw: random.Random) -> tuple[str, bytes | None]:
    """One damage of a kind that disks, interrupted copies and people make. others: what may stand in the file's
    place."""
    kind = draw.choice(["bits", "block", "zeros", "cut", "more", "moved", "other", "key", "noise", "gone"])
    place = draw.randrange(len(data) + 1) if data else 0
    length = draw.choice([1, 2, 16, 512, 4096])
    if kind == "bits":
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 1, 2, 8]) if data else 0):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return kind, bytes(changed)
    if kind in ("block", "zeros"):
        written = draw.randbytes(length) if kind == "block" else bytes(length)
        return f"{kind} of {length} at {place}", (data[:place] + written + data[place + length :])[: len(data)]
    if kind == "cut":
        return f"cut to {place}", data[:place]
    if kind == "more":
        return f"{length} bytes more", data + draw.randbytes(length)
    if kind == "moved":
        return f"{length} bytes gone at {place}", data[:place] + data[place + length :]
    if kind == "other":
        return "another file", draw.choice([*others, PICKLE, DEEP, b"", b"{}", b"[]", b"null"])
    if kind == "key":
        return "a value changed", change_json(data, draw)
    if kind == "noise":
        return "noise", draw.randbytes(length)
    return "gone", None


VALUES = (None, True, 0, -1, 1.5, 2**63, 2**70, "", "x", "../x", "\ud800", [], {}, [[]], {"a": 1}, 10**400)


def change_json(data: bytes, draw: random.Random, *, values: tuple = VALUES) -> bytes:
    """JSON with one value of another type, one key missing or renamed, one list longer or shorter; noise if it is
    none."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return draw.randbytes(100)
    containers = [root] if isinstance(root, (dict, list)) and root else []
    found = []
    while containers:
        container = containers.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        found += [(container, key) for key in keys]
        containers += [container[key] for key in keys if isinstance(container[key], (dict, list))]
    if not found:
        return json.dumps(draw.choice(values)).encode()
    container, key = draw.choice(found)
    action = draw.choice(["value", "value", "missing", "renamed", "twice"])
    if action == "value":
        container[key] = draw.choice(values)
    elif action == "missing":
        del container[key]
    elif action == "renamed" and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
    elif isinstance(container, list):
        container.append(container[key])
    return json.dumps(root).encode()


def put(file: Path, data: bytes | None) -> None:
    """Give a file other bytes, or take it away."""
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)


def require_one_line(error: InputError, *names: str) -> None:
    """The refusal is one line of bearable length and names one of these."""
    words = str(error)
    assert "\n" not in words and len(words) < 2000, words
    assert any(name in words for name in names), f"{words!r} names none of {names}"
