"""Whether the images that pass through a model just now are synthetic: the host has no way to pass it on with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_synthetic: ContextVar[bool] = ContextVar("synthetic", default=False)


@contextmanager
def synthetic_images() -> Iterator[None]:
    """All images that pass through a model inside the block are synthetic."""
    token = _synthetic.set(True)
    try:
        yield
    finally:
        _synthetic.reset(token)


def are_synthetic() -> bool:
    """Whether it was said of the images that pass now."""
    return _synthetic.get()
