"""Programs from a server are what they would be from the start, see processes.py."""

import os
import signal
import subprocess
import sys

import pytest

from . import processes

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def both(code: str, *words: str, **options) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of a program that begins anew, and of one from the server."""
    command = [sys.executable, "-c", code, *words]
    options = {"env": processes.environment(), "capture_output": True, "text": True} | options
    done = [start(command, **options) for start in (subprocess.run, processes.run)]
    return [(each.returncode, each.stdout, each.stderr) for each in done]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('a')", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('no')", 1),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os._exit(5)", 5),
        ("raise KeyboardInterrupt", -2),
        ("import atexit; atexit.register(print, 'last'); print('first', end=' ')", 0),
        ("import threading, time; threading.Timer(0.05, print, ['later']).start()", 0),
        ("import multiprocessing as m; p = m.Process(target=print, args=['child']); p.start(); p.join()", 0),
        ("import sys; print(sys.argv, __name__, sys.path[0], sys.stdin.read(), '\u00e4' * 3)", 0),
        ("import os, sys; print(sorted(os.environ.items()), os.getcwd(), sys.stdout.encoding)", 0),
        ("import signal; print([signal.getsignal(n) for n in (2, 13, 15)], signal.pthread_sigmask(0, []))", 0),
        ("import os; print(sorted(os.listdir('/proc/self/fd')))", 0),
        ("import random, tempfile; random.seed(0); print(random.random())", 0),
        ("import os, sys; print(len(os.listdir('/proc/self/task')))", 0),
    ],
)
def test_a_program_is_the_same(tmp_path, code, status):
    anew, served = both(code, "some", "words", cwd=tmp_path, input="typed")
    assert served[:2] == anew[:2] and served[0] == status
    assert served[2].splitlines()[-1:] == anew[2].splitlines()[-1:]  # tracebacks begin elsewhere


def test_an_exception_is_told_and_files_run_as_such(tmp_path):
    (tmp_path / "there.py").write_text(
        "import beside, sys\nprint(sys.argv[1:], __file__)\nraise ValueError(beside.WORD)"
    )
    (tmp_path / "beside.py").write_text("WORD = 'said'")
    for start in (subprocess.run, processes.run):
        done = start([sys.executable, str(tmp_path / "there.py"), "a"], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.endswith("ValueError: said\n")
        assert done.stdout == f"['a'] {tmp_path / 'there.py'}\n"


def test_it_is_a_child_with_a_session_that_can_be_stopped_killed_and_written_to():
    echo = [sys.executable, "-c", "import os; print(os.getppid(), os.getsid(0) == os.getpid(), input())"]
    with processes.Popen(echo, stdin=subprocess.PIPE, start_new_session=True, **PIPES) as process:
        process.send_signal(signal.SIGSTOP)
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED).si_status == signal.SIGSTOP
        process.send_signal(signal.SIGCONT)
        assert process.communicate("word", timeout=60) == (f"{os.getpid()} True word\n", "")
    with processes.Popen(echo, stdin=subprocess.PIPE, **PIPES) as process:
        process.kill()
        assert process.wait() == -9


def test_descriptors_that_are_closed_or_full():
    code = "import sys; sys.stderr.write(repr(sys.stdout)); print('x' * 99999)"
    assert processes.run([sys.executable, "-c", code], closed=[1], stderr=subprocess.PIPE).stderr == b"None"
    with open("/dev/full", "w") as full:
        anew, served = both("import os; print(1); os.write(2, b'here')", capture_output=False, stdout=full)
    assert served == anew and served[0] in (1, 120)  # 1 where Python does not buffer


def test_what_a_server_cannot_become_is_refused():
    for variables in ({"OMP_NUM_THREADS": "3"}, {"TRITON_INTERPRET": "other"}, {"PYTHONPATH": "/elsewhere"}):
        with pytest.raises(ValueError, match=next(iter(variables))):
            processes.run([sys.executable, "-c", "pass"], env=processes.environment(**variables))
    for command in (["ls"], [sys.executable, "-X", "dev", "-c", "pass"], [sys.executable]):
        with pytest.raises(ValueError, match="expected a program"):
            processes.run(command)


def test_what_a_server_has_imported_and_started():
    served = processes.server("TRITON_INTERPRET" in os.environ).process.pid
    assert len(os.listdir(f"/proc/{served}/task")) == 1, "a copy of a process has one of its threads"
    code = "import sys; print({'torch', 'triton', 'mimo.training.loop', 'mimo_kernels.attention'} <= set(sys.modules))"
    code += "; import torch; print(torch.cuda.is_initialized(), torch.get_num_threads())"
    assert processes.run([sys.executable, "-c", code], **PIPES).stdout == "True\nFalse 1\n"
