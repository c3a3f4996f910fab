"""The process of a command: waiting threads, output that fails no work, an end in one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynmoe import process
from dynmoe.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def keep_handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in process.ENDING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def python(body: str, *, shell: str = "{}", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run `body` as the command dynmoe-test, in a process without our variables."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = "import os, signal, sys\nfrom dynmoe import process\n"
    code += f"with process.command('dynmoe-test', 'After.'):\n{lines}\n"
    clean = {k: v for k, v in os.environ.items() if k not in process.WAITING}
    return subprocess.run(
        shell.format(f'{sys.executable} -c "$CODE"'),
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        cwd=ROOT,
        env={**clean, "CODE": code, **env},
        check=False,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_command_in_one_sentence(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    signum = getattr(signal, name)
    with pytest.raises(SystemExit) as end, process.command("dynmoe-test", "After."):
        os.kill(os.getpid(), signum)
    by = "" if name == "SIGINT" else f" by {name}"
    assert end.value.code == 128 + signum
    assert capsys.readouterr().err == f"dynmoe-test: stopped{by}. After.\n"


def test_a_damaged_environment_does_not_hide_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "two")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(SystemExit) as end, process.command("dynmoe-test"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "dynmoe-test: stopped by SIGTERM.\n"


def test_a_library_that_exits_on_an_interruption_is_understood(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end, process.command("dynmoe-test"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            sys.exit(1)  # Lightning's trainer
    assert end.value.code == 143
    assert capsys.readouterr().err == "dynmoe-test: stopped by SIGTERM.\n"


def test_other_ends_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, process.command("dynmoe-test"):
        raise ConfigError("key: wrong")
    assert (end.value.code, capsys.readouterr().err) == (2, "dynmoe-test: key: wrong\n")
    with pytest.raises(SystemExit) as end, process.command("dynmoe-test"):
        sys.exit(7)
    assert end.value.code == 7


@pytest.mark.parametrize(("patience", "status", "shown"), [(0, 130, b""), (60, 0, b"goes on\n")])
def test_another_signal_ends_at_once_when_it_comes_later(
    patience: int, status: int, shown: bytes
) -> None:
    body = f"process.PATIENCE = {patience}\n"
    body += "try: os.kill(os.getpid(), signal.SIGTERM)\nexcept KeyboardInterrupt: pass\n"
    done = python(body + "os.kill(os.getpid(), signal.SIGINT)\nprint('goes on')")
    assert (done.returncode, done.stdout) == (status, shown)
    assert done.stderr == (b"" if shown else b"dynmoe-test: stopped. After.\n")


def test_a_process_that_waits_for_another_one_ends_in_time() -> None:
    """A lock that no signal interrupts, as a collective is."""
    body = """import ctypes, threading
lock, take = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
with process.ends_in_time(0.2):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    take(lock)
    take(lock)"""
    done = python(body)
    assert done.returncode == 143
    assert done.stderr == b"dynmoe-test: stopped by SIGTERM. After.\n"


def test_a_fork_tells_its_parent_no_signal() -> None:
    """A loader of data that is ended does not end the training."""
    body = """import time
with process.ends_in_time(0.2):
    pid = os.fork()
    if not pid: os.kill(os.getpid(), signal.SIGTERM)
    os.waitpid(pid, 0)
    time.sleep(0.5)
print('goes on')"""
    assert python(body).stdout == b"goes on\n"


def test_a_signal_that_python_drops_is_asked_for_again() -> None:
    body = """import time
class Removed:
    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)
Removed()
for _ in range(1000): time.sleep(0.01)"""
    done = python(body)
    assert done.returncode == 143
    assert done.stderr == b"dynmoe-test: stopped by SIGTERM. After.\n"


def test_what_is_ignored_stays_ignored() -> None:
    """nohup, and Ctrl-C for a command in the background of a script."""
    body = "os.kill(os.getpid(), signal.SIGHUP)\nprint('goes on')"
    done = python(body, shell="trap '' HUP; {}")
    assert (done.returncode, done.stdout) == (0, b"goes on\n")


def test_a_worker_leaves_ctrl_c_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_ended_at", None)
    monkeypatch.setattr(process, "_role", "")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    process.follow_command()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with pytest.raises(process.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_launchers_own_handling_of_preemption_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_role", "")

    def bypass(*_: object) -> None:
        pass

    signal.signal(signal.SIGTERM, bypass)
    before = signal.getsignal(signal.SIGINT)
    process.follow_command()
    assert signal.getsignal(signal.SIGTERM) is bypass and signal.getsignal(signal.SIGINT) is before


def test_a_fork_does_not_end_as_the_command() -> None:
    body = "pid = os.fork()\nif not pid: os.kill(os.getpid(), signal.SIGTERM)\n"
    done = python(body + "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))")
    assert (done.stdout, done.stderr) == (b"-15\n", b"")


SHOW = "from rich.console import Console\nprint('6 → 8, −2 ± 1 é \\udcff')\n"
SHOW += "Console().print('→')\nprint('−', file=sys.stderr)"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"6 -> 8, -2 +- 1 ? ?\n->\n"),
        ("latin-1", b"6 -> 8, -2 \xb1 1 \xe9 ?\n->\n"),
        ("utf-8", "6 → 8, −2 ± 1 é ?\n→\n".encode()),
    ],
)
def test_characters_that_a_terminal_lacks_are_replaced(encoding: str, shown: bytes) -> None:
    done = python(SHOW, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, shown)


@pytest.mark.parametrize(
    "shell", ["{} | head -c 1", "{} > /dev/full", "{} >&-", "{} >&- 2>&-", "{} 2>/dev/full"]
)
def test_output_that_goes_nowhere_fails_nothing(shell: str, tmp_path: Path) -> None:
    body = "for _ in range(9999): print('line'); print('line', file=sys.stderr)\n"
    body += f"open({str(tmp_path / 'end')!r}, 'w').close()"
    done = python(body, shell=f"set -o pipefail; {shell}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "end").exists()
    assert b"Error" not in done.stderr


@pytest.mark.parametrize(
    ("given", "waits"),
    [
        ({}, "GOMP_SPINCOUNT=0"),
        ({"GOMP_SPINCOUNT": "1000"}, "GOMP_SPINCOUNT=1000"),
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active"),
    ],
)
def test_threads_wait_without_spinning_unless_told(given: dict[str, str], waits: str) -> None:
    assert python("print(process.waiting())", **given).stdout.decode().strip() == waits


def test_nothing_is_claimed_once_pytorch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process.WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", sys)
    process.settle()
    assert process.waiting() == "default"


def test_an_error_that_a_signal_became_in_c_is_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_ended_at", None)
    with pytest.raises(ValueError, match="its own"), process.stopped_in_c():
        raise ValueError("its own")
    monkeypatch.setattr(process, "_ended_at", 1.0)
    monkeypatch.setattr(process, "_ended_by", signal.SIGTERM)
    with pytest.raises(process.Stopped) as stopped, process.stopped_in_c():
        raise ValueError("could not determine the shape of a list")
    assert stopped.value.signum == signal.SIGTERM
