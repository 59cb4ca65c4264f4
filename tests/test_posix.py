"""What only POSIX has."""

import subprocess
import sys
from pathlib import Path

import pytest

TELL = "from qwen_lora.posix import peak_rss_gib; print(peak_rss_gib())"
START = f"""
import subprocess, sys
held = bytearray(400 << 20)
subprocess.run([sys.executable, "-c", {TELL!r}], check=True)
{TELL}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_the_process_s_own() -> None:
    """getrusage would tell a child its parent's size at the fork."""
    told = subprocess.run(
        [sys.executable, "-c", START],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    child, parent = map(float, told.stdout.split())
    assert child < 0.2 < 0.39 < parent < 1
