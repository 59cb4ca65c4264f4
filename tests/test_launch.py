"""The launcher owns its children: exit codes, signals, no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_lora import launch
from qwen_lora.launch import launch_processes

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="the launcher's promises are POSIX ones"),
]
REPOSITORY = Path(__file__).resolve().parents[1]


def run(code: str, processes: int = 2) -> int:
    return launch_processes([], processes, program=(sys.executable, "-c", code))


def start_launcher(code: str, folder: Path) -> subprocess.Popen[str]:
    """The launcher in a process of its own, with two children that run `code` in `folder`."""
    outer = (
        "import sys; from qwen_lora.launch import launch_processes as l; "
        "sys.exit(l([], 2, program=(sys.executable, '-c', sys.argv[1])))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", outer, code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(paths: list[Path], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.02)


def gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_children_get_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import os; e = os.environ; "
        "open(e['RANK'], 'w').write(' '.join(e[k] for k in "
        "('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')))"
    )
    assert run(code, 3) == 0
    assert [(tmp_path / name).read_text() for name in "012"] == [
        f"{rank} 3 127.0.0.1" for rank in range(3)
    ]


def test_a_failing_child_ends_the_others_with_its_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ALONE_S", 1.0)
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit(print('error: first', file=sys.stderr) or 2)\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    assert run(code) == 2
    assert time.monotonic() - started < 15
    assert capfd.readouterr().err.count("error: first") == 1


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_that_all_ranks_share_is_said_once(
    capfd: pytest.CaptureFixture[str], code: int
) -> None:
    assert run(f"import sys; print('error: same', file=sys.stderr); sys.exit({code})") == code
    assert capfd.readouterr().err.count("error: same") == 1


def test_when_the_first_rank_is_killed_another_says_so_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = (
        "import os, signal, sys\n"
        "if os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(print('error: process 0 is gone', file=sys.stderr) or 1)"
    )
    assert run(code, 3) in (1, 137)
    assert capfd.readouterr().err.count("error: process 0 is gone") == 1


SAVES_ON_SIGNAL = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    open('saved' + os.environ['RANK'], 'a').write('x')
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
open('pid' + os.environ['RANK'], 'w').write(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_forwarded_once_and_the_save_is_waited_for(
    tmp_path: Path, number: signal.Signals
) -> None:
    launcher = start_launcher(SAVES_ON_SIGNAL, tmp_path)
    wait_for([tmp_path / "pid0", tmp_path / "pid1"])
    launcher.send_signal(number)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + number
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == ["x", "x"]


def test_killing_the_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    launcher = start_launcher(SAVES_ON_SIGNAL, tmp_path)
    pids = [tmp_path / "pid0", tmp_path / "pid1"]
    wait_for(pids)
    launcher.kill()
    launcher.communicate(timeout=20)
    assert all(gone(int(path.read_text())) for path in pids)
