import json
from pathlib import Path

import pytest

from qwen_lora.precompute.report import (
    Outcome,
    judge,
    printable,
    skip_limit,
    sort_files,
    summarize,
    write_report,
)
from qwen_lora.precompute.types import Skip


def outcome(written: int = 0, unchanged: int = 0, duplicate: int = 0, skipped: int = 0) -> Outcome:
    return Outcome(
        tuple(f"w{number}" for number in range(written)),
        tuple(f"u{number}" for number in range(unchanged)),
        {f"d{number}": "w0" for number in range(duplicate)},
        tuple(Skip(f"s{number}", "undecodable") for number in range(skipped)),
        (),
    )


def test_every_file_is_in_one_group():
    sorted_files = sort_files(
        skips=[Skip("no-caption.png", "caption_missing")],
        files={
            "new.png": ["1", "2"],
            "half-new.png": ["3", "4"],
            "old.png": ["5"],
            "old-with-a-bad-half.png": ["6", "7"],
            "bad.png": ["8", "9"],
        },
        twins={"copy.png": "new.png"},
        live_before={"3", "5", "6"},
        written_ids={"1", "2", "4"},
        failures={
            "7": Skip("old-with-a-bad-half.png", "nonfinite"),
            "8": Skip("bad.png", "undecodable", "x"),
            "9": Skip("bad.png", "undecodable", "x"),
        },
    )
    assert sorted_files.written == ("new.png", "half-new.png")
    assert sorted_files.unchanged == ("old.png", "old-with-a-bad-half.png")
    assert [skip.name for skip in sorted_files.skipped] == ["no-caption.png", "bad.png"]
    assert [skip.name for skip in sorted_files.partial] == ["old-with-a-bad-half.png"]
    assert sorted_files.seen == 7


def test_report_has_a_line_a_file_and_no_control_character(tmp_path: Path):
    name = "a\n\x1b[31m\x7f\udce9.png"
    skips = (Skip(name, "undecodable", "bad\rdata"), Skip("b.png", "caption_missing"))
    path = write_report(tmp_path, Outcome((), (), {"c.png": "d.png"}, skips, ()))
    data = path.read_bytes()
    assert all(32 <= byte < 127 or byte == 10 for byte in data)
    rows = [json.loads(line) for line in data.splitlines()]
    assert rows == [
        {"file": name, "outcome": "skipped", "reason": "undecodable", "detail": "bad\rdata"},
        {"file": "b.png", "outcome": "skipped", "reason": "caption_missing", "detail": ""},
        {"file": "c.png", "outcome": "duplicate", "reason": "duplicate", "detail": "d.png"},
    ]


@pytest.mark.parametrize(
    ("counts", "max_skip", "fails"),
    [
        (outcome(written=30, skipped=10), None, False),
        (outcome(written=30, skipped=11), None, True),
        (outcome(written=1990, skipped=10), None, False),
        (outcome(written=2980, skipped=20), None, False),
        (outcome(written=2980, skipped=31), None, True),
        (outcome(written=3, skipped=3), None, False),
        (outcome(written=3, skipped=4), None, True),
        (outcome(written=3, skipped=1), 0, True),
        (outcome(written=20, skipped=15), 15, False),
        (outcome(unchanged=3), None, False),
        (outcome(skipped=1), None, True),
        (outcome(), None, True),
    ],
)
def test_exit_code_follows_max_skip_and_the_half(counts, max_skip, fails):
    assert bool(judge(counts, max_skip, nothing_live=False)) is fails
    summary = summarize(
        counts,
        max_skip=max_skip,
        samples=1,
        samples_written=1,
        retired=0,
        manifest=None,
        report=Path("r"),
    )
    assert summary.exit_code == int(fails)
    assert summary.seen == (
        summary.written + summary.unchanged + summary.duplicate + summary.skipped
    )


def test_the_limit_is_ten_or_one_percent():
    assert [skip_limit(seen, None) for seen in (5, 1000, 5000)] == [10, 10, 50]
    assert skip_limit(5000, 3) == 3


def test_names_are_printable():
    assert printable("a\nb\x1b\udce9é") == "a\\nb\\x1b\\udce9é"


def test_a_detail_holds_no_secret(tmp_path):
    """What libraries say of a file may hold the address that it came from."""
    skip = Skip("a.png", "unreadable", "https://me:canary-pw@host/a.png?sig=canary-sig refused it")
    report = write_report(tmp_path, Outcome((), (), {}, (skip,), (skip,))).read_text()
    assert "canary" not in report
    assert report.count("https://***@host/a.png?sig=*** refused it") == 2
