"""From the words of a command line to a command: tyro's parser, its complaints in one line, and presets as defaults."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import tyro

from mimo.config import PRESETS
from mimo.errors import InputError

HELP = ("-h", "--help")


def read_command(command: type, name: str, arguments: Sequence[str]) -> Any:
    """The options of `mimo NAME`. A command whose defaults depend on its words has `defaults`, which gives them.

    Raises InputError, in one line, for what cannot be read.
    """
    default = command.defaults(list(arguments)) if hasattr(command, "defaults") else None
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(command, prog=f"mimo {name}", args=arguments, default=default)
    except InputError:
        raise
    except ValueError as error:  # of a record whose fields are options: "workers=-1: expected ..."
        field, equals, rest = str(error).partition("=")
        raise InputError(f"--{field.replace('_', '-')} {rest}" if equals else str(error)) from None
    except SystemExit as stop:
        if stop.code == 2:
            raise InputError(f"mimo {name}: {one_line(complaint.getvalue())}") from None
        raise


def given(option: str, arguments: Sequence[str]) -> str | None:
    """The value of --option among the words, as far as it can be told before they are parsed; None without."""
    for number, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key == f"--{option}":
            return value if equals else next(iter(arguments[number + 1 :]), "")
    return None


def find_preset(command: str, arguments: Sequence[str]) -> str:
    """The preset is needed before the other options are read, because it gives their defaults. --help does without."""
    name = given("preset", arguments)
    if name is None and set(HELP) & set(arguments):
        return "mimo-tiny"
    if name is None:
        raise InputError(f"mimo {command}: --preset is missing: expected one of {', '.join(PRESETS)}")
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return name


def one_line(box: str) -> str:
    """The parser's framed, several-line complaint as one line, without help texts."""
    sections: list[list[str]] = [[]]
    for line in (line.strip("│ ") for line in box.splitlines()):
        if line[:1] in ("╭", "╰", "─") or (line and not line.strip("-")):
            sections.append([])
        elif line:
            sections[-1].append(line)
    if "╭" not in box:  # a terminal without such characters: rules of dashes, and the title stands above the first
        del sections[0]
    wanted = [" ".join(lines) for lines in sections if lines and "helptext" not in lines[0]]
    # "Error parsing --steps: no type matching {None}|INT could be instantiated from ['abc']. Got errors: ..."
    refused = r"Error parsing (\S+): no type matching (.+) could be instantiated from \[(.*?)\]\. .*"
    named = re.sub(r"Error parsing (model|train|sample): ", r"--\1.", "; ".join(wanted))
    return re.sub(refused, lambda m: f"{m[1]} {m[3]}: expected {metavar(m[2])}", named)


def metavar(kind: str) -> str:
    """The parser's name of a type in words: "{None}|INT|{INT INT}" -> "INT or INT INT"."""
    return re.sub(r"[{}]", "", kind.removeprefix("{None}|").replace("|", " or "))
