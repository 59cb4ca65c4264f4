"""Progress of long work: a tqdm bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

PLAIN_INTERVAL_S = 5.0


class Progress:
    """Counts finished units of one phase and tells how fast and until when.

    On a terminal this is tqdm; in a log file a line at most every few seconds. `quiet` (other
    ranks) prints nothing. `note` shows short values such as the loss.
    """

    def __init__(
        self, phase: str, total: int | None, unit: str, *, initial: int = 0, quiet: bool = False
    ) -> None:
        self.phase, self.total, self.unit, self.done = phase, total, unit, initial
        self._initial = self._printed = initial
        self._quiet = quiet
        self._start = self._last = time.monotonic()
        self._note = ""
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=phase, unit=unit, initial=initial, dynamic_ncols=True
            )

    def update(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._quiet and time.monotonic() - self._last >= PLAIN_INTERVAL_S:
            self._print_line()

    def note(self, text: str) -> None:
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """What is going on between two units of work."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=True)
        elif not self._quiet:
            print(f"{self.phase}: {text}", file=sys.stderr, flush=True)

    def leave_out(self, seconds: float) -> None:
        """Time spent on something else just now: rate and ETA are those of the units alone."""
        self._start += seconds
        if self._bar is not None:
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self._quiet and self.done > self._printed:
            self._print_line()

    def _print_line(self) -> None:
        self._last = time.monotonic()
        self._printed = self.done
        rate = (self.done - self._initial) / max(self._last - self._start, 1e-9)
        text = f"{self.phase}: {self.done}"
        if self.total is not None:
            text += f"/{self.total}"
        text += f" {self.unit}, {rate:.2f}/s"
        if self.total is not None and rate > 0:
            text += f", ETA {_duration((self.total - self.done) / rate)}"
        if self._note:
            text += f", {self._note}"
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
