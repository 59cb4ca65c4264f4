"""What the command prints to may be closed, full, left by its reader, or unable to show a text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_lora.redact import _RedactedStream

GOLDEN = Path(__file__).parent / "shards" / "golden" / "1.0"
COMMAND = [sys.executable, "-m", "qwen_lora"]
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


def run(shell: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A bash line in which $Q is the command and $SET a shard set."""
    variables = {**os.environ, "Q": " ".join(COMMAND), "SET": str(GOLDEN), **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell],
        env=variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )


@pytest.mark.parametrize("command", ["list", "info --json"])
def test_a_reader_that_has_read_enough_is_no_failure(command: str) -> None:
    done = run(f"$Q shards {command} $SET | true")
    assert (done.returncode, done.stderr) == (0, "")


def test_verify_without_a_reader_is_not_called_done() -> None:
    done = run("$Q shards verify $SET | true")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


@needs_full
@pytest.mark.parametrize("command", ["info", "list --urls", "verify"])
def test_a_full_disk_under_stdout_is_one_line(command: str) -> None:
    done = run(f"$Q shards {command} $SET >/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: cannot write to stdout: No space left on device"
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


@needs_full
def test_what_stderr_does_not_take_is_lost_and_nothing_else() -> None:
    done = run("$Q shards verify $SET 2>/dev/full")
    assert done.returncode == 0
    assert done.stdout.startswith("intact: ")


def test_closed_streams_are_nobody_elses() -> None:
    """A file opened later must not get the number of a closed stderr."""
    done = run("$Q shards verify $SET 0<&- 2>&-")
    assert done.returncode == 0
    assert done.stdout.startswith("intact: ")
    code = (
        "import os; from qwen_lora.cli.streams import steady_streams; steady_streams(); "
        "assert os.open('.', os.O_RDONLY) > 2; print('said')"
    )
    closed = run(f'{sys.executable} -c "{code}" 0<&- 1>&- 2>&-')
    assert closed.returncode == 0


def test_characters_that_stdout_lacks_are_escaped() -> None:
    plain = run("$Q shards list $SET", PYTHONIOENCODING="ascii")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert r"caption 2 \xe9" in plain.stdout
    coded = run("$Q shards list $SET --json", PYTHONIOENCODING="ascii")
    whole = run("$Q shards list $SET --json", PYTHONIOENCODING="utf-8")
    assert [*map(json.loads, coded.stdout.splitlines())] == [
        *map(json.loads, whole.stdout.splitlines())
    ]
    assert not whole.stdout.isascii()


def test_an_os_error_is_one_line_with_the_files_name(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import qwen_lora.shards.tools as tools; "
        "tools.info = lambda place: Path(place, 'gone').read_bytes(); "
        f"sys.argv = ['qwen-lora', 'shards', 'info', {str(tmp_path)!r}]; "
        "from qwen_lora.cli import main; main()"
    )
    done = run(f'{sys.executable} -c "{code}"')
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}/gone: No such file or directory\n"


def test_a_dead_terminal_stops_nothing() -> None:
    class Dead:
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

    stream = _RedactedStream(Dead())  # type: ignore[arg-type]
    assert stream.write("text") == 4
    stream.flush()
