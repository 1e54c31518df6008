"""How long work tells of its progress without knowing who watches.

The methods call `stage.advance()`; the command line draws a bar (`inc_clusterq.console`), a library call stays silent.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Stage(Protocol):
    """One stretch of work with a known number of steps."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Report `steps` more steps done; `note` is a few words to show beside the bar, for example the loss."""

    def skip(self, steps: int, note: str = "") -> None:
        """Report `steps` that took no time: they lie on disk, or there was no need for them."""


class Progress(Protocol):
    """Whoever watches."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Stage]:
        """Open a stage of `total` steps; it ends when the context is left."""


class _SilentStage:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass

    def skip(self, steps: int, note: str = "") -> None:
        pass


NO_STAGE: Stage = _SilentStage()
"""A stage that shows nothing."""


class _Silent:
    def stage(self, title: str, total: int) -> AbstractContextManager[Stage]:
        return nullcontext(NO_STAGE)


SILENT: Progress = _Silent()
"""A watcher that shows nothing."""
