"""Other libraries' log messages, held back where we tell what matters ourselves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(level: int, *names: str) -> Iterator[None]:
    """Let loggers say nothing below `level` in the block, nor below their own."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger, before in zip(loggers, levels, strict=True):
        logger.setLevel(max(before, level))
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
