"""Progress on a terminal: a bar with count, note and time left; rare plain lines where nobody can watch a bar.

Everything goes to stderr, so that stdout holds the result alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from inc_clusterq.progress import SILENT, Progress, Stage

QUIET_SECONDS = 30.0
"""Least time between two lines of one stage in a log."""


def progress_on(console: Console, *, quiet: bool = False) -> Progress:
    """The watcher that suits the console."""
    if quiet:
        return SILENT
    return RichProgress(console) if console.is_terminal else LineProgress(console)


class RichProgress:
    """Bars; a stage that is opened inside another one has its own below it while it lasts."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _TimeLeft(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
        )
        self._open = 0

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """Draw a bar of `total` steps; the outermost one stays, as far as it came, when the context is left."""
        if self._open == 0:
            self._bars.start()
        self._open += 1
        task = self._bars.add_task(escape(title), total=total, note="", skipped=0)
        try:
            yield _Bar(self._bars, task)
        finally:
            self._open -= 1
            self._bars.refresh()
            if self._open == 0:
                self._bars.stop()  # what is drawn now stays on the screen
            self._bars.remove_task(task)


class _Bar:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars, self._task, self._skipped = bars, task, 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=steps, note=escape(note))

    def skip(self, steps: int, note: str = "") -> None:
        self._skipped += steps
        self._bars.update(self._task, skipped=self._skipped)
        self.advance(steps, note)


class _TimeLeft(ProgressColumn):
    """Minutes and seconds, or hours before them; nothing before the first step that was done and not skipped."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = _seconds_left(task.elapsed or 0.0, int(task.completed), task.fields["skipped"], int(task.total or 0))
        if left is None:
            return Text("--:--", style="progress.remaining")
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}", style="progress.remaining")


def _seconds_left(elapsed: float, done: int, skipped: int, total: int) -> float | None:
    """At the speed of the steps that took time; None where there are none yet."""
    return elapsed / (done - skipped) * max(total - done, 0) if done > skipped else None


class LineProgress:
    """One line when a stage begins, one when it ends, and in between at most one every `QUIET_SECONDS`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """Print the stage's title, and how far it came when the context is left."""
        line = _Line(self._console, title, total)
        yield line
        line.end()


class _Line:
    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._done = self._skipped = 0
        self._start = self._last = time.monotonic()
        self._print("...")

    def skip(self, steps: int, note: str = "") -> None:
        self._skipped += steps
        self.advance(steps, note)

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last < QUIET_SECONDS:
            return
        self._last = now
        left = _seconds_left(now - self._start, self._done, self._skipped, self._total)
        told = "" if left is None else f", about {left:.0f} s left"
        self._print(f"{self._done}/{self._total}{told}" + (f", {note}" if note else ""))

    def end(self) -> None:
        self._print(f"done in {time.monotonic() - self._start:.0f} s")

    def _print(self, text: str) -> None:
        self._console.print(f"{self._title}: {text}", markup=False, highlight=False, soft_wrap=True)
