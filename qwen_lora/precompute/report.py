"""What happened to every file: report.jsonl, the summary, and the exit code it asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_lora.hashing import canonical_json
from qwen_lora.posix import write_atomic
from qwen_lora.precompute.types import Skip
from qwen_lora.redact import redact

REPORT_NAME = "report.jsonl"


@dataclass(frozen=True)
class PrecomputeSummary:
    """seen = written + unchanged + duplicate + skipped, in files; samples apart."""

    seen: int
    written: int
    unchanged: int
    duplicate: int
    skipped: int
    samples: int  # live in the set after the run
    samples_written: int  # of these, new
    exit_code: int
    reasons: dict[str, int] = field(default_factory=dict)  # skipped files by reason
    problem: str = ""  # why the exit code is not 0
    manifest: str | None = None  # file name of the generation
    report: str = ""  # path of report.jsonl
    retired: int = 0  # samples that were live before the run and are not after it

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        text = [
            f"{self.seen} files seen = {self.written} written + {self.unchanged} unchanged "
            f"+ {self.duplicate} duplicate + {self.skipped} skipped",
            f"{self.samples} samples in the set, {self.samples_written} of them new"
            + (f"; {self.retired} retired" if self.retired else ""),
        ]
        if self.skipped:
            by_reason = ", ".join(f"{reason} {count}" for reason, count in self.reasons.items())
            text.append(f"skipped: {by_reason}; each file stands in {self.report}")
        if self.problem:
            text.append(f"exit code {self.exit_code}: {self.problem}")
        return text


@dataclass(frozen=True)
class Outcome:
    """Every file of the dataset in exactly one of four groups."""

    written: tuple[str, ...]
    unchanged: tuple[str, ...]
    duplicate: Mapping[str, str]  # file -> its twin
    skipped: tuple[Skip, ...]
    partial: tuple[Skip, ...]  # files that are in the set without one of their samples

    def with_partial(self, more: Iterable[Skip]) -> Outcome:
        """The same with more files that lack a sample, as far as they are in the set."""
        skipped = {skip.name for skip in self.skipped}
        added = tuple(skip for skip in more if skip.name not in skipped)
        return replace(self, partial=self.partial + added)

    @property
    def seen(self) -> int:
        return sum(map(len, (self.written, self.unchanged, self.duplicate, self.skipped)))


def sort_files(
    skips: Iterable[Skip],
    files: Mapping[str, Sequence[str]],
    twins: Mapping[str, str],
    live_before: Collection[str],
    written_ids: Collection[str],
    failures: Mapping[str, Skip],
) -> Outcome:
    """A file is written when any of its samples was written in this run, unchanged when some were
    there before and none is new, skipped when it has none."""
    written, unchanged = [], []
    skipped, partial = list(skips), []
    for name, ids in files.items():
        failed = [failures[each] for each in ids if each in failures]
        if any(each in written_ids for each in ids):
            written.append(name)
        elif any(each in live_before for each in ids):
            unchanged.append(name)
        else:
            skipped.append(failed[0] if failed else Skip(name, "not_encoded"))
            continue
        partial += failed[:1]
    return Outcome(tuple(written), tuple(unchanged), twins, tuple(skipped), tuple(partial))


def write_report(folder: Path, outcome: Outcome) -> Path:
    """One JSON line a file that is not plainly in the set, by name; control characters escaped."""
    rows = [_row(skip, "skipped") for skip in outcome.skipped]
    rows += [_row(skip, "partial") for skip in outcome.partial]
    rows += [
        _row(Skip(name, "duplicate", twin), "duplicate") for name, twin in outcome.duplicate.items()
    ]
    rows.sort(key=lambda row: (row["file"], row["outcome"]))
    # canonical JSON escapes C0 and everything beyond ASCII; DEL is the one control character left.
    data = b"".join(canonical_json(row).replace(b"\x7f", b"\\u007f") + b"\n" for row in rows)
    write_atomic(folder / REPORT_NAME, data)
    return folder / REPORT_NAME


def _row(skip: Skip, outcome: str) -> dict[str, str]:
    return {
        "file": skip.name,
        "outcome": outcome,
        "reason": skip.reason,
        "detail": redact(skip.detail),
    }


def skip_limit(seen: int, max_skip: int | None) -> int:
    """Skipped files that a run may have: the setting, or the larger of 10 and 1 %."""
    return max(10, seen // 100) if max_skip is None else max_skip


def judge(outcome: Outcome, max_skip: int | None, nothing_live: bool) -> str:
    """Why this run is a failure (exit code 1), or an empty string."""
    seen, skipped = outcome.seen, len(outcome.skipped)
    if nothing_live or not (outcome.written or outcome.unchanged):
        return "no file could be used" if seen else "the dataset holds no images"
    if skipped > skip_limit(seen, max_skip):
        return f"{skipped} skipped files are more than {skip_limit(seen, max_skip)} (max_skip)"
    if 2 * skipped > seen:
        return f"more than half of the files ({skipped} of {seen}) are skipped"
    return ""


def summarize(
    outcome: Outcome,
    *,
    max_skip: int | None,
    samples: int,
    samples_written: int,
    retired: int,
    manifest: str | None,
    report: Path,
) -> PrecomputeSummary:
    problem = judge(outcome, max_skip, nothing_live=samples == 0)
    reasons = Counter(skip.reason for skip in outcome.skipped)
    return PrecomputeSummary(
        seen=outcome.seen,
        written=len(outcome.written),
        unchanged=len(outcome.unchanged),
        duplicate=len(outcome.duplicate),
        skipped=len(outcome.skipped),
        samples=samples,
        samples_written=samples_written,
        retired=retired,
        exit_code=1 if problem else 0,
        reasons=dict(sorted(reasons.items())),
        problem=problem,
        manifest=manifest,
        report=str(report),
    )


def printable(name: str) -> str:
    """A file name for the terminal: control characters and broken encodings become escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in name
    )
