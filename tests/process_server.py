"""What `tests.processes` starts Python from: a process that has imported what commands and tests need, and computed
nothing. For every request it forks; the copy becomes the program that was asked for and ends as Python itself ends.

    python tests/process_server.py SOCKET
"""

import atexit
import importlib
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from typing import NoReturn

# Imported by torch and the packages when they are used.
LATE = (
    "torch._dynamo",
    "torch.distributed.algorithms.join",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch.utils.tensorboard",
    "tyro",
)


def preload() -> None:
    for package in ("mimo_kernels", "mimo"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            # Commands are not imported, and the extension is by those who use it, if it loads.
            if not module.name.endswith((".__main__", "._C")):
                importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)


def serve(requests: socket.socket) -> dict:
    """Returns in a copy alone, with what it is to become."""
    told = signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        # Forked twice: the program has lost its parent, and whoever asked has adopted it, when it begins.
        number, go = os.pipe(), os.pipe()
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            requests.send(os.read(number[0], 100))
            os.write(go[1], b"!")
            for descriptor in (*number, *go, *descriptors):
                os.close(descriptor)
            continue
        program = os.fork()
        if program:
            os.write(number[1], str(program).encode())
            os._exit(0)
        os.read(go[0], 1)
        for descriptor in (*number, *go):
            os.close(descriptor)
        requests.close()
        signal.signal(signal.SIGINT, told)
        become(job := json.loads(message), descriptors)
        return job


def become(job: dict, descriptors: list[int]) -> None:
    """Takes over the descriptors, environment and folder of a program."""
    if job["new_session"]:
        os.setsid()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    for descriptor in descriptors:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["folder"] is not None:
        os.chdir(job["folder"])
    usual = sys.stdout.encoding
    encoding, _, errors = job["environment"].get("PYTHONIOENCODING", "").partition(":")
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        stream = None
        if descriptor in job["closed"]:
            os.close(descriptor)
        else:
            stream = text_stream(descriptor, encoding or usual, errors or "strict")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def text_stream(descriptor: int, encoding: str, errors: str) -> io.TextIOWrapper:
    """As Python opens its own."""
    at_once = descriptor != 0 and bool(os.environ.get("PYTHONUNBUFFERED"))
    raw = open(descriptor, "rb" if descriptor == 0 else "wb", buffering=0 if at_once else -1, closefd=False)
    if descriptor == 2:
        errors = "backslashreplace"
    lines = descriptor == 2 or os.isatty(descriptor)
    return io.TextIOWrapper(raw, encoding, errors, line_buffering=lines, write_through=at_once)


def run(kind: str, name: str, arguments: list[str]) -> None:
    sys.argv = [name, *arguments]
    if kind == "module":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "code":
        sys.path.insert(0, "")
        sys.argv[0] = "-c"
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(name, "<string>", "exec"), vars(main))
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
        runpy.run_path(name, run_name="__main__")


def status_of(program: Callable[[], None]) -> int:
    """Runs it; the status that Python ends with."""
    try:
        program()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(status: int) -> NoReturn:
    """What Python does last, but for taking the modules of torch apart, which takes longer than most programs here."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            status = 120
    os._exit(status & 0xFF)


if __name__ == "__main__":
    del sys.path[0]
    preload()
    job = serve(socket.socket(fileno=int(sys.argv[1])))
    end(status_of(lambda: run(job["kind"], job["name"], job["arguments"])))
