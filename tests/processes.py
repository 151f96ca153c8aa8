"""Programs in processes of their own, which begin at once, and several of them as ranks of one job.

`Popen` and `run` are those of subprocess, but a program of this Python is forked from a server that has imported torch
and the packages already, instead of spending seconds on it: see process_server.py. To the test it is the same: a child,
with its descriptors, signals and status. What a server cannot become is refused. Tests about starting itself, and about
what is imported, begin with subprocess.
"""

import atexit
import contextlib
import ctypes
import functools
import inspect
import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Variables that somebody may read at an import, and with them the few that are only read when they are used.
AT_IMPORT = tuple("CUDA GOMP HF_ KMP LD_ MKL MPL NUMPY OMP OPENBLAS PYTHON PYTORCH TORCH TRITON XDG".split())
LATE = ("PYTHONIOENCODING", "TORCHELASTIC", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
PR_SET_CHILD_SUBREAPER = 36
ENDS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def environment(*without: str, **more: object) -> dict[str, str]:
    """That of this process, for one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return kept | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in more.items()}


def at_import(variables: Mapping[str, str]) -> dict[str, str]:
    names = [name for name in variables if name.startswith(AT_IMPORT) and not name.startswith(LATE)]
    return {name: variables[name] for name in names}


# Servers by what Triton does with kernels there.
FIRST = {interpret: environment(*(() if interpret else ("TRITON_INTERPRET",))) for interpret in (True, False)}


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Processes below this one that lose their parent become its children, and not those of init."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for on in (1, 0):
        if prctl(PR_SET_CHILD_SUBREAPER, on, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        if on:
            yield


class Server:
    """A process with some environment to fork programs from, until it is closed."""

    def __init__(self, variables: dict[str, str]):
        self.variables = at_import(variables)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(Path(__file__).with_name("process_server.py")), str(there.fileno())]
        with there:
            self.process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, pass_fds=[there.fileno()])
        self.requests = here
        if not here.recv(100):
            raise RuntimeError(f"{command} ended with {self.process.wait()}")

    def start(self, job: dict[str, Any], descriptors: Sequence[int]) -> int:
        """The number of the process that does it, a child of this one."""
        if other := dict(self.variables.items() ^ at_import(job["environment"]).items()):
            raise ValueError(f"{', '.join(other)}: expected what `environment` says; else begin with subprocess itself")
        with adopting():
            socket.send_fds(self.requests, [json.dumps(job).encode()], descriptors)
            return int(self.requests.recv(100))

    def close(self) -> None:
        self.requests.close()
        self.process.wait()


@functools.cache
def server(interpret: bool) -> Server:
    made = Server(FIRST[interpret])
    atexit.register(made.close)
    return made


def program(command: Sequence[str]) -> dict[str, Any] | None:
    """What Python is told to run, where it is this one and is told nothing else."""
    if command[0] != sys.executable or len(command) < 2:
        return None
    kind = {"-m": "module", "-c": "code"}.get(command[1], "file")
    if kind == "file":
        return None if command[1].startswith("-") else {"kind": kind, "name": command[1], "arguments": command[2:]}
    return {"kind": kind, "name": command[2], "arguments": command[3:]}


class Popen(subprocess.Popen):
    """`subprocess.Popen` from a server. closed: descriptors that the program begins without, as after >&- in a shell.
    Without `env` it has `environment()`."""

    def __init__(
        self, command: Sequence[object], *, closed: Sequence[int] = (), server: Server | None = None, **options: Any
    ):
        self.closed_from_the_start, self.server = list(closed), server
        super().__init__([str(word) for word in command], **options)

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(super()._execute_child).bind(*arguments).arguments
        variables = environment() if given["env"] is None else given["env"]
        what = program(given["args"])
        if what is None:
            raise ValueError(f"{given['args']}: expected a program of {sys.executable} without options")
        if given["shell"] or given["preexec_fn"] is not None or given["pass_fds"]:
            raise ValueError("shell, preexec_fn and pass_fds are for subprocess itself")
        folder = None if given["cwd"] is None else os.fspath(given["cwd"])
        job = what | {"environment": variables, "folder": folder, "closed": self.closed_from_the_start}
        job["new_session"] = given["start_new_session"]
        descriptors = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        inherited = [number if given == -1 else given for number, given in enumerate(descriptors)]
        begin = self.server or server("TRITON_INTERPRET" in variables)
        self.pid = begin.start(job, inherited)
        self._child_created = True
        self._close_pipe_fds(*(given[end] for end in ENDS))


def run(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` from a server."""
    timeout, check = options.pop("timeout", None), options.pop("check", False)
    given = options.pop("input", None)
    if given is not None:
        options["stdin"] = subprocess.PIPE
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            texts = process.communicate(given, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, *texts)
    if check:
        done.check_returncode()
    return done


# Ranks ----------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(size: int, command: Sequence[object]) -> list[Popen]:
    """The environment that torchrun gives, without waiting for torchrun itself."""
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LOCAL_WORLD_SIZE": size}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [Popen(command, env=environment(**shared, RANK=rank, LOCAL_RANK=rank), **pipes) for rank in range(size)]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of every rank."""
    results = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, results, strict=True)]


def in_ranks(size: int, names: Path, code: str, **values: object) -> Any:
    """Run code that uses the names of a file in `size` ranks; it ends by calling report(something for JSON), once."""
    program = textwrap.dedent(
        f"""
        import json, sys
        sys.path.insert(0, {str(names.parent)!r})
        import torch
        torch.set_num_threads(1)
        from mimo import checkpoint
        from mimo.errors import InputError
        from mimo.training.distributed import process_group
        from mimo.training.loop import train
        from {names.stem} import *
        values = json.loads({json.dumps(values)!r})
        with process_group(gpu=False) as world:
            def report(value):
                if world.leads:
                    print("REPORT" + json.dumps(value))
        """
    ) + textwrap.indent(textwrap.dedent(code), "    ")
    results = finish(start_ranks(size, [sys.executable, "-c", program]))
    for status, _, errors in results:
        assert status == 0, errors
    return json.loads(results[0][1].partition("REPORT")[2])
