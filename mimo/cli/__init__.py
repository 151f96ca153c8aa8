"""The command line: `mimo COMMAND ...` or `python -m mimo COMMAND ...`; a file per command beside this one.

Exit status 0 done, 2 bad input (one line on stderr, no traceback), 1 a fault of ours (traceback), 130 interrupted.
Everything heavy is imported by the command that needs it, so that --help answers at once.
"""

import errno
import logging
import os
import sys
from collections.abc import Iterable, Sequence

from mimo.cli.ablate import Ablate
from mimo.cli.data import DataCheck
from mimo.cli.demo import Demo
from mimo.cli.encode import Encode
from mimo.cli.eval import Eval
from mimo.cli.export import Export
from mimo.cli.output import Streams, surviving_streams
from mimo.cli.parser import HELP, read_command
from mimo.cli.probe import Probe
from mimo.cli.sample import Sample
from mimo.cli.train import Train
from mimo.cli.train_tokenizer import TrainTokenizer
from mimo.config import PRESETS
from mimo.errors import InputError, let_others_speak, tell_launcher

COMMANDS: dict[str, type] = {
    "demo": Demo,
    "train": Train,
    "sample": Sample,
    "ablate": Ablate,
    "probe": Probe,
    "export": Export,
    "eval": Eval,
    "encode": Encode,
    "data check": DataCheck,
    "train-tokenizer": TrainTokenizer,
}


def overview() -> str:
    lines = [
        "usage: mimo COMMAND [options]",
        "",
        "Masked history modelling: video diffusion, frame after frame.",
        "",
        *command_lines(COMMANDS),
        "",
        "examples:",
        "  mimo demo",
        "  mimo train --preset mimo-tiny --data shapes --out runs/shapes",
        "  mimo encode --preset mimo-tiny --data videos --out latents",
        "  mimo train --preset mimo-tiny --data latents --out runs/latents",
        "  mimo data check videos",
        "  mimo sample --checkpoint runs/shapes --context clip.mp4 --frames 16 --out samples",
        "  mimo eval --checkpoints runs/shapes runs/other --data videos --out evaluation",
        "",
        f"presets: {', '.join(PRESETS)}",
        "",
        "`mimo COMMAND --help` lists the options of a command; `mimo --version` prints the version.",
    ]
    return "\n".join(lines)


def group_overview(group: str) -> str:
    """Of the commands of two words that begin with `group`."""
    lines = [f"usage: mimo {group} COMMAND [options]", "", *command_lines(in_group(group))]
    return "\n".join([*lines, "", f"`mimo {group} COMMAND --help` lists the options of a command."])


def command_lines(names: Iterable[str]) -> list[str]:
    return ["commands:", *(f"  {name:16} {(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in names)]


def in_group(word: str) -> list[str]:
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def parse(argv: Sequence[str]):
    """The command, one of COMMANDS, with its options."""
    group = in_group(argv[0])
    words = 2 if group else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}: expected one of {', '.join(group or COMMANDS)} (see mimo --help)")
    return read_command(COMMANDS[name], name, list(argv[words:]))


def general_answer(argv: Sequence[str]) -> str | None:
    """What is printed for words that name no command to run: an overview, or the version."""
    if argv[:1] == ["--version"]:
        from mimo_kernels import __version__

        return __version__
    if not argv or argv[0] in HELP:
        return overview()
    if in_group(argv[0]) and (len(argv) == 1 or argv[1] in HELP):
        return group_overview(argv[0])
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Faults of ours are raised, and Python exits with 1."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Before torch loads its OpenMP: threads that spin for long while they wait make a CPU step several times slower as
    # soon as anything else wants a core; ones that never spin make it 40% slower when nothing does.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    with surviving_streams() as streams:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        if (answer := general_answer(argv)) is not None:
            incomplete = not {*HELP, "--version"} & set(argv)
            print(answer, file=sys.stderr if incomplete else sys.stdout)
            return 2 if incomplete else 0
        return run_command(argv, streams)


def run_command(argv: Sequence[str], streams: Streams) -> int:
    first, command = os.environ.get("RANK", "0") == "0", None
    try:
        command = parse(argv)
        command.run()
        if getattr(command, "prints_its_result", False) and (refused := streams.refused()):
            raise InputError(f"cannot write to stdout: {refused.strerror}")
    except InputError as error:
        words = " ".join(str(error).split())  # none if another process has them
        # What is wrong with the options, all that torchrun has started see alike: the first one says it.
        if not words or (command is None and not first):
            let_others_speak()
        if words and (command is not None or first):
            print(f"error: {words}", file=sys.stderr, flush=True)
            if command is None:
                tell_launcher(error)
        return 2
    except KeyboardInterrupt as stop:
        if first:
            print(f"interrupted{stop}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
