"""Plain progress lines, as a log file gets them."""

import pytest

from qwen_lora import progress
from qwen_lora.progress import Progress


def test_a_short_phase_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("reading", 3, "files") as bar:
        for _ in range(3):
            bar.note("almost")
            bar.update()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("reading: 3/3 files, ") and line.endswith(", ETA 0:00, almost")


def test_the_last_line_is_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    with Progress("reading", 2, "files") as bar:
        bar.update()
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]


def test_nothing_done_and_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("reading", 5, "files", initial=5):
        pass
    with Progress("reading", 2, "files", quiet=True) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_other_work_is_said_and_left_out_of_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 1000, "step") as bar:
        bar.say("drawing 2 previews at step 0")
        bar._start -= 3600  # an hour of drawing
        bar.leave_out(3600)
        for _ in range(500):
            bar.update()
    said, line = capsys.readouterr().err.splitlines()
    assert said == "train: drawing 2 previews at step 0"
    rate = float(line.split(", ")[1].removesuffix("/s"))
    assert rate > 10  # and not 500 in an hour
